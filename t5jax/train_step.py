"""One training step: a pure function (TrainState, Batch) -> (TrainState, Metrics)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5jax.architectures import Architecture
from t5jax.batch import Batch
from t5jax.config import DistillConfig, LossConfig
from t5jax.losses import Teacher, batch_loss
from t5jax.models import api
from t5jax.monitor.norms import norms_by_group
from t5jax.sharding import constrain
from t5jax.train_state import TrainState, merge, split

Metrics = dict[str, Any]


def make_train_step(
    model: Architecture,
    tx: optax.GradientTransformation,
    loss: LossConfig,
    *,
    seed: int = 0,
    microbatches: int = 1,
    frozen: frozenset[str] = frozenset(),
    seen: Callable[[Any], Any] | None = None,
    point: Callable[[Any, Any], Any] | None = None,
    teacher: tuple[Architecture, DistillConfig] | None = None,
    norms: bool = False,
    skips: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the step; jit it with the state donated.

    The step's metrics are the sums of `losses.cross_entropy` over the batch, and "grad_norm", the
    global norm of the mean gradient before clipping.

    Args:
      tx: of the trainable parameters, as `optimizers.make_optimizer` returns it.
      seed: the seed of dropout; the rng of a step is fold_in(key(seed), step), so that a resumed
        run uses the same random numbers.
      microbatches: the number of parts of the batch that are computed in sequence.
      frozen: the paths of the parameters that are not trained.
      seen: returns the parameters that the loss sees, given those that are trained; None: the same.
      point: from the trainable parameters and the optimizer's state, the parameters at which the
        gradient is computed, see `optimizers.gradient_point`. None: the parameters themselves.
      teacher: a model whose probabilities are learned, and how; the step takes its parameters as a
        third argument. With `distill.cache`, batches have the probabilities instead.
      norms: also return "norms": "gradient" (before clipping), "parameter" (before the update) and
        "update" to the norms of what is trained, by group.
      skips: leave the state as it is where the loss, the gradient or the update is not finite, and
        where the mean loss is above the fourth argument, float32 []; "skipped" is 1 there.
    """

    def step(
        state: TrainState,
        batch: Batch,
        taught: api.Params | None = None,
        limit: jax.Array | None = None,
    ) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        params, kept = split(state.params, frozen)

        def gradient(params: dict[str, Any], batch: Batch, rng: jax.Array) -> tuple[Any, Metrics]:
            def loss_of(params: dict[str, Any]) -> tuple[jax.Array, Metrics]:
                by = None
                if teacher is not None:
                    by = Teacher(teacher[0], taught, teacher[1])
                whole = merge(params, kept)
                whole = whole if seen is None else seen(whole)
                return batch_loss(model, whole, batch, loss, dropout_rng=rng, teacher=by)

            return jax.grad(loss_of, has_aux=True)(params)

        at = point(params, state.opt_state) if point else params
        if microbatches == 1:
            grads, sums = gradient(at, batch, rng)
        else:
            grads, sums = _accumulate(gradient, at, batch, rng, microbatches)
        # At least one, so that a batch of padding has no effect instead of giving NaN.
        scale = 1 / jnp.maximum(sums["tokens"], 1)
        with jax.named_scope("grad_norm"):
            grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
            metrics = sums | {"grad_norm": optax.global_norm(grads).astype(jnp.float32)}

        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, params)
            updated = optax.apply_updates(params, updates)
        if norms:
            with jax.named_scope("norms"):
                trees = {"gradient": grads, "parameter": params, "update": updates}
                metrics["norms"] = {name: norms_by_group(tree) for name, tree in trees.items()}
        number = state.step + 1
        if skips:
            with jax.named_scope("skip"):
                bad = _is_bad(metrics, optax.global_norm(updates), limit)
                metrics["skipped"] = bad.astype(jnp.float32)
                number, updated, opt_state = jax.tree.map(
                    lambda old, new: jnp.where(bad, old, new),
                    (state.step, params, state.opt_state),
                    (number, updated, opt_state),
                )
        return TrainState(number, merge(updated, kept), opt_state), metrics

    return step


def _is_bad(metrics: Metrics, update_norm: jax.Array, limit: jax.Array | None) -> jax.Array:
    """Returns whether a step is to be left out, bool []."""
    loss = metrics["loss"] / jnp.maximum(metrics["tokens"], 1)
    finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"]) & jnp.isfinite(update_norm)
    return ~finite if limit is None else ~finite | (loss > limit)


def _accumulate(
    gradient: Callable[..., tuple[Any, Metrics]],
    params: dict[str, Any],
    batch: Batch,
    rng: jax.Array,
    microbatches: int,
) -> tuple[Any, Metrics]:
    """Sums gradients and metrics over microbatches; gradients in float32."""

    def split(x: jax.Array) -> jax.Array:
        # Every k-th row, so that a microbatch has rows on all devices and none have to move.
        x = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0)

    def body(total: tuple[Any, Metrics], xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        part, index = xs
        part = {
            name: constrain(x, "batch", "length", *(None for _ in x.shape[2:]))
            for name, x in part.items()
        }
        grads, sums = gradient(params, part, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, total, (_float32(grads), sums)), None

    parts = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, params, first, rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return jax.lax.scan(body, zeros, (parts, jnp.arange(microbatches)))[0]


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
