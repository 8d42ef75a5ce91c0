"""Values in a temporary file, which can be read in any order."""

import pickle
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

IN_MEMORY = 1 << 28
"""Bytes that are held in memory; a larger spool is a file."""

MOST = 1 << 32
"""Bytes in all; also at most half of what is free on the disk."""


class Spool:
    """Values that were read once, in a temporary file that ends with the process."""

    def __init__(self, values: Iterable[Any]):
        """Reads all values.

        Raises:
          OverflowError: if they take too much space, or cannot be written.
        """
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115
        self._ends = array("Q", [0])
        most = min(MOST, IN_MEMORY + shutil.disk_usage(tempfile.gettempdir()).free // 2)
        for value in values:
            try:
                self._file.write(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
            except Exception as error:  # The disk is full, or a user's object cannot be pickled.
                raise OverflowError(f"{type(error).__name__}: {error}") from None
            self._ends.append(self._file.tell())
            if self._ends[-1] > most:
                raise OverflowError(f"they take more than {most:,} bytes")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, places: np.ndarray) -> Iterator[Any]:
        """Yields the values at these places, int [n], in this order."""
        for place in map(int, places):
            start, end = self._ends[place], self._ends[place + 1]
            self._file.seek(start)
            yield pickle.loads(self._file.read(end - start))
