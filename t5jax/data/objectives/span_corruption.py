"""Span corruption: T5's objective (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4)."""

import dataclasses
from typing import ClassVar

import numpy as np


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
