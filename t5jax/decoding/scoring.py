"""The log-probability of given answers: for choices, for perplexity, and to compare models.

B batch, T length of the decoder's rows, D model, V vocab, K alternatives.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from t5jax import batch as features
from t5jax import sharding
from t5jax.architectures import Architecture
from t5jax.batch import BatchSpec, ExampleFormat, Kind
from t5jax.config import AxisRules
from t5jax.data.batches.converters import make_converter
from t5jax.decoding.batches import num_rows, power_of_two
from t5jax.models import api

_MAX_LOGITS = 2**25  # That a device holds at a time: 128 MiB in float32.


@dataclasses.dataclass(frozen=True)
class Score:
    """How probable an answer is."""

    tokens: list[int]
    """The ids of the answer."""
    log_probs: np.ndarray
    """The log-probability of each token after those before it, float32 [n], in nats."""
    is_greedy: np.ndarray
    """Whether each token is the most probable one, bool [n]."""
    top_tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.int32))
    """The most probable tokens at each place, int32 [n, K]; empty if none were asked for."""
    top_log_probs: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, 0), np.float32)
    )
    """Their log-probabilities, float32 [n, K]."""

    @property
    def total(self) -> float:
        """The log-probability of the whole answer."""
        return float(np.sum(self.log_probs, dtype=np.float64))


def score(
    model: Architecture,
    params: api.Params,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    form: ExampleFormat,
    kind: Kind,
    mesh: jax.sharding.Mesh,
    rules: AxisRules,
    batch_size: int,
    num_top: int = 0,
    between_batches: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Returns the score of each answer after its prompt, in their order.

    Args:
      model: the description.
      params: the parameters, arranged for decoding or not.
      prompts: token ids, as `form.prompt` returns them.
      answers: token ids; what ends a text is only scored if it is among them.
      form: how the model reads an example.
      kind: the kind of the model.
      mesh: the devices.
      rules: how arrays are sharded over them.
      batch_size: the maximum number of rows per batch.
      num_top: the number of alternatives at each place, K.
      between_batches: is called before each batch.
    Raises:
      ValueError: if a row is longer than the positions of the model.
    """
    alone = kind != "encoder_decoder"
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        length = len(prompt) + len(answer) - 1
        if alone and model.longest_row is not None and length > model.longest_row:
            raise ValueError(
                f"prompt and answer {number} have {length + 1} tokens, but this {model.family} has "
                f"{model.longest_row} positions; shorten one of them"
            )
    # Of like lengths together, so that little is padded.
    asked = [number for number, answer in enumerate(answers) if answer]
    asked.sort(key=lambda number: (len(prompts[number]) + len(answers[number]), number))
    rows = num_rows(len(asked), batch_size, sharding.batch_parts(mesh, rules))
    scores = [Score([], np.zeros(0, np.float32), np.zeros(0, bool)) for _ in answers]
    for start in range(0, len(asked), batch_size):
        between_batches()
        chunk = asked[start : start + batch_size]
        spec = _spec(model, kind, [(len(prompts[i]), len(answers[i])) for i in chunk], rows)
        examples = [
            {"inputs": np.array(prompts[i], np.int32), "targets": np.array(answers[i], np.int32)}
            for i in chunk
        ]
        # A prompt is complete as it is.
        as_it_is = dataclasses.replace(form, prompt_start=(), prompt_end=(form.eos_id,))
        batch = make_converter(spec, as_it_is)([[example] for example in examples])
        is_target_BT = batch[features.DECODER_LOSS_WEIGHTS] > 0
        with sharding.use_mesh(mesh, rules):
            batch = sharding.shard_batch(features.pad_rows(batch, rows), mesh, rules)
            found = jax.device_get(log_probs(model, params, batch, num_top))
        for row, i in enumerate(chunk):
            parts = [np.asarray(x)[row, is_target_BT[row]] for x in found]
            scores[i] = Score(list(answers[i]), *parts)
    return scores


def _spec(
    model: Architecture, kind: Kind, lengths: Sequence[tuple[int, int]], rows: int
) -> BatchSpec:
    """Returns the shape of a batch, of lengths that are powers of two.

    Args:
      lengths: of each prompt and answer.
    """
    if kind == "encoder_decoder":
        source, target = (power_of_two(max(x), 16) for x in zip(*lengths, strict=True))
        return BatchSpec(rows, source, target, pack=True, kind=kind)
    length = power_of_two(max(map(sum, lengths)) - 1, 16)
    length = min(length, model.longest_row or length)
    return BatchSpec(rows, 1, length - 1, pack=True, kind=kind)


@functools.partial(jax.jit, static_argnames=("model", "num_top"))
def log_probs(
    model: Architecture, params: api.Params, batch: Mapping[str, jax.Array], num_top: int = 0
) -> tuple[jax.Array, ...]:
    """Returns the log-probability of each target of a batch, whatever its loss weight.

    Args:
      model: the description.
      params: the parameters, arranged for decoding or not.
      batch: features with targets.
      num_top: the number of alternatives at each place, K.
    Returns:
      The log-probabilities float32 [B, T], whether they are the largest bool [B, T], and if num_top
      is not 0, the ids and log-probabilities of the largest ones [B, T, K]; whole on every device.
    """
    head = api.unembed_params(model, params)

    def part(x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        x_BD, targets_B = x
        logits_BV = api.unembed(model, head, x_BD[:, None])[:, 0]
        log_z_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
        own_B1 = jnp.take_along_axis(logits_BV, targets_B[:, None], axis=-1)
        is_greedy_B = jnp.argmax(logits_BV, axis=-1) == targets_B
        found = (own_B1 - log_z_B1)[:, 0], is_greedy_B
        if not num_top:
            return found
        top_BK, top_tokens_BK = jax.lax.top_k(logits_BV, num_top)
        return *found, top_tokens_BK, top_BK - log_z_B1

    encodes = model.kind == "encoder"
    targets_BT = batch[
        features.ENCODER_TARGET_TOKENS if encodes else features.DECODER_TARGET_TOKENS
    ]
    x_BTD = api.hidden(model, params, batch)
    size = sharding.local_size((len(targets_BT), model.num_outputs), "batch", "vocab")
    places = max(1, int(_MAX_LOGITS // size))
    found = jax.lax.map(
        part, (jnp.swapaxes(x_BTD, 0, 1), targets_BT.T), batch_size=min(places, len(x_BTD[0]))
    )
    # Replicated, so that every host can read it.
    return tuple(sharding.constrain(jnp.swapaxes(x, 0, 1), *(None,) * x.ndim) for x in found)
