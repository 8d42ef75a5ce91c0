"""Text tasks: documents and an objective become a SeqIO task.

    text_task("novels", text({"train": "books/*.txt"}, ...), SpanCorruption())

Documents are tokenized, joined with eos, and split into pieces of which each fills a row (Raffel et
al. 2020, arXiv:1910.10683, section 3.1.2); no tokens are dropped. The objective makes an example of
each piece, a different one in each epoch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from t5jax.data.bridge.tf import seqio
from t5jax.data.bridge.vocabulary import RunVocabulary
from t5jax.data.fingerprint import describe
from t5jax.data.objectives.base import BoundObjective, Objective, cut, example_rng
from t5jax.data.recipe import DOCUMENTS, Encoder, Recipe, in_chunks, source_files
from t5jax.data.run import Run
from t5jax.data.sources.source import Source, get_field
from t5jax.data.tasks.base import TOKENS, NumberedRow, OwnSource, check_functions


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
      objective: one of `t5jax.data.objectives`, such as SpanCorruption().
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
    try:
        check_functions(metrics)
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from None
    corpus = CorpusSource(name, source, field, objective)
    return corpus.register(RunVocabulary(vocabulary), metric_fns=list(metrics))


class CorpusSource(OwnSource):
    """The documents of a task, and the pieces of their tokens."""

    def __init__(self, task: str, source: Source, field: str, objective: Objective):
        super().__init__(task, source)
        self.field, self.objective = field, objective
        self.features = dict.fromkeys(objective.features, TOKENS)

    def documents(self, rows: Iterable[NumberedRow], split: str) -> Iterator[str]:
        """Yields the text of each row.

        Raises:
          ValueError: if a row lacks the field, with task, split and row.
        """
        for _, number, row in rows:
            try:
                text = get_field(row, self.field)
                if not isinstance(text, str):
                    raise ValueError(f"field {self.field!r} is {text!r:.60}; expected a text")
            except ValueError as error:
                where = f"task {self.task!r}: split {split!r}, row {number}"
                raise ValueError(f"{where}: {error}") from None
            yield text

    def texts(self, split):
        return self.documents(self.rows(split), split)

    def encode(self, rows, split, run, dropped=None):
        """Yields the documents' tokens in pieces that fill a row; the last may be shorter."""
        documents = map(run.tokenizer.encode, self.documents(rows, split))
        return cut(documents, run.tokenizer.eos_id, self.bind(run).tokens_length)

    def finish(self, run):
        bound = self.bind(run)
        return lambda piece, *seeds: bound(piece, example_rng(*seeds))

    def bind(self, run: Run) -> BoundObjective:
        missing = set(self.objective.features) - set(run.lengths)
        if missing:
            raise ValueError(
                f"task {self.task!r} is read without a length of {', '.join(sorted(missing))}; "
                "the objective needs them to cut the text, so give SeqIO a sequence_length"
            )
        return self.objective.bind(run.tokenizer, *_sides(run))

    def recipe(self, split, run):
        length = self.objective.tokens_length(run.tokenizer, *_sides(run))
        content = {
            "the tokens of a piece": length,
            "the code of its rows": describe([self.source, self.field]),
        }

        def chunks(dropped):
            documents = self.documents(self.rows(split, dropped), split)
            return in_chunks(({"targets": text} for text in documents), DOCUMENTS)

        encoder = Encoder(("targets",), {"targets": None}, run.tokenizer, piece_length=length)
        files = source_files(self.source, split)
        return Recipe(self.task, split, run, chunks, encoder, content, files)


def _sides(run: Run) -> tuple[int, int]:
    """Returns the lengths of both sides; an objective without inputs does not ask for theirs."""
    return run.lengths.get("inputs", 0), run.lengths["targets"]
