"""The scores of a task: its own metrics, and those of the probabilities of its targets."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from t5jax import metrics
from t5jax.checks import name_of, users_error
from t5jax.data.batches.examples import EvalExample, EvalSet
from t5jax.metrics import likelihood
from t5jax.metrics.labels import is_label
from t5jax.metrics.statistics import Means, Scores, Statistic, statistic_of

LOSSES = (likelihood.loss, likelihood.perplexity, likelihood.token_accuracy)
"""Metrics that every task has, if the model gives probabilities to its targets."""


def ranks(eval_set: EvalSet) -> bool:
    """Returns whether a task ranks answer choices."""
    return likelihood.rank_accuracy in [getattr(fn, "func", fn) for fn in eval_set.score_fns]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model says of one example."""

    log_prob: float
    """Log-probability of the target, in nats."""
    num_tokens: int
    """Of the target, with what ends it."""
    num_correct: int
    """Tokens of the target that were the most probable ones."""
    num_bytes: int
    """Of the target's text as far as the model sees it, in UTF-8. An encoder's have none."""
    num_words: int
    prediction: str | None = None
    """The text that the model writes; None if it was not asked for one."""
    choices: tuple[float, ...] = ()
    """Log-probabilities of the example's answer choices."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model, or a trivial predictor, says of the examples of a task, as metrics take it."""

    predictions: list[Any] | None
    """Postprocessed. None if there are none."""
    log_probs: list[likelihood.LogProb] | None
    texts: list[str] | None
    """The predictions, as people read them."""

    @classmethod
    def of(cls, eval_set: EvalSet, answers: Sequence[Answer]) -> "Answers":
        """Returns what a model says.

        Raises:
          ValueError: if the task's postprocessing fails.
        """
        texts = [a.prediction for a in answers if a.prediction is not None]
        if texts and eval_set.metric_fns:
            predictions = postprocess(eval_set, eval_set.examples, texts)
        else:
            predictions, texts = None, []
        log_probs = [
            likelihood.LogProb(
                a.log_prob,
                likelihood.Details(
                    a.num_tokens,
                    a.num_correct,
                    a.num_bytes,
                    a.num_words,
                    _choices(eval_set, example, a.choices) if eval_set.score_fns else (),
                ),
            )
            for example, a in zip(eval_set.examples, answers, strict=True)
        ]
        return cls(predictions, log_probs, texts or None)

    @classmethod
    def of_texts(cls, eval_set: EvalSet, texts: Sequence[str]) -> "Answers":
        """Returns what one says who writes these texts; raises as `of`."""
        return cls(postprocess(eval_set, eval_set.examples, texts), None, list(texts))


def _choices(
    eval_set: EvalSet, example: EvalExample, log_probs: Sequence[float]
) -> list[likelihood.Choice]:
    if not log_probs:
        return []
    values = postprocess(eval_set, [example] * len(log_probs), example.choices)
    return [
        likelihood.Choice(*choice)
        for choice in zip(values, example.choices, log_probs, strict=True)
    ]


def is_choice(eval_set: EvalSet, example: EvalExample) -> bool:
    """Returns whether one of the answer choices of an example is its target."""
    values = postprocess(eval_set, [example] * len(example.choices), example.choices)
    return any(is_label(example.targets, value) for value in values)


def score(eval_set: EvalSet, answers: Answers) -> Scores:
    """Returns the scores of all metrics for which there are answers.

    Raises:
      ValueError: if the task's code fails, with task, function and text.
    """
    targets = [example.targets for example in eval_set.examples]
    scores: Scores = {}
    try:
        for fns, values in parts(eval_set, answers):
            found = metrics.compute(targets, values, fns)
            if twice := scores.keys() & found.keys():
                raise ValueError(metrics.same_name(*twice))
            scores |= found
    except ValueError as error:
        raise ValueError(f"task {eval_set.task}: {error}") from error
    return scores


def statistics(eval_set: EvalSet, answers: Answers) -> Iterator[Statistic]:
    """Yields the statistics of all metrics for which there are answers."""
    targets = [example.targets for example in eval_set.examples]
    for fns, values in parts(eval_set, answers):
        for fn in fns:
            yield statistic_of(fn, targets, values)


def scores_of_examples(eval_set: EvalSet, answers: Answers) -> list[Scores]:
    """Returns the scores of each example, of those metrics that are means over examples."""
    rows: list[Scores] = [{} for _ in eval_set.examples]
    for found in statistics(eval_set, answers):
        if isinstance(found, Means):
            for name, shares in found.shares.items():
                for row, share in zip(rows, shares.tolist(), strict=True):
                    row[name] = 100.0 * share
    return rows


def parts(
    eval_set: EvalSet, answers: Answers
) -> Iterator[tuple[Sequence[Callable[..., Any]], Sequence[Any]]]:
    """Yields the metrics for which there are answers, with what they take as predictions."""
    if answers.log_probs is not None:
        yield (*LOSSES, *eval_set.score_fns), answers.log_probs
    if answers.predictions is not None:
        yield eval_set.metric_fns, answers.predictions


def postprocess(
    eval_set: EvalSet, examples: Sequence[EvalExample], texts: Sequence[str]
) -> list[Any]:
    """Returns what the task makes of generated texts.

    Raises:
      ValueError: if its function fails, with its name and the text.
    """
    values = []
    for example, text in zip(examples, texts, strict=True):
        row = {} if example.row is None else {"example": example.row}
        try:
            values.append(eval_set.postprocess(text, **row))
        except Exception as error:  # Of a user's code.
            raise ValueError(
                f"task {eval_set.task}: postprocess {name_of(eval_set.postprocess)} fails on the "
                f"prediction {text!r:.80} for the inputs {example.inputs!r:.80}: "
                f"{users_error(error)}"
            ) from error
    return values
