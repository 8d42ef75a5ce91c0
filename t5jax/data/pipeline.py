"""From a mixture's name to batches for training and examples for evaluation, through SeqIO.

Every process reads the whole stream of global batches, and `t5jax.sharding.shard_batch` keeps the
rows of its own devices: so the batch at step n depends on seed, n and the global batch size alone,
not on how many hosts there are.
"""

import difflib
import functools
import importlib.util
import logging
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5jax import shipped
from t5jax.batch import DECODER_LOSS_WEIGHTS, Batch, train_spec, validate_batch
from t5jax.config import Config
from t5jax.data.api import BatchIterator, EvalExample, EvalSet
from t5jax.data.prompts import SOURCE_FEATURE, TRAIN_SPLIT, read
from t5jax.data.tf import seqio, tf
from t5jax.data.vocabularies import RunVocabulary, as_tokenizer, run_vocabulary
from t5jax.tokenizers import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)


# --- Tasks --------------------------------------------------------------------------------------

_loaded: set[Path] = set()


def load_tasks(task_files: Sequence[str] = ()) -> None:
    """Imports the task files of ./tasks and of t5jax, and further ones, each once.

    Args:
      task_files: paths of Python files that register SeqIO tasks or mixtures.
    Raises:
      ValueError: for a file that is missing or fails; none of its tasks stay registered.
    """
    paths = list(shipped.list_files("tasks").values())
    paths += [shipped.find("tasks", str(file)) for file in task_files]
    for path in paths:
        if path not in _loaded:
            _import_tasks(path)
            _loaded.add(path)


def _import_tasks(path: Path) -> None:
    before = {registry: set(registry.names()) for registry in _REGISTRIES}
    spec = importlib.util.spec_from_file_location(f"t5jax_task_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses and pickles look their module up there.
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        for registry, names in before.items():
            for name in set(registry.names()) - names:
                registry.remove(name)
        raise ValueError(f"task file {path} fails: {type(error).__name__}: {error}") from error


_REGISTRIES = (seqio.TaskRegistry, seqio.MixtureRegistry)


def task_names() -> list[str]:
    """Returns the names of all tasks and mixtures that are registered."""
    return sorted({name for registry in _REGISTRIES for name in registry.names()})


def check_mixture(name: str) -> seqio.Task | seqio.Mixture:
    """Returns the task or mixture of a name.

    Raises:
      ValueError: if there is none, with the nearest names; or if it does not have exactly the
        features of an encoder-decoder model.
    """
    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"known are {', '.join(names) or 'none'}"
        )
        raise ValueError(f"data.mixture is {name!r}, which no task file registers; {hint}")
    found = seqio.get_mixture_or_task(name)
    if set(found.output_features) != {"inputs", "targets"}:
        raise ValueError(
            f"{name} has the features {', '.join(found.output_features)}; an encoder-decoder model "
            "needs inputs and targets"
        )
    return found


def tokenizer_for(config: Config, init_tokenizer: Tokenizer | None = None) -> Tokenizer:
    """Returns the tokenizer of a run: data.vocabulary, or else init.model's, or else the tasks'.

    Args:
      config: the run; its tasks must be loaded.
      init_tokenizer: the tokenizer of init.model, if the caller has read it already.
    Raises:
      ValueError: if there is none, if tasks disagree with it or among themselves, or if the model
        has no room for its ids.
    """
    tokenizer = init_tokenizer
    if config.data.vocabulary:
        tokenizer = load_tokenizer(config.data.vocabulary)
    elif tokenizer is None and config.init.model:
        tokenizer = load_tokenizer(config.init.model)
    run_has_one = tokenizer is not None
    for task in seqio.get_subtasks(check_mixture(config.data.mixture)):
        for feature in task.output_features.values():
            own = _own_tokenizer(feature.vocabulary, run_has_one)
            tokenizer = tokenizer or own
            if own and repr(own) != repr(tokenizer):
                raise ValueError(
                    f"task {task.name} has the vocabulary {own}, but the run or another of its "
                    f"tasks has {tokenizer}; set data.vocabulary, and let tasks leave theirs open "
                    "(prompted_task, or RunVocabulary of t5jax.data.vocabularies)"
                )
    if tokenizer is None:
        raise ValueError(
            f"{config.data.mixture} names no vocabulary, and neither does the run; set "
            'data.vocabulary (to "bytes", say), or init.model'
        )
    _check_model(config, tokenizer)
    return tokenizer


