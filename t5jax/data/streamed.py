"""Training examples as a stream, without a cache, in SeqIO's order.

t5jax's tasks are read in Python, SeqIO's own tasks through SeqIO.
"""

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np

from t5jax.data.batches.examples import Example
from t5jax.data.bridge.task import PythonTask
from t5jax.data.bridge.tf import elements, seqio, tf
from t5jax.data.bridge.vocabulary import building_for
from t5jax.data.prompts.task import TRAIN_SPLIT
from t5jax.data.registry import check_mixture
from t5jax.data.run import Run


class StreamedExamples:
    """`Examples` of a task or mixture, shuffled and mixed as SeqIO does."""

    def __init__(self, mixture: str, run: Run, seed: int):
        self._mixture, self._run, self._seed = check_mixture(mixture), run, seed
        self.fingerprint = {"data.mixture": mixture, "data.cache": None} | run.fingerprint

    def read(self, start: int) -> Iterator[Example]:
        """Yields the examples from number `start` on.

        To get there, t5jax's tasks generate at most two epochs of examples, SeqIO's own tasks all.

        Raises:
          ValueError: if there are no examples, or a task cannot read a row.
        """
        tasks = [t for t in seqio.get_subtasks(self._mixture) if TRAIN_SPLIT in t.splits]
        choices = self._choices(tasks)
        skipped = Counter(itertools.islice(choices, start))
        streams = [self._stream(task, skipped[i]) for i, task in enumerate(tasks)]
        for i in choices:
            if (example := next(streams[i], None)) is None:
                break
            yield example
        raise ValueError(f"{self._mixture.name} has no examples in its split {TRAIN_SPLIT!r}")

    def _choices(self, tasks: list[seqio.Task]) -> Iterator[int]:
        """Yields the index of each example's task."""
        if not isinstance(self._mixture, seqio.Mixture):
            return itertools.repeat(0)
        numbers = [tf.data.Dataset.from_tensors(np.int64(i)).repeat() for i in range(len(tasks))]
        rates = [self._mixture.get_rate(task) for task in tasks]
        drawn = elements(self._mixture._sample_fn(numbers, rates, self._seed).batch(1024))
        return itertools.chain.from_iterable(numbers.tolist() for numbers in drawn)

    def _stream(self, task: seqio.Task, start: int) -> Iterator[Example]:
        if isinstance(task, PythonTask):
            return task.read(TRAIN_SPLIT, self._run, self._seed, start)
        with building_for(self._run):
            dataset = task.get_dataset(
                self._run.lengths, TRAIN_SPLIT, shuffle=True, num_epochs=None, seed=self._seed
            )
        dataset = dataset.map(lambda e: {name: e[name] for name in task.output_features})
        return elements(dataset.skip(start).prefetch(tf.data.AUTOTUNE))
