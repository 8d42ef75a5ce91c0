"""The slots of an engine, and the compiled programs that fill and step them."""

import concurrent.futures
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from t5jax import batch as features
from t5jax import sharding
from t5jax.architectures import Architecture
from t5jax.config import AxisRules
from t5jax.decoding import EVERY_PART, History, Parts, row_options
from t5jax.models import api
from t5jax.serving import sizes
from t5jax.serving import slots as device
from t5jax.serving.requests import Request
from t5jax.serving.slots import NUM_BIASED, NUM_FORCED, Joining, Size, Step

_log = logging.getLogger(__name__)

_PROMPTS = 4  # That are read at a time, if so many wait.


class Programs:
    """The state on the devices, and what changes it.

    Every shape is compiled at the start, the largest first: it serves until the others are there,
    except where the bits of answers must not depend on that (`batch_invariant`).
    """

    def __init__(
        self,
        model: Architecture,
        params: api.Params,
        mesh: jax.sharding.Mesh,
        rules: AxisRules,
        kind: features.Kind,
        options: sizes.EngineOptions,
    ) -> None:
        """Makes room for the slots; arguments as for `Engine`.

        Raises:
          ValueError: if there is no room for one.
        """
        self._model, self._params, self._kind = model, params, kind
        self._mesh, self._rules = mesh, rules
        parts = sharding.batch_parts(mesh, rules)
        self.size = sizes.whole_size(model, params, options, mesh, parts)
        self.sizes = sizes.step_sizes(self.size, parts, options.batch_invariant)
        self.prompt_lengths = sizes.prompt_lengths(self.size)
        # Rows of a batch of prompts. Other numbers may round differently.
        most = parts if options.batch_invariant else -(-_PROMPTS // parts) * parts
        self._rows = sorted({parts, most})
        # A prompt is padded by what is compiled, which must not depend on when it comes.
        self._waits_for_all = options.batch_invariant
        self._replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        with sharding.use_mesh(mesh, rules):
            try:
                empty = jax.jit(functools.partial(device.empty, model, self.size))
                self._slots = jax.block_until_ready(empty())
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                own = sizes.slot_bytes(model, self.size)
                raise sizes.too_many(self.size.rows, own) from None
        self._shardings = jax.tree.map(lambda x: x.sharding, self._slots)
        words = -(-model.vocab_size // 32)
        self._everything = {
            rows: jax.device_put(np.full((rows, words), -1, np.int32), self._replicated)
            for rows in {size.rows for size in self.sizes}
        }
        self.can_share = (
            kind == "decoder"
            and not options.batch_invariant
            and all(keys.shape[2] == self.size.length for keys in self._slots.cache.keys)
        )
        self._compiled: dict[Any, Any] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(
            min(4, os.cpu_count() or 1), "t5jax-compile", _give_way
        )
        self.is_complete = threading.Event()
        """Set when everything is compiled."""

    # --- Compilation ------------------------------------------------------------------------------

    def compile(self) -> bool:
        """Compiles what every request can be served with, and begins with the rest.

        Returns:
          False if it was stopped.
        """
        longest, whole = self.prompt_lengths[-1], self.size
        first: list[Any] = [
            (self._compile_decode, whole),
            (self._compile_prompts, (longest, self._rows[-1])),
        ]
        if whole.rows > 1:
            first.append((self._compile_move, "move"))
        if self.can_share:
            first.append((self._compile_shared, "share"))
        rest: list[Any] = [(self._compile_decode, size) for size in self.sizes if size != whole]
        for rows in self._rows:
            for length in self.prompt_lengths:
                if (length, rows) != first[1][1]:
                    rest.append((self._compile_prompts, (length, rows)))
        futures = [self._pool.submit(self._in_mesh, *task) for task in first]
        later = [self._pool.submit(self._in_mesh, *task) for task in rest]
        try:
            for future in (*futures, *(later if self._waits_for_all else ())):
                future.result()
        except concurrent.futures.CancelledError:
            return False
        threading.Thread(target=self._finish, args=(later,), daemon=True).start()
        return True

    def stop(self) -> None:
        """Compiles nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _finish(self, later: Sequence[concurrent.futures.Future[None]]) -> None:
        for future in concurrent.futures.as_completed(later):
            if not future.cancelled() and (error := future.exception()) is not None:
                _log.warning("a smaller program could not be compiled: %s", error)
        self.is_complete.set()

    def _in_mesh(self, compile_one: Callable[[Any], None], key: Any) -> None:
        with sharding.use_mesh(self._mesh, self._rules):
            compile_one(key)

    def _compile_prompts(self, key: tuple[int, int]) -> None:
        length, rows = key
        prefill = jax.jit(functools.partial(device.prefill, self._model))
        batch = self._batch([[1]], length, rows)
        by = np.zeros(rows, np.int32)
        compiled = prefill.lower(self._params, batch, by).compile()
        shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(prefill, self._params, batch, by),
            compiled.output_shardings,
        )
        joining = self._joining([], [], rows)
        inserted = self._changing(device.insert, shapes, np.zeros(rows, np.int32), joining)
        self._compiled[key] = compiled, inserted

    def _compile_shared(self, key: str) -> None:
        zero = np.int32(0)
        joining = self._joining([], [], 1)
        self._compiled[key] = self._changing(device.insert_shared, zero, zero, joining)

    def _compile_move(self, key: str) -> None:
        def move(_: Architecture, *args: Any) -> Any:
            return device.move(*args)

        self._compiled[key] = self._changing(move, np.int32(0), np.int32(0))

    def _changing(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns the program of a function from slots to slots."""
        changed = jax.jit(
            functools.partial(function, self._model),
            donate_argnums=0,
            out_shardings=self._shardings,
        )
        return changed.lower(self._abstract, *args).compile()

    def _compile_decode(self, size: Size) -> None:
        lowered = lower_decode(self._model, self._params, self._abstract, size, self._mesh)
        self._compiled[size] = lowered.compile()

    @property
    def _abstract(self) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._slots
        )

    # --- What they do -----------------------------------------------------------------------------

    def reading(self, num_tokens: int) -> tuple[int, int]:
        """Returns the length to which a prompt is padded, and how many are read at a time."""
        shapes = [key for key in tuple(self._compiled) if type(key) is tuple]
        return max(
            (shape for shape in shapes if shape[0] >= num_tokens),
            key=lambda shape: (-shape[0], shape[1]),
        )

    def insert(self, requests: Sequence[Request], into: Sequence[int], length: int) -> None:
        """Reads prompts, and puts each answer in a slot.

        Args:
          requests: with as many different prompts as `reading` says, or fewer.
          into: the slots.
          length: to which prompts are padded.
        """
        different = list(dict.fromkeys(request.read for request in requests))
        rows = next(n for n in self._rows if n >= len(different) and (length, n) in self._compiled)
        adapters_P = np.zeros(rows, np.int32)
        adapters_P[: len(different)] = [adapter for adapter, _ in different]
        prompts = [prompt for _, prompt in different]
        prefill, insert = self._compiled[length, rows]
        read = prefill(self._params, self._batch(prompts, length, rows), adapters_P)
        for start in range(0, len(requests), rows):
            some = requests[start : start + rows]
            which_P = np.zeros(rows, np.int32)
            which_P[: len(some)] = [different.index(request.read) for request in some]
            joining = self._joining(some, into[start : start + rows], rows)
            self._slots = insert(self._slots, read, which_P, joining)

    def insert_shared(self, request: Request, slot: int, source: int, length: int) -> None:
        """Puts an answer in a slot, whose prompt begins like what another one holds."""
        numbers = np.int32(source), np.int32(length)
        joining = self._joining([request], [slot], 1)
        self._slots = self._compiled["share"](self._slots, *numbers, joining)

    def move(self, source: int, target: int) -> None:
        """Moves what is in a slot to a free one."""
        self._slots = self._compiled["move"](self._slots, np.int32(source), np.int32(target))

    def step_size(self, rows: int, source_length: int, length: int) -> Size:
        """Returns the smallest shape in which so many rows of these lengths can be stepped."""
        return next(
            size
            for size in self.sizes
            if size in self._compiled
            and size.rows >= rows
            and size.source_length >= source_length
            and size.length >= length
        )

    def decode(
        self,
        size: Size,
        kept_N: np.ndarray,
        allowed_RW: np.ndarray | None,
        *,
        num_steps: int,
        stop_early: bool,
        with_top: bool,
    ) -> Step:
        """Writes tokens; arguments as for `slots.decode`."""
        everything = self._everything[size.rows]
        allowed = everything
        if allowed_RW is not None:  # With the same sharding, so that it is the same program.
            allowed = jax.device_put(allowed_RW, everything.sharding)
        self._slots, step = self._compiled[size](
            *(self._slots, self._params, kept_N, allowed, np.bool_(allowed_RW is not None)),
            *(np.int32(num_steps), np.bool_(stop_early), np.bool_(with_top)),
        )
        return step

    def _batch(self, prompts: Sequence[Sequence[int]], length: int, rows: int) -> Any:
        batch = features.prompt_batch(prompts, self._kind, rows, length)
        return sharding.shard_batch(batch, self._mesh, self._rules)

    def _joining(self, requests: Sequence[Request], into: Sequence[int], rows: int) -> Joining:
        """Returns what `slots.insert` takes for answers that join."""
        spare = rows - len(requests)
        tokens_PL = np.zeros((rows, self.size.length + 1), np.int32)
        lengths_P = np.zeros(rows, np.int32)
        for row, request in enumerate(requests):
            read: Sequence[int] = request.prompt
            if self._model.kind == "encoder_decoder":
                read = (self._model.start_token_id,)
            tokens_PL[row, : len(read)], lengths_P[row] = read, len(read)
        asked = [*requests, *[Request((), 0)] * spare]
        return Joining(
            np.array([*into, *[self.size.rows] * spare], np.int32),
            np.array([request.max_tokens for request in asked], np.int32),
            History(tokens_PL, lengths_P),
            row_options(
                [request.options for request in asked],
                [request.stream for request in asked],
                num_forced=NUM_FORCED,
                num_biased=NUM_BIASED,
            ),
            np.array([request.adapter for request in asked], np.int32),
        )


def _give_way() -> None:
    """Lets this thread compile while no other has work: answers are written meanwhile."""
    if sys.platform == "linux":  # Elsewhere, priorities are those of processes.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def lower_decode(
    model: Architecture,
    params: Any,
    slots: Any,
    size: Size,
    mesh: jax.sharding.Mesh,
    parts: Parts = EVERY_PART,
) -> jax.stages.Lowered:
    """Returns the program that writes tokens, before it is compiled.

    Args:
      model: the description.
      params: arrays or their shapes, with shardings.
      slots: the shapes of all slots, with shardings.
      size: the part of the slots that it steps.
      mesh: the devices.
      parts: which options of requests it obeys.
    """
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def decode(slots: Any, params: api.Params, *args: Any) -> Any:
        step = functools.partial(device.decode, parts=parts)
        return step(model, params, slots, size, *args)

    def shape(dtype: str, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=replicated)

    shardings = jax.tree.map(lambda x: x.sharding, slots)
    program = jax.jit(decode, donate_argnums=0, out_shardings=(shardings, replicated))
    allowed_RW = shape("int32", size.rows, -(-model.vocab_size // 32))
    numbers = shape("bool"), shape("int32"), shape("bool"), shape("bool")
    kept_N = shape("bool", *slots.left.shape)
    return program.lower(slots, params, kept_N, allowed_RW, *numbers)


def lower_step(
    model: Architecture, params: Any, size: Size, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Lowered, Any]:
    """Returns the program that steps all slots of an engine, and their shapes.

    Without the options of requests, whose branches a greedy answer does not take. Arguments as for
    `lower_decode`; call it within `sharding.use_mesh`.
    """
    room = jax.jit(functools.partial(device.empty, model, size))
    slots = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(room),
        room.lower().compile().output_shardings,
    )
    return lower_decode(model, params, slots, size, mesh, Parts()), slots