def _own_tokenizer(vocabulary: seqio.Vocabulary, run_has_one: bool) -> Tokenizer | None:
    if isinstance(vocabulary, RunVocabulary):
        return None if run_has_one else vocabulary.default
    return as_tokenizer(vocabulary)


def _check_model(config: Config, tokenizer: Tokenizer) -> None:
    model = config.model
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the vocabulary {tokenizer} has {tokenizer.vocab_size} ids, but model.vocab_size is "
            f"{model.vocab_size}; set it to {-(-tokenizer.vocab_size // 128) * 128}, or choose "
            "another vocabulary"
        )
    expected = {
        "pad_token_id": tokenizer.pad_id,
        "eos_token_id": tokenizer.eos_id,
        "decoder_start_token_id": 0,
    }
    for field, value in expected.items():
        if getattr(model, field) != value:
            raise ValueError(
                f"model.{field} is {getattr(model, field)}; expected {value}, as {tokenizer} and "
                "SeqIO's batches have it"
            )
    if tokenizer.pad_id != 0:
        raise ValueError(f"{tokenizer} pads with id {tokenizer.pad_id}; SeqIO pads with 0")


# --- Training -----------------------------------------------------------------------------------


def train_iterator(config: Config, tokenizer: Tokenizer | None = None) -> BatchIterator:
    """Returns the endless, shuffled stream of a run's training batches.

    Args:
      config: the run; its tasks must be loaded.
      tokenizer: of the run; by default `tokenizer_for(config)`.
    Raises:
      ValueError: for an unknown mixture, one without training data, or no vocabulary; from
        __next__, for rows that a task cannot read.
    """
    mixture = check_mixture(config.data.mixture)
    _tasks_with_split(mixture, TRAIN_SPLIT)
    return _TrainIterator(config, mixture, tokenizer or tokenizer_for(config))


class _TrainIterator:
    """A `BatchIterator` over SeqIO. Nothing is read before the first batch."""

    def __init__(self, config: Config, mixture, tokenizer: Tokenizer):
        self.spec = train_spec(config)
        self._mixture, self._tokenizer, self._seed = mixture, tokenizer, config.data.seed
        fields = ("mixture", "inputs_length", "targets_length", "batch_size", "pack", "seed")
        self._fingerprint = {f"data.{field}": getattr(config.data, field) for field in fields}
        self._fingerprint["vocabulary"] = repr(tokenizer)
        self._num_batches = 0
        self._reading = []  # The open tf.data iterator, or nothing.
        # At the latest when Python exits: it would wait forever for threads that read on.
        weakref.finalize(self, self._reading.clear)

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        try:
            batch = read(self._next)
        except Exception:
            self._reading.clear()  # It would read on in the background.
            raise
        if batch is None:
            raise ValueError(f"{self._mixture.name} has no examples in its split {TRAIN_SPLIT!r}")
        validate_batch(batch, self.spec)
        self._num_batches += 1
        return batch

    def _next(self) -> Batch | None:
        if not self._reading:
            dataset = self._dataset().skip(self._num_batches).prefetch(tf.data.AUTOTUNE)
            self._reading.append(dataset.as_numpy_iterator())
        return next(self._reading[0], None)

    def state(self) -> dict:
        return {"batches": self._num_batches, "fingerprint": dict(self._fingerprint)}

    def restore(self, state: dict) -> None:
        for field, value in self._fingerprint.items():
            saved = state["fingerprint"].get(field)
            if saved != value:
                raise ValueError(
                    f"the data cannot go on where it was: {field} was {saved!r} and is {value!r} "
                    "now; set it back, or begin a new run_dir"
                )
        self._num_batches = state["batches"]
        self._reading.clear()

    def _dataset(self) -> tf.data.Dataset:
        with run_vocabulary(self._tokenizer):
            dataset = seqio.get_dataset(
                self._mixture,
                {"inputs": self.spec.inputs_length, "targets": self.spec.targets_length},
                # The lengths hold by trimming and padding; validate_batch checks them again.
                seqio.EncDecFeatureConverter(pack=self.spec.pack, apply_length_check=False),
                dataset_split=TRAIN_SPLIT,
                shuffle=True,
                num_epochs=None,
                seed=self._seed,
                batch_size=self.spec.batch_size,
                verbose=False,
            )
        options = tf.data.Options()
        options.deterministic = True
        return dataset.map(_float_weights).with_options(options)


