"""Training examples straight from SeqIO, without a cache."""

import weakref
from collections.abc import Iterator

from t5jax.data.batches.examples import Example
from t5jax.data.bridge.tf import read, tf
from t5jax.data.bridge.vocabulary import Run, building_for
from t5jax.data.prompts.task import TRAIN_SPLIT
from t5jax.data.registry import check_mixture
from t5jax.tokenizers import LabelTokenizer, Tokenizer


class StreamedExamples:
    """`Examples` straight from SeqIO, in the order of its own shuffling and mixing."""

    def __init__(
        self,
        mixture: str,
        tokenizer: Tokenizer,
        lengths: dict[str, int],
        seed: int,
        labels: LabelTokenizer | None = None,
    ):
        """Reads nothing yet; `labels` are those of a run whose model is a classifier."""
        self._mixture, self._tokenizer = check_mixture(mixture), tokenizer
        self._lengths, self._seed, self._labels = lengths, seed, labels
        self.fingerprint = {
            "data.mixture": mixture,
            "data.cache": None,
            "vocabulary": repr(tokenizer),
        }
        if labels is not None:
            self.fingerprint["model.labels"] = repr(labels)

    def read(self, start: int) -> Iterator[Example]:
        """Yields the examples from number `start` on; those before it are made and skipped.

        Raises:
          ValueError: for no examples, and for what a task cannot read.
        """
        dataset = self._dataset().skip(start).prefetch(tf.data.AUTOTUNE)
        opened = [dataset.as_numpy_iterator()]
        # At the latest when Python exits: it would wait forever for threads that read on.
        close = weakref.finalize(self, opened.clear)
        try:
            while (example := read(lambda: next(opened[0], None))) is not None:
                yield example
        finally:
            close()
        raise ValueError(f"{self._mixture.name} has no examples in its split {TRAIN_SPLIT!r}")

    def _dataset(self) -> tf.data.Dataset:
        with building_for(Run(self._tokenizer, self._labels)):
            dataset = self._mixture.get_dataset(
                self._lengths, TRAIN_SPLIT, shuffle=True, num_epochs=None, seed=self._seed
            )
        features = list(self._mixture.output_features)
        options = tf.data.Options()
        options.deterministic = True
        return dataset.map(lambda e: {name: e[name] for name in features}).with_options(options)
