"""Cross-entropy with z-loss and label smoothing, as sums over target tokens.

Sums, divided once at the end, are exact under microbatches, data parallelism and padding.
z-loss: Mesh TensorFlow's and PaLM's term z * log(Z)^2 (arXiv:2204.02311, section 5).

B batch, T target length, D model, V vocab (or classes).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5jax import batch as features
from t5jax.architectures import Architecture
from t5jax.config import DistillConfig, LossConfig
from t5jax.models import api
from t5jax.sharding import local_size, mesh_axes, platform

Sums = dict[str, jax.Array]

# The most logits that a device holds at a time: 2^25 in float32 are 128 MiB. On TPU 1 GiB, since
# the devices add up the gradient of the unembedding once for each chunk.
_MAX_LOGITS = {"tpu": 2**28}
_MAX_LOGITS_ELSEWHERE = 2**25


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, config: LossConfig
) -> tuple[jax.Array, Sums]:
    """Returns the loss and the metrics, each as a sum over tokens.

    Args:
      logits_BTV: float32.
      targets_BT: int32 in [0, V).
      weights_BT: float32; a token of weight 0 is ignored.
    Returns:
      The loss to minimize, and {"loss": the same, "nll": the cross-entropy alone, in nats,
      "correct": the number of tokens whose target has the largest logit, "tokens": the sum of the
      weights}.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll_BT = log_z_BT - target_BT
    loss_BT = nll_BT
    if config.label_smoothing:
        # The target distribution is (1 - s) one-hot + s uniform.
        uniform_BT = log_z_BT - jnp.mean(logits_BTV, axis=-1)
        loss_BT = (1 - config.label_smoothing) * nll_BT + config.label_smoothing * uniform_BT
    if config.z_loss:
        loss_BT += config.z_loss * jnp.square(log_z_BT)
    loss = jnp.sum(loss_BT * weights_BT)
    # Is the target the argmax? Comparing with the maximum reads the logits in one fused pass.
    correct_BT = target_BT >= jnp.max(logits_BTV, axis=-1)
    sums = {
        "loss": loss,
        "nll": jnp.sum(nll_BT * weights_BT),
        "correct": jnp.sum(correct_BT * weights_BT),
        "tokens": jnp.sum(weights_BT),
    }
    return loss, jax.lax.stop_gradient(sums)


class Teacher(NamedTuple):
    """A model whose probabilities are learned."""

    model: Architecture
    params: api.Params | None
    """None: the batch has what it says."""
    config: DistillConfig


def distillation(
    logits_BTV: jax.Array, teacher_BTV: jax.Array, weights_BT: jax.Array, temperature: float
) -> jax.Array:
    """Returns T^2 KL(teacher || student), summed over tokens, at temperature T.

    Embeddings may be padded to different sizes: the ids that both have count.

    Args:
      logits_BTV: float32, of the student.
      teacher_BTV: float32, of the teacher; no gradient flows into it.
      weights_BT: float32; a token of weight 0 is ignored.
      temperature: T.
    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2.
    """
    common = min(logits_BTV.shape[-1], teacher_BTV.shape[-1])
    student_BTV = jax.nn.log_softmax(logits_BTV[..., :common] / temperature)
    teacher_BTV = jax.nn.log_softmax(teacher_BTV[..., :common] / temperature)
    kl_BT = jnp.sum(jnp.exp(teacher_BTV) * (teacher_BTV - student_BTV), axis=-1)
    return temperature**2 * jnp.sum(kl_BT * weights_BT)


def distillation_of_top(
    logits_BTV: jax.Array,
    ids_BTk: jax.Array,
    log_probs_BTk: jax.Array,
    weights_BT: jax.Array,
    temperature: float,
    num_ids: int,
) -> jax.Array:
    """Returns `distillation`, given the largest of the teacher's probabilities.

    All other ids count as one, so that it is at most the whole divergence, and with k = `num_ids`
    the whole.

    Args:
      logits_BTV: float32, of the student.
      ids_BTk: int32, as `top_log_probs` returns them.
      log_probs_BTk: float32 [B, T, k + 1], of the teacher at the same temperature; the last is
        that of all other ids together.
      weights_BT: float32; a token of weight 0 is ignored.
      temperature: T.
      num_ids: the number of ids that both models have.
    """
    student_BTV = jax.nn.log_softmax(logits_BTV[..., :num_ids] / temperature)
    student_BTk = jnp.take_along_axis(student_BTV, ids_BTk, axis=-1)
    k = ids_BTk.shape[-1]
    if k == num_ids:
        log_probs_BTk = log_probs_BTk[..., :k]
    else:
        rest_BTV = jnp.put_along_axis(student_BTV, ids_BTk, -jnp.inf, axis=-1, inplace=False)
        rest_BT1 = jax.nn.logsumexp(rest_BTV, axis=-1, keepdims=True)
        student_BTk = jnp.concatenate([student_BTk, rest_BT1], axis=-1)
    kl_BT = jnp.sum(jnp.exp(log_probs_BTk) * (log_probs_BTk - student_BTk), axis=-1)
    return temperature**2 * jnp.sum(jnp.where(weights_BT > 0, kl_BT * weights_BT, 0))