def _float_weights(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return batch | {DECODER_LOSS_WEIGHTS: tf.cast(batch[DECODER_LOSS_WEIGHTS], tf.float32)}


# --- Evaluation ---------------------------------------------------------------------------------


def eval_sets(
    config: Config, split: str | None = None, tokenizer: Tokenizer | None = None
) -> list[EvalSet]:
    """Returns the evaluation examples of every task of the mixture, each once and in order.

    Args:
      config: the run; its tasks must be loaded. At most eval.num_examples of a task are taken.
      split: eval.split by default. Tasks that lack it are left out, which is logged.
      tokenizer: of the run; by default `tokenizer_for(config)`.
    Raises:
      ValueError: if no task has the split, or a task has no examples in it.
    """
    split = split or config.eval.split
    mixture = check_mixture(config.data.mixture)
    tokenizer = tokenizer or tokenizer_for(config)
    tasks = _tasks_with_split(mixture, split)
    return [_eval_set(task, split, config, tokenizer) for task in tasks]


def _eval_set(task: seqio.Task, split: str, config: Config, tokenizer: Tokenizer) -> EvalSet:
    lengths = {"inputs": config.data.inputs_length, "targets": config.data.targets_length}
    with run_vocabulary(tokenizer):
        dataset = task.get_dataset(lengths, split, shuffle=False, num_epochs=1)
    limit = -1 if config.eval.num_examples is None else config.eval.num_examples
    rows = read(lambda: list(dataset.take(limit).as_numpy_iterator()))
    if not rows:
        raise ValueError(f"task {task.name} has no examples in its split {split!r}")
    if len(task.metric_fns) > len(task.predict_metric_fns):
        _log.warning("task %s: only metrics of (targets, predictions) are computed", task.name)
    return EvalSet(
        task=task.name,
        examples=[_eval_example(task, row, tokenizer) for row in rows],
        metric_fns=task.predict_metric_fns,
        postprocess=functools.partial(task.postprocess_fn, example=None, is_target=False)
        if task.postprocessor
        else _unchanged,
    )


def _eval_example(task: seqio.Task, row: dict[str, Any], tokenizer: Tokenizer) -> EvalExample:
    input_ids, target_ids = row["inputs"].tolist(), row["targets"].tolist()
    inputs = _text(row, "inputs_pretokenized", tokenizer.decode(input_ids))
    targets = _text(row, "targets_pretokenized", tokenizer.decode(target_ids))
    if task.postprocessor:
        targets = task.postprocess_fn(targets, example=row, is_target=True)
    source = _text(row, SOURCE_FEATURE, inputs)
    return EvalExample(inputs, source, targets, input_ids, target_ids)


def _text(row: dict[str, Any], feature: str, default: str) -> str:
    return row[feature].decode() if feature in row else default


def _unchanged(text: str) -> str:
    return text


def _tasks_with_split(mixture: seqio.Task | seqio.Mixture, split: str) -> list[seqio.Task]:
    tasks = seqio.get_subtasks(mixture)
    having = [task for task in tasks if split in task.splits]
    if not having:
        splits = sorted({s for task in tasks for s in task.splits})
        raise ValueError(
            f"{mixture.name} has no split {split!r}; there are {', '.join(splits) or 'none'}"
        )
    for task in tasks:
        if task not in having:
            _log.warning("task %s has no split %r and is left out", task.name, split)
    return having
