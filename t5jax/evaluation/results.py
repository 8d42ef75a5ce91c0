"""The scores of a model and its baselines on a task, and how they compare."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from t5jax import metrics
from t5jax.data.batches.examples import EvalSet
from t5jax.evaluation import baselines as compared
from t5jax.evaluation import compare
from t5jax.evaluation.baselines import Baseline
from t5jax.evaluation.scores import LOSSES, Answers, score

_log = logging.getLogger(__name__)


def _comparable(eval_set: EvalSet, model: Answers, other: Answers, name: str) -> dict[str, float]:
    """Returns the scores of a baseline, without losses per token if its tokens are others.

    Neither may those per word or byte be compared if targets are cut elsewhere.
    """
    scores = score(eval_set, other)
    if model.log_probs is None or other.log_probs is None:
        return scores
    details = [
        (a.details, b.details) for a, b in zip(model.log_probs, other.log_probs, strict=True)
    ]
    same_tokens = all(a.num_tokens == b.num_tokens for a, b in details)
    same_texts = all(a.num_bytes == b.num_bytes for a, b in details)
    left_out = [] if same_tokens else [fn.__name__ for fn in LOSSES]
    if not same_texts:
        left_out += [fn for fn in metrics.OF_SCORES if fn != "rank_accuracy"]
    left_out = [name for name in left_out if name in scores]
    if left_out:
        _log.warning(
            "task %s: %s of %s are left out, since its vocabulary reads the targets as other "
            "tokens%s",
            *(eval_set.task, ", ".join(left_out), name),
            "" if "bits_per_byte" in left_out else "; --metrics bits_per_byte can be compared",
        )
    return {name: value for name, value in scores.items() if name not in left_out}


def result_of(
    eval_set: EvalSet,
    model: Answers,
    systems: Mapping[str, Answers],
    files: Sequence[Baseline],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the scores of a model and its baselines on a task, and how they compare."""
    scores = score(eval_set, model)
    others = {name: _comparable(eval_set, model, each, name) for name, each in systems.items()}
    earlier = {b.name: compared.earlier_scores(b, eval_set) for b in files}
    intervals: dict[str, compare.Interval] = {}
    comparisons: dict[str, dict[str, compare.Comparison]] = {}
    lower, number = compare.lower_is_better(eval_set, model), len(eval_set.examples)
    if resamples:
        intervals, comparisons = compare.bootstrap(
            eval_set, model, dict(systems), resamples=resamples, seed=seed
        )
        for name, found in comparisons.items():
            comparisons[name] = {k: one for k, one in found.items() if k in others[name]}
        for name, row in earlier.items():
            comparisons[name] = {
                metric: compare.against_score(intervals[metric], value, metric in lower)
                for metric, value in row.items()
                if metric in intervals
            }
    return {
        "num_examples": number,
        "lower_is_better": sorted(lower & scores.keys()),
        "model": scores,
        "intervals": {name: [i.low, i.high] for name, i in intervals.items()},
        "baselines": others | earlier,
        "comparisons": {
            name: {
                metric: {
                    "difference": c.difference.value,
                    "interval": [c.difference.low, c.difference.high],
                    "verdict": c.verdict,
                }
                for metric, c in row.items()
            }
            for name, row in comparisons.items()
        },
    }
