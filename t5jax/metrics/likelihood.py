"""Metrics of the probabilities that a model gives to targets and to answer choices.

They are functions of (targets, scores), as a SeqIO task's `score_metric_fns`, where a score is the
log-probability of a target. Perplexities per word and byte and the two accuracies of choices are
those of EleutherAI's lm-evaluation-harness.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5jax.metrics.labels import is_label
from t5jax.metrics.statistics import Means, Scores, Sums, ratio, statistic


class Choice(NamedTuple):
    """An answer to choose."""

    value: Any
    """What the task's `postprocess` makes of it."""
    text: str
    log_prob: float
    """Its log-probability after the inputs, in nats."""


@dataclasses.dataclass(frozen=True, eq=False)
class Details:
    """What a log-probability is of."""

    num_tokens: float = 0
    num_correct: float = 0
    """Tokens that were the most probable ones."""
    num_bytes: int = 0
    """Of the target's text, in UTF-8."""
    num_words: int = 0
    choices: Sequence[Choice] = ()


class LogProb(float):
    """The log-probability of a target in nats: a number, and what it is of."""

    details: Details

    def __new__(cls, value: float, details: Details) -> "LogProb":
        self = super().__new__(cls, value)
        self.details = details
        return self


def _sums(scores: Sequence[LogProb], field: str, finish: Callable[[float, float], Scores]) -> Sums:
    counts = [(float(score), getattr(score.details, field)) for score in scores]
    return Sums(np.reshape(counts, (-1, 2)), lambda sums: finish(sums[0], sums[1]))


@statistic
def loss(targets: Sequence[Any], scores: Sequence[LogProb]) -> Sums:
    """Returns {"loss": nats per target token}."""
    return _sums(scores, "num_tokens", lambda s, n: {"loss": ratio(-s, n)})


@statistic
def perplexity(targets: Sequence[Any], scores: Sequence[LogProb]) -> Sums:
    """Returns {"perplexity": exp(loss)}, per target token including the one that ends the text."""
    return _sums(scores, "num_tokens", lambda s, n: {"perplexity": _exp(ratio(-s, n))})


@statistic
def word_perplexity(targets: Sequence[Any], scores: Sequence[LogProb]) -> Sums:
    """Returns {"word_perplexity": perplexity per word of the targets' texts}, separated by spaces.

    Unlike that per token, it may be compared between models of different vocabularies.
    """
    return _sums(scores, "num_words", lambda s, n: {"word_perplexity": _exp(ratio(-s, n))})


@statistic
def byte_perplexity(targets: Sequence[Any], scores: Sequence[LogProb]) -> Sums:
    """Returns {"byte_perplexity": perplexity per byte of the targets' texts in UTF-8}."""
    return _sums(scores, "num_bytes", lambda s, n: {"byte_perplexity": _exp(ratio(-s, n))})


@statistic
def bits_per_byte(targets: Sequence[Any], scores: Sequence[LogProb]) -> Sums:
    """Returns {"bits_per_byte": log2 of `byte_perplexity`}."""
    return _sums(scores, "num_bytes", lambda s, n: {"bits_per_byte": ratio(-s, n) / math.log(2)})


@statistic
def token_accuracy(targets: Sequence[Any], scores: Sequence[LogProb]) -> Sums:
    """Returns {"token_accuracy": percent} of target tokens that are the most probable ones."""
    counts = [(score.details.num_correct, score.details.num_tokens) for score in scores]
    return Sums(
        np.reshape(counts, (-1, 2)), lambda sums: {"token_accuracy": 100 * ratio(sums[0], sums[1])}
    )


@statistic
def rank_accuracy(targets: Sequence[Any], scores: Sequence[LogProb]) -> Means:
    """Returns the accuracy of the most probable answer choice (rank classification).

    The answer is the choice with the largest log-probability; in rank_accuracy_norm that is divided
    by the number of characters first, so that long choices are not at a disadvantage.

    Returns:
      {"rank_accuracy": percent, "rank_accuracy_norm": percent}.
    Raises:
      ValueError: if an example has no choices.
    """
    plain, normalized = [], []
    for number, (target, score) in enumerate(zip(targets, scores, strict=True)):
        choices = score.details.choices
        if not choices:
            raise ValueError(
                f"example {number} has no answer choices; give the template some "
                '(JinjaTemplate(..., choices="yes ||| no")), or all examples by --choices yes no'
            )
        best = max(choices, key=lambda choice: choice.log_prob)
        plain.append(is_label(target, best.value))
        best = max(choices, key=lambda choice: choice.log_prob / max(len(choice.text), 1))
        normalized.append(is_label(target, best.value))
    return Means(rank_accuracy=plain, rank_accuracy_norm=normalized)


LOWER_IS_BETTER = frozenset(
    {"loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
)
"""Names of scores that are better if lower. A metric of one's own may have an attribute
`lower_is_better`."""
HIGHER_IS_BETTER = frozenset(
    {
        *("accuracy", "rank_accuracy", "rank_accuracy_norm", "token_accuracy"),
        *("bleu", "char_bleu", "chrf", "rouge1", "rouge2", "rougeLsum"),
        *("em", "exact_match", "f1", "f1_binary", "f1_macro", "f1_micro", "token_f1"),
        *("entity_f1", "entity_precision", "entity_recall"),
        *("matthews", "pearson", "spearman"),
    }
)
"""Names of the other scores of this package."""


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # Beyond that there is no float.
