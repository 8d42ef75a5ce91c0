"""Metrics: functions `fn(targets, predictions) -> {name: score}`.

A prediction is what the task's `postprocess` makes of a generated text: a text, a number, a label
or a list of tags. A target is the same, or a list of all acceptable ones (references). Scores are
percentages; correlations are between -100 and 100, and NaN where they are undefined. A SeqIO task
takes these functions as its `metric_fns`. Those of (targets, scores) compare the log-probabilities
of targets (`t5jax.metrics.likelihood`).
"""

from t5jax.metrics.labels import accuracy, entity_f1, f1_binary, f1_macro, f1_micro, matthews
from t5jax.metrics.likelihood import (
    bits_per_byte,
    byte_perplexity,
    rank_accuracy,
    word_perplexity,
)
from t5jax.metrics.numeric import pearson, spearman
from t5jax.metrics.scores import MetricFn, compute, most_frequent, same_name
from t5jax.metrics.text import bleu, char_bleu, chrf, exact_match, rouge, squad, token_f1

__all__ = [
    "BY_NAME",
    "OF_SCORES",
    "MetricFn",
    "accuracy",
    "bits_per_byte",
    "bleu",
    "byte_perplexity",
    "char_bleu",
    "chrf",
    "compute",
    "entity_f1",
    "exact_match",
    "f1_binary",
    "f1_macro",
    "f1_micro",
    "matthews",
    "most_frequent",
    "pearson",
    "rank_accuracy",
    "rouge",
    "same_name",
    "spearman",
    "squad",
    "token_f1",
    "word_perplexity",
]

BY_NAME: dict[str, MetricFn] = {
    fn.__name__: fn
    for fn in (
        *(accuracy, bleu, char_bleu, chrf, entity_f1, exact_match, f1_binary, f1_macro, f1_micro),
        *(matthews, pearson, rouge, spearman, squad, token_f1),
    )
}
"""Metrics of (targets, predictions)."""
OF_SCORES: dict[str, MetricFn] = {
    fn.__name__: fn for fn in (bits_per_byte, byte_perplexity, rank_accuracy, word_perplexity)
}
"""Metrics of (targets, scores)."""
