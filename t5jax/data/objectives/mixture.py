"""Mixtures of objectives, such as UL2's (Tay et al. 2023, arXiv:2205.05131, section 3.1)."""

import dataclasses
from typing import ClassVar

import numpy as np

from t5jax.data.objectives.base import BoundObjective
from t5jax.data.objectives.language_modelling import PrefixLM
from t5jax.data.objectives.span_corruption import SpanCorruption


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
