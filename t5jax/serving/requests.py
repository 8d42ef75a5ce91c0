"""What an engine is asked, and how an answer is passed on while it is being written."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal

from t5jax.decoding import Constraint, GenerationOptions
from t5jax.serving.text import TextStream

_log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]


class QueueFull(Exception):
    """There are as many requests waiting as may wait."""


class Stopping(Exception):
    """The engine takes no more requests."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to write."""

    prompt: tuple[int, ...]
    """What the model reads, as `ExampleFormat.prompt` returns it."""
    max_tokens: int
    options: GenerationOptions = GenerationOptions()
    """How it is written; `max_tokens` is set above, `num_answers` and beams are not for a single
    answer."""
    stream: tuple[int, int] = (0, 0)
    """Numbers of the prompt and of the answer, by which drawn answers of a seed differ."""
    special_tokens: bool = False
    """Keep special tokens in the text."""
    continues: bool = False
    """Whether the text goes on the prompt's, so that a space may stand in front of it."""
    streaming: bool = False
    """Whether somebody reads the text while it is written; otherwise it is passed on as a whole."""
    deadline: float | None = None
    """When to give up, in seconds of time.monotonic()."""
    constraint: Constraint | None = None
    """What may be written next, of this answer alone."""
    adapter: int = 0
    """Which of the adapters in the parameters writes it; 0 is the model itself."""

    @property
    def read(self) -> tuple[int, tuple[int, ...]]:
        """What is read, and by which adapter; the same for several answers to a prompt."""
        return self.adapter, self.prompt

    @property
    def is_limited(self) -> bool:
        """Whether some ids are never written."""
        return bool(self.options.suppressed_tokens) or self.options.allowed_tokens is not None


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens in this place and their log-probabilities."""
    offset: int = 0
    """Where the text that it adds begins in the answer, if `options.logprobs` is set."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What has been written since the last piece."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    error: str = ""
    """What went wrong, if that is the reason."""


class Answer:
    """An answer that waits, is being written, or is finished."""

    def __init__(self, request: Request, stream: TextStream, listener: Callable[[Piece], None]):
        self.request = request
        self.submitted = time.monotonic()
        self.first_token: float | None = None
        self.num_tokens = 0
        self.finished: FinishReason | None = None
        self.slot = -1
        self._stream, self._listener = stream, listener
        self._kept: list[Token] = []  # Not passed on yet.
        self._cancelled = False

    def cancel(self) -> None:
        """Gives the answer up; its slot is free after the step that is running."""
        self._cancelled = True

    @property
    def gave_up(self) -> FinishReason | None:
        if self._cancelled:
            return "cancelled"
        deadline = self.request.deadline
        return "timeout" if deadline is not None and time.monotonic() > deadline else None

    def add(self, tokens: Sequence[Token], ends: Sequence[int], special: frozenset[int]) -> None:
        """Adds tokens, and passes on what they add to the text."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        request, stream = self.request, self._stream
        reason: FinishReason | None = None
        for token in tokens:
            if request.options.logprobs is not None:
                token = dataclasses.replace(token, offset=len(stream.text))
            self._kept.append(token)
            if request.constraint is not None:
                request.constraint.read(token.id)
            self.num_tokens += 1
            is_end = token.id in ends
            # As in transformers, a word that ends an answer is part of it.
            if not is_end or token.id not in special:
                stream.push(token.id)
            if is_end or stream.stopped:
                reason = "stop"
            elif self.num_tokens >= request.max_tokens:
                reason = "length"
            if reason:
                break
        if reason:
            self._pass_on(stream.finish(), reason)
        elif request.streaming:
            self._pass_on(stream.take())

    def end(self, reason: FinishReason, error: str = "") -> None:
        """Ends the answer early."""
        self._pass_on(self._stream.finish(), reason, error)

    def _pass_on(self, text: str, reason: FinishReason | None = None, error: str = "") -> None:
        tokens, self._kept = tuple(self._kept), []
        if reason:
            self.finished = reason
        try:
            self._listener(Piece(text, tokens, reason, error))
        except Exception:  # It must not stop the other answers.
            _log.exception("a listener failed")
            self._cancelled = True
