"""Asks one model about the examples of tasks; what it has answered already is not asked again."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from t5jax import metrics, sharding, storage
from t5jax.architectures import Architecture, Dtype
from t5jax.checks import did_you_mean
from t5jax.config import AxisRules, Config, override
from t5jax.data.batches.examples import EvalSet
from t5jax.evaluation import baselines as compared
from t5jax.evaluation import predictions
from t5jax.evaluation.baselines import Baseline
from t5jax.evaluation.evaluator import Evaluator
from t5jax.evaluation.scores import LOSSES, Answer, Answers, ranks, scores_of_examples
from t5jax.monitor import progress
from t5jax.source import Source
from t5jax.special_tokens import check_vocabulary
from t5jax.tokenizers import Tokenizer

_STRETCH = 256  # Examples between two writes: a run that is killed asks for at most so many again.


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked of each model."""

    tasks: tuple[str, ...]
    split: str
    shots: int
    metrics: tuple[str, ...]
    choices: tuple[str, ...]
    task_files: tuple[str, ...]
    num_examples: int | None
    inputs_length: int | None
    max_tokens: int | None


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where and how it is computed, on which the answers do not depend, but for the dtype."""

    mesh: jax.sharding.Mesh
    rules: AxisRules | None
    batch_size: int
    dtype: Dtype | None


def ask(
    source: Source,
    asked: Question,
    devices: Devices,
    output: Path | None,
    given: Sequence[Baseline] = (),
) -> dict[str, tuple[EvalSet, list[Answer]]]:
    """Returns what a model says of each task, by the task's name.

    Args:
      source: the model.
      asked: what it is asked.
      devices: where it is computed.
      output: the folder of its answers, if they are kept.
      given: baselines, of which earlier ones are checked before the model is asked for hours.
    """
    mesh, rules = devices.mesh, source.rules(devices.mesh, devices.rules)
    config, eval_sets = check(source, asked, devices, given)
    description, params = source.read(devices.dtype, mesh, rules)
    with contextlib.ExitStack() as stack, sharding.use_mesh(mesh, rules):
        evaluator = _evaluator(source, description, config, devices)
        folder = None
        if output is not None:
            about = _about(source, config, asked, devices, eval_sets, output)
            folder = stack.enter_context(predictions.Folder(output, about))
        found = {}
        for eval_set in progress.track(
            eval_sets, f"evaluating {source.path.name} on {asked.split}"
        ):
            found[eval_set.task] = eval_set, _answers(evaluator, params, eval_set, folder)
    return found


def check(
    source: Source, asked: Question, devices: Devices, given: Sequence[Baseline] = ()
) -> tuple[Config, list[EvalSet]]:
    """Returns the config and the tasks, before the model's weights are read.

    Raises:
      ValueError: if they do not fit the model, the devices or the baselines.
    """
    config, tokenizer = config_of(source, asked), source.tokenizer()
    rules = source.rules(devices.mesh, devices.rules)
    sharding.check_batch_size(devices.batch_size, devices.mesh, rules, "batch_size")
    check_vocabulary(source.model, tokenizer)
    eval_sets = _eval_sets(source, config, asked, tokenizer)
    data = config.data
    for baseline in given:
        lengths = {"inputs_length": data.inputs_length, "max_tokens": data.targets_length}
        compared.warn_of_lengths(baseline, lengths)
    evaluator = _evaluator(source, source.model, config, devices)
    for eval_set in eval_sets:
        for baseline in given:
            compared.check(baseline, eval_set)
        evaluator.check(eval_set)
    return config, eval_sets


def _evaluator(source: Source, model: Architecture, config: Config, devices: Devices) -> Evaluator:
    return Evaluator(
        model,
        source.tokenizer(),
        devices.mesh,
        source.rules(devices.mesh, devices.rules),
        batch_size=devices.batch_size,
        max_tokens=config.data.targets_length,
        prefix_lm=config.data.prefix_lm,
    )


def _answers(
    evaluator: Evaluator, params: Any, eval_set: EvalSet, folder: predictions.Folder | None
) -> list[Answer]:
    """Returns what a model says of a task; what is in the folder already is not asked again."""
    if folder is None:
        (answers,) = evaluator.answers(params, eval_set)
    else:
        answers = folder.read(eval_set)
        for more in evaluator.answers(params, eval_set, start=len(answers), most=_STRETCH):
            folder.append(eval_set, len(answers), more)
            answers += more
        given = Answers.of(eval_set, answers)
        folder.finish(eval_set, answers, scores_of_examples(eval_set, given))
    return answers


def config_of(source: Source, asked: Question) -> Config:
    """Returns the run's config with the lengths and the split that are asked for."""
    data = source.config.data
    inputs, targets = asked.inputs_length, asked.max_tokens
    return override(
        source.config,
        {
            "data.inputs_length": data.inputs_length if inputs is None else inputs,
            "data.targets_length": data.targets_length if targets is None else targets,
            "eval.split": asked.split,
            "eval.num_examples": asked.num_examples,
        },
    )


