"""From a mixture's name to batches for training and examples for evaluation.

Training examples are streamed from SeqIO or read from the caches of their tasks (data.cache);
batches are made from them in the same way (`t5jax/data/batches/`). Every process plans all rows of
the global batch and keeps its own, so that the batch at step n only depends on the seed, n and the
global batch size, not on the number of hosts.
"""

import functools
import json
import logging
from collections.abc import Sequence
from typing import Any

from t5jax import distributed, storage
from t5jax.architectures import Architecture
from t5jax.batch import BatchSpec, train_spec
from t5jax.checks import name_of, users_error
from t5jax.config import Config
from t5jax.data.batches.converters import example_lengths, make_converter
from t5jax.data.batches.examples import BatchIterator, EvalExample, EvalSet
from t5jax.data.batches.iterator import Batches, ChangingBatches
from t5jax.data.bridge.tf import seqio
from t5jax.data.bridge.vocabulary import RunVocabulary, as_tokenizer
from t5jax.data.registry import check_mixture
from t5jax.data.run import TRAIN_SPLIT, Run
from t5jax.data.streamed import StreamedExamples
from t5jax.data.tasks.base import OwnSource
from t5jax.data.tasks.foreign import kind_of
from t5jax.data.tasks.prompted import CHOICES_FEATURE, SOURCE_FEATURE
from t5jax.special_tokens import check_vocabulary, example_format
from t5jax.tokenizers import LabelTokenizer, Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)


# --- The run's tokenizer ------------------------------------------------------------------------


