"""The examples of any SeqIO task as texts, and as tokens before truncation."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5jax.data.bridge.tf import seqio
from t5jax.data.bridge.vocabulary import RunVocabulary, as_tokenizer
from t5jax.data.registry import check_mixture
from t5jax.data.run import TRAIN_SPLIT, Run
from t5jax.data.sources.kinds import text
from t5jax.data.tasks.foreign import kind_of
from t5jax.tokenizers import LabelTokenizer, Tokenizer


@dataclasses.dataclass(frozen=True)
class TextExample:
    """One example, as the model sees it but not truncated."""

    texts: Mapping[str, str]
    """The text of each feature: as rendered, or decoded if there are only tokens."""
    ids: Mapping[str, list[int]]
    """The tokens of each feature with eos, not truncated."""
    row: Mapping[str, Any]
    """The whole example, as a task's postprocessing takes it."""


def read_examples(
    task: seqio.Task,
    split: str,
    tokenizers: Mapping[str, Tokenizer],
    lengths: Mapping[str, int],
    dropped: Counter,
    most: int | None = None,
    labels: LabelTokenizer | None = None,
) -> Generator[TextExample, None, None]:
    """Yields the examples of a split once.

    Args:
      task: any task.
      split: one of its splits.
      tokenizers: the tokenizer of each feature, see `feature_tokenizers`.
      lengths: the lengths of "inputs" and "targets" in tokens, which exemplars have to fit and
        objectives fill. Other examples are not truncated.
      dropped: counts dropped rows, by reason.
      most: the maximum number of examples. If there are more, they are drawn from the whole split;
        otherwise they come in order.
      labels: the classes of a classifier, which targets must be.
    Raises:
      ValueError: if the task cannot read a row.
    """
    run = Run(tokenizers["targets"], labels, task_lengths(task, lengths))
    kind = kind_of(task)
    for row in kind.once(split, run, dropped, most=most, whole=True):
        ids = {name: np.ravel(row[name]).tolist() for name in tokenizers if name in row}
        if kind.has_pairs:  # As a model reads them.
            ends = tokenizers["inputs"].pad_id, tokenizers["inputs"].eos_id
            ids["inputs"] = [ends[1] if i == ends[0] else i for i in ids["inputs"]]
        texts = {}
        for name, feature_ids in ids.items():
            text = row.get(f"{name}_pretokenized")
            is_text = isinstance(text, bytes)
            texts[name] = text.decode() if is_text else _decode(tokenizers[name], feature_ids)
        yield TextExample(texts, ids, row)


def feature_tokenizers(
    task: seqio.Task, tokenizer: Tokenizer | None = None
) -> dict[str, Tokenizer]:
    """Returns the tokenizer of each of a task's features.

    Args:
      task: any task.
      tokenizer: the run's tokenizer, for features that do not fix one.
    Raises:
      ValueError: if a feature has none.
    """
    found = {}
    for name, feature in task.output_features.items():
        if isinstance(feature.vocabulary, RunVocabulary):
            found[name] = tokenizer or feature.vocabulary.default
        else:
            found[name] = as_tokenizer(feature.vocabulary)
        if found[name] is None:
            raise ValueError(
                f"task {task.name} leaves its vocabulary to the run; name one here too, such as "
                '--vocabulary bytes, or give the task its own (vocabulary="bytes")'
            )
    return found


def subtasks(found: Sequence[seqio.Task | seqio.Mixture]) -> list[seqio.Task]:
    """Returns the tasks of tasks and mixtures, each once."""
    return list({task.name: task for each in found for task in seqio.get_subtasks(each)}.values())


def common_tokenizer(mixture: str, tokenizer: Tokenizer | None = None) -> Tokenizer:
    """Returns the tokenizer that all features of a registered task or of a mixture's tasks share.

    Raises:
      ValueError: if a feature has none, or they have different ones.
    """
    tasks = seqio.get_subtasks(check_mixture(mixture))
    found = {repr(t): t for task in tasks for t in feature_tokenizers(task, tokenizer).values()}
    if len(found) > 1:
        raise ValueError(
            f"{mixture} has several vocabularies: {', '.join(found)}; name the one of the run with "
            "--vocabulary"
        )
    return next(iter(found.values()))


def task_lengths(task: seqio.Task, lengths: Mapping[str, int]) -> Mapping[str, int]:
    """Returns the lengths of a task's features in a run with these."""
    objective = kind_of(task).objective
    if objective is not None and objective.encoder_only:
        return {**lengths, "targets": lengths["inputs"]}  # They are aligned with their inputs.
    return lengths


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Returns the text of all ids without a last eos; one between documents is shown."""
    ids = ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids
    is_eos = [i == tokenizer.eos_id for i in ids]
    documents = [
        tokenizer.decode(i for i, _ in group)
        for ends, group in itertools.groupby(zip(ids, is_eos, strict=True), lambda pair: pair[1])
        if not ends
    ]
    return f" {tokenizer.special_tokens['eos_token']} ".join(documents)


# --- Texts alone --------------------------------------------------------------------------------


def read_lines(names: Sequence[str], split: str = TRAIN_SPLIT) -> Iterator[str]:
    """Yields lines to train a vocabulary on.

    Args:
      names: one registered task or variant; or text files, as for `t5jax.data.text`.
      split: the split of the task.
    Raises:
      ValueError: if there is no such task or file, no such split, or a row cannot be read.
    """
    if len(names) > 1 or any(mark in names[0] for mark in "./*") or Path(names[0]).is_file():
        yield from (row["text"] for row in text({"files": names}).rows("files"))
        return
    for task in seqio.get_subtasks(check_mixture(names[0])):
        if split not in task.splits:
            raise ValueError(
                f"task {task.name!r} has no split {split!r}; there are {', '.join(task.splits)}"
            )
        for example_text in kind_of(task).texts(split):
            yield from filter(str.strip, example_text.split("\n"))
