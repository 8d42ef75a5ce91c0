"""Training objectives over plain text, from tokens to an example (NumPy, no TensorFlow).

An objective is a frozen description in a task; `bind` turns it into a function for one vocabulary
and one row length. The random generator is an argument, so that an example is a function of (seed,
its number, epoch), independent of how it is read.

    SpanCorruption    Raffel et al. 2020 (arXiv:1910.10683), section 3.1.4: T5
    ul2               Tay et al. 2023 (arXiv:2205.05131), section 3.1: R-, X- and S-denoisers
    PrefixLM          arXiv:1910.10683, section 3.2.3; T5's "LM adaptation"
    CausalLM          next-token prediction
    MaskedLM          Devlin et al. 2019 (arXiv:1810.04805), section 3.1: BERT
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import ClassVar, Protocol

import numpy as np

from t5jax.data.batches.examples import Example
from t5jax.tokenizers import Tokenizer


class BoundObjective(Protocol):
    """An objective for one vocabulary and one row length."""

    tokens_length: int
    """Number of tokens of text for an example that fills its row."""

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Example:
        """Returns the example for tokens int32 [n], 1 <= n <= tokens_length."""

    def lengths(self, n: int, rng: np.random.Generator) -> dict[str, int]:
        """Returns the lengths of the features for n tokens and a generator in the same state."""


class Objective(Protocol):
    """The objective of a task. `repr()` describes it completely."""

    features: ClassVar[tuple[str, ...]]
    """("inputs", "targets") or ("targets",)."""
    encoder_only: ClassVar[bool]
    """Whether targets are aligned with inputs, as for encoder-only models."""

    def tokens_length(self, tokenizer: Tokenizer, inputs_length: int, targets_length: int) -> int:
        """Returns the number of tokens of text that fill a row."""

    def bind(
        self,
        tokenizer: Tokenizer,
        inputs_length: int,
        targets_length: int,
        tokens_length: int | None = None,
    ) -> BoundObjective:
        """Returns the objective as a function.

        Args:
          tokenizer: has eos, sentinels and other special ids.
          inputs_length: the length of an encoder row in tokens.
          targets_length: the length of a decoder row in tokens.
          tokens_length: the maximum number of tokens of text in an example; by default as many as
            fill a row.
        Raises:
          ValueError: if the vocabulary lacks a token, or the targets do not fit.
        """


def example_rng(seed: int, index: int, epoch: int = 0) -> np.random.Generator:
    """Returns the random generator of an example, which only depends on these arguments.

    Args:
      seed: in [0, 2^64).
      index: the number of the example in its task, in [0, 2^40).
      epoch: in [0, 2^24).
    """
    # Philox takes the key directly, in 7 us; seeding with SeedSequence takes three times as long.
    key = np.array([seed, (epoch << 40) + index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def cut(documents: Iterable[np.ndarray], eos_id: int, length: int) -> Iterator[np.ndarray]:
    """Joins documents with eos, and yields their tokens in pieces of one length.

    No tokens are dropped; the last piece may be shorter. Empty documents are skipped.

    Args:
      documents: tokens int32 [n] without eos.
      eos_id: the id after each document.
      length: the length of a piece in tokens.
    """
    parts, held = [], 0
    for document in documents:
        if len(document):
            parts += [np.asarray(document, np.int32), np.array([eos_id], np.int32)]
            held += len(document) + 1
        if held >= length:
            tokens = np.concatenate(parts)
            whole = held // length * length
            yield from tokens[:whole].reshape(-1, length)
            parts, held = [tokens[whole:]], held - whole
    if held:
        yield np.concatenate(parts)


# --- Span corruption ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """Replaces spans of the inputs by sentinels; the targets are the sentinels and their spans.

        the <extra_id_0> sat on <extra_id_1>        <extra_id_0> cat <extra_id_1> the mat

    The number and lengths of the spans follow T5's random_spans_noise_mask: round(n * density)
    tokens in round(that / mean length) spans; all layouts that begin with kept text and end with a
    span are equally likely. The targets end with eos, not with a sentinel.
    """

    features: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    encoder_only: ClassVar[bool] = False

    noise_density: float = 0.15
    """Fraction of the tokens that are replaced."""
    mean_span_length: float = 3.0
    """In tokens."""
    prefix: str = ""
    """Text before the inputs, such as UL2's mode tokens."""

    def __post_init__(self):
        if not 0 < self.noise_density < 1:
            raise ValueError(f"noise_density is {self.noise_density}; it must be between 0 and 1")
        if not self.mean_span_length >= 1:
            raise ValueError(
                f"mean_span_length is {self.mean_span_length}; it must be at least 1 token"
            )

    def tokens_length(self, tokenizer, inputs_length, targets_length):
        room = inputs_length - len(tokenizer.encode(self.prefix))
        if room < 3:
            raise ValueError(
                f"data.inputs_length is {inputs_length}; {self} needs at least "
                f"{inputs_length - room + 3}"
            )
        n = 1
        while self._lengths(n + 1)[0] <= room:
            n += 1
        # As in T5: with a density of 0.5, rounding may make the targets one token longer than the
        # inputs.
        return n - 1 if self.noise_density == 0.5 and self._lengths(n)[1] > room else n

    def bind(self, tokenizer, inputs_length, targets_length, tokens_length=None):
        n = tokens_length or self.tokens_length(tokenizer, inputs_length, targets_length)
        needed = self._lengths(n)[1]
        if needed > targets_length:
            raise ValueError(
                f"{self} makes of {n} tokens, which fill {inputs_length} of inputs, targets of "
                f"{needed}, but data.targets_length is {targets_length}; set it to {needed}, or "
                "lower data.inputs_length"
            )
        num_spans = self._num_spans(n)[1]
        sentinels = tokenizer.sentinel_ids
        if num_spans > len(sentinels):
            raise ValueError(
                f"{self} cuts {num_spans} spans out of {n} tokens, but {tokenizer} has "
                f"{len(sentinels)} sentinels (<extra_id_0>, ...); lower data.inputs_length, raise "
                "mean_span_length, or choose another vocabulary"
            )
        return _BoundSpanCorruption(
            n,
            self,
            np.array(tokenizer.encode(self.prefix), np.int32),
            np.array(sentinels, np.int32),
            np.array([tokenizer.eos_id], np.int32),
        )

    def _num_spans(self, n: int) -> tuple[int, int]:
        """Returns how many of n >= 2 tokens are replaced, and in how many spans."""
        num_noise = min(max(round(n * self.noise_density), 1), n - 1)
        num_spans = max(round(num_noise / self.mean_span_length), 1)
        return num_noise, min(num_spans, n - num_noise)  # Kept text separates the spans.

    def _lengths(self, n: int) -> tuple[int, int]:
        """Returns the lengths of the inputs without prefix and of the targets, both with eos."""
        if n == 1:
            return 2, 2  # A single token is kept; the targets are the sentinel after it.
        num_noise, num_spans = self._num_spans(n)
        return n - num_noise + num_spans + 1, num_noise + num_spans + 1


