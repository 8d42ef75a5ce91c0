"""Metrics of labels: of classes, one a text, and of tags, one a word.

Sources: scikit-learn for F1 and Matthews' correlation, seqeval for entities.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from t5jax.metrics.statistics import Means, OfColumns, statistic
from t5jax.metrics.targets import canonical, check_lengths, single_values, value_references


@statistic
def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> Means:
    """Returns {"accuracy": percent} of correctly predicted labels, ignoring surrounding spaces.

    A label is a text, a number or a list of tags. A prediction that is no label counts as wrong.
    """
    references, values = value_references(targets, predictions)
    hits = [
        _stripped(value) in map(_stripped, refs)
        for refs, value in zip(references, values, strict=True)
    ]
    return Means(accuracy=hits)


def is_label(target: Any, prediction: Any) -> bool:
    """Returns whether one prediction is correct, as `accuracy` counts it."""
    return accuracy([target], [prediction])["accuracy"] == 100.0


@statistic
def f1_micro(
    targets: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[Any] | None = None
) -> OfColumns:
    """Returns {"f1_micro": percent}, F1 from the counts of all classes together.

    With all classes this is the accuracy; `labels` leaves some out, such as "no relation".

    Args:
      labels: the classes that count. None: all that occur, as in scikit-learn.
    """
    return _f1("f1_micro", targets, predictions, "micro", labels)


@statistic
def f1_macro(
    targets: Sequence[Any], predictions: Sequence[Any], *, labels: Sequence[Any] | None = None
) -> OfColumns:
    """Returns {"f1_macro": percent}, the mean of the F1 of each class.

    Args:
      labels: the classes that count, as in `functools.partial(f1_macro, labels=("yes", "no"))`.
        None: all that occur in targets or predictions, as in scikit-learn, so that every other text
        that a model generates is a class of its own with an F1 of 0.
    """
    return _f1("f1_macro", targets, predictions, "macro", labels)


@statistic
def f1_binary(
    targets: Sequence[Any], predictions: Sequence[Any], *, positive: Any = 1
) -> OfColumns:
    """Returns {"f1_binary": percent}, F1 of one class; it is 0 if that class does not occur.

    Args:
      positive: the class, as in `functools.partial(f1_binary, positive="duplicate")`; 1 is also
        the text "1".
    Raises:
      ValueError: also if there are other classes but not this one.
    """
    expected, _ = _classes(targets, predictions)
    positive = _stripped(positive)
    if all(isinstance(label, str) and label.isdecimal() for label in expected):
        positive = str(positive)  # 1, of targets that are texts.
    different = isinstance(positive, str) != isinstance(expected[0], str)
    if positive not in expected and (different or len(set(expected)) > 1):
        found = ", ".join(sorted(map(repr, set(expected)))[:5])
        raise ValueError(
            f"f1_binary counts the class {positive!r}, which is no target; there are {found}; name "
            f"one by functools.partial(f1_binary, positive={expected[0]!r})"
        )
    return _f1("f1_binary", targets, predictions, "micro", [positive])


@statistic
def matthews(targets: Sequence[Any], predictions: Sequence[Any]) -> OfColumns:
    """Returns {"matthews": percent}, Matthews' correlation coefficient, from -100 to 100.

    It is 0 if there is only one class among the targets or the predictions.
    """
    from sklearn.metrics import matthews_corrcoef

    def finish(expected: Any, predicted: Any) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of a single class; the score says so.
            return {"matthews": 100.0 * float(matthews_corrcoef(expected, predicted))}

    return OfColumns(_numbered(*_classes(targets, predictions)), finish)


def entity_f1(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Returns precision, recall and F1 of named entities, each counted as a whole.

    Tags are in IOB1, IOB2 or IOBES ("B-PER", "I-PER", "O"), and read as conlleval does. Predicted
    tags beyond the last word are ignored, and missing ones are "O".

    Args:
      targets: N lists of tags, or N texts of tags separated by spaces: one for each word.
      predictions: N lists or texts.
    Returns:
      {"entity_precision": percent, "entity_recall": percent, "entity_f1": percent}.
    """
    from seqeval.metrics import f1_score, precision_score, recall_score

    check_lengths(targets, predictions)
    expected = [_tags(tags, f"target {i}") for i, tags in enumerate(targets)]
    predicted = [_tags(tags, f"prediction {i}") for i, tags in enumerate(predictions)]
    for i, tags in enumerate(expected):
        for tag in tags:
            if tag != "O" and tag[:2] not in ("B-", "I-", "E-", "S-"):
                raise ValueError(
                    f"target {i} has the tag {tag!r:.40}; expected O, or a tag that begins with B- "
                    "or I- (IOB), or also E- or S- (IOBES)"
                )
    aligned = [
        [*got[: len(tags)], *["O"] * (len(tags) - len(got))]
        for tags, got in zip(expected, predicted, strict=True)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A score without entities is 0; tags that are none.
        return {
            "entity_precision": 100.0 * float(precision_score(expected, aligned)),
            "entity_recall": 100.0 * float(recall_score(expected, aligned)),
            "entity_f1": 100.0 * float(f1_score(expected, aligned)),
        }


def _f1(
    name: str,
    targets: Sequence[Any],
    predictions: Sequence[Any],
    average: str,
    labels: Sequence[Any] | None,
) -> OfColumns:
    from sklearn.metrics import f1_score

    expected, predicted, *chosen = _numbered(
        *_classes(targets, predictions), *([] if labels is None else [map(_stripped, labels)])
    )
    options = {"labels": chosen[0] if chosen else None, "average": average, "zero_division": 0}

    def finish(expected: Any, predicted: Any) -> dict[str, float]:
        return {name: 100.0 * float(f1_score(expected, predicted, **options))}

    return OfColumns([expected, predicted], finish)


def _classes(targets: Sequence[Any], predictions: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Returns the label of each target and prediction."""
    expected, predicted = single_values(targets, predictions)
    if any(isinstance(value, list) for value in (*expected, *predicted)):
        raise ValueError(
            "targets or predictions are lists, such as "
            f"{next(x for x in (*expected, *predicted) if isinstance(x, list))!r:.60}; expected a "
            "label each, a text or a number; for tags of words there is entity_f1"
        )
    return list(map(_stripped, expected)), list(map(_stripped, predicted))


def _numbered(*lists: Any) -> list[list[int]]:
    """Returns the lists with a number for each different value: scikit-learn takes one type."""
    numbers: dict[Any, int] = {}
    return [[numbers.setdefault(value, len(numbers)) for value in values] for values in lists]


def _tags(tags: Any, what: str) -> list[str]:
    found = tags.split() if isinstance(tags, str) else tags
    if not isinstance(found, (list, tuple)) or not all(isinstance(tag, str) for tag in found):
        raise ValueError(
            f"{what} is {tags!r:.60}; expected a list of tags, or a text of tags separated by "
            "spaces (a task's postprocess has to return one for this metric)"
        )
    return list(found)


def _stripped(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_stripped, value))
    return canonical(value).strip() if isinstance(value, str) else value
