"""`t5jax plan`."""

import dataclasses
import inspect
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from t5jax import storage
from t5jax.commands.parse import check_options, parse
from t5jax.commands.train import known_configs, load_config_file, with_sections
from t5jax.config import Config

if TYPE_CHECKING:
    import jax

    from t5jax.batch import BatchSpec
    from t5jax.plan.chips import Topology
    from t5jax.plan.plan import Plan
    from t5jax.plan.search import Trial
    from t5jax.program import Program


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Compiles a config's step for a TPU, without one, and prints what it needs and how long it
    takes.

    The figures are the estimates of libtpu's compiler (`pip install "t5jax[plan]"`). The fields of
    the config are overridden as in `t5jax train`: `--data.batch-size 64`.
    """

    topology: str
    """A chip and the shape of a slice in chips: v5e:2x2, v5p:4x4x4, v6e:4x4, tpu7x:2x2x1."""
    slices: int = 1
    """Slices of this shape, connected by the data center's network."""
    json: bool = False
    """Print the plan as JSON."""
    top: int = 12
    """How many of the largest operations to list."""
    no_inputs: bool = False
    """Decoder-only models: rows are targets alone, as of a text task. A config that names its
    mixture says so itself."""
    decode: bool = False
    """Plan the decoding of one token per row, with a full cache, instead of a training step."""
    serve: bool = False
    """Plan the program in which `t5jax serve` writes one token in each slot, greedily. As many
    slots as --rows, data.inputs_length tokens of input and data.targets_length of an answer."""
    rows: int | None = None
    """--decode: rows that are decoded together; --serve: slots. None: eval.batch_size."""
    search: bool = False
    """Compile the config with other meshes, policies and batch sizes, and rank them."""
    batch_sizes: tuple[int, ...] = ()
    """--search: sizes to try. None given: that of the config."""
    remats: tuple[str, ...] = ()
    """--search: policies of model.remat to try. None given: all."""
    microbatches: tuple[int, ...] = ()
    """--search: values of train.microbatches to try. None given: that of the config."""
    max_compiles: int = 12
    """--search: the most programs to compile."""
    no_nearest: bool = False
    """Where the config does not fit, do not look for the nearest that does."""
    save: str | None = None
    """File for the compiled step, which `t5jax train --compiled FILE` loads on such a TPU."""
    any_libtpu: bool = False
    """Use the libtpu that is installed, even if jax asks for another version."""


def plan(args: list[str]) -> int:
    """Compiles a config's step for a TPU that is not there; returns 1 if it does not fit."""
    # Before jax starts: nothing here computes, and where there is a TPU it may be in use.
    os.environ["JAX_PLATFORMS"] = "cpu"
    known = ", ".join(known_configs())
    if not args or (args[0].startswith("-") and not {"-h", "--help"} & set(args)):
        raise ValueError(
            "plan needs a CONFIG before its options: a Python file, a .json file that `t5jax train "
            f"--print-config` wrote, or a name such as {known}"
        )
    name = "" if args[0].startswith("-") else args[0]
    description = f"{inspect.cleandoc(PlanOptions.__doc__ or '')}\n\nCONFIG is one of: {known}."
    prog = f"t5jax plan {name or 'CONFIG'}"
    options, rest = parse(
        PlanOptions,
        args[1:] if name else args,
        prog=prog,
        description=description,
        return_unknown=True,
    )
    config = with_sections(load_config_file(name), rest)
    config = parse(Config, rest, prog=prog, default=config)
    _check(options)

    from t5jax.plan.chips import find_topology

    topology = find_topology(options.topology, options.slices, any_libtpu=options.any_libtpu)
    config, spec = _resolve(config, options, topology)
    if options.search:
        return _search(config, topology, spec, options)
    return _plan(config, topology, spec, options)


def _check(options: PlanOptions) -> None:
    check_options(options, 1, "slices", "top", "rows", "max_compiles")
    if options.decode and (options.search or options.save):
        other = "search" if options.search else "save"
        raise ValueError(f"--decode and --{other} do not go together; leave one of them out")
    if options.search and options.save:
        raise ValueError(
            "--search and --save do not go together; save the one that you choose by its options"
        )
    if options.serve and (options.decode or options.search or options.save):
        other = "decode" if options.decode else "search" if options.search else "save"
        raise ValueError(f"--serve and --{other} do not go together; leave one of them out")
    if options.rows and not (options.decode or options.serve):
        raise ValueError(
            f"--rows is {options.rows}, but without --decode or --serve it has no effect; add one, "
            "or set --data.batch-size"
        )
    for field in ("batch_sizes", "remats", "microbatches"):
        if getattr(options, field) and not options.search:
            raise ValueError(f"--{field.replace('_', '-')} has no effect without --search; add it")


