"""Targets and predictions as metrics compare them, checked."""

import numbers
import unicodedata
from collections.abc import Sequence
from typing import Any

_POSTPROCESS = "a task's postprocess has to return one for this metric"


def check_lengths(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
    """Raises ValueError if there are no examples, or not as many targets as predictions."""
    if len(targets) != len(predictions):
        raise ValueError(
            f"{len(targets)} targets for {len(predictions)} predictions; a metric needs one "
            "target, or one list of references, for each prediction"
        )
    if not len(targets):
        raise ValueError(
            "no examples to score: targets and predictions are empty; expected at least one "
            "(is the split empty, or every example filtered out?)"
        )


def text_references(targets: Sequence[Any], predictions: Sequence[Any]) -> list[Sequence[str]]:
    """Returns every target as a list of texts.

    Raises:
      ValueError: if there are no examples, a target is neither a text nor a list of texts, or a
        prediction is no text.
    """
    check_lengths(targets, predictions)
    found: list[Sequence[str]] = []
    for i, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        refs = _listed(target)
        if not all(isinstance(ref, str) for ref in refs):
            raise ValueError(
                f"target {i} is {target!r:.60}; expected a text or a list of texts ({_POSTPROCESS})"
            )
        _check_any(i, refs)
        if not isinstance(prediction, str):
            raise ValueError(
                f"prediction {i} is {prediction!r:.60}; expected a text ({_POSTPROCESS})"
            )
        found.append(refs)
    return found


def value_references(
    targets: Sequence[Any], predictions: Sequence[Any]
) -> tuple[list[list[Any]], list[Any]]:
    """Returns every target as a list of values, and the predictions, ready to be compared by ==.

    A value is a text, a number or a list of them (tags); if a prediction is a list, so is its
    target. Canonically equivalent texts (Unicode's NFC and NFD) become equal.

    Raises:
      ValueError: if there are no examples, a target is missing (None or NaN), or targets and
        predictions are of different kinds, so that none can ever be right.
    """
    check_lengths(targets, predictions)
    found, values = [], [_value(prediction) for prediction in predictions]
    for i, (target, value) in enumerate(zip(targets, values, strict=True)):
        refs = [_value(ref) for ref in _listed(target)]
        if isinstance(value, list) and not any(isinstance(ref, list) for ref in refs):
            refs = [refs]
        _check_any(i, refs)
        for ref in refs:
            if any(x is None or x != x for x in (ref if isinstance(ref, list) else [ref])):
                raise ValueError(
                    f"target {i} is {target!r:.60}; expected a text, a number, or a list of them; "
                    "drop rows without an answer (Source.filter), or correct the task's postprocess"
                )
        found.append(refs)
    expected = {_kind(ref) for refs in found for ref in refs}
    got = {_kind(value) for value in values if value is not None}
    if got and not got & expected:
        raise ValueError(
            f"targets are {' or '.join(sorted(expected))} such as {found[0][0]!r:.40}, and "
            f"predictions {' or '.join(sorted(got))} such as {predictions[0]!r:.40}; no prediction "
            "can be right: a task's postprocess has to return the same kind for both"
        )
    return found, values


def single_values(
    targets: Sequence[Any], predictions: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Returns targets and predictions as `value_references` does, each target as one value.

    Raises:
      ValueError: also if a target has several references.
    """
    references, values = value_references(targets, predictions)
    for i, refs in enumerate(references):
        if len(refs) != 1:
            raise ValueError(
                f"target {i} is {targets[i]!r:.60}; expected one value, since this metric is not "
                "defined for several references"
            )
    return [refs[0] for refs in references], values


def canonical(text: str) -> str:
    """Returns the text in Unicode's canonical form (NFC), in which equivalent texts are equal."""
    return unicodedata.normalize("NFC", text)


def is_list(value: Any) -> bool:
    """Returns whether a value is a list, a tuple or an array with axes."""
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0


def _value(value: Any) -> Any:
    """Returns Python's value for NumPy's, a list for a tuple, and canonical texts."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value]
    return canonical(value) if isinstance(value, str) else value


def _listed(target: Any) -> Sequence[Any]:
    target = target.tolist() if hasattr(target, "tolist") else target
    return target if isinstance(target, (list, tuple)) else [target]


def _check_any(i: int, refs: Sequence[Any]) -> None:
    if not refs:
        raise ValueError(f"target {i} is an empty list; expected at least one reference")


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "texts"
    if isinstance(value, numbers.Number):
        return "numbers"
    return "lists" if isinstance(value, list) else type(value).__name__