@dataclasses.dataclass(frozen=True)
class _BoundSpanCorruption:
    tokens_length: int
    objective: SpanCorruption
    prefix: np.ndarray
    sentinels: np.ndarray
    eos: np.ndarray

    def __call__(self, tokens, rng):
        kept, cut = self._span_lengths(len(tokens), rng)
        # The ends of kept text and spans, alternately; each begins where the previous one ends.
        ends = np.stack([kept, cut], axis=1).cumsum()
        is_cut = np.zeros(len(tokens) + 1, bool)
        is_cut[ends[:-1]] = True
        is_cut = np.logical_xor.accumulate(is_cut)[:-1]
        cut_starts, kept_starts = ends[:-1:2], np.concatenate([[0], ends[1:-1:2]])
        inputs = self._replace(tokens, is_cut, cut_starts)
        targets = self._replace(tokens, ~is_cut, kept_starts)
        return {
            "inputs": np.concatenate([self.prefix, inputs, self.eos]),
            "targets": np.concatenate([targets, self.eos]),
        }

    def lengths(self, n, rng):
        inputs, targets = self.objective._lengths(n)
        return {"inputs": len(self.prefix) + inputs, "targets": targets}

    def _span_lengths(self, n: int, rng) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lengths of the kept text before each span, and of the spans."""
        if n == 1:
            return np.array([1]), np.array([0])
        num_noise, num_spans = self.objective._num_spans(n)
        cut = _segment(num_noise, num_spans, rng)
        return _segment(n - num_noise, num_spans, rng), cut

    def _replace(self, tokens, gone, starts) -> np.ndarray:
        """Returns the tokens with a sentinel in place of each span that is gone."""
        starts = starts[starts < len(tokens)]  # A single token has no span.
        tokens, stays = tokens.copy(), ~gone
        tokens[starts] = self.sentinels[: len(starts)]
        stays[starts] = True
        return tokens[stays]


def _segment(num_items: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the lengths >= 1 of random segments; all divisions are equally likely."""
    borders = rng.choice(num_items - 1, num_segments - 1, replace=False, shuffle=False)
    borders.sort()
    return np.diff(borders + 1, prepend=0, append=num_items)