def top_log_probs(
    model: Architecture,
    params: api.Params,
    batch: Mapping[str, jax.Array],
    *,
    temperature: float,
    num_ids: int,
    top_k: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the largest of a model's probabilities, as `distillation_of_top` takes them.

    Args:
      num_ids: as there; ids above do not count.
      top_k: how many.
    Returns:
      int32 [B, T, k] and float32 [B, T, k + 1].
    """
    x_BTD = api.hidden(model, params, batch)
    head = api.unembed_params(model, params)

    def top(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BTV = api.unembed(model, head, x_BTD)[..., :num_ids]
        log_probs_BTV = jax.nn.log_softmax(logits_BTV / temperature)
        top_BTk, ids_BTk = jax.lax.top_k(log_probs_BTV, top_k)
        rest_BTV = jnp.put_along_axis(log_probs_BTV, ids_BTk, -jnp.inf, axis=-1, inplace=False)
        rest_BT1 = jax.nn.logsumexp(rest_BTV, axis=-1, keepdims=True)
        # Of nothing: a number whose exponential is 0.
        rest_BT1 = jnp.maximum(rest_BT1, -1e4)
        return ids_BTk, jnp.concatenate([top_BTk, rest_BT1], axis=-1)

    chunks = _chunks_of((*x_BTD.shape[:2], model.num_outputs))
    parts = jax.lax.map(top, _chunk(x_BTD, chunks))
    ids, log_probs = jax.tree.map(_unchunk, parts)
    return ids, log_probs


def batch_loss(
    model: Architecture,
    params: api.Params,
    batch: Mapping[str, jax.Array],
    config: LossConfig,
    *,
    dropout_rng: jax.Array | None = None,
    teacher: Teacher | None = None,
) -> tuple[jax.Array, Sums]:
    """Returns the `cross_entropy` of a batch without holding all its logits [B, T, V] at once.

    With a teacher, the loss is its `distillation` and the cross-entropy, as the weight in its
    config says; the sums have "distillation" too.
    """
    x_BTD = api.hidden(model, params, batch, dropout_rng=dropout_rng)
    encodes = model.kind == "encoder"
    targets_BT = batch[
        features.ENCODER_TARGET_TOKENS if encodes else features.DECODER_TARGET_TOKENS
    ]
    weights_BT = batch[features.ENCODER_LOSS_WEIGHTS if encodes else features.DECODER_LOSS_WEIGHTS]

    taught: _Taught | None = None
    if teacher is None:
        pass
    elif teacher.params is None:
        taught = ((batch[features.TEACHER_IDS], batch[features.TEACHER_LOG_PROBS]), None)
    else:
        taught_x_BTD = jax.lax.stop_gradient(api.hidden(teacher.model, teacher.params, batch))
        taught = ((taught_x_BTD,), api.unembed_params(teacher.model, teacher.params))

    def part(
        head: api.Params,
        x_BTD: jax.Array,
        targets_BT: jax.Array,
        weights_BT: jax.Array,
        taught: _Taught | None = None,
    ) -> tuple[jax.Array, Sums]:
        logits_BTV = api.unembed(model, head, x_BTD)
        loss, sums = cross_entropy(logits_BTV, targets_BT, weights_BT, config)
        if teacher is None or taught is None:
            return loss, sums
        said, taught_head = taught
        how = teacher.config
        if taught_head is None:
            common = min(model.vocab_size, teacher.model.vocab_size)
            ids_BTk, log_probs_BTk = said
            distilled = distillation_of_top(
                logits_BTV, ids_BTk, log_probs_BTk, weights_BT, how.temperature, common
            )
        else:
            teacher_BTV = api.unembed(teacher.model, taught_head, *said)
            distilled = distillation(logits_BTV, teacher_BTV, weights_BT, how.temperature)
        loss = (1 - how.weight) * loss + how.weight * distilled
        return loss, jax.lax.stop_gradient(sums | {"loss": loss, "distillation": distilled})

    chunks = _chunks_of((*targets_BT.shape, model.num_outputs))
    head = api.unembed_params(model, params)
    return _sum_over_chunks(part, chunks, head, x_BTD, targets_BT, weights_BT, taught)


# Arrays of a teacher [B, T, ...], which are divided into chunks, and its head if they need one.
_Taught = tuple[tuple[jax.Array, ...], Any]


def _chunks_of(shape: tuple[int, int, int]) -> int:
    """Returns in how many chunks logits [B, T, V] are computed."""
    length = int(local_size(shape[1:2], "length"))
    return _num_chunks(local_size(shape, "batch", "length", "vocab"), length)


def _num_chunks(num_logits: float, length: int) -> int:
    """Returns the smallest number of equal chunks that keep the logits within the limit."""
    wanted = num_logits / _MAX_LOGITS.get(platform(), _MAX_LOGITS_ELSEWHERE)
    return next(n for n in range(1, length + 1) if length % n == 0 and (n >= wanted or n == length))


def _chunk(x: jax.Array, chunks: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...], neighbouring tokens together.

    If the length is sharded, a chunk has every chunks-th token instead, so that each device has its
    share of every chunk and no token moves.
    """
    batch, length, *rest = x.shape
    if mesh_axes((length,), "length") == (None,):
        return jnp.moveaxis(x.reshape(batch, chunks, length // chunks, *rest), 1, 0)
    return jnp.moveaxis(x.reshape(batch, length // chunks, chunks, *rest), 2, 0)


def _unchunk(x: jax.Array) -> jax.Array:
    """The inverse of `_chunk`."""
    chunks, batch, length, *rest = x.shape
    strided = mesh_axes((chunks * length,), "length") != (None,)
    return jnp.moveaxis(x, 0, 2 if strided else 1).reshape(batch, chunks * length, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_over_chunks(
    part: Callable[..., Any],
    chunks: int,
    head: Any,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    taught: _Taught | None = None,
) -> Any:
    """Sums `part(head, x, targets, weights, taught) -> (loss, sums)` over chunks of the length.

    `taught` is what a teacher says, which has no gradient.

    The gradient is computed in the forward pass, while a chunk's logits are at hand, so that they
    are neither stored nor computed twice.
    """

    part, xs = _with_taught(part, chunks, (x_BTD, targets_BT, weights_BT), taught)

    def body(total: Any, chunk: Any) -> Any:
        return jax.tree.map(jnp.add, total, part(head, *chunk)), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, head, *(x[0] for x in xs)))
    return jax.lax.scan(body, zeros, xs)[0]


def _with_taught(
    part: Callable[..., Any],
    chunks: int,
    arrays: tuple[jax.Array, ...],
    taught: _Taught | None,
) -> tuple[Callable[..., Any], list[jax.Array]]:
    """Returns the part as a function of a head and a chunk of each array, and their chunks."""
    if taught is None:
        return part, [_chunk(x, chunks) for x in arrays]
    said, head = taught

    def of_chunks(student: Any, *chunk: jax.Array) -> Any:
        return part(student, *chunk[: len(arrays)], (chunk[len(arrays) :], head))

    return of_chunks, [_chunk(x, chunks) for x in (*arrays, *said)]


def _forward(
    part: Callable[..., Any],
    chunks: int,
    head: Any,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    taught: _Taught | None = None,
) -> Any:
    part, xs = _with_taught(part, chunks, (x_BTD, targets_BT, weights_BT), taught)

    def body(carry: Any, chunk: Any) -> Any:
        total, head_grad = carry
        value, (head_part, x_part) = jax.value_and_grad(part, (0, 1), has_aux=True)(head, *chunk)
        total = jax.tree.map(jnp.add, total, value)
        # In float32: a bfloat16 sum would lose terms that are small relative to it.
        head_grad = jax.tree.map(lambda a, g: a + g.astype(a.dtype), head_grad, head_part)
        return (total, head_grad), x_part

    if chunks == 1:
        total, grads = jax.value_and_grad(part, (0, 1), has_aux=True)(head, *(x[0] for x in xs))
        return total, grads
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, head, *(x[0] for x in xs)))
    init = (zeros, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head))
    (total, head_grad), x_grad = jax.lax.scan(body, init, xs)
    head_grad = jax.tree.map(lambda g, x: g.astype(x.dtype), head_grad, head)
    return total, (head_grad, _unchunk(x_grad))


def _backward(part: Callable[..., Any], chunks: int, grads: Any, cotangents: Any) -> Any:
    scale, _ = cotangents  # No gradient flows through the metrics.
    head_grad, x_grad = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
    return head_grad, x_grad, None, None, None


_sum_over_chunks.defvjp(_forward, _backward)
