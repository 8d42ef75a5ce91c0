"""An answer as it is returned, and where a text ends it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer to a prompt."""

    text: str
    """The text, without the stop string that ended it."""
    tokens: list[int]
    """All ids that were written, with those of a stop string and the id that ended the answer."""
    finish: Finish
    """"stop" if it ended by itself or at a stop string, "length" if there was no more room."""
    score: float | None = None
    """Of beam search, the score; otherwise the sum of `log_probs`, if they were asked for."""
    log_probs: list[float] | None = None
    """The log-probability of each token, in nats, before temperature, penalties and masks."""
    top: list[list[tuple[int, float]]] | None = None
    """For each token, the most probable ids at its place with their log-probabilities."""


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Returns where the first of the stop strings begins in a text; None if there is none."""
    places = [place for place in (text.find(word) for word in stop) if place >= 0]
    return min(places, default=None)


def cut_at_stop(
    tokens: Sequence[int], text_of: Callable[[Sequence[int]], str], stop: Sequence[str]
) -> int | None:
    """Returns the number of tokens up to the first whose text contains a stop string.

    Args:
      tokens: the tokens of an answer.
      text_of: the text of some of them.
      stop: the stop strings.
    Returns:
      None if the text contains none.
    """
    if not stop or find_stop(text_of(tokens), stop) is None:
        return None
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if find_stop(text_of(tokens[:middle]), stop) is None:
            low = middle + 1
        else:
            high = middle
    return low
