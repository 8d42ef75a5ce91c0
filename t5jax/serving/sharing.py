"""What the decoder has read in each slot, so that a prompt that begins alike need not be read."""

import time
from collections.abc import Iterable, Sequence

# A prompt shares at least so many tokens, and at most so many more are read one by one.
_SHARED_TOKENS, _MOST_READ = 16, 64


class Held:
    """The tokens of the answer in each slot, or of the last one, with its prompt.

    The last one was written, but not read.
    """

    def __init__(self, num_slots: int, is_on: bool) -> None:
        """Holds nothing; if it is not on, ever."""
        self._is_on = is_on
        self._tokens: list[list[int]] = [[] for _ in range(num_slots)]
        self._adapters = [0] * num_slots  # That have read them.
        self._last_used = [0.0] * num_slots

    def longest_shared(self, prompt: Sequence[int], adapter: int) -> tuple[int | None, int]:
        """Returns a slot that holds what a prompt begins with, and how many tokens of it.

        None if reading the rest of the prompt one by one would take longer than all of it.
        """
        if not self._is_on or len(prompt) < _SHARED_TOKENS:
            return None, 0
        most, best = 0, None
        for slot, held in enumerate(self._tokens):
            if self._adapters[slot] != adapter:
                continue
            # The last token of the prompt is read in any case.
            limit = min(len(prompt), len(held)) - 1
            if limit > most and held[most] == prompt[most]:
                shared = next((i for i in range(limit) if held[i] != prompt[i]), limit)
                if shared > most:
                    most, best = shared, slot
        rest = len(prompt) - most
        if most < _SHARED_TOKENS - 1 or rest > _MOST_READ or 4 * rest > len(prompt):
            return None, 0
        return best, most

    def refuge(self, slot: int, shared: int, free: Iterable[int]) -> int | None:
        """Returns the free slot to which what one holds should be moved, before it is filled with
        a prompt that shares some tokens of it; None if it is not worth it."""
        tokens = self._tokens[slot]
        if not self._is_on or shared >= len(tokens) - 1 or len(tokens) < _SHARED_TOKENS:
            return None
        oldest = min(free, key=lambda i: self._last_used[i], default=slot)
        return None if oldest == slot else oldest

    def put(self, slot: int, prompt: Sequence[int], adapter: int) -> None:
        """Notes that a prompt, read by an adapter, is in a slot."""
        if self._is_on:
            self._adapters[slot] = adapter
            self._tokens[slot], self._last_used[slot] = list(prompt), time.monotonic()

    def extend(self, slot: int, tokens: Iterable[int]) -> None:
        """Notes what has been written."""
        if self._is_on:
            self._tokens[slot] += tokens

    def cut(self, slot: int, most: int) -> None:
        """Notes that what follows has been written over."""
        del self._tokens[slot][most:]

    def move(self, source: int, target: int) -> None:
        """Notes that the content of a slot is in another one."""
        self._tokens[target], self._tokens[source] = self._tokens[source], []
        self._adapters[target] = self._adapters[source]
        self._last_used[target], self._last_used[source] = self._last_used[source], 0.0
