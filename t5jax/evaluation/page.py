"""The page of an evaluation: one HTML file of scores, and of examples side by side.

Nothing is loaded from elsewhere. The examples are JSON in the page, and are shown as text, never as
markup. Those on which the model and its baselines disagree most come first.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t5jax.data.batches.examples import EvalSet
from t5jax.evaluation.predictions import as_json
from t5jax.evaluation.scores import Answers, scores_of_examples
from t5jax.html import as_script, fill

MOST_EXAMPLES = 1000
"""Examples of a task in the page; `predictions/` has all of them."""

Systems = tuple[EvalSet, Answers, Mapping[str, Answers]]
"""A task, what the model says, and what the baselines say by name."""


def render(
    model: str, split: str, results: Mapping[str, Mapping[str, Any]], systems: Mapping[str, Systems]
) -> str:
    """Returns the page.

    Args:
      model: the name of the model.
      split: of the tasks.
      results: as returned by `run.evaluate_model`.
      systems: for each task what the model and its baselines say.
    """
    baselines = list(dict.fromkeys(name for row in results.values() for name in row["baselines"]))
    examples = {task: _examples(*each) for task, each in systems.items()}
    return fill(
        Path(__file__).with_name("page.html.jinja"),
        model=model,
        split=split,
        baselines=baselines,
        results=results,
        total={task: row["num_examples"] for task, row in results.items()},
        examples=examples,
        data=as_script({"model": model, "tasks": examples}),
        number=_number,
        between=_between,
    )


def _examples(
    eval_set: EvalSet, model: Answers, baselines: Mapping[str, Answers]
) -> list[dict[str, Any]]:
    """Returns the examples as the page shows them, with the largest disagreement first."""
    names = [
        "",
        *(name for name, answers in baselines.items() if answers.texts or answers.log_probs),
    ]
    answers = {"": model, **baselines}
    scores = {name: scores_of_examples(eval_set, answers[name]) for name in names}
    rows: list[dict[str, Any]] = []
    for number, example in enumerate(eval_set.examples):
        says = []
        for name in names:
            given = answers[name]
            loss = None
            if given.log_probs is not None:
                loss = -given.log_probs[number] / max(given.log_probs[number].details.num_tokens, 1)
            says.append(
                {
                    "name": name,
                    "text": given.texts[number] if given.texts else None,
                    "scores": {k: round(v, 2) for k, v in scores[name][number].items()},
                    "loss": None if loss is None or not math.isfinite(loss) else round(loss, 4),
                }
            )
        rows.append(
            {
                "index": number,
                "inputs": example.seen or example.inputs,
                "targets": _as_texts(example.targets),
                "says": says,
                "disagreement": _disagreement(says),
            }
        )
    rows.sort(key=lambda row: (-row["disagreement"], row["index"]))
    return rows[:MOST_EXAMPLES]


def _disagreement(says: list[dict[str, Any]]) -> float:
    """Returns how far the model and the baselines are apart in scores, texts and losses."""
    ours, *others = says
    apart = 0.0
    for theirs in others:
        shared = ours["scores"].keys() & theirs["scores"].keys()
        apart += sum(abs(ours["scores"][k] - theirs["scores"][k]) for k in shared)
        apart += float(ours["text"] != theirs["text"])
        if ours["loss"] is not None and theirs["loss"] is not None:
            apart += min(abs(ours["loss"] - theirs["loss"]), 1.0)
    return round(apart, 4)


def _as_texts(targets: Any) -> list[str]:
    value = as_json(targets)
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _number(metric: str, value: Any) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{4 if metric.endswith('loss') or metric == 'bits_per_byte' else 2}f}"
    if value and not float(text):  # An interval that excludes 0 must not seem to contain it.
        text = f"{value:.1g}"
    return text.replace("-", "\u2212")


def _between(metric: str, interval: Sequence[Any] | None) -> str:
    low, high = (_number(metric, x) for x in interval or (None, None))
    return low if low == "–" else f"{low} to {high}"
