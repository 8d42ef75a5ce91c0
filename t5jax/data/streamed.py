"""Training examples as a stream, without a cache.

t5jax's tasks are read in Python, SeqIO's own tasks through SeqIO; tasks are mixed as SeqIO does.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from t5jax.data.batches.examples import Example, several_tasks
from t5jax.data.bridge.tf import elements, seqio, tf
from t5jax.data.registry import check_mixture
from t5jax.data.run import TRAIN_SPLIT, Run
from t5jax.data.stamps import sketch
from t5jax.data.tasks.base import OwnSource
from t5jax.data.tasks.foreign import kind_of


class StreamedExamples:
    """`Examples` of a task or mixture."""

    def __init__(self, mixture: str, run: Run, seed: int):
        self._mixture, self._run, self._seed = check_mixture(mixture), run, seed
        self._tasks = [t for t in seqio.get_subtasks(self._mixture) if TRAIN_SPLIT in t.splits]
        self.fingerprint = {"data.mixture": mixture, "data.cache": None} | run.fingerprint
        for task in self._tasks:
            files = kind_of(task).files(TRAIN_SPLIT)
            if any("://" in file for file in files) and not isinstance(task.source, OwnSource):
                continue  # TensorFlow reads them, which knows other stores.
            names = [Path(file).name for file in files]
            if files:
                self.fingerprint[f"the files of {task.name}"] = names
            for file, name in zip(files, names, strict=True):
                key = f"the content of {name}"
                self.fingerprint[key] = self.fingerprint.get(key, "") + sketch(file)

    def windows(self, start: int, most: int) -> Iterator[list[Example]]:
        """Yields the examples from number `start` on in windows.

        A window has at most `most` examples and ends with a task's epoch. In a mixture, tasks whose
        epochs are shorter than `most` times the number of tasks are ignored, as those of caches.
        To get to the start, t5jax's tasks generate at most two epochs of examples, SeqIO's own
        tasks all.

        Raises:
          ValueError: if there are no examples, or a task cannot read a row.
        """
        choices = self._choices()
        read = Counter(itertools.islice(choices, start))
        streams = [
            kind_of(task).stream(TRAIN_SPLIT, self._run, self._seed, read[i])
            for i, task in enumerate(self._tasks)
        ]
        window: list[Example] = []
        epochs: dict[int, int] = {}
        for number, i in enumerate(choices, start):
            try:
                epoch, example = next(streams[i])
            except StopIteration:
                break
            is_new = epoch > epochs.setdefault(i, epoch)
            # The examples of the mixture in an epoch of the task, as far as it has been read.
            is_long = is_new and number / epoch >= most * len(self._tasks)
            epochs[i] = epoch
            if len(window) == most or (is_new and (len(self._tasks) == 1 or is_long)):
                yield window
                # As where a run that is resumed begins, which knows no epochs from before.
                window, epochs = [], {i: epoch}
            window.append(example)
        raise ValueError(f"{self._mixture.name} has no examples in its split {TRAIN_SPLIT!r}")

    @property
    def is_one_task(self) -> bool:
        return len(self._tasks) == 1

    def epoch(self) -> int:
        """Returns the number of examples of an epoch, by making them once.

        Raises:
          ValueError: for several tasks, or one of SeqIO's own.
        """
        if not self.is_one_task:
            raise ValueError(several_tasks([task.name for task in self._tasks]))
        (task,) = self._tasks
        kind = kind_of(task)
        if not isinstance(kind, OwnSource):
            raise ValueError(
                f"train.epochs is set, but {task.name} is a task of SeqIO's own, whose examples "
                "are only counted in a cache; set data.cache to a folder, or give train.steps and "
                "leave train.epochs out"
            )
        return sum(1 for _ in kind.encode(kind.rows(TRAIN_SPLIT), TRAIN_SPLIT, self._run))

    def _choices(self) -> Iterator[int]:
        """Yields the index of each example's task."""
        if not isinstance(self._mixture, seqio.Mixture):
            return itertools.repeat(0)
        tasks = range(len(self._tasks))
        numbers = [tf.data.Dataset.from_tensors(np.int64(i)).repeat() for i in tasks]
        rates = [self._mixture.get_rate(task) for task in self._tasks]
        drawn = elements(self._mixture._sample_fn(numbers, rates, self._seed).batch(1024))
        return itertools.chain.from_iterable(numbers.tolist() for numbers in drawn)
