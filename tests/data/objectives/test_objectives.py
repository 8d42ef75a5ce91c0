import collections
import dataclasses

import numpy as np
import pytest

from t5jax.data.objectives.base import cut, example_rng
from t5jax.data.objectives.language_modelling import CausalLM, MaskedLM, PrefixLM
from t5jax.data.objectives.mixture import MixtureOfObjectives, ul2
from t5jax.data.objectives.span_corruption import SpanCorruption
from t5jax.tokenizers import ByteTokenizer


@dataclasses.dataclass
class Words:
    """T5's special ids, and an id for every word of a prefix."""

    pad_id: int = 0
    eos_id: int = 1
    bos_id: int | None = 2
    mask_id: int | None = 3
    vocab_size: int = 32_100
    sentinel_ids: tuple[int, ...] = tuple(range(32_099, 31_999, -1))

    def encode(self, text):
        return [4 + ["[NLU]", "[NLG]", "[S2S]"].index(word) for word in text.split()]


WORDS = Words()
NLU, NLG, S2S = 4, 5, 6


def text(n: int) -> np.ndarray:
    return np.arange(100, 100 + n, dtype=np.int32)


def is_sentinel(ids) -> np.ndarray:
    return np.asarray(ids) >= 32_000


def rebuild(inputs, targets) -> list[int]:
    """Puts the spans of the targets where the inputs have their sentinels."""
    assert inputs[-1] == targets[-1] == 1
    inputs, targets = inputs.tolist(), targets.tolist()
    spans, tokens = collections.defaultdict(list), []
    for i in targets[:-1]:
        if i >= 32_000:
            sentinel = i
        else:
            spans[sentinel].append(i)
    for i in inputs[:-1]:
        tokens += spans.pop(i) if i >= 32_000 else [i]
    assert not spans
    return tokens


# --- Span corruption ----------------------------------------------------------------------------


def test_the_smallest_case_by_hand():
    # Two of four tokens in two spans: there is but one way to lay them out.
    bound = SpanCorruption(0.5, 1.0).bind(WORDS, 5, 5, tokens_length=4)
    example = bound(np.array([11, 12, 13, 14], np.int32), example_rng(0, 0))
    assert example["inputs"].tolist() == [11, 32_099, 13, 32_098, 1]
    assert example["targets"].tolist() == [32_099, 12, 32_098, 14, 1]
    assert {array.dtype for array in example.values()} == {np.dtype("int32")}


def test_a_single_token_is_kept():
    example = SpanCorruption().bind(WORDS, 512, 114)(text(1), example_rng(0, 0))
    assert (example["inputs"].tolist(), example["targets"].tolist()) == ([100, 1], [32_099, 1])


def t5_lengths(inputs_length, density, mean):
    """T5's search for the text that fills the inputs, rounded as its code does."""

    def lengths(n):
        noise = round(n * density)
        spans = round(noise / mean)
        return n - noise + spans + 1, noise + spans + 1

    n = inputs_length - 1
    while lengths(n + 1)[0] <= inputs_length:
        n += 1
    inputs, targets = lengths(n)
    return (n - 1, targets - 1) if density == 0.5 and targets > inputs else (n, targets)


def test_the_text_fills_the_inputs_as_t5_has_it():
    assert t5_lengths(512, 0.15, 3.0) == (568, 114)
    for inputs_length in range(64, 600, 7):
        for density, mean in [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.25, 5.0)]:
            objective = SpanCorruption(density, mean)
            expected_n, expected_targets = t5_lengths(inputs_length, density, mean)
            n = objective.tokens_length(WORDS, inputs_length, 600)
            assert n == expected_n
            many = dataclasses.replace(WORDS, sentinel_ids=range(999))
            lengths = objective.bind(many, inputs_length, 600).lengths(n, None)
            assert inputs_length - 1 <= lengths["inputs"] <= inputs_length
            # Where T5 takes one token less, it takes one target less, which may be still too many.
            slack = (0, 1) if density == 0.5 else (0,)
            assert expected_targets - lengths["targets"] in slack


