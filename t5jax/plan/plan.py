"""Plans a run or a decoder on a TPU: compiles its program, and reads memory, time and traffic."""

import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax

from t5jax import sharding
from t5jax.batch import BatchSpec
from t5jax.config import Config
from t5jax.models import api
from t5jax.plan import hlo
from t5jax.plan.chips import Topology, libtpu_version
from t5jax.plan.cost import Cost, cost
from t5jax.plan.flops import step_flops
from t5jax.program import Program, program

GIB = 2**30


class DoesNotFit(ValueError):
    """The compiler found no room in memory."""

    def __init__(self, message: str, needed: float) -> None:
        super().__init__(message)
        self.needed = needed
        """Bytes of what did not fit: the temporaries, or everything."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: int
    optimizer: int
    batch: int
    """The inputs of a step; of a decoder, its cache."""
    temporaries: int
    """Activations, gradients and what else lives during a step."""
    program: int
    """The compiled program itself, and results that do not take an argument's place."""
    available: int

    @property
    def needed(self) -> int:
        return self.parameters + self.optimizer + self.batch + self.temporaries + self.program

    @property
    def left(self) -> int:
        """Negative if it does not fit."""
        return self.available - self.needed


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program needs and does on a topology. Times are the compiler's estimates."""

    topology: str
    num_devices: int
    mesh: dict[str, int]
    jax: str
    libtpu: str
    what: str
    """"train", or "decode"."""
    rows: int
    tokens: int
    """In a step, without regard to padding."""
    settings: dict[str, Any]
    """What a search changes: remat, batch size, microbatches."""
    num_params: int
    memory: Memory
    cost: Cost
    flops: int
    """Of one step, on all devices, as MFU counts them; 0 for decoding."""
    peak_flops: float
    """Of one device, per second."""

    @property
    def fits(self) -> bool:
        return self.memory.left >= 0

    @property
    def seconds(self) -> float:
        return self.cost.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Of 1."""
        return self.flops / (self.seconds * self.num_devices * self.peak_flops)

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        plain = dataclasses.asdict(self)
        plain["memory"] |= {"needed": self.memory.needed, "left": self.memory.left}
        return plain | {
            "fits": self.fits,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
        }


Lower = Callable[[Program, Any, int, int, int], tuple[jax.stages.Lowered, Any]]
"""From a program, its parameters as decoding holds them, the number of rows, and the lengths of
inputs and answers, to a program for a token of each row and the shapes of its state."""


def plan_step(
    config: Config, topology: Topology, spec: BatchSpec
) -> tuple[Plan, jax.stages.Compiled]:
    """Returns the plan of a training step, and the compiled step.

    Args:
      spec: the shape of its batches.
    Raises:
      ValueError: if the mesh does not suit the topology or the model; DoesNotFit.
    """
    run = program(config, sharding.make_mesh(config.mesh, topology.devices))
    state, batch, *teacher = run.arguments(spec)
    sizes = {
        "parameters": device_bytes((state.params, teacher)),
        "optimizer": device_bytes((state.opt_state, state.step)),
        "batch": device_bytes(batch),
    }
    _check_arguments(sizes, topology)
    compiled = compile_for(run.lower(spec), topology)
    length = spec.decoder_length + spec.inputs_length
    if spec.kind != "encoder_decoder":
        length = spec.inputs_length if spec.kind == "encoder" else spec.decoder_length
    plan = _plan(
        "train",
        run,
        topology,
        compiled,
        sizes,
        rows=spec.batch_size,
        tokens=spec.batch_size * length,
        settings=settings(config),
        flops=step_flops(config.model, batch),
        num_params=sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
    )
    return plan, compiled


def settings(config: Config) -> dict[str, Any]:
    """Returns what a search changes."""
    return {
        "model.remat": config.model.remat,
        "data.batch_size": config.data.batch_size,
        "train.microbatches": config.train.microbatches,
    }


def plan_decoding(
    config: Config, topology: Topology, rows: int, *, lower: Lower | None = None
) -> Plan:
    """Returns the plan of reading one token in each of `rows` rows, with a full cache.

    The cache has room for data.inputs_length tokens of input and as many to generate as
    eval.max_tokens, or data.targets_length, says.

    Args:
      config: the config.
      topology: the chips.
      rows: the number of rows.
      lower: returns the program and the shapes of its state; None: one step of the network alone.
    Raises:
      ValueError: as `plan_step`, or if the model has no decoder.
    """
    model = config.model
    if model.kind == "encoder":
        raise ValueError(f"this {model.family} is an encoder, which writes nothing; take a decoder")
    run = program(config, sharding.make_mesh(config.mesh, topology.devices))
    sharding.check_batch_size(rows, run.mesh, run.rules, "--rows")
    length = config.eval.max_tokens or config.data.targets_length
    with run.use():
        params = _decoding_params(run)
        lowered, state = (lower or _lower_step)(
            run, params, rows, config.data.inputs_length, length
        )
    sizes = {
        "parameters": device_bytes(params),
        "optimizer": 0,
        "batch": device_bytes(state),
    }
    _check_arguments(sizes, topology)
    compiled = compile_for(lowered, topology)
    return _plan(
        "decode",
        run,
        topology,
        compiled,
        sizes,
        rows=rows,
        tokens=rows,
        settings={"rows": rows},
        flops=0,
        num_params=sum(math.prod(x.shape) for x in jax.tree.leaves(run.shapes.params)),
    )


def _lower_step(
    run: Program, params: Any, rows: int, source_length: int, length: int
) -> tuple[jax.stages.Lowered, Any]:
    room = jax.jit(lambda: api.init_cache(run.model, rows, source_length, length))
    where = room.lower().compile().output_shardings
    cache = jax.tree.map(_placed, jax.eval_shape(room), where)
    batch = sharding.partition_spec(("batch",), run.rules)
    tokens = jax.ShapeDtypeStruct(
        (rows,), "int32", sharding=jax.sharding.NamedSharding(run.mesh, batch)
    )
    step = jax.jit(
        lambda params, cache, tokens: api.decode_step(run.model, params, cache, tokens),
        donate_argnums=1,
        out_shardings=(None, where),
    )
    return step.lower(params, cache, tokens), (cache, tokens)


def _decoding_params(run: Program) -> Any:
    """Returns the parameters as decoding holds them, sharded as in training."""
    shapes = jax.eval_shape(lambda p: api.arrange_for_decoding(run.model, p), run.shapes.params)

    def one(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A stack of layers is a tuple of them here: decoder/layers/3/mlp for decoder/layers/mlp.
        keys = [k for k in path if not hasattr(k, "idx")]
        where: Any = run.shardings.params
        for key in keys:
            where = where[key.key]
        spec = where.spec[1:] if len(keys) < len(path) else where.spec
        return _placed(x, jax.sharding.NamedSharding(run.mesh, jax.sharding.PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(one, shapes)


def _placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _plan(
    what: str,
    run: Program,
    topology: Topology,
    compiled: jax.stages.Compiled,
    sizes: dict[str, int],
    **rest: Any,
) -> Plan:
    found = compiled.memory_analysis()
    memory = Memory(
        **sizes,
        temporaries=found.temp_size_in_bytes,
        program=found.generated_code_size_in_bytes
        + max(0, found.output_size_in_bytes - found.alias_size_in_bytes),
        available=int(topology.chip.hbm),
    )
    return Plan(
        topology=topology.title,
        num_devices=len(topology.devices),
        mesh=dict(run.mesh.shape),
        jax=importlib.metadata.version("jax"),
        libtpu=libtpu_version() or "",
        what=what,
        memory=memory,
        cost=cost(hlo.parse(compiled.as_text()), topology.chip, topology.shape),
        peak_flops=topology.chip.peak_flops,
        **rest,
    )


def device_bytes(tree: Any) -> int:
    """Returns the bytes of ShapeDtypeStructs with shardings on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def compile_for(lowered: jax.stages.Lowered, topology: Topology) -> jax.stages.Compiled:
    """Compiles for a topology.

    Raises:
      DoesNotFit: if the compiler finds no room.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        sizes = [float(n) * _UNITS[unit] for n, unit in re.findall(r"\(?([\d.]+)([KMGT])", text)]
        needed = sizes[0] if sizes else math.inf
        available = topology.chip.hbm
        raise DoesNotFit(
            f"temporaries (activations, gradients) of {needed / GIB:.2f} GiB do not fit into the "
            f"{available / GIB:.2f} GiB of a {topology.chip.name}: "
            f"{(needed - available) / GIB:.2f} GiB too much, without the arguments",
            needed,
        ) from error


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _check_arguments(sizes: dict[str, int], topology: Topology) -> None:
    """Raises DoesNotFit if what a step is given does not fit, which needs no compiler."""
    needed, available = sum(sizes.values()), topology.chip.hbm
    if needed >= available:
        largest = max(sizes, key=lambda name: sizes[name])
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size)
        raise DoesNotFit(
            f"the arguments of a step need {needed / GIB:.2f} GiB per device ({parts}), but a "
            f"{topology.chip.name} has {available / GIB:.2f}: {(needed - available) / GIB:.2f} GiB "
            f"too much, most of it {largest}; mesh.fsdp or mesh.model shards parameters and "
            "optimizer over more devices",
            needed,
        )


def describe(plans: Iterable[Plan]) -> str:
    """Returns a line that says what the figures are."""
    versions = {f"libtpu {p.libtpu}, jax {p.jax}" for p in plans}
    return f"estimates of the TPU compiler, not measurements: {'; '.join(sorted(versions))}"