# --- Language modelling -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PrefixLM:
    """Splits the text at a random token into inputs and targets, each with eos.

    The split is uniform among those that fit both rows.
    """

    features: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    encoder_only: ClassVar[bool] = False

    max_targets: float = 1.0
    """Maximum fraction of the tokens in the targets; the mean is half of it."""
    prefix: str = ""
    """Text before the inputs."""

    def __post_init__(self):
        if not 0 < self.max_targets <= 1:
            raise ValueError(f"max_targets is {self.max_targets}; it must be above 0, at most 1")

    def tokens_length(self, tokenizer, inputs_length, targets_length):
        # At least one token moves to the targets, which makes room for eos.
        return inputs_length - len(tokenizer.encode(self.prefix))

    def bind(self, tokenizer, inputs_length, targets_length, tokens_length=None):
        n = tokens_length or self.tokens_length(tokenizer, inputs_length, targets_length)
        prefix = np.array(tokenizer.encode(self.prefix), np.int32)
        if n < 2 or targets_length < 2:
            raise ValueError(
                f"data.inputs_length {inputs_length} and data.targets_length {targets_length} are "
                f"too short for {self}; expected at least {len(prefix) + 2} and 2"
            )
        return _BoundPrefixLM(
            n, self.max_targets, targets_length, prefix, np.array([tokenizer.eos_id], np.int32)
        )


@dataclasses.dataclass(frozen=True)
class _BoundPrefixLM:
    tokens_length: int
    max_targets: float
    targets_length: int
    prefix: np.ndarray
    eos: np.ndarray

    def __call__(self, tokens, rng):
        split = self._split(len(tokens), rng)
        return {
            "inputs": np.concatenate([self.prefix, tokens[:split], self.eos]),
            "targets": np.concatenate([tokens[split:], self.eos]),
        }

    def lengths(self, n, rng):
        split = self._split(n, rng)
        return {"inputs": len(self.prefix) + split + 1, "targets": n - split + 1}

    def _split(self, n: int, rng) -> int:
        """Returns how many of n tokens are inputs; 0 for a single token."""
        longest = min(self.targets_length - 1, max(int(n * self.max_targets), 1), max(n - 1, 1))
        return n - int(rng.integers(1, longest, endpoint=True))


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """The targets are the text itself. The encoder of an encoder-decoder only reads eos."""

    features: ClassVar[tuple[str, ...]] = ("targets",)
    encoder_only: ClassVar[bool] = False

    def tokens_length(self, tokenizer, inputs_length, targets_length):
        return targets_length

    def bind(self, tokenizer, inputs_length, targets_length, tokens_length=None):
        return _BoundCausalLM(tokens_length or targets_length)


