"""Continuous batching: answers join and leave between tokens, and share each step of the decoder.

One thread owns the slots (`t5jax.serving.programs`). It admits requests from a bounded queue while
there are free slots, dispatches the next tokens of all answers, and reads those dispatched before,
so that the devices do not wait for texts to be put together. Whoever submits a request gets a piece
of text, with its tokens, through a callback whenever there is more.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from t5jax import batch as features
from t5jax import sharding
from t5jax.architectures import Architecture
from t5jax.config import AxisRules
from t5jax.decoding import allowed_bits
from t5jax.models import api
from t5jax.serving.programs import Programs
from t5jax.serving.requests import Answer, FinishReason, Piece, QueueFull, Request, Stopping, Token
from t5jax.serving.sharing import Held
from t5jax.serving.sizes import EngineOptions, slot_bytes
from t5jax.serving.slots import MAX_STEPS, NOTHING, Size
from t5jax.serving.text import TextStream
from t5jax.special_tokens import check_prompts
from t5jax.tokenizers import Tokenizer

_log = logging.getLogger(__name__)

# How long one call of `decode` may take: pieces of texts, and new requests, wait for it.
_STREAMING_SECONDS, _OTHER_SECONDS = 0.02, 0.08
# The prompts that are read between two calls of `decode`, in tokens.
_PROMPT_TOKENS = 2048


@dataclasses.dataclass
class Counters:
    """What an engine has done."""

    requests: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    """Of them, those that were in a slot already."""
    tokens: int = 0
    steps: int = 0
    finished: collections.Counter[FinishReason] = dataclasses.field(
        default_factory=collections.Counter
    )


class Engine:
    """Writes answers to requests with one model."""

    def __init__(
        self,
        model: Architecture,
        params: api.Params,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        rules: AxisRules = AxisRules(),
        *,
        prefix_lm: bool = False,
        options: EngineOptions = EngineOptions(),
    ) -> None:
        """Makes room for the slots; `start` compiles.

        Args:
          model: the description.
          params: as returned by `api.arrange_for_decoding`.
          tokenizer: the model's tokenizer.
          mesh: the devices.
          rules: how arrays are sharded over them.
          prefix_lm: use bidirectional attention in a decoder's prompt.
          options: sizes.
        Raises:
          ValueError: if the model writes no text, or not one slot fits into memory.
        """
        if model.kind == "encoder":
            raise ValueError(f"{model.family} is an encoder and writes no text")
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self._mesh, self._rules = mesh, rules
        kind: features.Kind = "prefix_lm" if prefix_lm else model.kind
        self.programs = Programs(model, params, mesh, rules, kind, options)
        self.size = self.programs.size
        self.bytes_per_slot = slot_bytes(model, self.size)
        self.counters = Counters()
        self._in_slots: list[Answer | None] = [None] * self.size.rows
        self._held = Held(self.size.rows, self.programs.can_share)
        self._waiting: collections.deque[Answer] = collections.deque()
        self._changed = threading.Condition()
        self._step_seconds: dict[Size, float] = {}
        self._collected = 0.0
        self._stopping = False
        self.failure: BaseException | None = None
        self.ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="t5jax-engine", daemon=True)

    # --- For any thread ---------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread, which sets `ready` as soon as it has the programs for any request."""
        self._thread.start()

    @property
    def num_running(self) -> int:
        return sum(answer is not None for answer in self._in_slots)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    def room(self, prompt: Sequence[int]) -> int:
        """Returns how many tokens the answer to a prompt may have.

        Raises:
          ValueError: if the prompt is too long, or has an id without an embedding.
        """
        limit = self.size.source_length or self.size.length
        if len(prompt) > limit:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, but this server takes at most {limit}; "
                "shorten it"
            )
        check_prompts(self.model, self.tokenizer, [prompt])
        if self.model.kind == "decoder":
            return self.size.length - len(prompt) + 1  # The last token is not read.
        return self.size.length

    def submit(
        self, requests: Sequence[Request], listeners: Sequence[Callable[[Piece], None]]
    ) -> list[Answer]:
        """Queues requests, all of them or none.

        Args:
          requests: the requests.
          listeners: for each, a function that takes each piece of the answer, the last one with a
            finish_reason. It is called in the engine's thread and must return at once.
        Raises:
          ValueError: for a request that does not fit into a slot.
          QueueFull: if they are more than may wait.
          Stopping: if the engine is stopping, or has failed.
        """
        for request in requests:
            room = self.room(request.prompt)
            if not 1 <= request.max_tokens <= room:
                raise ValueError(
                    f"max_tokens is {request.max_tokens}, but behind a prompt of "
                    f"{len(request.prompt)} tokens there is room for {room}; set it to 1 to "
                    f"{room}, or shorten the prompt"
                )
        most = self.options.max_waiting + self.size.rows
        if len(requests) > most:
            raise ValueError(
                f"{len(requests)} answers are asked for at once, but this server takes at most "
                f"{most}; ask for fewer at a time"
            )
        answers = [
            Answer(request, self._text_of(request), listener)
            for request, listener in zip(requests, listeners, strict=True)
        ]
        with self._changed:
            if self._stopping or self.failure is not None:
                raise Stopping("the server is stopping")
            free = self.size.rows - self.num_running
            if len(self._waiting) + len(answers) > self.options.max_waiting + free:
                raise QueueFull(
                    f"{len(self._waiting)} answers wait already, of at most "
                    f"{self.options.max_waiting}"
                )
            self._waiting.extend(answers)
            self.counters.requests += len(answers)
            self._changed.notify()
        return answers

    def _text_of(self, request: Request) -> TextStream:
        return TextStream(
            self.tokenizer,
            special_tokens=request.special_tokens,
            stop=request.options.stop,
            before=request.prompt if request.continues else (),
        )

    def stop(self, timeout: float | None = None) -> bool:
        """Takes no more requests, finishes those it has, and returns whether it was in time."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
            if self.ready.is_set() or not self._waiting:
                self.programs.stop()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- In the engine's thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with sharding.use_mesh(self._mesh, self._rules):
                if self.programs.compile():
                    self.ready.set()
                    self._serve()
        except BaseException as error:
            self.failure = error
            _log.exception("the engine failed")
            with self._changed:
                left = [a for a in (*self._in_slots, *self._waiting) if a is not None]
                self._in_slots = [None] * self.size.rows
                self._waiting.clear()
            for answer in left:
                answer.end("error")
        finally:
            self.programs.stop()

    def _serve(self) -> None:
        dispatched = None
        while True:
            with self._changed:
                while not (self._waiting or self.num_running or dispatched):
                    if self._stopping:
                        return
                    self._changed.wait()
            self._release()
            self._admit()
            if dispatched is not None and self._is_constrained:
                self._collect(dispatched)  # What comes next depends on it.
                dispatched = None
            now = self._dispatch() if self.num_running else None
            if dispatched is not None:
                self._collect(dispatched)
            dispatched = now

    def _release(self) -> None:
        """Ends answers that nobody waits for any more."""
        for answer in tuple(self._in_slots):
            if answer is not None and (reason := answer.gave_up):
                answer.end(reason)
                self._free(answer)
        given_up = [a for a in tuple(self._waiting) if a.gave_up]
        for answer in given_up:
            with self._changed:
                self._waiting.remove(answer)
            reason = answer.gave_up or "cancelled"
            answer.end(reason)
            self.counters.finished[reason] += 1

    def _free(self, answer: Answer) -> None:
        assert answer.finished is not None
        self._in_slots[answer.slot] = None
        # Steps that it does not take part in write to the end of the part that is stepped.
        self._held.cut(answer.slot, max(0, self._needs(answer)[1] - 1))
        self.counters.finished[answer.finished] += 1

    def _admit(self) -> None:
        """Fills free slots with requests that wait, as many as do not hold up the others long."""
        read = 0
        alike: dict[tuple[int, int], list[Answer]] = {}
        seen: set[Any] = set()
        while self._waiting and None in self._in_slots and read < _PROMPT_TOKENS:
            slot = self._in_slots.index(None)
            with self._changed:
                answer = self._waiting.popleft()
            if reason := answer.gave_up:
                answer.end(reason)
                self.counters.finished[reason] += 1
                continue
            # From here on, a failure of the engine ends it.
            self._in_slots[slot], answer.slot = answer, slot
            request = answer.request
            self.counters.prompt_tokens += len(request.prompt)
            source, shared = self._held.longest_shared(request.prompt, request.adapter)
            if source is not None:
                self._keep_held(slot, shared, source)
                self.programs.insert_shared(request, slot, source, shared)
                self._held.put(slot, request.prompt, request.adapter)
                self.counters.shared_tokens += shared
                continue
            shape = self.programs.reading(len(request.prompt))
            alike.setdefault(shape, []).append(answer)
            if request.read not in seen:  # Several answers to one prompt read it once.
                seen.add(request.read)
                read += shape[0]
        for (length, most), answers in alike.items():
            different: set[Any] = set()
            some: list[Answer] = []
            for answer in answers:
                if len(different | {answer.request.read}) > most:
                    self._read(some, length)
                    different, some = set(), []
                different.add(answer.request.read)
                some.append(answer)
            self._read(some, length)

    def _read(self, answers: Sequence[Answer], length: int) -> None:
        for answer in answers:
            self._keep_held(answer.slot, 0)
        slots = [answer.slot for answer in answers]
        self.programs.insert([answer.request for answer in answers], slots, length)
        for answer in answers:
            self._held.put(answer.slot, answer.request.prompt, answer.request.adapter)

    def _keep_held(self, slot: int, shared: int, source: int | None = None) -> None:
        """Moves what a slot holds to a free one, before it is filled."""
        free = [i for i, a in enumerate(self._in_slots) if a is None and i != source]
        if (refuge := self._held.refuge(slot, shared, free)) is not None:
            self.programs.move(slot, refuge)
            self._held.move(slot, refuge)

    @property
    def _is_constrained(self) -> bool:
        return any(a is not None and a.request.constraint is not None for a in self._in_slots)

    def _allowed(self, size: Size) -> np.ndarray | None:
        """Returns int32 [R, W], which ids may be written next; None for all."""
        limited = [
            a for a in self._in_slots if a and (a.request.constraint or a.request.is_limited)
        ]
        if not limited:
            return None
        allowed_RW = np.full((size.rows, -(-self.model.vocab_size // 32)), -1, np.int32)
        for answer in limited:
            row_W, request = allowed_RW[answer.slot], answer.request
            try:
                if request.constraint is not None:
                    request.constraint.fill(row_W)
                if request.is_limited:
                    sizes = self.model.vocab_size, self.model.end_token_ids
                    row_W &= allowed_bits(request.options, *sizes, self.tokenizer.vocab_size)
            except ValueError as error:
                row_W[:] = -1
                answer.end("error", str(error))
                self._free(answer)
        return allowed_RW

    def _dispatch(self) -> "_Dispatched":
        """Starts the next tokens of all answers."""
        self._compact()
        running = [a for a in self._in_slots if a is not None]
        source, length = (max(needs) for needs in zip(*map(self._needs, running), strict=True))
        size = self.programs.step_size(running[-1].slot + 1, source, length)
        streaming = any(a.request.streaming for a in running)
        seconds = _STREAMING_SECONDS if streaming else _OTHER_SECONDS
        num_steps = int(seconds / self._step_seconds.get(size, seconds))
        num_steps = 1 if self._is_constrained else max(1, min(num_steps, MAX_STEPS))
        allowed_RW = self._allowed(size)
        for slot in range(size.rows):
            if self._in_slots[slot] is None:  # Its last place is written over.
                self._held.cut(slot, size.length - 1)
        with_top = any(a.request.options.logprobs for a in running)
        step = self.programs.decode(
            size,
            np.array([answer is not None for answer in self._in_slots]),
            allowed_RW,
            num_steps=num_steps,
            stop_early=bool(self._waiting),
            with_top=with_top,
        )
        arrays = (step.written, *((step.top_ids, step.top_logprobs) if with_top else ()))
        return _Dispatched(arrays, [(a.slot, a) for a in running], size, time.monotonic())

    def _needs(self, answer: Answer) -> tuple[int, int]:
        """Returns the tokens of an encoder's input, and of what the decoder reads."""
        request = answer.request
        if self.model.kind == "encoder_decoder":
            return len(request.prompt), request.max_tokens
        return 0, len(request.prompt) + request.max_tokens - 1

    def _compact(self) -> None:
        """Moves answers into lower slots, if fewer rows need to be stepped then."""
        while True:
            used = [i for i, answer in enumerate(self._in_slots) if answer is not None]
            fewest = min(s.rows for s in self.programs.sizes if s.rows >= len(used))
            if used[-1] < fewest:
                return
            source, target = used[-1], self._in_slots.index(None)
            self.programs.move(source, target)
            self._held.move(source, target)
            answer, self._in_slots[source] = self._in_slots[source], None
            assert answer is not None
            self._in_slots[target], answer.slot = answer, target

    def _collect(self, dispatched: "_Dispatched") -> None:
        """Reads tokens, and passes them on."""
        written_KR2, *top = jax.device_get(dispatched.arrays)
        now = time.monotonic()
        ids_KR, logprobs_KR = written_KR2[..., 0], written_KR2[..., 1].view(np.float32)
        num_steps = int((ids_KR != NOTHING).any(axis=1).sum())
        if num_steps:
            seconds = (now - max(dispatched.time, self._collected)) / num_steps
            known = self._step_seconds.get(dispatched.size, seconds)
            self._step_seconds[dispatched.size] = 0.8 * known + 0.2 * seconds
        self._collected = now
        self.counters.steps += num_steps
        ends, special = self.model.end_token_ids, self.tokenizer.special_ids
        for row, answer in dispatched.running:
            if answer.finished:
                continue
            num_top = answer.request.options.logprobs or 0
            tokens = []
            for k in range(num_steps):
                if ids_KR[k, row] < 0:
                    continue
                best: tuple[tuple[int, float], ...] = ()
                if num_top:
                    pairs = zip(top[0][k, row, :num_top], top[1][k, row, :num_top], strict=True)
                    best = tuple((int(i), _finite(x)) for i, x in pairs)
                tokens.append(Token(int(ids_KR[k, row]), _finite(logprobs_KR[k, row]), best))
            if not tokens:
                continue
            self._held.extend(answer.slot, (token.id for token in tokens))
            answer.add(tokens, ends, special)
            self.counters.tokens += len(tokens)
            if answer.finished:
                self._free(answer)


def _finite(logprob: Any) -> float:
    """Returns a log-probability that JSON can hold; as in OpenAI's interface, -9999 for -inf."""
    return float(logprob) if np.isfinite(logprob) else -9999.0


class _Dispatched(NamedTuple):
    """A call of `decode` whose result has not been read."""

    arrays: tuple[jax.Array, ...]
    running: list[tuple[int, Answer]]
    """The row of each answer."""
    size: Size
    time: float
