"""Evaluations during a run: computed, said and written."""

from collections.abc import Callable
from typing import Any, NamedTuple

from t5jax import distributed
from t5jax.config import Config
from t5jax.data.batches.examples import EvalSet
from t5jax.evaluation import Evaluator, Result, mean_loss
from t5jax.models import api
from t5jax.monitor import log, tables
from t5jax.monitor.goodput import Goodput
from t5jax.monitor.progress import ProgressBar
from t5jax.train.prefetch import raise_among_several
from t5jax.train.start import Ready
from t5jax.train.state import LoopState
from t5jax.train_state import TrainState, evaluated_params

Watch = Callable[[int, dict[str, float]], str]
"""Takes the step and the metrics of an evaluation; returns why the run shall stop, or ""."""

Results = dict[str, tuple[EvalSet, Result]]
"""The examples and the result of each task."""


class Evaluated(NamedTuple):
    """What came out of an evaluation."""

    loss: float | None = None
    """None: the evaluation was broken off, since the run is asked to stop, or has failed."""
    failure: Exception | None = None
    """What is to be raised when the step is saved."""
    ends: bool = False
    """Whether the run is over."""


def evaluate(
    step: int,
    state: TrainState,
    ready: Ready,
    loop: LoopState,
    config: Config,
    goodput: Goodput,
    writer: Any,
    bar: ProgressBar,
    watch: Watch | None,
) -> Evaluated:
    """Evaluates the parameters of a step, reports the scores, and records the loss in `loop`.

    Nothing is reported or recorded of an evaluation that is not finished.
    """
    assert ready.evaluator is not None
    try:
        with goodput.spend("evaluation"):
            seen = ready.run.seen(evaluated_params(state))
            results = run_evaluation(ready.evaluator, seen, ready.eval_sets)
    except distributed.Preempted:
        return Evaluated()
    except Exception as error:  # Such as too little memory to generate.
        raise_among_several(error)
        return Evaluated(failure=error)
    if failure := failure_of(step, results):
        return Evaluated(failure=failure)
    loss = mean_loss([result for _, result in results.values()])
    scalars = report_evaluation(step, results, loss, config, writer, bar)
    loop.add(step, loss)
    if said := loop.says_overfitting():
        bar.print(said)
        writer.write_scalars(step, {log.OVERFITS_SINCE: loop.overfits_since})
    why = watch(step, scalars) if watch else ""
    if not why and loop.stops(config.eval.patience):
        why = loop.reason()
    if why:
        bar.print(f"stopping at step {step}: {why}")
    return Evaluated(loss, ends=bool(why))


def run_evaluation(evaluator: Evaluator, params: api.Params, eval_sets: list[EvalSet]) -> Results:
    """Returns the results of all tasks."""
    return {s.task: (s, evaluator.evaluate(params, s)) for s in eval_sets}


def failure_of(step: int, results: Results) -> ValueError | None:
    """Returns the error of the first task whose own code failed."""
    errors = [result.error for _, result in results.values() if result.error]
    if not errors:
        return None
    return ValueError(
        f"{errors[0]}; mend the function, and the same command evaluates step {step} again, and "
        "goes on"
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
