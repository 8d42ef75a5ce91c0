"""Text tasks: documents and an objective become a SeqIO task.

    text_task("novels", text({"train": "books/*.txt"}, ...), SpanCorruption())

Documents are tokenized, joined with eos, and split into pieces of which each fills a row (Raffel et
al. 2020, arXiv:1910.10683, section 3.1.2); no tokens are dropped. The objective makes an example of
each piece, a different one in each epoch.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from t5jax.data.batches.examples import Example
from t5jax.data.bridge.task import TOKENS, add_task
from t5jax.data.bridge.tf import seqio
from t5jax.data.bridge.vocabulary import RunVocabulary
from t5jax.data.objectives.objectives import BoundObjective, Objective, cut, example_rng
from t5jax.data.run import Run
from t5jax.data.sources.source import Row, Source, get_field


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
    corpus = CorpusSource(name, source, field, objective)
    return add_task(name, corpus, RunVocabulary(vocabulary), metric_fns=list(metrics))


class CorpusSource:
    """The documents of a task, and their pieces."""

    def __init__(self, task: str, source: Source, field: str, objective: Objective):
        self.task, self.source, self.field, self.objective = task, source, field, objective
        self.splits, self.features = source.splits, dict.fromkeys(objective.features, TOKENS)

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

    def encoded(self, split: str, run: Run, dropped: Counter | None = None) -> Iterator[np.ndarray]:
        """Yields the documents' tokens in pieces that fill a row; the last may be shorter."""
        documents = (run.tokenizer.encode(e["targets"]) for e in self.examples(split, dropped))
        return cut(documents, run.tokenizer.eos_id, self.bind(run).tokens_length)

    def finish(self, run: Run) -> Callable[..., Example]:
        """Returns the objective as a function of a piece and two seeds."""
        bound = self.bind(run)
        return lambda piece, *seeds: bound(piece, example_rng(*seeds))

    def bind(self, run: Run) -> BoundObjective:
        """Returns the objective for the run's lengths, or raises ValueError if they do not suit."""
        missing = set(self.objective.features) - set(run.lengths)
        if missing:
            raise ValueError(
                f"task {self.task!r} is read without a length of {', '.join(sorted(missing))}; "
                "the objective needs them to cut the text, so give SeqIO a sequence_length"
            )
        # An objective without inputs does not ask for their length.
        inputs, targets = run.lengths.get("inputs", 0), run.lengths["targets"]
        return self.objective.bind(run.tokenizer, inputs, targets)