def _resolve(
    config: Config, options: PlanOptions, topology: "Topology"
) -> "tuple[Config, BatchSpec]":
    """Returns the config with the model it starts from, and the shape of its batches."""
    from t5jax import sharding
    from t5jax.batch import train_spec

    if config.init.model:
        from t5jax.source import adopt, find

        source = find(config.init.model)
        model = adopt(config.model, source, config.init.model)
        mesh = sharding.make_mesh(config.mesh, topology.devices)
        rules = source.rules(mesh, config.axes, model)
        config = dataclasses.replace(config, model=model, axes=rules)
    if not config.data.mixture:
        return config, train_spec(config, has_inputs=not options.no_inputs)
    if options.no_inputs:
        raise ValueError(
            f"--no-inputs has no effect: the tasks of data.mixture {config.data.mixture} say "
            "whether there are inputs; leave it out"
        )
    from t5jax.data import pipeline, registry

    registry.load_tasks(config.data.task_files)
    return config, pipeline.batch_spec(config)


def _plan(config: Config, topology: "Topology", spec: "BatchSpec", options: PlanOptions) -> int:
    from t5jax.plan.plan import DoesNotFit, plan_decoding, plan_step

    _say(f"compiling for {topology.title}, {len(topology.devices)} devices")
    compiled = None
    try:
        if options.decode or options.serve:
            rows = options.rows or config.eval.batch_size
            lower = _lower_served if options.serve else None
            found = plan_decoding(config, topology, rows, lower=lower)
        else:
            found, compiled = plan_step(config, topology, spec)
    except DoesNotFit as error:
        raise ValueError(_misfit(str(error), config, topology, spec, options)) from error
    if options.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        from t5jax.plan.tables import print_plan

        print_plan(found, options.top)
    if not found.fits:
        too_much = f"it needs {-found.memory.left / 2**30:.2f} GiB more than there is"
        raise ValueError(_misfit(too_much, config, topology, spec, options))
    if options.save and compiled:
        from t5jax.plan.compiled import save

        save(storage.path(options.save, "--save"), compiled, config, spec, topology.devices)
        _say(f"{options.save}: the compiled step; t5jax train ... --compiled {options.save}")
    return 0


def _misfit(
    message: str, config: Config, topology: "Topology", spec: "BatchSpec", options: PlanOptions
) -> str:
    """Returns the message with the nearest config that fits."""
    from t5jax.plan.search import describe_changes, nearest

    message = f"the config does not fit {topology.title}: {message}"
    if options.no_nearest or options.decode or options.serve:
        return message
    _say(f"{message}. Looking for the nearest that does:")
    found = nearest(config, topology, spec, _say)
    if found is None or found.plan is None:
        return (
            f"{message}; nor does it with full remat, microbatches and mesh.fsdp: take more chips"
        )
    return (
        f"{message}; the nearest that fits: {describe_changes(found.changes)} "
        f"({found.plan.memory.left / 2**30:.2f} GiB left)"
    )


def _lower_served(
    run: "Program", params: Any, rows: int, source_length: int, length: int
) -> "tuple[jax.stages.Lowered, Any]":
    from t5jax.serving.programs import lower_step
    from t5jax.serving.slots import Size

    has_encoder = run.model.kind == "encoder_decoder"
    size = Size(rows, source_length if has_encoder else 0, length)
    if not has_encoder:
        size = size._replace(length=source_length + length)
    return lower_step(run.model, params, size, run.mesh)


def _search(config: Config, topology: "Topology", spec: "BatchSpec", options: PlanOptions) -> int:
    from t5jax.plan.search import search

    trials = search(
        config,
        topology,
        spec,
        batch_sizes=options.batch_sizes,
        remats=options.remats,
        microbatches=options.microbatches,
        max_compiles=options.max_compiles,
        report=_say,
    )
    if options.json:
        print(json.dumps([_trial_json(trial) for trial in trials], indent=2))
    else:
        from t5jax.plan.tables import print_trials

        print_trials(trials)
    return 0 if any(t.plan and not t.reason for t in trials) else 1


def _trial_json(trial: "Trial") -> dict[str, Any]:
    found: Plan | None = trial.plan
    return {
        "changes": trial.changes,
        "reason": trial.reason,
        "plan": found.to_json() if found else None,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
