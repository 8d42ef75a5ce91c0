"""SeqIO's own tasks, which are read through SeqIO."""

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Callable, Mapping

import numpy as np

from t5jax.data.bridge.tf import elements, seqio, tf
from t5jax.data.bridge.vocabulary import building_for
from t5jax.data.fingerprint import describe
from t5jax.data.recipe import CHUNK, Encoder, Recipe, in_chunks
from t5jax.data.tasks.base import Kind, OwnSource
from t5jax.tokenizers.training import sample

_log = logging.getLogger(__name__)

_LAST_STEPS = (seqio.preprocessors.append_eos, seqio.preprocessors.append_eos_after_trim)


def kind_of(task: seqio.Task) -> Kind:
    """Returns what reads a task."""
    return task.source if isinstance(task.source, OwnSource) else ForeignTask(task)


@dataclasses.dataclass(frozen=True)
class ForeignTask(Kind):
    """A task made with SeqIO alone."""

    task: seqio.Task

    def origin(self):
        source = self.task.source
        if isinstance(source, seqio.TfdsDataSource):
            return f"TFDS {source.tfds_dataset.name}"
        return type(source).__name__

    def files(self, split):
        source = self.task.source
        return list(source.list_shards(split)) if isinstance(source, seqio.FileDataSource) else []

    def num_rows(self, split):
        count = self.task.num_input_examples(split)
        if count is None:
            dataset = self.task.source.get_dataset(split, shuffle=False)
            count = sum(1 for _ in elements(dataset))
        return count

    def texts(self, split):
        dataset = self._before_tokens(split)
        names = [name for name in self.task.output_features if name in dataset.element_spec]
        for row in elements(dataset):
            yield from (row[name].decode() for name in names)

    def once(self, split, run, dropped=None, *, most=None, whole=False):
        examples = self._once(split, run, whole)
        return examples if most is None else iter(sample(examples, most))

    def _once(self, split, run, whole):
        def dataset(sequence_length):
            return self.task.get_dataset(sequence_length, split, shuffle=False, seed=0)

        with building_for(run):
            if whole:
                # Steps that split the text need the lengths.
                with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                    return elements(dataset(None))
            return elements(dataset(run.lengths))

    def stream(self, split, run, seed, start=0):
        buffer, size = self.task.shuffle_buffer_size or 0, self.task.num_input_examples(split)
        if size is None or size > buffer:
            _log.warning(
                "task %s: SeqIO shuffles its examples among %s at a time; rows that are sorted (by "
                "class, say) should be shuffled on disk first, or cached (data.cache), which "
                "shuffles all of them",
                *(self.task.name, f"{buffer:,}"),
            )
        with building_for(run):
            dataset = self.task.get_dataset(
                run.lengths, split, shuffle=True, num_epochs=None, seed=seed
            )
        dataset = dataset.map(lambda e: {name: e[name] for name in self.task.output_features})
        # SeqIO shuffles across the borders of epochs.
        return ((0, e) for e in elements(dataset.skip(start).prefetch(tf.data.AUTOTUNE)))

    def recipe(self, split, run):
        """Returns the recipe of its steps before CacheDatasetPlaceholder or a last eos.

        SeqIO reads it with all cores, so more processes would not help.
        """
        task, (tokenizer, _, lengths) = self.task, run
        before, last = self._steps()
        features = tuple(name for name in ("inputs", "targets") if name in task.output_features)
        appended = {
            f: tokenizer.eos_id if last and task.output_features[f].add_eos else None
            for f in features
        }
        # SeqIO cuts what is too long at the end of a task, whether eos is there or not.
        is_kept = last is seqio.preprocessors.append_eos_after_trim
        kept = appended if is_kept else dict.fromkeys(features)

        def rows(seed):
            dataset = task.source.get_dataset(split=split, shuffle=False)
            arguments = {"output_features": task.output_features, "sequence_length": lengths}
            with building_for(run), seqio.utils.map_seed_manager(seed):
                for step in before:
                    dataset = seqio.utils.add_kwargs_to_transform(step, **arguments)(dataset)
            for chunk in in_chunks(elements(dataset), CHUNK):
                try:
                    yield [{f: _with_eos(row, f, appended[f]) for f in features} for row in chunk]
                except ValueError as error:
                    raise ValueError(f"task {task.name}: {error}") from None

        def chunks(dropped):
            first, other = (
                [tokens.tobytes() for row in next(rows(seed), []) for tokens in row.values()]
                for seed in (0, 1)
            )
            if first != other:
                raise ValueError(
                    f"task {task.name} draws at random before what would be cached, which would "
                    "then be the same in every epoch; put seqio.CacheDatasetPlaceholder() before "
                    "that step, or register the task with t5jax.data.text_task and an objective"
                )
            return rows(0)

        content = {
            "the code of its source": describe(task.source),
            "its preprocessors": describe(before),
            "its features": [list(appended.items()), list(kept.items())],
        }
        if any("sequence_length" in inspect.signature(step).parameters for step in before):
            content |= {f"data.{name}_length": length for name, length in lengths.items()}
        encoder = Encoder(features, kept, tokenizer, tokenized=True)
        return Recipe(task.name, split, run, chunks, encoder, content, self.files(split))

    def _steps(self) -> tuple[list, Callable | None]:
        """Returns the steps before what is cached, and the one after them that appends eos."""
        before, after = list(self.task.preprocessors), []
        places = [isinstance(step, seqio.CacheDatasetPlaceholder) for step in before]
        if any(places):
            before, after = before[: places.index(True)], before[places.index(True) + 1 :]
        elif before and before[-1] in _LAST_STEPS:
            before, after = before[:-1], before[-1:]
        for step in after:
            if step not in _LAST_STEPS:
                name = getattr(getattr(step, "func", step), "__name__", type(step).__name__)
                raise ValueError(
                    f"task {self.task.name} has {name} after what is cached, which a cache cannot "
                    "run when it is read; register the task with t5jax.data.text_task and an "
                    "objective, move the step before CacheDatasetPlaceholder, or leave data.cache "
                    "out"
                )
        return before, after[-1] if after else None

    def _before_tokens(self, split: str) -> tf.data.Dataset:
        """Returns the last dataset in the pipeline in which the output features are texts."""
        task = self.task
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
                f"task {task.name!r} has no texts under {', '.join(task.output_features)} before "
                "they are tokens; give text files instead"
            )
        return last


def _with_eos(row: Mapping, feature: str, eos_id: int | None) -> np.ndarray:
    if feature not in row:
        raise ValueError(f"an example has no {feature!r}; it has {', '.join(sorted(row))}")
    tokens = np.asarray(row[feature])
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"feature {feature!r} of an example is {tokens.dtype}{list(tokens.shape)}; expected "
            "tokens, int32 [n] (does the task lack seqio.preprocessors.tokenize?)"
        )
    return tokens if eos_id is None else np.append(tokens, eos_id)
