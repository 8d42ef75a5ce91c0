"""What a run reports of its steps: metrics.jsonl, TensorBoard, the progress bar."""

import math
from collections import deque
from typing import Any

import jax
import optax

from t5jax.config import Config
from t5jax.monitor.progress import ProgressBar, Throughput


class NonFiniteLoss(ValueError):
    """The loss or the gradient is NaN or infinite."""


class Reports:
    """Reads a step's metrics after the next step was dispatched, so that devices never wait."""

    def __init__(
        self,
        config: Config,
        writer: Any,
        bar: ProgressBar,
        throughput: Throughput,
        schedule: optax.Schedule,
        sums: dict[str, float],
    ) -> None:
        """Continues from `sums`, the metrics of the steps since the last report of a resumed
        run."""
        self._config, self._writer, self._bar = config, writer, bar
        self._throughput, self._schedule = throughput, schedule
        self._pending: deque[tuple[int, dict[str, jax.Array], int]] = deque()
        self.sums = sums

    def add(self, step: int, metrics: dict[str, jax.Array], num_tokens: int) -> None:
        """Takes the metrics of a step, and reads those of the one before."""
        self._pending.append((step, metrics, num_tokens))
        if len(self._pending) > 1:
            self._report()

    def flush(self) -> None:
        """Reads the metrics of all steps."""
        while self._pending:
            self._report()

    def _report(self) -> None:
        step, metrics, num_tokens = self._pending.popleft()
        metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
        self._throughput.step_done(num_tokens)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise NonFiniteLoss(
                    f"{name} is {metrics[name]} at step {step}; the last good checkpoint stands, "
                    "and the same command goes on from it. Lower optimizer.learning_rate, set "
                    "optimizer.clip_norm, or set model.dtype to float32 to see whether precision "
                    "is the cause; a longer warm-up helps a run from its first step"
                )
        metrics["steps"] = 1
        self.sums = {name: self.sums.get(name, 0) + value for name, value in metrics.items()}
        if step % self._config.train.log_every and step != self._config.train.steps:
            self._bar.update(step)
            return
        sums, self.sums = self.sums, {}
        tokens = max(sums["tokens"], 1)
        rates = self._throughput.read()
        scalars = {
            "train/loss": sums["loss"] / tokens,
            "train/nll": sums["nll"] / tokens,
            "train/token_accuracy": 100 * sums["correct"] / tokens,
            "train/grad_norm": sums["grad_norm"] / sums["steps"],
            "train/learning_rate": float(self._schedule(step - 1)),
        } | {f"train/{name}": rate for name, rate in rates.items()}
        if "distillation" in sums:
            scalars["train/distillation"] = sums["distillation"] / tokens
        self._writer.write_scalars(step, scalars)
        self._bar.update(
            step,
            loss=scalars["train/loss"],
            tokens_per_second=rates.get("tokens_per_second"),
            mfu=rates.get("mfu"),
        )
