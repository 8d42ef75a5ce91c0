"""Changes of scores: penalties on what has been written before, repeated n-grams, biases.

What has been written is `tokens_NL`, all that the decoder of each row has read and written, of
which `lengths_N` are tokens and the rest is arbitrary.

N rows, L tokens, V vocab, E ids with a bias.
"""

import jax
import jax.numpy as jnp


def penalize_repetition(
    scores_NV: jax.Array, tokens_NL: jax.Array, lengths_N: jax.Array, penalty_N: jax.Array
) -> jax.Array:
    """Returns scores, of which those of tokens that occurred are divided by a penalty if they are
    positive, and multiplied otherwise (CTRL, Keskar et al. 2019, arXiv:1909.05858, section 4.1).

    Args:
      scores_NV: float32 logits or log-probabilities.
      tokens_NL: int32.
      lengths_N: int32.
      penalty_N: float32; 1 for none.
    """
    is_token_NL = jnp.arange(tokens_NL.shape[1])[None] < lengths_N[:, None]
    seen_NV = _mark(tokens_NL, is_token_NL, scores_NV.shape[1])
    penalty_N1 = penalty_N[:, None]
    worse_NV = jnp.where(scores_NV < 0, scores_NV * penalty_N1, scores_NV / penalty_N1)
    return jnp.where(seen_NV, worse_NV, scores_NV)


def penalize_presence(
    scores_NV: jax.Array,
    tokens_NL: jax.Array,
    lengths_N: jax.Array,
    index_N: jax.Array,
    presence_N: jax.Array,
    frequency_N: jax.Array,
) -> jax.Array:
    """Returns scores minus penalties for tokens that the answer has, once and for each time.

    As in OpenAI's interface, what was read does not count.

    Args:
      scores_NV: float32.
      tokens_NL: int32.
      lengths_N: int32.
      index_N: int32, how many of the tokens, the last ones, are the answer.
      presence_N: float32.
      frequency_N: float32.
    """
    places_1L = jnp.arange(tokens_NL.shape[1])[None]
    is_answer_NL = (places_1L >= (lengths_N - index_N)[:, None]) & (places_1L < lengths_N[:, None])
    rows_N1 = jnp.arange(len(tokens_NL))[:, None]
    counted_NL = jnp.where(is_answer_NL, tokens_NL, scores_NV.shape[1])  # Others are dropped.
    counts_NV = jnp.zeros_like(scores_NV).at[rows_N1, counted_NL].add(1.0, mode="drop")
    return scores_NV - counts_NV * frequency_N[:, None] - jnp.sign(counts_NV) * presence_N[:, None]


def add_biases(scores_NV: jax.Array, ids_NE: jax.Array, biases_NE: jax.Array) -> jax.Array:
    """Returns scores, to some of which something is added.

    Args:
      scores_NV: float32.
      ids_NE: int32, different ids; -1 for none.
      biases_NE: float32.
    """
    rows_N1 = jnp.arange(len(ids_NE))[:, None]
    places_NE = jnp.where(ids_NE >= 0, ids_NE, scores_NV.shape[1])
    return scores_NV.at[rows_N1, places_NE].add(biases_NE, mode="drop")


def ban_repeated_ngrams(
    scores_NV: jax.Array, tokens_NL: jax.Array, lengths_N: jax.Array, size_N: jax.Array
) -> jax.Array:
    """Returns scores with -inf for tokens that would repeat an n-gram of their row.

    Args:
      scores_NV: float32.
      tokens_NL: int32.
      lengths_N: int32.
      size_N: int32, the size n of each row's n-grams; 0 for none.
    """
    length = tokens_NL.shape[1]
    size_N = jnp.minimum(size_N, length + 1)  # A longer one does not occur either.
    ends_1L = jnp.arange(length)[None]
    rows_N1 = jnp.arange(len(tokens_NL))[:, None]
    # An n-gram ends at e, and its first n - 1 tokens are the last ones of the row.
    begins_NL = ends_1L - (size_N[:, None] - 1) >= 0
    match_NL = begins_NL & (ends_1L < lengths_N[:, None]) & (size_N > 0)[:, None]

    def compare(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        back, match_NL = carry
        last_N1 = tokens_NL[rows_N1, jnp.maximum(lengths_N - back, 0)[:, None]]
        is_same_NL = jnp.roll(tokens_NL, back, axis=1) == last_N1
        return back + 1, match_NL & (is_same_NL | (back >= size_N)[:, None])

    def unfinished(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return carry[0] < jnp.max(size_N)

    _, match_NL = jax.lax.while_loop(unfinished, compare, (jnp.int32(1), match_NL))
    # A row with fewer than n - 1 tokens has no such beginning.
    match_NL &= (lengths_N >= size_N)[:, None]
    banned_NV = _mark(tokens_NL, match_NL, scores_NV.shape[1])
    return jnp.where(banned_NV, -jnp.inf, scores_NV)


def _mark(tokens_NL: jax.Array, where_NL: jax.Array, vocab_size: int) -> jax.Array:
    """Returns bool [N, V], which tokens a row has at the marked places."""
    rows_N1 = jnp.arange(len(tokens_NL))[:, None]
    places_NL = jnp.where(where_NL, tokens_NL, vocab_size)  # Beyond the end, and so dropped.
    marks_NV = jnp.zeros((len(tokens_NL), vocab_size), bool)
    return marks_NV.at[rows_N1, places_NL].set(True, mode="drop")