def test_counts_sentinels_and_the_text_itself():
    bound = SpanCorruption().bind(WORDS, 512, 114)
    for index in range(200):
        example = bound(text(568), example_rng(0, index))
        inputs, targets = example["inputs"], example["targets"]
        assert (len(inputs), len(targets)) == (512, 114)
        descending = list(range(32_099, 32_099 - 28, -1))
        assert inputs[is_sentinel(inputs)].tolist() == descending
        assert targets[is_sentinel(targets)].tolist() == descending
        assert (~is_sentinel(targets)).sum() - 1 == 85  # 15 % of 568, in 28 spans: 3.04 each.
        assert not is_sentinel(inputs[0])
        assert is_sentinel(inputs[-2])  # The text ends in a span.
        assert rebuild(inputs, targets) == text(568).tolist()


def t5_noise_mask(n, density, mean, rng):
    """random_spans_noise_mask, by a shuffle of borders as T5 draws it."""
    noise = min(max(round(n * density), 1), n - 1)
    spans = max(round(noise / mean), 1)

    def segments(items):
        borders = rng.permutation(np.arange(items - 1) < spans - 1)
        ids = np.cumsum(np.concatenate([[0], borders]))
        return np.bincount(ids)

    lengths = np.stack([segments(n - noise), segments(noise)], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def test_masks_are_distributed_as_t5s():
    n, density, mean, draws = 12, 0.4, 2.0, 6000
    bound = SpanCorruption(density, mean).bind(WORDS, 20, 20, tokens_length=n)
    ours, theirs = collections.Counter(), collections.Counter()
    rng = np.random.default_rng(0)
    for index in range(draws):
        inputs = bound(text(n), example_rng(1, index))["inputs"]
        ours[tuple(~np.isin(text(n), inputs))] += 1
        theirs[tuple(t5_noise_mask(n, density, mean, rng))] += 1
    # Every layout of 5 tokens in 2 spans: 4 ways to divide the span tokens, 6 the others.
    assert ours.keys() == theirs.keys()
    assert len(ours) == 24
    for mask, count in ours.items():
        assert abs(count - draws / 24) < 5 * (draws / 24) ** 0.5, mask  # Five sigma.


def test_targets_that_do_not_fit_are_an_error():
    with pytest.raises(
        ValueError, match=r"of 568 tokens.*targets of 114, but data\.targets_length"
    ):
        SpanCorruption().bind(WORDS, 512, 113)
    assert SpanCorruption().bind(WORDS, 512, 114).tokens_length == 568


def test_every_span_needs_a_sentinel_of_its_own():
    few = dataclasses.replace(WORDS, sentinel_ids=WORDS.sentinel_ids[:27])
    with pytest.raises(ValueError, match=r"cuts 28 spans out of 568 tokens, but .* has 27 sentin"):
        SpanCorruption().bind(few, 512, 114)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "noise_density is 0.0; it must be between 0 and 1"),
        ((1.0,), "noise_density is 1.0; it must be between 0 and 1"),
        ((0.15, 0.5), "mean_span_length is 0.5; it must be at least 1 token"),
    ],
)
def test_spans_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpanCorruption(*arguments)


def test_too_short_rows_are_refused():
    with pytest.raises(ValueError, match=r"data\.inputs_length is 2; SpanCorruption.* at least 3"):
        SpanCorruption().bind(WORDS, 2, 10)
    with pytest.raises(ValueError, match=r"too short for PrefixLM.*at least 2 and 2"):
        PrefixLM().bind(WORDS, 1, 10)
    with pytest.raises(ValueError, match=r"data\.inputs_length is 2; MaskedLM.*at least 3"):
        MaskedLM().bind(WORDS, 2, 2)


# --- Language modelling -------------------------------------------------------------------------


def test_prefix_lm_splits_anywhere_and_evenly():
    bound = PrefixLM().bind(WORDS, 8, 8)
    assert bound.tokens_length == 8
    splits = collections.Counter()
    for index in range(3500):
        example = bound(text(8), example_rng(0, index))
        inputs, targets = example["inputs"], example["targets"]
        assert inputs[-1] == targets[-1] == 1
        assert [*inputs[:-1], *targets[:-1]] == text(8).tolist()
        splits[len(inputs) - 1] += 1
    assert sorted(splits) == [1, 2, 3, 4, 5, 6, 7]
    assert all(400 < count < 600 for count in splits.values())


