"""Evaluations during a run: computed, said and written."""

from typing import Any

from t5jax.config import Config
from t5jax.data.batches.examples import EvalSet
from t5jax.evaluation import Evaluator, Result
from t5jax.models import api
from t5jax.monitor import tables
from t5jax.monitor.progress import ProgressBar

Results = dict[str, tuple[EvalSet, Result]]
"""The examples and the result of each task."""


def run_evaluation(evaluator: Evaluator, params: api.Params, eval_sets: list[EvalSet]) -> Results:
    """Returns the results of all tasks."""
    return {s.task: (s, evaluator.evaluate(params, s)) for s in eval_sets}


def failure_of(results: Results) -> ValueError | None:
    """Returns the error of the first task whose own code failed."""
    errors = [result.error for _, result in results.values() if result.error]
    if not errors:
        return None
    return ValueError(
        f"{errors[0]}; mend the function, and the same command goes on from the last step"
    )


def report_evaluation(
    step: int, results: Results, loss: float, config: Config, writer: Any, bar: ProgressBar
) -> dict[str, float]:
    """Writes the scores of an evaluation, and prints a line and samples for each task; returns them
    by the names of metrics.jsonl."""
    split = config.eval.split
    bar.print(f"step {step}: {split} loss {loss:.4f}")
    if split == "train":  # Metrics of training steps have that name.
        split = "eval/train"
    scalars = {f"{split}/loss": loss}
    for task, (eval_set, result) in results.items():
        scalars |= {f"{split}/{task}/{name}": value for name, value in result.scores.items()}
        scores = ", ".join(
            f"{name} {value:.2f}" for name, value in result.scores.items() if name != "loss"
        )
        bar.print(f"  {task}: {scores}")
        columns = eval_set.samples(result.predictions, config.eval.num_samples)
        if columns[0]:
            bar.print(tables.samples_table(*columns))
            writer.write_texts(step, {f"{split}/{task}/samples": tables.samples_markdown(*columns)})
    writer.write_scalars(step, scalars)
    writer.flush()
    return scalars
