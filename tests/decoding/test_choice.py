"""The next token of each row: transformers' processors are the judge of what may be drawn."""

import functools

import jax
import numpy as np
import pytest
from scipy import stats

from t5jax.decoding import (
    EVERY_PART,
    GenerationOptions,
    History,
    Parts,
    allowed_bits,
    choose,
    row_options,
)
from t5jax.decoding.choice import largest, process
from t5jax.decoding.truncation import truncate

VOCAB, ENDS = 37, (1, 5)
LOGITS = np.random.default_rng(0).normal(0, 2, (8, VOCAB)).astype("float32")
HISTORY = History(
    np.random.default_rng(1).integers(0, 6, (8, 14)).astype("int32"),
    np.array([14, 1, 2, 9, 13, 5, 3, 7], "int32"),
)
pick = jax.jit(choose, static_argnames=("ends", "parts", "num_top"))
ALL = np.full((8, 2), -1, "int32")


def choice(options, streams=None, index=0, parts=EVERY_PART, logits=LOGITS, allowed=ALL, **more):
    """Chooses for rows with these options."""
    n = len(options)
    return pick(
        logits[:n],
        row_options(options, streams, num_forced=2),
        np.full(n, index, "int32"),
        ends=ENDS,
        parts=parts,
        history=jax.tree.map(lambda x: x[:n], HISTORY),
        allowed_NW=allowed[:n],
        **more,
    )


def test_rows_have_options_of_their_own_and_the_default_is_the_largest_logit():
    options = [
        GenerationOptions(),
        GenerationOptions(forced_tokens=(7, 8)),
        GenerationOptions(temperature=1e-30),
        GenerationOptions(temperature=1.0, top_k=1),
        GenerationOptions(temperature=2.0, top_p=1e-6),
        GenerationOptions(temperature=2.0, min_p=1.0),
        GenerationOptions(repetition_penalty=1e9),
        GenerationOptions(min_tokens=3),
    ]
    logits = LOGITS.copy()
    logits[7, 5] = 9.0
    best = logits.argmax(-1)
    got = np.asarray(choice(options, logits=logits).tokens_N)
    np.testing.assert_array_equal(got[[0, 2, 3, 4, 5]], best[[0, 2, 3, 4, 5]])
    assert got[1] == 7
    assert choice(options, index=1).tokens_N[1] == 8
    unseen = [i for i in range(VOCAB) if i not in HISTORY.tokens_NL[6, :3]]
    assert got[6] == unseen[logits[6, unseen].argmax()]
    assert got[7] == np.delete(logits[7], [1, 5]).argsort()[-1] + 2  # Both ids lie before it.
    assert choice(options, index=3, logits=logits).tokens_N[7] == 5
    plain = choice(options, parts=Parts(), logits=logits).tokens_N
    np.testing.assert_array_equal(plain, best)


@pytest.mark.parametrize("size", [1, 7, 37, 384, 50257])
def test_the_largest_entry_is_the_first_one_in_any_size_of_vocabulary(size):
    x = np.random.default_rng(size).integers(0, 9, (16, size)).astype("float32")  # Many are equal.
    x[1], x[2] = -np.inf, 5
    np.testing.assert_array_equal(largest(x), np.argmax(x, axis=-1))


def test_log_probabilities_are_the_networks_whatever_is_asked():
    options = [GenerationOptions(forced_tokens=(7,)), GenerationOptions(temperature=3.0, seed=4)]
    got = choice(options, num_top=3)
    expected = jax.nn.log_softmax(LOGITS[:2], axis=-1)
    np.testing.assert_allclose(got.log_probs_N, expected[np.arange(2), got.tokens_N], atol=1e-5)
    np.testing.assert_array_equal(got.top_tokens_NK, np.argsort(-LOGITS[:2], axis=-1)[:, :3])
    np.testing.assert_allclose(got.top_log_probs_NK, -np.sort(-expected)[:, :3], atol=1e-5)


def test_a_token_depends_on_seed_prompt_answer_and_place_but_not_on_the_slot():
    sample = functools.partial(GenerationOptions, temperature=1.0)
    logits = np.zeros((8, VOCAB), "float32")
    seeds = [5, 5, 2**40 + 5, 5, 5, 5, 5, 5]
    streams = [(0, 0)] * 3 + [(1, 0), (0, 1)] + [(0, 0)] * 3
    got = np.asarray(choice([sample(seed=s) for s in seeds], streams, logits=logits).tokens_N)
    assert len(set(got[[0, 2, 3, 4]].tolist())) == 4
    assert set(got[[0, 1, 5, 6, 7]].tolist()) == {got[0]}
    alone = choice([sample(seed=5)], [(1, 0)], logits=logits)
    assert alone.tokens_N[0] == got[3]
    later = choice([sample(seed=5)], index=1, logits=logits)
    assert later.tokens_N[0] != got[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 5},
        {"temperature": 1.7, "top_p": 0.7},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.1},
    ],
)
def test_tokens_are_drawn_with_their_probabilities(changes):
    """A chi-square test of 4,000 draws, whose seeds are fixed."""
    draws, logits = 4000, LOGITS[:1].repeat(4000, axis=0)
    options = row_options([GenerationOptions(**changes)] * draws, [(i, 0) for i in range(draws)])
    got = pick(logits, options, np.zeros(draws, "int32"), ends=ENDS, parts=Parts(True, True))
    scores = LOGITS[0].astype("float64") / changes["temperature"]
    kept = np.ones(VOCAB, bool)
    if "top_k" in changes:
        kept &= scores >= np.sort(scores)[-changes["top_k"]]
    probs = np.where(kept, np.exp(scores), 0) / np.exp(scores)[kept].sum()
    ascending = np.argsort(probs)
    kept[ascending[np.cumsum(probs[ascending]) <= 1 - changes.get("top_p", 1.0) - 1e-12]] = False
    kept &= probs >= changes.get("min_p", 0.0) * probs.max()
    expected = np.where(kept, probs, 0) / probs[kept].sum() * draws
    counts = np.bincount(got.tokens_N, minlength=VOCAB)
    assert not counts[~kept].any()
    common = expected >= 5
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert stats.chisquare(counts, expected).pvalue > 0.001