def names_of_run(source: Source) -> list[str]:
    names = [name for _, name in source.config.data.mixtures if name]
    if not names:
        raise ValueError(f"{source.path} does not say what it was trained on; give --tasks NAME")
    return names


def _eval_sets(
    source: Source, config: Config, asked: Question, tokenizer: Tokenizer
) -> list[EvalSet]:
    from t5jax.data import pipeline, registry  # TensorFlow and SeqIO: only where data are read.

    for name in asked.metrics:
        _check_metric(name)
    names = asked.tasks or names_of_run(source)
    registry.load_tasks(asked.task_files)
    names = registry.match(names, asked.split)
    if asked.shots:
        names = registry.with_shots(names, asked.shots)
    eval_sets = pipeline.eval_sets(config, tokenizer=tokenizer, mixtures=names)
    return [_with_metrics(eval_set, asked) for eval_set in eval_sets]


def _check_metric(name: str) -> None:
    always = [fn.__name__ for fn in LOSSES]
    known = [*always, *metrics.BY_NAME, *metrics.OF_SCORES]
    if name not in known:
        raise ValueError(
            f"there is no metric {name!r}; {did_you_mean(name, known)}known are {', '.join(known)}"
        )


def _with_metrics(eval_set: EvalSet, asked: Question) -> EvalSet:
    """Returns a task with the metrics and choices that are asked for beside its own."""
    names = [*asked.metrics, *(["rank_accuracy"] if asked.choices else [])]
    has = [
        getattr(fn, "func", fn) if isinstance(fn, functools.partial) else fn
        for fn in (*eval_set.metric_fns, *eval_set.score_fns)
    ]
    more = {
        kind: [fn for name, fn in kinds.items() if name in names and fn not in has]
        for kind, kinds in (("metric_fns", metrics.BY_NAME), ("score_fns", metrics.OF_SCORES))
    }
    examples = eval_set.examples
    if asked.choices:
        examples = [dataclasses.replace(e, choices=asked.choices) for e in examples]
    return dataclasses.replace(
        eval_set,
        examples=examples,
        metric_fns=[*eval_set.metric_fns, *more["metric_fns"]],
        score_fns=[*eval_set.score_fns, *more["score_fns"]],
    )


def _about(
    source: Source,
    config: Config,
    asked: Question,
    devices: Devices,
    eval_sets: Sequence[EvalSet],
    output: Path,
) -> dict[str, Any]:
    """Returns what the answers depend on, as JSON values."""
    # The evaluation may be written beside the weights.
    own = f"{output.absolute()}/"
    files = [
        file
        for folder in source.places
        for name, file in storage.files(folder.absolute()).items()
        if not f"{folder.absolute()}/{name}".startswith(own)
    ]
    return {
        "model": {
            "model": str(source.place.absolute()),
            "model's files": [
                len(files),
                sum(size for size, _ in files),
                max((version for _, version in files), default=0),
            ],
        },
        "options": {
            "split": asked.split,
            "inputs_length": config.data.inputs_length,
            "max_tokens": config.data.targets_length,
            "num_examples": asked.num_examples,
            "dtype": devices.dtype,
            "what is asked": {
                e.task: ["answers" if e.metric_fns else "no answers"]
                + (["choices"] if ranks(e) else [])
                for e in eval_sets
            },
        },
        "tasks": {e.task: f"{len(e.examples)} examples {predictions.digest(e)}" for e in eval_sets},
    }


def ask_other(
    name: str,
    source: Source,
    asked: Question,
    devices: Devices,
    output: Path | None,
    eval_sets: Mapping[str, EvalSet],
) -> dict[str, Answers]:
    """Returns what another model says of the same tasks.

    Raises:
      ValueError: if its examples are not the same.
    """
    found = ask(source, asked, devices, output)
    for task, eval_set in eval_sets.items():
        theirs = [e.targets for e in found[task][0].examples]
        if theirs != [e.targets for e in eval_set.examples]:
            raise ValueError(
                f"--baseline {name}: its targets of the task {task} are not those of the model, "
                "since it reads them with a tokenizer or labels of its own; they cannot be compared"
            )
    return {task: Answers.of(*each) for task, each in found.items()}