def test_prefix_lm_leaves_no_more_for_the_targets_than_fits():
    bound = PrefixLM().bind(WORDS, 20, 4)
    lengths = [len(bound(text(20), example_rng(0, i))["targets"]) for i in range(50)]
    assert set(lengths) == {2, 3, 4}


def test_prefix_lm_with_few_targets_rounds_down():
    bound = PrefixLM(0.5).bind(WORDS, 8, 8)
    sizes = {len(bound(text(7), example_rng(0, i))["targets"]) for i in range(60)}
    assert sizes == {1 + 1, 2 + 1, 3 + 1}  # With eos: 3.5 would be 4 when rounded.


def test_causal_lm_is_the_text():
    bound = CausalLM().bind(WORDS, 0, 6)
    assert bound.tokens_length == 6
    assert bound(text(6), example_rng(0, 0))["targets"].tolist() == text(6).tolist()


def test_masked_lm_masks_as_bert_does():
    bound = MaskedLM().bind(WORDS, 102, 102)
    fates = collections.Counter()
    for index in range(400):
        example = bound(text(100), example_rng(0, index))
        inputs, targets = example["inputs"], example["targets"]
        chosen = np.flatnonzero(targets)
        assert len(chosen) == 15  # Of 102.
        assert (inputs[0], inputs[-1], targets[0], targets[-1]) == (2, 1, 0, 0)
        assert np.where(targets, targets, inputs)[1:-1].tolist() == text(100).tolist()
        fates["mask"] += (inputs[chosen] == 3).sum()
        fates["same"] += (inputs[chosen] == targets[chosen]).sum()
        assert (inputs[chosen] != 0).all()
    assert fates["mask"] / 6000 == pytest.approx(0.8, abs=0.02)
    assert fates["same"] / 6000 == pytest.approx(0.1, abs=0.015)


def test_a_random_token_of_masked_lm_is_any_but_padding():
    bound = MaskedLM(0.5).bind(Words(vocab_size=5), 102, 102)
    drawn = set()
    for index in range(100):
        example = bound(np.full(100, 4, np.int32), example_rng(0, index))
        drawn |= set(example["inputs"][example["targets"] != 0].tolist())
    assert drawn == {1, 2, 3, 4}
    bound = MaskedLM(0.5).bind(Words(vocab_size=6), 102, 102)  # The last id too.
    assert any(5 in bound(np.full(100, 4, np.int32), example_rng(0, i))["inputs"] for i in range(9))


@pytest.mark.parametrize(
    ("n", "num_predicted"), [(1, 1), (3, 1), (8, 2), (14, 2), (15, 3), (126, 19), (510, 77)]
)
def test_masked_lm_predicts_its_share_and_at_least_one(n, num_predicted):
    example = MaskedLM().bind(WORDS, 512, 512)(text(n), example_rng(0, n))
    assert (example["targets"] != 0).sum() == num_predicted  # 15 % of n + 2, rounded.


def test_masked_lm_never_predicts_what_frames_a_text():
    documents = np.concatenate([text(3), [1], text(2), [1, 0, 3, 2], text(4), [1]])
    bound, seen = MaskedLM(0.9).bind(WORDS, 32, 32), set()
    for index in range(50):
        example = bound(documents, example_rng(0, index))
        seen |= set(np.flatnonzero(example["targets"]).tolist())
        assert (example["targets"] != 0).sum() == 9  # There are no more words.
    assert seen == {1, 2, 3, 5, 6, 11, 12, 13, 14}
    frames = bound(np.array([1, 1]), example_rng(0, 0))
    assert frames["inputs"].tolist() == [2, 1, 1, 1]
    assert not frames["targets"].any()


def test_masked_lm_needs_a_vocabulary_with_its_tokens():
    with pytest.raises(ValueError, match=r"ByteTokenizer.* has no bos token; MaskedLM"):
        MaskedLM().bind(ByteTokenizer(), 128, 128)
    with pytest.raises(ValueError, match=r"pads with id 7; .* needs id 0"):
        MaskedLM().bind(dataclasses.replace(WORDS, pad_id=7), 128, 128)
    with pytest.raises(ValueError, match="share is 0; it must be between 0 and 1"):
        MaskedLM(0)


# --- Mixtures -----------------------------------------------------------------------------------


