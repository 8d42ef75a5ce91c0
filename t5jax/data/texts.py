"""The examples of any SeqIO task as texts, and as tokens before truncation.

t5jax's tasks are read without TensorFlow's pipeline, so that dropped rows can be counted. SeqIO's
own tasks are read through SeqIO.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5jax.data.bridge.tf import elements, seqio, tf
from t5jax.data.bridge.vocabulary import RunVocabulary, as_tokenizer, building_for
from t5jax.data.objectives.task import CorpusSource
from t5jax.data.prompts.task import TRAIN_SPLIT
from t5jax.data.registry import check_mixture
from t5jax.data.run import Run
from t5jax.data.sources.kinds import text
from t5jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextExample:
    """One example, as the model sees it but not truncated."""

    texts: Mapping[str, str]
    """The text of each feature: as rendered, or decoded if there are only tokens."""
    ids: Mapping[str, list[int]]
    """The tokens of each feature with eos, not truncated."""


def read_examples(
    task: seqio.Task,
    split: str,
    tokenizers: Mapping[str, Tokenizer],
    lengths: Mapping[str, int],
    dropped: Counter,
) -> Generator[TextExample, None, None]:
    """Yields the examples of a split once, in the source's order.

    Args:
      task: any task.
      split: one of its splits.
      tokenizers: the tokenizer of each feature, see `feature_tokenizers`.
      lengths: the lengths of "inputs" and "targets" in tokens, which exemplars have to fit and
        objectives fill. Other examples are not truncated.
      dropped: counts dropped rows, by reason.
    Raises:
      ValueError: if the task cannot read a row.
    """
    read = _own if hasattr(task.source, "encoded") else _foreign
    for row in read(task, split, tokenizers, lengths, dropped):
        ids = {name: np.ravel(row[name]).tolist() for name in tokenizers if name in row}
        texts = {}
        for name, feature_ids in ids.items():
            text = row.get(f"{name}_pretokenized")
            is_text = isinstance(text, bytes)
            texts[name] = text.decode() if is_text else _decode(tokenizers[name], feature_ids)
        yield TextExample(texts, ids)


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
    if isinstance(task.source, CorpusSource) and task.source.objective.encoder_only:
        return {**lengths, "targets": lengths["inputs"]}  # They are aligned with their inputs.
    return lengths


def _own(task, split, tokenizers, lengths, dropped) -> Iterator[Mapping[str, Any]]:
    run = Run(tokenizers["targets"], lengths=task_lengths(task, lengths))
    finish = task.source.finish(run)
    for number, encoded in enumerate(task.source.encoded(split, run, dropped)):
        yield finish(encoded, 0, number)


def _foreign(task, split, tokenizers, lengths, dropped) -> Iterator[Mapping[str, Any]]:
    def dataset(sequence_length):
        return task.get_dataset(sequence_length, split, shuffle=False, seed=0)

    tokenizer = next(iter(tokenizers.values()))
    with building_for(Run(tokenizer)):
        try:
            found = dataset(None)
        except (KeyError, TypeError, ValueError, AttributeError):
            found = dataset(lengths)  # Preprocessors that split the text need the lengths.
    return elements(found)


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
        for example_text in read_texts(task, split):
            yield from filter(None, example_text.splitlines())


def read_texts(task: seqio.Task, split: str) -> Iterator[str]:
    """Yields the texts of a split before tokenization, without a tokenizer.

    Raises:
      ValueError: if the task cannot read a row, or never has texts.
    """
    if hasattr(task.source, "examples"):
        for example in task.source.examples(split):
            yield from (example[name] for name in task.output_features if name in example)
        return
    dataset = _before_tokens(task, split)
    names = [name for name in task.output_features if name in dataset.element_spec]
    for row in elements(dataset):
        yield from (row[name].decode() for name in names)


def _before_tokens(task: seqio.Task, split: str) -> tf.data.Dataset:
    """Returns the last dataset in the task's pipeline in which the output features are texts."""
    dataset, last = task.source.get_dataset(split, shuffle=False), None
    with seqio.utils.map_seed_manager(0):
        for step in (None, *task.preprocessors):
            if step is not None:
                arguments = {"output_features": task.output_features, "sequence_length": None}
                dataset = seqio.utils.add_kwargs_to_transform(step, **arguments)(dataset)
            # A source may only have lines, before a step makes features of them.
            spec = dataset.element_spec if isinstance(dataset.element_spec, Mapping) else {}
            found = [spec[name].dtype for name in task.output_features if name in spec]
            if found and all(dtype == tf.string for dtype in found):
                last = dataset
            elif found:
                break
    if last is None:
        raise ValueError(
            f"task {task.name!r} has no texts under {', '.join(task.output_features)} before they "
            "are tokens; give text files instead"
        )
    return last
