"""`t5jax eval`: a model and its baselines on tasks, from their names to tables and files."""

import contextlib
import dataclasses
import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from t5jax import metrics, sharding, storage
from t5jax.architectures import Dtype
from t5jax.checks import check_at_least, did_you_mean
from t5jax.config import AxisRules, Config, MeshConfig, override
from t5jax.data.batches.examples import EvalSet
from t5jax.evaluation import baselines as compared
from t5jax.evaluation import compare, page, predictions
from t5jax.evaluation.baselines import Baseline
from t5jax.evaluation.evaluator import Evaluator
from t5jax.evaluation.scores import LOSSES, Answer, Answers, ranks, score, scores_of_examples
from t5jax.monitor import progress, tables
from t5jax.source import Source, find
from t5jax.special_tokens import check_vocabulary
from t5jax.storage import to_json
from t5jax.tokenizers import Tokenizer

_log = logging.getLogger(__name__)

BASELINES = (compared.MAJORITY, compared.COPY)


def evaluate_model(
    model: str | Source,
    tasks: str | Sequence[str] = (),
    *,
    split: str = "test",
    shots: int = 0,
    metrics: Sequence[str] = (),
    choices: Sequence[str] = (),
    baseline: Sequence[str | Source] = BASELINES,
    resamples: int = 1000,
    seed: int = 0,
    task_files: Sequence[str] = (),
    batch_size: int = 64,
    num_examples: int | None = None,
    inputs_length: int | None = None,
    max_tokens: int | None = None,
    dtype: Dtype | None = None,
    mesh: MeshConfig | jax.sharding.Mesh = MeshConfig(),
    rules: AxisRules | None = None,
    num_samples: int = 0,
    output: Path | None = None,
    json: Path | None = None,
    html: Path | None = None,
    show: bool = True,
) -> dict[str, dict[str, Any]]:
    """Evaluates a model, prints a table of the results, and returns them as plain values.

    Args:
      model: a Hub name, a Hugging Face folder, a run or one of its checkpoints; or a source.
      tasks: names of tasks, their variants, and mixtures; "*", "?" and "[...]" match several tasks.
        Empty: the one that the run was trained on.
      split: the split of the tasks.
      shots: the number of solved training examples before each prompt.
      metrics: names of metrics of `t5jax.metrics`, in addition to those of the tasks.
      choices: answers to rank by their probability, for all examples, in place of those of the
        tasks' templates.
      baseline: "majority" (the most frequent target), "copy" (of the input), other models or
        sources, folders of earlier evaluations (`output`), or JSON files of scores (`json`).
      resamples: the number of bootstrap resamples, for intervals and verdicts. 0: none.
      seed: the seed of the resamples.
      task_files: Python files that register tasks, in addition to ./tasks/*.py, the shipped ones
        and the run's.
      batch_size: the number of rows per batch.
      num_examples: the maximum number of examples of each task. None: all.
      inputs_length: the maximum length of inputs in tokens; longer ones are truncated. None: as in
        the run, or 512.
      max_tokens: the maximum length of targets and answers in tokens. None: as in the run, or 128.
      dtype: the dtype of computation and parameters. None: as in training.
      mesh: the devices.
      rules: how arrays are sharded over them; an axis that they do not divide stays whole. None: as
        in the run.
      num_samples: the number of predictions to print for each task.
      output: a folder for the predictions, the scores and a page that shows them. The same
        evaluation goes on there if it was stopped.
      json: a file for the scores, in addition to the table.
      html: a file for the page, in addition to the table.
      show: print the table on standard output.
    Returns:
      For each task "num_examples", which scores are "lower_is_better", the scores of the "model",
      its "intervals", the scores of the "baselines" by name, and the "comparisons" with them.
    Raises:
      ValueError: if the model, a task, a metric or a baseline cannot be found or read, or the
        task's postprocessing or metrics fail.
    """
    json, html = (
        file and _place(file, name) for name, file in {"--json": json, "--html": html}.items()
    )
    where = storage.path(output, "--output") if output else None
    writes = jax.process_index() == 0
    check_at_least(resamples, 0, "--resamples")
    check_at_least(shots, 0, "--shots")
    sources = {str(b.path): b for b in baseline if not isinstance(b, str)}
    given = compared.check_names([b if isinstance(b, str) else str(b.path) for b in baseline])
    others = {b.name: sources.get(b.name) or find(b.name) for b in given if b.kind == "model"}
    source = find(model) if isinstance(model, str) else model
    source.warn_if_unrounded()
    mesh = sharding.make_mesh(mesh) if isinstance(mesh, MeshConfig) else mesh
    asked = _Question(
        tasks=(tasks,) if isinstance(tasks, str) and tasks else tuple(tasks),
        split=split,
        shots=shots,
        metrics=tuple(metrics),
        choices=tuple(choices),
        task_files=(*source.config.data.task_files, *task_files),
        num_examples=num_examples,
        inputs_length=inputs_length,
        max_tokens=max_tokens,
    )
    devices = _Devices(mesh, rules, batch_size, dtype)
    with contextlib.ExitStack() as stack:
        if where:
            place = storage.staged(where, folder=True, writes=writes)
            output = stack.enter_context(place).path
        answered = _ask(source, asked, devices, output, given)
        eval_sets = {name: eval_set for name, (eval_set, _) in answered.items()}
        answers = {name: Answers.of(*each) for name, each in answered.items()}
        # Others are asked for the same, whatever they were trained on.
        data = _config(source, asked).data
        asked = dataclasses.replace(
            asked,
            tasks=asked.tasks or tuple(_names_of_run(source)),
            inputs_length=data.inputs_length,
            max_tokens=data.targets_length,
        )
        of_models = {}
        for name, other in others.items():
            folder = output / "baselines" / name.strip("/").replace("/", "_") if output else None
            of_models[name] = _answers_of_other(name, other, asked, devices, folder, eval_sets)
        results, columns = {}, {}
        for task, eval_set in eval_sets.items():
            systems: dict[str, Answers | None] = {}
            for b in given:
                if b.kind == "folder":
                    systems[b.name] = compared.earlier_answers(b, eval_set)
                elif b.kind == "model":
                    systems[b.name] = of_models[b.name][task]
                elif b.kind != "scores":
                    systems[b.name] = compared.trivial_answers(b.kind, eval_set, answers[task])
            there = {name: each for name, each in systems.items() if each is not None}
            files = [b for b in given if b.kind == "scores"]
            results[task] = _result(eval_set, answers[task], there, files, resamples, seed)
            columns[task] = there
            if num_samples and writes and (texts := answers[task].texts):
                samples = eval_set.samples(texts, num_samples)
                tables.print_table(tables.samples_table(*samples, title=task))
        if show and writes:
            tables.print_table(tables.results_table(results), sys.stdout)
            if resamples and any(each["comparisons"] for each in results.values()):
                tables.print_note(tables.LEGEND, sys.stdout)
        if writes:
            text = to_json(results, indent=2) + "\n"
            if json:
                storage.write_file(json, text.encode())
            if output or html:
                shown = page.render(
                    str(model) if isinstance(model, str) else str(source.path),
                    split,
                    results,
                    {task: (eval_sets[task], answers[task], columns[task]) for task in results},
                )
            if html:
                storage.write_file(html, shown.encode())
            if output:
                (output / "scores.json").write_text(text, encoding="utf-8")
                (output / "report.html").write_text(shown, encoding="utf-8")
    return results