@dataclasses.dataclass(frozen=True)
class _BoundCausalLM:
    tokens_length: int

    def __call__(self, tokens, rng):
        return {"targets": tokens}

    def lengths(self, n, rng):
        return {"targets": n}


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """BERT's: some tokens are predicted; 8 of 10 are masked, 1 is a random one, 1 stays.

    Inputs are bos (BERT: [CLS]), the text and eos ([SEP]). Targets are the predicted tokens where
    they stand, and 0 elsewhere. A random token is any but id 0, which is padding, where BERT takes
    any; the number of predicted tokens is BERT's.
    """

    features: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    encoder_only: ClassVar[bool] = True

    share: float = 0.15
    """Share of the tokens that is predicted; at least one token is."""

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}; it must be between 0 and 1")

    def tokens_length(self, tokenizer, inputs_length, targets_length):
        return inputs_length - 2

    def bind(self, tokenizer, inputs_length, targets_length, tokens_length=None):
        for name in ("bos_id", "mask_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(
                    f"{tokenizer} has no {name.removesuffix('_id')} token; {self} needs a "
                    "vocabulary that has, such as BERT's (data.vocabulary; `tasks --vocabulary`)"
                )
        if tokenizer.pad_id != 0:
            raise ValueError(
                f"{tokenizer} pads with id {tokenizer.pad_id}; {self} needs id 0 for what is not "
                "predicted"
            )
        n = tokens_length or self.tokens_length(tokenizer, inputs_length, targets_length)
        if n < 1:
            raise ValueError(f"data.inputs_length is {inputs_length}; {self} needs at least 3")
        return _BoundMaskedLM(
            n, self.share, tokenizer.bos_id, tokenizer.mask_id, tokenizer.eos_id,
            tokenizer.vocab_size,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _BoundMaskedLM:
    tokens_length: int
    share: float
    bos_id: int
    mask_id: int
    eos_id: int
    vocab_size: int

    def __call__(self, tokens, rng):
        n = len(tokens)
        inputs = np.concatenate([[self.bos_id], tokens, [self.eos_id]]).astype(np.int32)
        targets = np.zeros_like(inputs)
        chosen = 1 + rng.choice(n, max(round(n * self.share), 1), replace=False)
        targets[chosen] = inputs[chosen]
        fate = rng.random(len(chosen))
        inputs[chosen[fate < 0.8]] = self.mask_id
        random = chosen[fate >= 0.9]
        inputs[random] = rng.integers(1, self.vocab_size, len(random))
        return {"inputs": inputs, "targets": targets}

    def lengths(self, n, rng):
        return {"inputs": n + 2, "targets": n + 2}


# --- Mixtures -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MixtureOfObjectives:
    """Each example has one of several objectives, drawn by their rates.

    All make their examples of equally many tokens: the most with which every one's inputs fit.
    """

    features: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    encoder_only: ClassVar[bool] = False

    objectives: tuple[SpanCorruption | PrefixLM, ...]
    rates: tuple[float, ...]

    def __post_init__(self):
        if len(self.objectives) != len(self.rates) or not self.objectives:
            raise ValueError(
                f"there are {len(self.objectives)} objectives and {len(self.rates)} rates; give a "
                "rate for each, and at least one"
            )
        for objective in self.objectives:
            if (objective.features, objective.encoder_only) != (self.features, self.encoder_only):
                raise ValueError(
                    f"{objective} does not mix; expected objectives that give inputs and targets "
                    "of an encoder-decoder"
                )
        if min(self.rates) < 0 or not 0 < sum(self.rates) < np.inf:
            raise ValueError(f"rates are {self.rates}; none may be negative, one must be positive")

    def tokens_length(self, tokenizer, inputs_length, targets_length):
        lengths = (inputs_length, targets_length)
        return min(o.tokens_length(tokenizer, *lengths) for o in self.objectives)

    def bind(self, tokenizer, inputs_length, targets_length, tokens_length=None):
        n = tokens_length or self.tokens_length(tokenizer, inputs_length, targets_length)
        bound = [o.bind(tokenizer, inputs_length, targets_length, n) for o in self.objectives]
        return _BoundMixture(n, tuple(bound), np.cumsum(self.rates) / sum(self.rates))


@dataclasses.dataclass(frozen=True)
class _BoundMixture:
    tokens_length: int
    objectives: tuple[BoundObjective, ...]
    thresholds: np.ndarray

    def __call__(self, tokens, rng):
        return self._draw(rng)(tokens, rng)

    def lengths(self, n, rng):
        return self._draw(rng).lengths(n, rng)

    def _draw(self, rng) -> BoundObjective:
        return self.objectives[np.searchsorted(self.thresholds, rng.random(), side="right")]


def ul2(
    regular: str = "[NLU]", extreme: str = "[NLG]", sequential: str = "[S2S]"
) -> MixtureOfObjectives:
    """Returns UL2's seven denoisers (arXiv:2205.05131, table 1) in equal shares.

    Args:
      regular, extreme, sequential: mode tokens, the texts before the inputs of R-, X- and
        S-denoisers; whatever pieces the vocabulary has for them. Empty: none.
    """
    denoisers = (
        SpanCorruption(0.15, 3.0, regular),
        SpanCorruption(0.15, 8.0, regular),
        SpanCorruption(0.5, 3.0, extreme),
        SpanCorruption(0.5, 8.0, extreme),
        SpanCorruption(0.15, 64.0, extreme),
        SpanCorruption(0.5, 64.0, extreme),
        # The paper's S-denoiser has a quarter of the text, on average, in its targets.
        PrefixLM(0.5, sequential),
    )
    return MixtureOfObjectives(denoisers, (1.0,) * len(denoisers))
