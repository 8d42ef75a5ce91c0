"""Continuous batching: answers join and leave between tokens, and share each step of the decoder.

One thread owns the slots (`t5jax.serving.slots`). It admits requests from a bounded queue while
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
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from t5jax import batch as features
from t5jax import sharding
from t5jax.architectures import Architecture
from t5jax.config import AxisRules
from t5jax.decoding import (
    Constraint,
    GenerationOptions,
    History,
    allowed_bits,
    row_options,
)
from t5jax.models import api
from t5jax.serving import slots as device
from t5jax.serving.slots import MAX_STEPS, NOTHING, Size, Slots
from t5jax.serving.text import TextStream
from t5jax.special_tokens import check_prompts
from t5jax.tokenizers import Tokenizer

_log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]

_SHORTEST_PROMPT = 16
_SHORTEST_ROW = 64
# How long one call of `decode` may take: pieces of texts, and new requests, wait for it.
_STREAMING_SECONDS, _OTHER_SECONDS = 0.02, 0.08
# The prompts that are read between two calls of `decode`, in tokens.
_PROMPT_TOKENS = 2048
# A prompt shares at least so many tokens, and at most so many more are read one by one.
_SHARED_TOKENS, _MOST_READ = 16, 64
_MEMORY_SHARE = 0.6
_UNKNOWN_MEMORY = 2.0 * 2**30
_MOST_SLOTS, _MOST_SLOTS_CPU = 128, 32


class QueueFull(Exception):
    """There are as many requests waiting as may wait."""


class Stopping(Exception):
    """The engine takes no more requests."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The sizes of an engine."""

    slots: int | None = None
    """Answers written at a time. None: as many as fit into free memory, within limits."""
    max_length: int = 1024
    """Maximum length of what a decoder reads in tokens: prompt and answer, or with an encoder, the
    answer."""
    max_source_length: int = 1024
    """Maximum length of an encoder's input in tokens."""
    max_waiting: int = 256
    """Answers that may wait for a slot; more are refused."""
    batch_invariant: bool = False
    """Always step all slots at their full length, which is slower: then the bits of an answer do
    not depend on what else is being written."""

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "max_source_length", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to write."""

    prompt: tuple[int, ...]
    """What the model reads, as `ExampleFormat.prompt` returns it."""
    max_tokens: int
    options: GenerationOptions = GenerationOptions()
    """How it is written; `max_tokens` is set above, `num_answers` and beams are not for a single
    answer."""
    number: int = 0
    """Among several answers to a prompt: they differ by it where tokens are drawn."""
    special_tokens: bool = False
    """Keep special tokens in the text."""
    num_top: int = 0
    """How many of the most probable tokens to report for each token."""
    streaming: bool = False
    """Whether somebody reads the text while it is written."""
    deadline: float | None = None
    """When to give up, in seconds of time.monotonic()."""
    constraint: Constraint | None = None
    """What may be written next, of this answer alone."""
    adapter: int = 0
    """Which of the adapters in the parameters writes it; 0 is the model itself."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens in this place and their log-probabilities."""
    offset: int = 0
    """Where the text that it adds begins in the answer."""


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
        text, kept = "", []
        reason: FinishReason | None = None
        for token in tokens:
            kept.append(dataclasses.replace(token, offset=len(self._stream.text)))
            if self.request.constraint is not None:
                self.request.constraint.read(token.id)
            self.num_tokens += 1
            is_end = token.id in ends
            # As in transformers, a word that ends an answer is part of it.
            if not is_end or token.id not in special:
                text += self._stream.push(token.id)
            if is_end or self._stream.stopped:
                reason = "stop"
            elif self.num_tokens >= self.request.max_tokens:
                reason = "length"
            if reason:
                break
        if reason:
            text += self._stream.finish()
        self._pass_on(Piece(text, tuple(kept), reason))

    def end(self, reason: FinishReason, error: str = "") -> None:
        """Ends the answer early."""
        self._pass_on(Piece(self._stream.finish(), (), reason, error))

    def _pass_on(self, piece: Piece) -> None:
        if piece.finish_reason:
            self.finished = piece.finish_reason
        try:
            self._listener(piece)
        except Exception:  # It must not stop the other answers.
            _log.exception("a listener failed")
            self._cancelled = True


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
        """Makes room for the slots; `start` compiles the programs.

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
        self.model, self.tokenizer, self._params = model, tokenizer, params
        self._mesh, self._rules = mesh, rules
        self._kind: features.Kind = "prefix_lm" if prefix_lm else model.kind
        self._parts = sharding.batch_parts(mesh, rules)
        self.options = options
        longest = model.longest_row
        length = min(options.max_length, longest or options.max_length)
        source, prompt = 0, api.prompt_length(params)
        if model.kind == "encoder_decoder":
            source = min(options.max_source_length, longest or options.max_source_length)
        self.bytes_per_slot = (
            _slot_bytes(model, Size(self._parts, source, length, prompt)) // self._parts
        )
        num_slots = options.slots or self._fitting_slots()
        num_slots = -(-num_slots // self._parts) * self._parts
        self.size = Size(num_slots, source, length, prompt)
        self.counters = Counters()
        self._sizes = _sizes(self.size, self._parts, options.batch_invariant)
        self._prompt_lengths = _powers(_SHORTEST_PROMPT, source or length)
        with sharding.use_mesh(mesh, rules):
            empty = jax.jit(device.empty, static_argnums=(0, 1))
            self._slots: Slots = empty(model, self.size)
            words = -(-model.vocab_size // 32)
            replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            self._everything = {
                rows: jax.device_put(np.full((rows, words), -1, np.int32), replicated)
                for rows in {size.rows for size in self._sizes}
            }
        self._in_slots: list[Answer | None] = [None] * num_slots
        # What the decoder has read of the answer in each slot, or of the last one.
        self._held: list[list[int]] = [[] for _ in range(num_slots)]
        self._held_by = [0] * num_slots  # The adapter that has read it.
        self._last_used = [0.0] * num_slots
        self._shares = (
            self._kind == "decoder"
            and not options.batch_invariant
            and all(keys.shape[2] == length for keys in self._slots.cache.keys)
        )
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
        """Starts the thread, which compiles all programs first and then sets `ready`."""
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
            Answer(
                r,
                TextStream(self.tokenizer, special_tokens=r.special_tokens, stop=r.options.stop),
                to,
            )
            for r, to in zip(requests, listeners, strict=True)
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

    def stop(self, timeout: float | None = None) -> bool:
        """Takes no more requests, finishes those it has, and returns whether it was in time."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- In the engine's thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with sharding.use_mesh(self._mesh, self._rules):
                self._compile()
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

    def _compile(self) -> None:
        """Runs every program once."""
        for length in self._prompt_lengths:
            rows = self._prefill([1], length, 0)
            self._insert(rows, 0, Request((1,), 0))
        for size in self._sizes:
            self._decode(size, 0, False, False)
        if self._shares:
            rows = device.share(self.model, self._slots, np.int32(0), np.int32(1))
            self._insert(rows, 0, Request((1,), 0))
        if self.size.rows > 1:
            self._slots = device.move(self._slots, np.int32(1), np.int32(0))
        jax.block_until_ready(self._slots)

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
        for slot, answer in enumerate(self._in_slots):
            if answer is not None and (reason := answer.gave_up):
                answer.end(reason)
                self._free(slot)
        given_up = [a for a in tuple(self._waiting) if a.gave_up]
        for answer in given_up:
            with self._changed:
                self._waiting.remove(answer)
            reason = answer.gave_up or "cancelled"
            answer.end(reason)
            self.counters.finished[reason] += 1

    def _free(self, slot: int) -> None:
        answer, self._in_slots[slot] = self._in_slots[slot], None
        assert answer is not None
        assert answer.finished is not None
        self.counters.finished[answer.finished] += 1

    def _admit(self) -> None:
        """Fills free slots with requests that wait, as many as do not hold up the others long."""
        read = 0
        last: tuple[Any, Any] = None, None
        while self._waiting and None in self._in_slots and read < _PROMPT_TOKENS:
            with self._changed:
                answer = self._waiting.popleft()
            if reason := answer.gave_up:
                answer.end(reason)
                self.counters.finished[reason] += 1
                continue
            request, slot = answer.request, self._in_slots.index(None)
            length = next(n for n in self._prompt_lengths if n >= len(request.prompt))
            self.counters.prompt_tokens += len(request.prompt)
            source, shared = self._longest_shared(request.prompt, request.adapter)
            if source is not None:
                rows = device.share(self.model, self._slots, np.int32(source), np.int32(shared))
                self.counters.shared_tokens += shared
            else:
                key = request.prompt, request.adapter
                if last[0] != key:  # Several answers to one prompt read it once.
                    last = key, self._prefill(request.prompt, length, request.adapter)
                    read += length
                rows = last[1]
            if shared < len(self._held[slot]) - 1:
                self._keep_held(slot)
            self._insert(rows, slot, request)
            self._in_slots[slot], answer.slot = answer, slot
            self._held[slot] = list(request.prompt)
            self._held_by[slot] = request.adapter
            self._last_used[slot] = time.monotonic()

    def _keep_held(self, slot: int) -> None:
        """Moves what a free slot holds to another one, in place of what was used before it."""
        if len(self._held[slot]) < _SHARED_TOKENS or not self._shares:
            return
        free = [i for i, answer in enumerate(self._in_slots) if answer is None]
        oldest = min(free, key=lambda i: self._last_used[i])
        if oldest != slot:
            self._move(slot, oldest)

    def _longest_shared(self, prompt: Sequence[int], adapter: int) -> tuple[int | None, int]:
        """Returns a slot that holds what a prompt begins with, and how many tokens of it.

        None if reading the rest of the prompt one by one would take longer than all of it.
        """
        if not self._shares or len(prompt) < _SHARED_TOKENS:
            return None, 0
        most, best = 0, None
        for slot, held in enumerate(self._held):
            if self._held_by[slot] != adapter:
                continue
            # The last token of the prompt is read in any case; that of an answer was not.
            limit = min(len(prompt), len(held)) - 1
            if limit > most and held[most] == prompt[most]:
                shared = next((i for i in range(limit) if held[i] != prompt[i]), limit)
                if shared > most:
                    most, best = shared, slot
        rest = len(prompt) - most
        if most < _SHARED_TOKENS - 1 or rest > _MOST_READ or 4 * rest > len(prompt):
            return None, 0
        return best, most

    def _prefill(self, prompt: Sequence[int], length: int, adapter: int) -> Any:
        batch = features.prompt_batch([prompt], self._kind, self._parts, length)
        batch = sharding.shard_batch(batch, self._mesh, self._rules)
        return device.prefill(self.model, self._params, batch, np.int32(adapter))

    def _insert(self, rows: Any, slot: int, request: Request) -> None:
        read: Sequence[int] = request.prompt
        if self.model.kind == "encoder_decoder":
            read = (self.model.start_token_id,)
        tokens_1L = np.zeros((1, self.size.length + 1), np.int32)
        tokens_1L[0, : len(read)] = read
        history = History(tokens_1L, np.array([len(read)], np.int32))
        options = row_options([request.options], [(0, request.number)], num_forced=1)
        numbers = np.int32(slot), np.int32(request.max_tokens)
        self._slots = device.insert(
            *(self.model, self._slots, rows, *numbers, history, options),
            np.int32(request.adapter),
        )

    @property
    def _is_constrained(self) -> bool:
        return any(a is not None and a.request.constraint is not None for a in self._in_slots)

    def _allowed(self, size: Size) -> Any:
        """Returns int32 [R, W], which ids may be written next."""
        allowed_RW = np.full((size.rows, -(-self.model.vocab_size // 32)), -1, np.int32)
        for answer in self._in_slots[: size.rows]:
            if answer is None:
                continue
            row_W, request = allowed_RW[answer.slot], answer.request
            try:
                if request.constraint is not None:
                    request.constraint.fill(row_W)
                if _is_limited(request.options):
                    sizes = self.model.vocab_size, self.model.end_token_ids
                    row_W &= allowed_bits(request.options, *sizes, self.tokenizer.vocab_size)
            except ValueError as error:
                row_W[:] = -1
                answer.end("error", str(error))
                self._free(answer.slot)
        return allowed_RW

    def _dispatch(self) -> "_Dispatched":
        """Starts the next tokens of all answers."""
        self._compact()
        running = [a for a in self._in_slots if a is not None]
        source, length = (max(needs) for needs in zip(*map(self._needs, running), strict=True))
        size = next(
            s
            for s in self._sizes
            if s.rows > running[-1].slot and s.source_length >= source and s.length >= length
        )
        streaming = any(a.request.streaming for a in running)
        seconds = _STREAMING_SECONDS if streaming else _OTHER_SECONDS
        num_steps = int(seconds / self._step_seconds.get(size, seconds))
        num_steps = 1 if self._is_constrained else max(1, min(num_steps, MAX_STEPS))
        with_top = any(a.request.num_top for a in running)
        step = self._decode(size, num_steps, bool(self._waiting), with_top)
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
            fewest = min(s.rows for s in self._sizes if s.rows >= len(used))
            if used[-1] < fewest:
                return
            source, target = used[-1], self._in_slots.index(None)
            self._move(source, target)

    def _move(self, source: int, target: int) -> None:
        """Moves what is in a slot, and what it holds, to a free one."""
        self._slots = device.move(self._slots, np.int32(source), np.int32(target))
        answer, self._in_slots[source] = self._in_slots[source], None
        self._in_slots[target] = answer
        if answer is not None:
            answer.slot = target
        self._held[target], self._held[source] = self._held[source], []
        self._held_by[target] = self._held_by[source]
        self._last_used[target], self._last_used[source] = self._last_used[source], 0.0

    def _decode(self, size: Size, num_steps: int, stop_early: bool, with_top: bool) -> device.Step:
        for slot in range(size.rows):
            if self._in_slots[slot] is None:  # Its last place is written over.
                del self._held[slot][size.length - 1 :]
        constrained = self._is_constrained or any(
            answer is not None and _is_limited(answer.request.options) for answer in self._in_slots
        )
        allowed_RW = self._everything[size.rows]
        if constrained:  # With the same sharding, so that it is the same program.
            allowed_RW = jax.device_put(self._allowed(size), allowed_RW.sharding)
        kept_N = np.array([answer is not None for answer in self._in_slots])
        self._slots, step = device.decode(
            *(self.model, self._params, self._slots, kept_N, allowed_RW),
            *(np.bool_(constrained), size),
            *(np.int32(num_steps), np.bool_(stop_early), np.bool_(with_top)),
        )
        return step

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
            num_top = answer.request.num_top
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
            self._held[answer.slot] += [token.id for token in tokens]
            answer.add(tokens, ends, special)
            self.counters.tokens += len(tokens)
            if answer.finished:
                self._free(answer.slot)

    # --- Sizes ------------------------------------------------------------------------------------

    def _fitting_slots(self) -> int:
        """Returns how many slots fit into free memory.

        Raises:
          ValueError: if there is no room for one.
        """
        free, most = free_memory(self._mesh)
        slots = min(int(_MEMORY_SHARE * free / self.bytes_per_slot), most)
        if slots < self._parts:
            raise ValueError(
                f"{free / 2**30:.2f} GiB of memory are free, but the keys and values of one answer "
                f"take {self.bytes_per_slot / 2**30:.2f} GiB; set a smaller max_length (and with "
                "an encoder max_source_length)"
            )
        return slots


def _is_limited(options: GenerationOptions) -> bool:
    """Returns whether some ids are never written."""
    return bool(options.suppressed_tokens) or options.allowed_tokens is not None


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


def free_memory(mesh: jax.sharding.Mesh) -> tuple[float, int]:
    """Returns the free memory of all devices in bytes, and a sensible maximum number of slots."""
    devices = mesh.local_devices
    if devices[0].platform == "cpu":
        return _free_host_memory(), _MOST_SLOTS_CPU
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in s for s in stats):
        return _UNKNOWN_MEMORY * len(devices), _MOST_SLOTS
    free = min(s.get("bytes_limit", 0) - s.get("bytes_in_use", 0) for s in stats)
    return free * len(devices), _MOST_SLOTS


def _free_host_memory() -> float:
    try:
        with open("/proc/meminfo") as file:
            kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
        return kib * 1024 / 2  # Others need memory as well.
    except (OSError, StopIteration):
        return _UNKNOWN_MEMORY


def _slot_bytes(model: Architecture, size: Size) -> int:
    cache = jax.eval_shape(lambda: device.empty(model, size))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def _sizes(whole: Size, parts: int, batch_invariant: bool) -> list[Size]:
    """Returns the shapes to step, the smallest first: quarters of the rows and of the lengths."""
    if batch_invariant:
        return [whole]
    rows, lengths = {whole.rows, parts}, {(whole.source_length, whole.length)}
    while (fewer := min(rows - {parts}, default=parts) // 4 // parts * parts) > 4:
        rows.add(fewer)
    factor = 4
    while whole.length // factor >= _SHORTEST_ROW:
        lengths.add((-(-whole.source_length // factor), -(-whole.length // factor)))
        factor *= 4
    return [
        Size(r, *length, whole.prompt_length) for r in sorted(rows) for length in sorted(lengths)
    ]


def _powers(least: int, most: int) -> list[int]:
    """Returns powers, and the largest number."""
    powers = []
    while least < most:
        powers.append(least)
        least *= 2
    return [*powers, most]
