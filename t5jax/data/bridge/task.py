"""Tasks whose examples are made in Python, in SeqIO's registry.

TensorFlow shuffles and repeats the examples' numbers alone, as SeqIO would the examples; texts and
tokens wait in Python until their number comes out.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from t5jax.data.bridge.tf import elements, from_generator, seqio, tf
from t5jax.data.bridge.vocabulary import RunVocabulary
from t5jax.data.run import Run

SHUFFLE_BUFFER = 10_000
"""Size of the buffer in which training shuffles examples. A longer source that is sorted (by class,
say) should be shuffled on disk first."""

TOKENS, TEXT = tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.string)

_CHUNK = 256  # Numbers that cross between Python and TensorFlow at once.


def add_task(name: str, source: Any, vocabulary: RunVocabulary, **settings) -> "PythonTask":
    """Registers and returns a `PythonTask`; the settings are those of `seqio.Task`."""
    check_new(name)
    tokens = [feature for feature, spec in source.features.items() if spec is TOKENS]
    features = dict.fromkeys(tokens, seqio.Feature(vocabulary))
    settings |= {"source": source, "output_features": features, "task_cls": PythonTask}
    return seqio.TaskRegistry.add(name, **settings)


def check_new(name: str) -> None:
    """Raises ValueError for the name of a task or mixture that is there already."""
    if name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        raise ValueError(f"there is a task or mixture {name!r} already; choose another name")


class PythonTask(seqio.Task):
    """A task whose source makes the examples.

    `source.encoded(split, run)` yields a split once, in its order, as tokens: what comes before
    anything random. `source.finish(run)` is the function of one of these and two seeds that gives
    the example, whose features and their types are `source.features`.
    """

    def read(self, split: str, run: Run, seed: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields the training examples of all epochs from number `start` on."""
        order, take = self._ordered(split, run, seed, skipped=start)
        chunks = (np.stack(c, axis=1).tolist() for c in elements(order.batch(_CHUNK).prefetch(1)))
        examples = itertools.starmap(take, itertools.chain.from_iterable(chunks))
        for example in itertools.islice(examples, start, None):
            yield {name: example[name] for name in self.output_features}

    def get_dataset(
        self, sequence_length=None, split="train", use_cached=False, shuffle=True,
        shuffle_buffer_size=None, seed=None, shard_info=None, num_epochs=1, **_,
    ):  # fmt: skip
        """As `seqio.Task` has it; always shuffled among SHUFFLE_BUFFER examples, never cached."""
        vocabulary = next(iter(self.output_features.values())).vocabulary
        run = vocabulary.run._replace(lengths=sequence_length or {})
        shard = (shard_info.index, None, shard_info.num_shards) if shard_info else (None,)
        order, take = self._ordered(split, run, seed, shuffle, num_epochs, shard)
        features = self.source.features

        def look_up(*numbers):
            return list(map(take(*numbers).get, features))

        def fetch(*numbers):
            values = tf.numpy_function(look_up, numbers, [x.dtype for x in features.values()])
            named = zip(features, values, strict=True)
            return {name: tf.ensure_shape(x, features[name].shape) for name, x in named}

        return order.map(fetch).prefetch(tf.data.AUTOTUNE)

    def _ordered(self, split, run, seed, shuffle=True, num_epochs=None, shard=(None,), skipped=0):
        """Returns the order of the examples, and the function that takes one from its place in it.

        The order is a data set of an example's number and two seeds, int64, which are what the
        function takes, each number once. Up to SHUFFLE_BUFFER examples are made once and kept. Of
        the first `skipped` examples, which nobody looks at, those of whole epochs are made once.
        """
        finish = self.source.finish(run)
        waiting: dict[int, Any] = {}
        kept: list[Any] = []
        next_number = size = 0

        def epoch():
            nonlocal next_number, size
            first, made = next_number, []
            if is_skipped := 0 < size <= skipped - first:
                examples = itertools.repeat(None, size)
            elif kept:
                examples = iter(kept)
            else:
                examples = itertools.islice(self.source.encoded(split, run), *shard)
            while chunk := list(itertools.islice(examples, _CHUNK)):
                numbers = range(next_number, next_number + len(chunk))
                next_number += len(chunk)
                waiting.update(zip(numbers, chunk, strict=True))
                made = made + chunk if next_number - first <= SHUFFLE_BUFFER else []
                yield np.array(numbers)
            size = next_number - first
            if made and not is_skipped:
                kept[:] = made

        def take(number, *seeds):
            encoded = waiting.pop(number)
            if encoded is None:
                return None
            example = finish(encoded, *seeds)
            return {name: _cut(x, run.lengths.get(name)) for name, x in example.items()}

        order = from_generator(epoch, tf.TensorSpec([None], tf.int64)).unbatch()
        if shuffle:
            order = order.shuffle(SHUFFLE_BUFFER, seed=seed)
        seeds = (None, None) if seed is None else (seed, seed + 1)
        seeds = map(tf.data.Dataset.random, seeds)
        return tf.data.Dataset.zip(order.repeat(num_epochs), *seeds), take


def _cut(value: Any, length: int | None) -> Any:
    """Returns tokens as they are, or where they are longer, their beginning and what ends them."""
    is_longer = length is not None and len(value) > length
    return np.append(value[: length - 1], value[-1]) if is_longer else value
