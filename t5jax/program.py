"""The program of a run: what a config computes on a mesh, before anything is on the devices.

One step of a run:

    run = program(config, sharding.make_mesh(config.mesh))
    with run.use():
        state = run.create(jax.random.key(config.train.seed))
        state, metrics = run.step(state, batch)
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5jax import sharding
from t5jax.adapters import params as adapters
from t5jax.architectures import Architecture
from t5jax.batch import TEACHER_IDS, TEACHER_LOG_PROBS, BatchSpec, train_spec
from t5jax.config import AxisRules, Config
from t5jax.distill.teacher import Teacher, find_teacher, num_kept
from t5jax.models import api
from t5jax.optimizers import gradient_point, make_optimizer, make_schedule
from t5jax.prune.masks import check_pattern, prunable
from t5jax.quantize.matrices import Scheme, check_installed, chosen, rounded_params
from t5jax.train_state import (
    TrainState,
    begin_train_state,
    create_train_state,
    frozen_params,
    split,
    train_state_shapes,
    train_state_shardings,
)
from t5jax.train_step import make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled where it is first called; `lower` needs no arrays at all."""

    model: Architecture
    mesh: jax.sharding.Mesh
    rules: AxisRules
    shapes: TrainState
    """ShapeDtypeStructs of the state."""
    shardings: TrainState
    """NamedShardings of the state."""
    schedule: optax.Schedule
    """Learning rate, from the number of updates already made."""
    create: Callable[[jax.Array], TrainState]
    """The state at step 0, with random parameters from a key."""
    begin: Callable[[api.Params], TrainState]
    """The state at step 0, with parameters, which are donated."""
    step: jax.stages.Wrapped
    """One training step, (state, batch) -> (state, metrics), jitted; the state that goes in is
    donated. With a teacher, its parameters are a third argument; with `watch.on_nonfinite` or
    `on_spike` skip, a fourth one is the loss above which the state stays as it is, float32 []."""
    attention: str
    """`train.attention`."""
    base: frozenset[str] = frozenset()
    """With an adapter, the paths of the parameters that init.model has, which checkpoints leave
    out."""
    frozen: frozenset[str] = frozenset()
    """The paths of the parameters that are not trained."""
    seen: Callable[[api.Params], api.Params] = lambda params: params
    """Returns the parameters that the loss and evaluations see: rounded, with
    `quantize.weights`."""
    teacher: Teacher | None = None
    """Whose parameters are the third argument of the step, unless batches have what it says."""
    teacher_features: Mapping[str, tuple[tuple[int, ...], str]] | None = None
    """Shapes behind [B, T] and dtypes of what batches have of the teacher; None: nothing."""
    skips: bool = False
    """Whether the step has a fourth argument."""

    def saved(self, state: Any) -> Any:
        """Returns what a checkpoint has of the state, or of a tree like it."""
        return state.replace(params=split(state.params, self.base)[0])

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Sets the mesh, the rules and the attention for everything that is called inside."""
        with sharding.use_mesh(self.mesh, self.rules), api.use_attention(self.attention):
            yield

    def arguments(self, spec: BatchSpec) -> tuple[Any, ...]:
        """Returns the arguments of the step as ShapeDtypeStructs with their shardings."""

        def one(x: Any, where: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        arrays: dict[str, tuple[tuple[int, ...], Any]] = {**spec.features()}
        for name, (dims, dtype) in (self.teacher_features or {}).items():
            arrays[name] = ((spec.batch_size, spec.decoder_length, *dims), dtype)
        batch = {
            name: jax.ShapeDtypeStruct(
                shape, dtype, sharding=sharding.batch_sharding(self.mesh, self.rules, shape)
            )
            for name, (shape, dtype) in arrays.items()
        }
        state = jax.tree.map(one, self.shapes, self.shardings)
        taught = None
        if self.teacher is not None and self.teacher_features is None:
            taught = jax.tree.map(one, self.teacher.shapes, self.teacher.shardings)
        if self.skips:
            where = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
            limit = jax.ShapeDtypeStruct((), jnp.float32, sharding=where)
            return state, batch, taught, limit
        return (state, batch) if taught is None else (state, batch, taught)

    def lower(self, spec: BatchSpec) -> jax.stages.Lowered:
        """Returns the step for batches of a shape, ready to compile; needs no arrays."""
        with self.use():
            return self.step.lower(*self.arguments(spec))


_OPTIONS = {
    # Otherwise the compiler cuts each product with a sharded weight into parts, which wait for the
    # weight's parts one after the other. Whole products with the gathered weight take a fifth of
    # the time (by libtpu 0.0.42's estimate of Llama 3 8B on 16 chips).
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
}


def compiler_options(platform: str) -> dict[str, str]:
    """Returns what the compiler of a platform is told, beside its defaults."""
    return _OPTIONS.get(platform, {})


def program(config: Config, mesh: jax.sharding.Mesh) -> Program:
    """Returns the program of a run.

    Args:
      config: of the run; its data, evaluation and checkpoints play no part, but for the batch size.
      mesh: devices.
    Raises:
      ValueError: if the mesh does not divide the batch, a microbatch, a length or a parameter; if
        the model has no output to train; if optimizer.freeze, the adapter or the schedule does not
        fit the run; if the devices cannot run train.attention.
    """
    model, rules, batch_size = config.model, config.axes, config.data.batch_size
    parts = config.train.microbatches
    sharding.check_batch_size(batch_size, mesh, rules)
    sharding.check_batch_size(
        batch_size // parts,
        mesh,
        rules,
        f"data.batch_size / train.microbatches = {batch_size} / {parts} =",
    )
    if model.kind != "decoder":  # Of a decoder's rows, only the data say whether they have inputs.
        sharding.check_lengths(train_spec(config), mesh, rules)
    model.check_head()
    api.check_attention(config.train.attention, mesh.devices.flat[0].platform)

    adapter, base = config.adapter, frozenset[str]()
    if adapter is None:
        frozen = frozen_params(api.param_shapes(model), config.optimizer.freeze)
    else:
        base, frozen = (of(model, adapter) for of in (adapters.base_params, adapters.frozen_params))
    trained_axes, _ = split(adapters.param_axes(model, adapter), frozen)
    _check_prune(config, trained_axes)
    tx = make_optimizer(config.optimizer, config.train.steps, trained_axes, config.prune)
    shardings = train_state_shardings(model, tx, mesh, rules, frozen, adapter)
    seen = _rounding(config)
    teacher = find_teacher(config, mesh)
    step = make_train_step(
        model,
        tx,
        config.loss,
        seed=config.train.seed,
        microbatches=parts,
        frozen=frozen,
        seen=seen,
        point=functools.partial(gradient_point, config.optimizer),
        teacher=None if teacher is None else (teacher.model, config.distill),
        norms=config.watch.norms,
        skips=config.watch.skips,
    )
    return Program(
        model,
        mesh,
        rules,
        shapes=train_state_shapes(model, tx, frozen, adapter),
        shardings=shardings,
        schedule=jax.jit(make_schedule(config.optimizer, config.train.steps)),
        create=jax.jit(
            lambda key: create_train_state(model, tx, key, frozen, adapter),
            out_shardings=shardings,
        ),
        begin=jax.jit(
            lambda params: begin_train_state(params, tx, frozen),
            donate_argnums=0,
            out_shardings=shardings,
        ),
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, None),
            compiler_options=compiler_options(mesh.devices.flat[0].platform),
        ),
        attention=config.train.attention,
        base=base,
        frozen=frozen,
        seen=(lambda params: params)
        if seen is None
        else jax.jit(seen, out_shardings=shardings.params),
        teacher=teacher,
        skips=config.watch.skips,
        teacher_features=None if teacher is None else _teacher_features(config, teacher),
    )


def _teacher_features(
    config: Config, teacher: Teacher
) -> dict[str, tuple[tuple[int, ...], str]] | None:
    if not config.distill.cache:
        return None
    kept = num_kept(config, teacher)
    return {TEACHER_IDS: ((kept,), "int32"), TEACHER_LOG_PROBS: ((kept + 1,), "float32")}


def _check_prune(config: Config, trained_axes: Any) -> None:
    """Raises ValueError if what is trained cannot be pruned as the config says."""
    prune = config.prune
    if prune.sparsity is None:
        return
    last = max(prune.end or prune.begin, 1)
    if last > config.train.steps:
        name = "end" if prune.end else "begin"
        raise ValueError(
            f"prune.{name} is {last}, but train.steps is {config.train.steps}; lower it, or raise "
            "train.steps"
        )
    paths = prunable(trained_axes, prune.keep)
    shapes = api.param_shapes(config.model)
    check_pattern(
        shapes, api.param_axes(config.model), paths, prune.pattern, prune.scope or "layer"
    )


def _rounding(config: Config) -> Callable[[api.Params], api.Params] | None:
    """Returns the rounding of quantization-aware training, None without.

    Raises:
      ValueError: if the network's matrices cannot be rounded so, or qwix is missing.
    """
    given = config.quantize
    if given.weights is None:
        return None
    check_installed()
    scheme = Scheme(given.weights, None, given.group, given.keep)
    chosen(config.model, scheme)
    return functools.partial(_rounded, config.model, scheme)


def _rounded(model: Architecture, scheme: Scheme, params: api.Params) -> api.Params:
    return rounded_params(model, params, scheme)
