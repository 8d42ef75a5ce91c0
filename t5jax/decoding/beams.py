"""Beam search: the answers with the highest scores among those that a few beams reach.

The score is the sum of log-probabilities divided by the length to a power (Wu et al. 2016,
arXiv:1609.08144, section 7, in its simpler form). Candidates, scores and the end of the search are
those of transformers.

B prompts, K beams, C candidates, T tokens generated, V vocab, N = B x K rows of the cache.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from t5jax.architectures import Architecture
from t5jax.decoding.choice import History, process
from t5jax.decoding.loop import Request, first_history, is_filler
from t5jax.decoding.options import EarlyStopping
from t5jax.models import api
from t5jax.sharding import constrain

_NEVER = -1e9  # A score that is worse than any; finite, so that sums of it stay numbers.


class _Beams(flax.struct.PyTreeNode):
    index: jax.Array  # int32, how many tokens have been written.
    tokens: jax.Array  # int32 [B, K, T], of the beams that go on.
    scores: jax.Array  # float32 [B, K], sums of log-probabilities.
    answers: jax.Array  # int32 [B, K, T], the best ones that have ended.
    answer_scores: jax.Array  # float32 [B, K]
    is_answer: jax.Array  # bool [B, K]
    may_improve: jax.Array  # bool [B]
    is_open: jax.Array  # bool [B], whether the search for this prompt goes on.


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_tokens", "num_beams", "num_answers", "early_stopping"),
)
def beam_search(
    model: Architecture,
    params: api.Params,
    batch: Mapping[str, jax.Array],
    max_tokens: int,
    request: Request,
    length_penalty: jax.Array,
    *,
    num_beams: int,
    num_answers: int,
    early_stopping: EarlyStopping,
) -> tuple[jax.Array, jax.Array]:
    """Returns the best answers of each prompt, int32 [B, answers, T], and their scores.

    Args:
      model: the description.
      params: the parameters, arranged for decoding or not.
      batch: as returned by `batch.prompt_batch`.
      max_tokens: the maximum length of an answer in tokens.
      request: penalties and masks of each prompt, and how many tokens it may have.
      length_penalty: float32, the power.
      num_beams: the number of beams, K.
      num_answers: the number of answers, at most K.
      early_stopping: when the search ends, see `GenerationOptions`.
    """
    params = api.arrange_for_decoding(model, params)
    logits_BV, rows = api.prefill(model, params, batch)
    num_prompts, source_length = next(iter(batch.values())).shape
    source_length += api.prompt_length(params)
    slots_N = jnp.repeat(jnp.arange(num_prompts), num_beams)
    cache = api.init_cache(model, num_prompts * num_beams, source_length, max_tokens)
    cache = api.insert(model, cache, api.take(rows, slots_N), jnp.arange(len(slots_N)))
    per_row = Request(
        rows=jax.tree.map(lambda x: x[slots_N], request.rows),
        allowed=None if request.allowed is None else request.allowed[slots_N],
        parts=request.parts,
    )
    begin = first_history(model, batch, 0) if request.parts.reads_history else None
    limits_B = jnp.full(num_prompts, max_tokens) if request.limits is None else request.limits
    shape = (num_prompts, num_beams)
    ends_E = jnp.array(model.end_token_ids)
    # So many that as many beams as there are go on, whichever candidates end.
    num_candidates = max(2, 1 + len(model.end_token_ids)) * num_beams

    def penalized(beams: _Beams, log_probs_NV: jax.Array) -> jax.Array:
        if per_row.rows is None:
            return log_probs_NV
        history = None if begin is None else _history(begin, beams, slots_N)
        return process(
            log_probs_NV,
            per_row.rows,
            jnp.full(len(slots_N), beams.index, jnp.int32),
            ends=model.end_token_ids,
            parts=request.parts,
            history=history,
            allowed_NW=per_row.allowed,
        )

    def select(beams: _Beams, logits_NV: jax.Array) -> tuple[_Beams, jax.Array]:
        """Returns the beams with one more token, and the beam that each of them continues."""
        index, vocab_size = beams.index, logits_NV.shape[-1]
        log_probs_NV = penalized(beams, jax.nn.log_softmax(logits_NV, axis=-1))
        sums_BKV = log_probs_NV.reshape(*shape, vocab_size) + beams.scores[..., None]
        scores_BC, places_BC = jax.lax.top_k(sums_BKV.reshape(num_prompts, -1), num_candidates)
        parents_BC, new_BC = places_BC // vocab_size, places_BC % vocab_size
        tokens_BCT = _gather(beams.tokens, parents_BC).at[:, :, index].set(new_BC)
        ends_BC = jnp.any(new_BC[..., None] == ends_E[None, None], axis=-1)
        ends_BC |= (index + 1 >= limits_B)[:, None]

        # Beams that go on.
        running_BC = scores_BC + jnp.where(ends_BC, _NEVER, 0.0)
        running_BK, chosen_BK = jax.lax.top_k(running_BC, num_beams)

        # Those that have ended, if they are better than the answers so far.
        length = (index + 1).astype(jnp.float32)
        is_full_B = jnp.all(beams.is_answer, axis=-1) & (early_stopping == "true")
        is_best = jnp.arange(num_candidates)[None] < num_beams
        ended_BC = ends_BC & is_best
        final_BC = scores_BC / length**length_penalty
        final_BC += jnp.where(is_full_B | ~beams.may_improve, _NEVER, 0.0)[:, None]
        final_BC += jnp.where(ended_BC, 0.0, _NEVER)
        merged = jnp.concatenate([beams.answer_scores, final_BC], axis=1)
        answer_scores_BK, kept_BK = jax.lax.top_k(merged, num_beams)
        answers = jnp.concatenate([beams.answers, tokens_BCT], axis=1)
        is_answer = jnp.concatenate([beams.is_answer, ended_BC], axis=1)
        answers_BKT = _gather(answers, kept_BK)
        is_answer_BK = _gather(is_answer, kept_BK)

        # Whether a better one may come.
        best_length_B = jnp.full(num_prompts, length)
        if early_stopping == "never":
            longest_B = limits_B.astype(jnp.float32)
            best_length_B = jnp.where(length_penalty > 0, longest_B, best_length_B)
        best_B = running_BK[:, 0] / best_length_B**length_penalty
        worst_B = jnp.min(answer_scores_BK, axis=1)
        worst_BK = jnp.where(is_answer_BK, worst_B[:, None], _NEVER)
        may_improve_B = beams.may_improve & jnp.any(best_B[:, None] > worst_BK, axis=-1)
        is_full_B = jnp.all(is_answer_BK, axis=-1) & (early_stopping == "true")
        is_open_B = beams.is_open & may_improve_B & ~is_full_B & ~jnp.all(ends_BC, axis=-1)
        parents_BK = _gather(parents_BC, chosen_BK)
        beams = _Beams(
            index + 1,
            _gather(tokens_BCT, chosen_BK),
            running_BK,
            answers_BKT,
            answer_scores_BK,
            is_answer_BK,
            may_improve_B,
            is_open_B,
        )
        return beams, parents_BK

    def unfinished(carry: Any) -> jax.Array:
        beams, _, _ = carry
        return (beams.index < max_tokens) & jnp.any(beams.is_open)

    def body(carry: Any) -> Any:
        beams, parents_BK, cache = carry
        first_B1 = jnp.arange(num_prompts)[:, None] * num_beams
        cache = api.reorder(cache, (first_B1 + parents_BK).reshape(-1))
        last_N = beams.tokens[:, :, beams.index - 1].reshape(-1)
        logits_NV, cache = api.decode_step(model, params, cache, last_N)
        return *select(beams, logits_NV), cache

    nothing = jnp.full((*shape, max_tokens), model.pad_token_id, jnp.int32)
    # All beams begin alike: only the first counts.
    scores_BK = jnp.broadcast_to(jnp.where(jnp.arange(num_beams) > 0, _NEVER, 0.0)[None], shape)
    is_open_B = ~is_filler(model, batch)
    beams = _Beams(
        index=jnp.int32(0),
        tokens=nothing,
        scores=scores_BK,
        answers=nothing,
        answer_scores=jnp.full(shape, _NEVER),
        is_answer=jnp.zeros(shape, bool),
        may_improve=is_open_B,
        is_open=is_open_B,
    )
    carry = (*select(beams, logits_BV[slots_N]), cache)
    beams = jax.lax.while_loop(unfinished, body, carry)[0]
    # Replicated, so that every host can read it.
    answers = constrain(beams.answers[:, :num_answers], None, None, None)
    return answers, constrain(beams.answer_scores[:, :num_answers], None, None)


def _gather(x: jax.Array, beams: jax.Array) -> jax.Array:
    """Returns [B, M, ...], the beams int32 [B, M] of x [B, K, ...]."""
    index = beams.reshape(*beams.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def _history(begin: History, beams: _Beams, slots_N: jax.Array) -> History:
    """Returns what the rows have read and written: what they began with, and their beams."""
    tokens_NT = beams.tokens.reshape(len(slots_N), -1)
    lengths_N = begin.lengths_N[slots_N]
    places_NT = lengths_N[:, None] + jnp.arange(tokens_NT.shape[1])[None]
    begin_NL = jnp.pad(begin.tokens_NL[slots_N], ((0, 0), (0, tokens_NT.shape[1])))
    rows_N1 = jnp.arange(len(slots_N))[:, None]
    return History(begin_NL.at[rows_N1, places_NT].set(tokens_NT), lengths_N + beams.index)
