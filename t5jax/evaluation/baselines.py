"""What a model is compared with: trivial predictors, other models, earlier evaluations."""

import contextlib
import dataclasses
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from t5jax import storage
from t5jax.data.batches.examples import EvalSet
from t5jax.evaluation import predictions
from t5jax.evaluation.scores import Answers, score
from t5jax.metrics import most_frequent
from t5jax.metrics.targets import is_list

_log = logging.getLogger(__name__)

MAJORITY, COPY = "majority", "copy"

Kind = Literal["majority", "copy", "folder", "scores", "model"]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A baseline as it was given."""

    name: str
    kind: Kind
    scores: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    """Of a JSON file: task to its scores."""


def find(given: str) -> Baseline:
    """Returns what a baseline is, without reading a model.

    Args:
      given: "majority", "copy", the folder of an evaluation, a JSON file of scores, or a model.
    Raises:
      ValueError: if a JSON file cannot be read, or holds no scores.
    """
    if given == MAJORITY:
        return Baseline(given, "majority")
    if given == COPY:
        return Baseline(given, "copy")
    path = storage.path(given, "--baseline")
    if predictions.is_folder(path):
        return Baseline(given, "folder")
    if path.suffix != ".json":
        return Baseline(given, "model")
    try:
        found = json.loads(storage.local(path).read_text(encoding="utf-8"))
        scores = {task: dict(row.get("model", row).items()) for task, row in found.items()}
        numbers = {task: row.get("num_examples") for task, row in found.items()}
        if any(type(number) not in (int, type(None)) for number in numbers.values()):
            raise ValueError("num_examples")
    except OSError as error:
        raise ValueError(f"--baseline {given}: {error.strerror}") from None
    except (ValueError, AttributeError):
        raise ValueError(
            f'--baseline {given} holds no scores; expected {{"TASK": {{"METRIC": NUMBER}}}}, as '
            "`t5jax eval --json` writes it"
        ) from None
    return Baseline(
        given, "scores", {t: {"model": s, "num": numbers[t]} for t, s in scores.items()}
    )


def earlier_scores(baseline: Baseline, eval_set: EvalSet) -> dict[str, float]:
    """Returns the scores of a task in a JSON file.

    Raises:
      ValueError: if it has none of this task, or those of other examples.
    """
    if eval_set.task not in baseline.scores:
        raise ValueError(
            f"--baseline {baseline.name} has no scores of the task {eval_set.task}; it has "
            f"{', '.join(baseline.scores) or 'none'}"
        )
    found = baseline.scores[eval_set.task]
    if found["num"] not in (None, len(eval_set.examples)):
        raise ValueError(
            f"--baseline {baseline.name} has scores of {found['num']:,} examples of the task "
            f"{eval_set.task}; here it has {len(eval_set.examples):,}; set --num-examples alike"
        )
    numbers = {k: v for k, v in found["model"].items() if type(v) in (int, float)}
    return {name: float(value) for name, value in numbers.items() if name != "num_examples"}


def earlier_answers(baseline: Baseline, eval_set: EvalSet) -> Answers:
    """Returns the answers to a task in the folder of an evaluation.

    Raises:
      ValueError: if there are none, or those to other examples, naming the first.
    """
    rows = predictions.read_rows(storage.path(baseline.name), eval_set.task)
    if len(rows) != len(eval_set.examples):
        raise ValueError(
            f"--baseline {baseline.name} has {len(rows):,} predictions of the task "
            f"{eval_set.task}, which has {len(eval_set.examples):,} examples here; finish that "
            "evaluation, or set --num-examples and --split alike"
        )
    for row, example in zip(rows, eval_set.examples, strict=True):
        for name, here in {
            "inputs": example.inputs,
            "targets": json.loads(json.dumps(predictions.as_json(example.targets))),
        }.items():
            if row.get(name) != here:
                raise ValueError(
                    f"--baseline {baseline.name}: the {name} of example {row.get('index')} of the "
                    f"task {eval_set.task} are {row.get(name)!r:.80}, and here {here!r:.80}; "
                    "compare evaluations of the same examples (--split, --shots, --num-examples)"
                )
    answers = predictions.answers_of(rows)
    if eval_set.metric_fns and any(a.prediction is None for a in answers):
        eval_set = dataclasses.replace(eval_set, metric_fns=())
    if any(
        len(a.choices) != len(e.choices) for a, e in zip(answers, eval_set.examples, strict=True)
    ):
        eval_set = dataclasses.replace(eval_set, score_fns=())
    return Answers.of(eval_set, answers)


def check(baseline: Baseline, eval_set: EvalSet) -> None:
    """Raises ValueError for an earlier evaluation of something else."""
    if baseline.kind == "scores":
        earlier_scores(baseline, eval_set)
    elif baseline.kind == "folder":
        earlier_answers(baseline, eval_set)


def warn_of_lengths(baseline: Baseline, lengths: Mapping[str, int]) -> None:
    """Warns if an earlier evaluation had other lengths, which change scores by themselves.

    Args:
      baseline: the baseline.
      lengths: inputs_length and max_tokens of the model's evaluation.
    """
    if baseline.kind != "folder":
        return
    options = predictions.read_about(storage.path(baseline.name)).get("options") or {}
    other = [
        f"{name} {options[name]}, not {here}"
        for name, here in lengths.items()
        if options.get(name, here) != here
    ]
    if other:
        _log.warning(
            "--baseline %s was asked with %s: where texts are longer, the scores differ for that "
            "alone; set them alike (--inputs-length, --max-tokens)",
            *(baseline.name, " and ".join(other)),
        )


def trivial_answers(kind: str, eval_set: EvalSet, model: Answers) -> Answers | None:
    """Returns what a trivial predictor answers; None if the task's code cannot read it.

    Args:
      kind: "majority", the most frequent target of these examples, or "copy", the values of the
        row that are in the prompt.
      eval_set: the task.
      model: what the model says, which shows whether an answer is a list.
    """
    if model.predictions is None:
        return None
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A constant has no correlation.
        if kind == COPY:
            answers = Answers.of_texts(eval_set, [example.source for example in eval_set.examples])
        else:
            lists = any(map(is_list, model.predictions))
            value = most_frequent([e.targets for e in eval_set.examples], lists=lists)
            number = len(eval_set.examples)
            answers = Answers([value] * number, None, [_text(value)] * number)
        score(eval_set, answers)
        return answers
    return None


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if is_list(value) else str(value)


def check_names(given: Sequence[str]) -> list[Baseline]:
    """Returns what each baseline is.

    Raises:
      ValueError: also if one is given twice.
    """
    for name in given:
        if given.count(name) > 1:
            raise ValueError(f"--baseline {name} is there twice; give it once")
    return [find(name) for name in given]
