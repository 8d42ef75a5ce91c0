"""Text tasks: documents and an objective become a SeqIO task.

    text_task("novels", text({"train": "books/*.txt"}, ...), SpanCorruption())

Documents are tokenized, joined with eos, and split into pieces of which each fills a row (Raffel et
al. 2020, arXiv:1910.10683, section 3.1.2); no tokens are dropped. The objective makes an example of
each piece, a different one in each epoch.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5jax.data.batches.examples import Example
from t5jax.data.bridge.tf import from_generator, seqio, tf
from t5jax.data.bridge.vocabulary import RunTask, RunVocabulary, current_run
from t5jax.data.objectives.objectives import Objective, cut, example_rng
from t5jax.data.prompts.task import SHUFFLE_BUFFER
from t5jax.data.sources.source import Row, Source, get_field
from t5jax.tokenizers import Tokenizer


def text_task(
    name: str,
    source: Source,
    objective: Objective,
    *,
    field: str = "text",
    vocabulary: Any = None,
    metrics: Sequence[Callable] = (),
) -> seqio.Task:
    """Registers a SeqIO task over plain text.

    Args:
      name: the name of the task in configs and mixtures.
      source: the documents, one per row; training reads its split "train".
      objective: one of `t5jax.data.objectives.objectives`.
      field: the field with the text; "a.b" is field b of field a.
      vocabulary: the vocabulary of runs that do not set one; see `prompted_task`.
      metrics: functions of (targets, predictions); by default none, so that evaluation only
        computes the loss.
    Returns:
      The task, which is now in `seqio.TaskRegistry`.
    Raises:
      ValueError: if the name is taken. When examples are read, if a row lacks the field, or the
        lengths or the vocabulary do not suit the objective.
    """
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        raise ValueError(f"there is a task or mixture {name!r} already; choose another name")
    run_vocabulary = RunVocabulary(vocabulary)
    feature = seqio.Feature(run_vocabulary, add_eos=False)  # The objective adds it.
    return seqio.TaskRegistry.add(
        name,
        source=CorpusSource(name, source, field, objective, run_vocabulary),
        output_features=dict.fromkeys(objective.features, feature),
        preprocessors=[seqio.CacheDatasetPlaceholder(), ObjectiveStep(objective)],
        metric_fns=list(metrics),
        shuffle_buffer_size=None,  # The source shuffles.
        task_cls=RunTask,
    )


class CorpusSource(seqio.DataSource):
    """The documents of a task, and their pieces."""

    supports_arbitrary_sharding = False

    def __init__(
        self,
        task: str,
        source: Source,
        field: str,
        objective: Objective,
        vocabulary: RunVocabulary,
    ):
        super().__init__(splits=source.splits, performs_internal_shuffling=True)
        self.task, self.source, self.field, self.objective = task, source, field, objective
        self._vocabulary = vocabulary

    def examples(self, split: str, dropped: Counter | None = None) -> Iterator[dict[str, str]]:
        """Yields {"targets": document} for every row.

        Args:
          split: the name of the split.
          dropped: counts the rows that the source drops, by reason.
        Raises:
          ValueError: if a row cannot be read or lacks the field, with task, split and row.
        """
        try:
            for number, row in self.source.numbered(split, dropped):
                yield {"targets": self._text(split, number, row)}
        except ValueError as error:
            raise ValueError(f"task {self.task!r}: {error}") from None

    def _text(self, split: str, number: int, row: Row) -> str:
        try:
            text = get_field(row, self.field)
            if not isinstance(text, str):
                raise ValueError(f"field {self.field!r} is {text!r:.60}; expected a text")
        except ValueError as error:
            raise ValueError(f"split {split!r}, row {number}: {error}") from None
        return text

    def pieces(
        self, split: str, tokenizer: Tokenizer, length: int, dropped: Counter | None = None
    ) -> Iterator[np.ndarray]:
        """Yields the documents' tokens in pieces, int32 [length]; the last may be shorter."""
        documents = (tokenizer.encode(e["targets"]) for e in self.examples(split, dropped))
        return cut(documents, tokenizer.eos_id, length)

    # The interface of SeqIO.

    def list_shards(self, split):
        return [split]

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **_):
        # There is one shard, so SeqIO never requests a part of it.
        lengths = current_run().lengths or {}
        missing = set(self.objective.features) - set(lengths)
        if missing:
            raise ValueError(
                f"task {self.task!r} is read without a length of {', '.join(sorted(missing))}; "
                "the objective needs them to cut the text, so give SeqIO a sequence_length"
            )
        tokenizer = self._vocabulary.tokenizer
        length = self.objective.tokens_length(*_bind_args(tokenizer, lengths))
        dataset = from_generator(
            lambda: ({"targets": piece} for piece in self.pieces(split, tokenizer, length)),
            {"targets": tf.TensorSpec([None], tf.int32)},
        )
        # SeqIO repeats the data after this, so that each epoch has every piece once.
        return dataset.shuffle(SHUFFLE_BUFFER, seed=seed) if shuffle else dataset


class ObjectiveStep:
    """An objective as a SeqIO preprocessor: pieces of text ("targets") become examples."""

    def __init__(self, objective: Objective):  # SeqIO gives a dataclass no lengths.
        self.objective = objective

    def __call__(self, dataset, sequence_length, output_features):
        tokenizer = output_features["targets"].vocabulary.tokenizer
        bound = self.objective.bind(*_bind_args(tokenizer, sequence_length))
        names = self.objective.features

        def apply(tokens: np.ndarray, *seed: np.ndarray) -> list[np.ndarray]:
            example: Example = bound(tokens, example_rng(*map(int, seed)))
            return [example[name] for name in names]

        @seqio.map_over_dataset(num_seeds=1)
        def step(example, seed):
            arrays = tf.numpy_function(apply, [example["targets"], *seed], [tf.int32] * len(names))
            return {n: tf.ensure_shape(x, [None]) for n, x in zip(names, arrays, strict=True)}

        return step(dataset)


def _bind_args(tokenizer: Tokenizer, lengths: Mapping[str, int]) -> tuple[Tokenizer, int, int]:
    # An objective without inputs does not ask for their length.
    return tokenizer, lengths.get("inputs", 0), lengths["targets"]
