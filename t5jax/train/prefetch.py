"""The next batch is read and sent to the devices while they compute the current step."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from t5jax import sharding
from t5jax.config import AxisRules
from t5jax.data.batches.examples import BatchIterator, Taken
from t5jax.distill.cache import TaughtBatches
from t5jax.monitor import progress


class Fetched(NamedTuple):
    """A batch on the devices."""

    arrays: dict[str, jax.Array]
    num_tokens: int
    """Of all processes, without padding; of several, estimated from this one's rows."""
    taken: Taken
    """Its examples."""
    position: dict[str, Any]
    """The position after this batch, which a checkpoint of its step needs: by then the iterator is
    one batch ahead."""

    @property
    def number(self) -> int:
        """Of the batch among those that the run reads, from 1."""
        return int(self.position["batches"])


class Prefetch:
    """Transfers the next batch to the devices while they run the current step."""

    def __init__(
        self,
        iterator: BatchIterator | TaughtBatches,
        mesh: jax.sharding.Mesh,
        rules: AxisRules,
        timed: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """Fetches nothing yet; `timed` returns a context for each fetch."""
        self._iterator, self._mesh, self._rules, self._timed = iterator, mesh, rules, timed
        self._slot: Fetched | None = None

    def fetch(self) -> None:
        """Reads the next batch, which `next` returns then."""
        with self._timed():
            batch = next(self._iterator)
            batch_size = self._iterator.spec.batch_size
            arrays = sharding.shard_batch(batch, self._mesh, self._rules, batch_size)
            share = len(next(iter(batch.values()))) / batch_size
            num_tokens = round(progress.count_tokens(batch) / share)
            taken, position = self._iterator.taken(), self._iterator.state()
            self._slot = Fetched(arrays, num_tokens, taken, position)

    def try_fetch(self) -> Exception | None:
        """Fetches; returns the error of the data instead of raising it."""
        try:
            self.fetch()
        except Exception as error:
            raise_among_several(error)
            return error
        return None

    def __next__(self) -> Fetched:
        if self._slot is None:
            self.fetch()
        assert self._slot is not None
        slot, self._slot = self._slot, None
        return slot


def raise_among_several(error: Exception) -> None:
    """Raises the error if there are other processes: they would wait in vain for this one."""
    if jax.process_count() > 1:
        raise error