def _place(file: Path, name: str) -> Path:
    """Returns where a file is to be written. Raises ValueError if its folder is not there."""
    file = storage.path(file, name)
    if not storage.is_remote(file) and not file.parent.is_dir():
        raise ValueError(f"{name} {file}: there is no folder {file.parent}; make it first")
    return file


# --- One model ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Question:
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
class _Devices:
    """Where and how it is computed, on which the answers do not depend, but for the dtype."""

    mesh: jax.sharding.Mesh
    rules: AxisRules | None
    batch_size: int
    dtype: Dtype | None


def _ask(
    source: Source,
    asked: _Question,
    devices: _Devices,
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
    sharding.check_batch_size(devices.batch_size, mesh, rules, "batch_size")
    config, tokenizer = _config(source, asked), source.tokenizer()
    check_vocabulary(source.model, tokenizer)
    eval_sets = _eval_sets(source, config, asked, tokenizer)
    for eval_set in eval_sets:
        for baseline in given:
            compared.check(baseline, eval_set)
    description, params = source.read(devices.dtype, mesh, rules)
    with contextlib.ExitStack() as stack, sharding.use_mesh(mesh, rules):
        evaluator = Evaluator(
            description,
            tokenizer,
            mesh,
            rules,
            batch_size=devices.batch_size,
            max_tokens=config.data.targets_length,
            prefix_lm=config.data.prefix_lm,
        )
        for eval_set in eval_sets:
            evaluator.check(eval_set)
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


_STRETCH = 256  # Examples between two writes: a run that is killed asks for at most so many again.


def _config(source: Source, asked: _Question) -> Config:
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


def _names_of_run(source: Source) -> list[str]:
    names = [name for _, name in source.config.data.mixtures if name]
    if not names:
        raise ValueError(f"{source.path} does not say what it was trained on; give --tasks NAME")
    return names


def _eval_sets(
    source: Source, config: Config, asked: _Question, tokenizer: Tokenizer
) -> list[EvalSet]:
    from t5jax.data import pipeline, registry  # TensorFlow and SeqIO: only where data are read.

    for name in asked.metrics:
        _check_metric(name)
    names = asked.tasks or _names_of_run(source)
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


def _with_metrics(eval_set: EvalSet, asked: _Question) -> EvalSet:
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
    asked: _Question,
    devices: _Devices,
    eval_sets: Sequence[EvalSet],
    output: Path,
) -> dict[str, Any]:
    """Returns what the answers depend on, as JSON values."""
    # The evaluation may be written beside the weights.
    folder, own = source.place.absolute(), f"{output.absolute()}/"
    files = storage.files(folder)
    files = {name: file for name, file in files.items() if not f"{folder}/{name}".startswith(own)}
    return {
        "model": {
            "model": str(folder),
            "model's files": [
                len(files),
                sum(size for size, _ in files.values()),
                max((version for _, version in files.values()), default=0),
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


# --- Beside others --------------------------------------------------------------------------------


def _answers_of_other(
    name: str,
    source: Source,
    asked: _Question,
    devices: _Devices,
    output: Path | None,
    eval_sets: Mapping[str, EvalSet],
) -> dict[str, Answers]:
    """Returns what another model says of the same tasks.

    Raises:
      ValueError: if its examples are not the same.
    """
    found = _ask(source, asked, devices, output)
    for task, eval_set in eval_sets.items():
        theirs = [e.targets for e in found[task][0].examples]
        if theirs != [e.targets for e in eval_set.examples]:
            raise ValueError(
                f"--baseline {name}: its targets of the task {task} are not those of the model, "
                "since it reads them with a tokenizer or labels of its own; they cannot be compared"
            )
    return {task: Answers.of(*each) for task, each in found.items()}


def _comparable(eval_set: EvalSet, model: Answers, other: Answers, name: str) -> dict[str, float]:
    """Returns the scores of a baseline, without losses per token if its tokens are others.

    Neither may those per word or byte be compared if targets are cut elsewhere.
    """
    scores = score(eval_set, other)
    if model.log_probs is None or other.log_probs is None:
        return scores
    details = [
        (a.details, b.details) for a, b in zip(model.log_probs, other.log_probs, strict=True)
    ]
    same_tokens = all(a.num_tokens == b.num_tokens for a, b in details)
    same_texts = all(a.num_bytes == b.num_bytes for a, b in details)
    left_out = [] if same_tokens else [fn.__name__ for fn in LOSSES]
    if not same_texts:
        left_out += [fn for fn in metrics.OF_SCORES if fn != "rank_accuracy"]
    left_out = [name for name in left_out if name in scores]
    if left_out:
        _log.warning(
            "task %s: %s of %s are left out, since its vocabulary reads the targets as other "
            "tokens%s",
            *(eval_set.task, ", ".join(left_out), name),
            "" if "bits_per_byte" in left_out else "; --metrics bits_per_byte can be compared",
        )
    return {name: value for name, value in scores.items() if name not in left_out}


def _result(
    eval_set: EvalSet,
    model: Answers,
    systems: Mapping[str, Answers],
    files: Sequence[Baseline],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the scores of a model and its baselines on a task, and how they compare."""
    scores = score(eval_set, model)
    others = {name: _comparable(eval_set, model, each, name) for name, each in systems.items()}
    earlier = {b.name: compared.earlier_scores(b, eval_set) for b in files}
    intervals: dict[str, compare.Interval] = {}
    comparisons: dict[str, dict[str, compare.Comparison]] = {}
    lower, number = compare.lower_is_better(eval_set, model), len(eval_set.examples)
    if resamples:
        intervals, comparisons = compare.bootstrap(
            eval_set, model, dict(systems), resamples=resamples, seed=seed
        )
        for name, found in comparisons.items():
            comparisons[name] = {k: one for k, one in found.items() if k in others[name]}
        for name, row in earlier.items():
            comparisons[name] = {
                metric: compare.against_score(intervals[metric], value, number, metric in lower)
                for metric, value in row.items()
                if metric in intervals
            }
    return {
        "num_examples": number,
        "lower_is_better": sorted(lower & scores.keys()),
        "model": scores,
        "intervals": {name: [i.low, i.high] for name, i in intervals.items()},
        "baselines": others | earlier,
        "comparisons": {
            name: {
                metric: {
                    "difference": c.difference.value,
                    "interval": [c.difference.low, c.difference.high],
                    "verdict": c.verdict,
                }
                for metric, c in row.items()
            }
            for name, row in comparisons.items()
        },
    }
