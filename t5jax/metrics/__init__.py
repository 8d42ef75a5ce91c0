"""Metrics: functions `fn(targets, predictions) -> {name: score}`.

A prediction is what the task's `postprocess` makes of a generated text: a text, a number, a label
or a list of tags. A target is the same, or a list of all acceptable ones (references). Scores are
percentages; correlations are between -100 and 100, and NaN where they are undefined. A SeqIO task
takes these functions as its `metric_fns`.
"""

from t5jax.metrics.labels import accuracy, entity_f1, f1_binary, f1_macro, f1_micro, matthews
from t5jax.metrics.numeric import pearson, spearman
from t5jax.metrics.scores import COPY_INPUT, MOST_FREQUENT, MetricFn, baselines, compute
from t5jax.metrics.text import bleu, char_bleu, chrf, exact_match, rouge, squad, token_f1

__all__ = [
    "COPY_INPUT",
    "MOST_FREQUENT",
    "MetricFn",
    "accuracy",
    "baselines",
    "bleu",
    "char_bleu",
    "chrf",
    "compute",
    "entity_f1",
    "exact_match",
    "f1_binary",
    "f1_macro",
    "f1_micro",
    "matthews",
    "pearson",
    "rouge",
    "spearman",
    "squad",
    "token_f1",
]
