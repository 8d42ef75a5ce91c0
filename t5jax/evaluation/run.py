"""`t5jax eval`: a model and its baselines on tasks, from their names to tables and files."""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from t5jax import sharding, storage
from t5jax.architectures import Dtype
from t5jax.checks import check_at_least
from t5jax.config import AxisRules, MeshConfig
from t5jax.evaluation import baselines as compared
from t5jax.evaluation import page
from t5jax.evaluation.asking import (
    Devices,
    Question,
    ask,
    ask_other,
    check,
    config_of,
    names_of_run,
)
from t5jax.evaluation.results import result_of
from t5jax.evaluation.scores import Answers
from t5jax.monitor import tables
from t5jax.source import Source, find
from t5jax.storage import to_json

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
    asked = Question(
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
    devices = Devices(mesh, rules, batch_size, dtype)
    with contextlib.ExitStack() as stack:
        if where:
            place = storage.staged(where, folder=True, writes=writes)
            output = stack.enter_context(place).path
        answered = ask(source, asked, devices, output, given)
        eval_sets = {name: eval_set for name, (eval_set, _) in answered.items()}
        answers = {name: Answers.of(*each) for name, each in answered.items()}
        # Others are asked for the same, whatever they were trained on.
        data = config_of(source, asked).data
        asked = dataclasses.replace(
            asked,
            tasks=asked.tasks or tuple(names_of_run(source)),
            inputs_length=data.inputs_length,
            max_tokens=data.targets_length,
        )
        of_models = {}
        for name, other in others.items():
            folder = output / "baselines" / name.strip("/").replace("/", "_") if output else None
            of_models[name] = ask_other(name, other, asked, devices, folder, eval_sets)
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
            results[task] = result_of(eval_set, answers[task], there, files, resamples, seed)
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


def check_evaluation(
    model: Source,
    tasks: Sequence[str],
    *,
    split: str = "test",
    task_files: Sequence[str] = (),
    batch_size: int = 64,
    num_examples: int | None = None,
    inputs_length: int | None = None,
    max_tokens: int | None = None,
) -> None:
    """Raises the ValueError with which `evaluate_model` would end before it reads the weights.

    Args:
      model: the model.
      tasks: names of tasks.
      split: as for `evaluate_model`, and so are the others.
    """
    asked = Question(
        tasks=tuple(tasks),
        split=split,
        shots=0,
        metrics=(),
        choices=(),
        task_files=(*model.config.data.task_files, *task_files),
        num_examples=num_examples,
        inputs_length=inputs_length,
        max_tokens=max_tokens,
    )
    check(model, asked, Devices(sharding.make_mesh(MeshConfig()), None, batch_size, None))


def _place(file: Path, name: str) -> Path:
    """Returns where a file is to be written. Raises ValueError if its folder is not there."""
    file = storage.path(file, name)
    if not storage.is_remote(file) and not file.parent.is_dir():
        raise ValueError(f"{name} {file}: there is no folder {file.parent}; make it first")
    return file