def tokenizer_for(config: Config, init_tokenizer: Tokenizer | None = None) -> Tokenizer:
    """Returns the tokenizer of a run: data.vocabulary, otherwise init.model's, otherwise the
    tasks'.

    Args:
      config: the run; its tasks must be loaded.
      init_tokenizer: the tokenizer of init.model, if it has been loaded.
    Raises:
      ValueError: if there is none, if tasks do not agree with it or with each other, or if the
        model's vocabulary is too small.
    """
    tokenizer = init_tokenizer
    if config.data.vocabulary:
        tokenizer = load_tokenizer(config.data.vocabulary)
    elif tokenizer is None and config.init.model:
        tokenizer = load_tokenizer(config.init.model)
    run_has_one = tokenizer is not None
    for task in _all_tasks(config):
        for feature in task.output_features.values():
            own = _own_tokenizer(feature.vocabulary, run_has_one)
            tokenizer = tokenizer or own
            if own and repr(own) != repr(tokenizer):
                raise ValueError(
                    f"task {task.name} has the vocabulary {own}, but the run or another of its "
                    f"tasks has {tokenizer}; set data.vocabulary, and let tasks leave theirs open "
                    "(prompted_task, or t5jax.data.RunVocabulary)"
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
    check_vocabulary(model, tokenizer)
    expected = {field: getattr(tokenizer, name) for field, name in model.tokenizer_ids.items()}
    if "bos_id" in model.tokenizer_ids.values() and tokenizer.bos_id is None:
        raise ValueError(
            f"{tokenizer} has no token that begins a text, as {model.family} reads it; set "
            f"data.vocabulary to one that has, such as that of a published {model.family}"
        )
    for field, value in expected.items():
        if getattr(model, field) != value:
            raise ValueError(
                f"model.{field} is {getattr(model, field)}; expected {value}, as {tokenizer} has it"
            )


# --- Training -----------------------------------------------------------------------------------


def batch_spec(config: Config) -> BatchSpec:
    """Returns the shape of a run's training batches; its tasks must be loaded.

    Raises:
      ValueError: if a mixture is unknown.
    """
    mixtures = [(name, check_mixture(name)) for _, name in config.data.mixtures]
    return train_spec(config, has_inputs=_have_inputs(mixtures), has_pairs=_have_pairs(mixtures))


def train_iterator(
    config: Config, tokenizer: Tokenizer | None = None, rows: Sequence[int] | None = None
) -> BatchIterator:
    """Returns the infinite, shuffled iterator of a run's training batches.

    With data.cache, caches that are missing or do not match are written first; nothing else is read
    before the first batch.

    Args:
      config: the run; its tasks must be loaded.
      tokenizer: the run's tokenizer; by default `tokenizer_for(config)`.
      rows: the rows of the global batch to return (`sharding.process_rows`); by default all.
    Raises:
      ValueError: if a mixture is unknown or has no training data, or the vocabulary is missing or
        does not suit an objective; from __next__, if a task cannot read a row.
    """
    tokenizer = tokenizer or tokenizer_for(config)
    mixtures = [(name, check_mixture(name)) for _, name in config.data.mixtures]
    spec = batch_spec(config)
    form = example_format(config.model, tokenizer)
    _check_positions(config.model, spec)
    run = Run(tokenizer, LabelTokenizer.of(config.model), example_lengths(spec, form))
    for name, mixture in mixtures:
        for task in _tasks_with_split(mixture, TRAIN_SPLIT):
            _check_objective(task, config.model, run)
        if config.data.cache:
            _write_caches(name, config.data.cache, run)

    def make_stage(name: str, seed: int) -> BatchIterator:
        if config.data.cache:
            from t5jax.data.cache.examples import open_cached

            return batches(open_cached(name, config.data.cache, run, seed), seed)
        return batches(StreamedExamples(name, run, seed), seed)

    def batches(examples, seed: int) -> BatchIterator:
        return Batches(examples, make_converter(spec, form), spec, seed, rows)

    return ChangingBatches(
        [
            # Each mixture reads its tasks in another order.
            (first, functools.partial(make_stage, name, config.data.seed + number))
            for number, (first, name) in enumerate(config.data.mixtures)
        ]
    )


def task_shares(name: str) -> dict[str, float]:
    """Returns the share of each task among the training examples of a mixture; of a task, 1."""
    mixture = check_mixture(name)
    if isinstance(mixture, seqio.Task):
        return {name: 1.0}
    tasks = [task for task in seqio.get_subtasks(mixture) if TRAIN_SPLIT in task.splits]
    rates = {task.name: float(mixture.get_rate(task)) for task in tasks}
    total = sum(rates.values())
    return {task: rate / total for task, rate in rates.items()}


def _write_caches(mixture: str, folder: str, run: Run) -> None:
    """Writes the caches that are missing or do not match."""
    from t5jax.data.cache.store import write_caches

    if storage.is_remote(folder):
        # On a disk that hosts share they wait for each other at a lock, which a bucket has not.
        distributed.from_first_process(lambda: len(write_caches(mixture, folder, run)))
    else:
        write_caches(mixture, folder, run)


def _check_positions(model: Architecture, spec: BatchSpec) -> None:
    """Raises ValueError if examples may be longer than the positions that the model learned."""
    positions = model.longest_row
    encoder = spec.kind == "encoder"
    length = spec.inputs_length if encoder else spec.decoder_length
    if positions is not None and length > positions:
        names = "data.inputs_length" if encoder else "data.inputs_length + data.targets_length"
        raise ValueError(
            f"a text of {length} tokens has no positions in this model; {model.family} learned "
            f"{positions} (model.max_positions); make {names} at most as much"
        )


def _have_inputs(mixtures: Sequence[tuple[str, seqio.Task | seqio.Mixture]]) -> bool:
    """Returns whether examples have inputs in addition to targets.

    Raises:
      ValueError: if some mixtures of a run do and others do not.
    """
    having = {name: "inputs" in mixture.output_features for name, mixture in mixtures}
    if len(set(having.values())) > 1:
        raise ValueError(
            f"{', '.join(n for n, has in having.items() if has)} has inputs and targets, "
            f"{', '.join(n for n, has in having.items() if not has)} targets alone; the mixtures "
            "of one run must have the same features"
        )
    return all(having.values())


def _have_pairs(mixtures: Sequence[tuple[str, seqio.Task | seqio.Mixture]]) -> bool:
    """Returns whether some examples have two texts as inputs."""
    tasks = [task for _, mixture in mixtures for task in seqio.get_subtasks(mixture)]
    return any(kind_of(task).has_pairs for task in tasks)


def _check_objective(task: seqio.Task, model: Architecture, run: Run) -> None:
    """Raises ValueError if a task does not suit the model's head."""
    kind = kind_of(task)
    if not isinstance(kind, OwnSource):
        return  # SeqIO's own tasks cannot be checked.
    objective = kind.objective
    hides_tokens = objective is not None and objective.encoder_only
    if hides_tokens != (model.head == "masked_lm"):
        needed = "an encoder with a masked_lm head" if hides_tokens else "another model"
        raise ValueError(
            f"task {task.name} ({objective or 'inputs and targets'}) is for {needed}, and not for "
            f"{model.family} with a {model.head} head; choose another task or another model"
        )
    if model.kind == "encoder" and objective is not None and not hides_tokens:
        raise ValueError(
            f"task {task.name} has the objective {objective}, which is for a model with a decoder; "
            "choose another task or another model"
        )
    if kind.has_pairs and not model.reads_pairs:
        raise ValueError(
            f"task {task.name} has a template of two texts, which only an encoder with model.head "
            "sequence_classification and two token types (model.type_vocab_size) reads, and not "
            f"this {model.family}; write both texts as one"
        )
    try:
        kind.finish(run)
    except ValueError as error:
        raise ValueError(f"task {task.name}: {error}") from None


# --- Evaluation ---------------------------------------------------------------------------------


def eval_sets(
    config: Config,
    split: str | None = None,
    tokenizer: Tokenizer | None = None,
    mixtures: Sequence[str] | None = None,
) -> list[EvalSet]:
    """Returns the evaluation examples of every task of the mixtures, each once and in order.

    Args:
      config: the run; its tasks must be loaded. At most eval.num_examples of a task are used, which
        are drawn from the whole split, the same ones each time.
      split: by default eval.split. Tasks that lack it are skipped, which is logged.
      tokenizer: the run's tokenizer; by default `tokenizer_for(config)`.
      mixtures: names of tasks and mixtures, by default those of the run.
    Raises:
      ValueError: if no task has the split, or a task has no examples in it.
    """
    split = split or config.eval.split
    tokenizer = tokenizer or tokenizer_for(config)
    if mixtures is None:
        found = [check_mixture(name) for _, name in config.data.mixtures]
    else:
        found = [check_mixture(name, "--tasks") for name in mixtures]
    tasks = {task.name: task for m in found for task in _tasks_with_split(m, split)}
    return [_eval_set(task, split, config, tokenizer) for task in tasks.values()]


def _eval_set(task: seqio.Task, split: str, config: Config, tokenizer: Tokenizer) -> EvalSet:
    spec = train_spec(config, has_inputs="inputs" in task.output_features)
    lengths = example_lengths(spec, example_format(config.model, tokenizer))
    run = Run(tokenizer, LabelTokenizer.of(config.model), lengths)
    _check_objective(task, config.model, run)
    rows = list(kind_of(task).once(split, run, most=config.eval.num_examples))
    if not rows:
        raise ValueError(f"task {task.name} has no examples in its split {split!r}")
    if not any(len(row["targets"]) for row in rows):
        raise ValueError(f"the targets of task {task.name} in its split {split!r} are all empty")
    computed = [*task.predict_metric_fns, *task.score_metric_fns]
    if len(task.metric_fns) > len(computed):
        _log.warning(
            "task %s: only metrics of (targets, predictions) and (targets, scores) are computed",
            task.name,
        )
    # A model stops at any of the ids that end a text, so its answers lack these tokens.
    others = [i for i in config.model.end_token_ids if i != tokenizer.eos_id]
    ends = tuple(tokenizer.decode([i]) for i in others if i in tokenizer.special_ids)
    return EvalSet(
        task=task.name,
        examples=[_eval_example(task, row, run, ends) for row in rows],
        metric_fns=task.predict_metric_fns,
        postprocess=functools.partial(task.postprocessor, is_target=False)
        if task.postprocessor
        else _unchanged,
        score_fns=task.score_metric_fns,
        has_pairs=kind_of(task).has_pairs,
    )


def _eval_example(
    task: seqio.Task, row: dict[str, Any], run: Run, ends: tuple[str, ...]
) -> EvalExample:
    tokenizer = run.tokenizer
    input_ids = row["inputs"].tolist() if "inputs" in row else []
    target_ids = row["targets"].tolist()
    inputs = _text(row, "inputs_pretokenized", tokenizer.decode(input_ids))
    targets = _text(row, "targets_pretokenized", tokenizer.decode(target_ids))
    for end in ends:
        targets = targets.removesuffix(end)
    source = _text(row, SOURCE_FEATURE, inputs)
    choices = tuple(json.loads(_text(row, CHOICES_FEATURE, "[]")))
    seen, fills = inputs, len(input_ids) == run.lengths.get("inputs")
    if fills and len(tokenizer.encode(inputs)) >= len(input_ids):  # Its end is cut.
        seen = f"{tokenizer.decode(input_ids)} […]"
    if not task.postprocessor:
        return EvalExample(inputs, source, targets, input_ids, target_ids, None, seen, choices)
    try:
        targets = task.postprocess_fn(targets, example=row, is_target=True)
    except Exception as error:  # Of a user's code.
        raise ValueError(
            f"task {task.name}: postprocess {name_of(task.postprocessor)} fails on the target "
            f"{targets!r:.80}: {users_error(error)}"
        ) from error
    return EvalExample(inputs, source, targets, input_ids, target_ids, row, seen, choices)


def _text(row: dict[str, Any], feature: str, default: str) -> str:
    return row[feature].decode() if feature in row else default


def _unchanged(text: str) -> str:
    return text


def _all_tasks(config: Config) -> list[seqio.Task]:
    """Returns the tasks of all mixtures of a run, each once."""
    mixtures = [check_mixture(name) for _, name in config.data.mixtures]
    return list({task.name: task for m in mixtures for task in seqio.get_subtasks(m)}.values())


_NO_EVAL_SPLIT = (
    "; name one of these (eval.split, or --split of t5jax eval), train without evaluation "
    "(eval.every 0), or make one in the task file by Source.hold_out({!r}, every=20)"
)


def _tasks_with_split(mixture: seqio.Task | seqio.Mixture, split: str) -> list[seqio.Task]:
    tasks = seqio.get_subtasks(mixture)
    having = [task for task in tasks if split in task.splits]
    if not having:
        splits = sorted({s for task in tasks for s in task.splits})
        remedy = "" if split == TRAIN_SPLIT else _NO_EVAL_SPLIT.format(split)
        known = ", ".join(splits) or "none"
        raise ValueError(f"{mixture.name} has no split {split!r}; there are {known}{remedy}")
    for task in tasks:
        if task not in having:
            _log.warning("task %s has no split %r and is left out", task.name, split)
    return having