def test_a_large_vocabulary_is_drawn_from_as_a_small_one():
    vocab, draws = 1000, 2000
    weights = np.zeros(vocab, "float32")
    weights[[3, 255, 256, 700, 999]] = (0.4, 0.1, 0.1, 0.15, 0.25)
    logits = np.log(np.maximum(weights, 1e-30), dtype="float32")[None].repeat(draws, axis=0)
    options = [GenerationOptions(temperature=1.0, seed=3)] * draws
    options = row_options(options, [(0, i) for i in range(draws)])
    got = pick(logits, options, np.zeros(draws, "int32"), ends=ENDS, parts=Parts(draws=True))
    counts = np.bincount(got.tokens_N, minlength=vocab)[[3, 255, 256, 700, 999]]
    assert counts.sum() == draws
    assert stats.chisquare(counts, weights[weights > 0] * draws).pvalue > 0.001


def test_allowed_and_suppressed_tokens_and_what_is_left_of_them():
    few = GenerationOptions(allowed_tokens=(3, 30, 36), suppressed_tokens=(1,))
    but_one = GenerationOptions(suppressed_tokens=(int(LOGITS[1].argmax()), VOCAB + 9))
    stuck = GenerationOptions(allowed_tokens=(1,), min_tokens=2)
    options = [few, but_one, stuck]
    allowed = np.stack([allowed_bits(o, VOCAB, ENDS, VOCAB - 1) for o in options])
    got = np.asarray(choice(options, allowed=allowed).tokens_N)
    assert got[0] == [3, 5, 30][LOGITS[0, [3, 5, 30]].argmax()]  # 36 is no text.
    assert got[1] == LOGITS[1].argsort()[-2]
    assert got[2] == [1, 5][LOGITS[2, [1, 5]].argmax()]  # Nothing else: it may as well end.


def test_presence_counts_what_was_written_and_biases_are_added():
    history = History(
        np.array([[3, 3, 1, 2, 2, 0], [3, 4, 4, 5, 0, 0]], "int32"), np.array([5, 4], "int32")
    )
    options = [
        GenerationOptions(presence_penalty=1, frequency_penalty=0.5),
        GenerationOptions(logit_bias=((2, -100.0), (4, 1.5))),
    ]
    got = process(
        np.zeros((2, 6), "float32"),
        row_options(options),
        np.array([3, 2]),
        ends=ENDS,
        parts=Parts.of(options),
        history=history,
    )
    # Of the first row, 3 was read, 1 written once and 2 twice.
    assert got.tolist() == [[0, -1.5, -2, 0, 0, 0], [0, 0, -100, 0, 1.5, 0]]


# --- Against transformers -------------------------------------------------------------------------


@pytest.mark.hf
def test_penalties_and_truncation_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    changes = [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 2**31},  # It takes no longer than one of the row's length.
        {"no_repeat_ngram_size": 3, "repetition_penalty": 0.8},
        {"no_repeat_ngram_size": 2, "min_tokens": 4},
    ]
    parts, places = EVERY_PART._replace(allows=False), np.full(8, 3, "int32")
    ours = jax.jit(functools.partial(process, ends=ENDS, parts=parts))
    for change in changes:
        rows = row_options([GenerationOptions(**change)] * 8)
        got = ours(LOGITS, rows, places, history=HISTORY)
        for row, length in enumerate(HISTORY.lengths_N):
            ids = torch.tensor(HISTORY.tokens_NL[row : row + 1, :length]).long()
            scores = torch.tensor(LOGITS[row : row + 1])
            for name, make in (
                ("repetition_penalty", theirs.RepetitionPenaltyLogitsProcessor),
                ("no_repeat_ngram_size", theirs.NoRepeatNGramLogitsProcessor),
                (
                    "min_tokens",
                    lambda n: theirs.MinNewTokensLengthLogitsProcessor(0, n + 99, [1, 5]),
                ),
            ):
                if name in change:
                    scores = make(change[name])(ids, scores)
            np.testing.assert_allclose(got[row], scores[0], rtol=1e-6)
    for top_k, top_p, min_p in ((4, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (9, 0.8, 0.05)):
        limits = row_options(
            [GenerationOptions(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p)]
        )
        limits = (x.repeat(8) for x in (limits.top_k, limits.top_p, limits.min_p))
        got = jax.jit(truncate)(LOGITS, *limits)
        scores = torch.tensor(LOGITS)
        for value, off, make in (
            (top_k, 0, theirs.TopKLogitsWarper),
            (top_p, 1.0, theirs.TopPLogitsWarper),
            (min_p, 0.0, theirs.MinPLogitsWarper),
        ):
            if value != off:
                scores = make(value)(None, scores)
        np.testing.assert_array_equal(got, scores)