def test_ul2_draws_its_seven_denoisers_equally_often():
    bound = ul2().bind(WORDS, 512, 512)
    n = bound.tokens_length
    assert n == 511
    seen = collections.Counter()
    for index in range(1400):
        example = bound(text(n), example_rng(0, index))
        inputs, targets = example["inputs"], example["targets"]
        assert len(inputs) <= 512
        num_spans = int(is_sentinel(inputs).sum())
        if inputs[0] == S2S:
            assert num_spans == 0
            assert [*inputs[1:-1], *targets[:-1]] == text(n).tolist()
            assert len(targets) - 1 <= n / 2
        else:
            assert rebuild(inputs[1:], targets) == text(n).tolist()
        cut_out = len(targets) - 1 - num_spans
        seen[int(inputs[0]), num_spans, cut_out if num_spans else 0] += 1
    # 15 % of 511 are 77 tokens, half of it 256; spans of 3, 8 and 64 tokens.
    assert set(seen) == {
        (NLU, 26, 77),
        (NLU, 10, 77),
        (NLG, 85, 256),
        (NLG, 32, 256),
        (NLG, 1, 77),
        (NLG, 4, 256),
        (S2S, 0, 0),
    }
    assert all(140 < count < 260 for count in seen.values())


def test_mode_tokens_may_be_any_text_or_none():
    bound = ul2("", "", "").bind(ByteTokenizer(), 512, 512)
    assert bound.tokens_length == 512
    with_mode = ul2("[R]", "[X]", "[S] ").bind(ByteTokenizer(), 512, 512)
    starts = {
        ByteTokenizer().decode(with_mode(text(300) % 200 + 3, example_rng(0, i))["inputs"][:3])
        for i in range(60)
    }
    assert starts == {"[R]", "[X]", "[S]"}


def test_rates_are_shares():
    mixture = MixtureOfObjectives((PrefixLM(), SpanCorruption()), (3.0, 1.0)).bind(WORDS, 64, 64)
    prefix = sum(
        not is_sentinel(mixture(text(60), example_rng(0, i))["inputs"]).any() for i in range(2000)
    )
    assert prefix / 2000 == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize(
    ("objectives", "rates", "message"),
    [
        ((PrefixLM(),), (1.0, 2.0), "there are 1 objectives and 2 rates"),
        ((), (), "there are 0 objectives and 0 rates"),
        ((PrefixLM(),), (-1.0,), r"rates are \(-1.0,\); none may be negative"),
        ((PrefixLM(), CausalLM()), (1.0, 1.0), r"CausalLM\(\) does not mix"),
        ((MaskedLM(),), (1.0,), r"MaskedLM\(share=0.15\) does not mix"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(objectives, rates, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfObjectives(objectives, rates)


# --- What holds for all -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [SpanCorruption(), SpanCorruption(0.5, 3.0), PrefixLM(), CausalLM(), MaskedLM(), ul2()],
)
def test_lengths_are_known_without_the_tokens(objective):
    bound = objective.bind(WORDS, 128, 128)
    for n in [1, 2, 3, 4, 5, 7, 20, bound.tokens_length]:
        for index in range(30):
            example = bound(text(n), example_rng(3, index, epoch=1))
            lengths = bound.lengths(n, example_rng(3, index, epoch=1))
            assert {name: len(ids) for name, ids in example.items()} == lengths
            assert tuple(example) == objective.features
            assert max(lengths.values()) <= 128


def test_an_example_is_a_function_of_seed_number_and_epoch():
    bound = SpanCorruption().bind(WORDS, 128, 128)

    def inputs(*key):
        return tuple(bound(text(140), example_rng(*key))["inputs"].tolist())

    assert inputs(0, 5) == inputs(0, 5)
    assert len({inputs(0, 5), inputs(1, 5), inputs(0, 6), inputs(0, 5, 1), inputs(5, 0)}) == 5


def test_documents_are_joined_and_cut_and_nothing_is_lost():
    documents = [[11, 12], [13], [], [14, 15, 16, 17, 18]]
    pieces = cut((np.array(d, np.int32) for d in documents), 1, 4)
    assert [piece.tolist() for piece in pieces] == [[11, 12, 1, 13], [1, 14, 15, 16], [17, 18, 1]]
    assert list(cut([], 1, 4)) == []
    [whole] = cut([np.arange(7)], 1, 8)
    assert (whole.tolist(), whole.dtype) == ([*range(7), 1], np.int32)
