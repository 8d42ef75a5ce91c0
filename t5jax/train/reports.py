"""What a run reports of its steps: metrics.jsonl, TensorBoard, the progress bar.

Here a step is also judged, and gets its number: one that was passed over has none.
"""

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from t5jax.config import Config
from t5jax.monitor import data_counts
from t5jax.monitor.norms import as_scalars
from t5jax.monitor.progress import ProgressBar, Throughput
from t5jax.train.guard import Bad, Guard, Rewind
from t5jax.train.prefetch import Fetched
from t5jax.train.state import LoopState

KeepBatch = Callable[[Fetched, dict[str, Any]], Path]
"""Keeps a batch, with what was wrong; returns where."""


class _Pending(NamedTuple):
    metrics: dict[str, Any]
    batch: Fetched
    limit: float


class Reports:
    """Reads a step's metrics after the next step was dispatched, so that devices never wait."""

    def __init__(
        self,
        config: Config,
        writer: Any,
        bar: ProgressBar,
        throughput: Throughput,
        schedule: optax.Schedule,
        loop: LoopState,
        start: int,
        keep: KeepBatch,
    ) -> None:
        """Continues after the step `start` from what `loop` has of the steps before."""
        self._config, self._writer, self._bar = config, writer, bar
        self._throughput, self._schedule, self._keep = throughput, schedule, keep
        self._guard = Guard(config.watch, loop.guard)
        self._loop, self._read = loop, start
        self._sums = loop.sums
        self._pending: deque[_Pending] = deque()
        self._begins = {first for first, _ in config.data.mixtures[1:]}

    @property
    def step(self) -> int:
        """The number of the last step that was begun; of one that is not read yet, unless it is
        passed over."""
        return self._read + len(self._pending)

    def limit(self, batch: Fetched) -> float:
        """Returns the loss above which the next step, with this batch, is a spike."""
        if self._is_first(batch) or any(self._is_first(p.batch) for p in self._pending):
            return math.inf
        return self._guard.limit(in_flight=bool(self._pending))

    def _is_first(self, batch: Fetched) -> bool:
        """Returns whether another mixture begins with a batch."""
        return batch.number - 1 in self._begins

    def add(self, metrics: dict[str, Any], batch: Fetched, limit: float = math.inf) -> None:
        """Takes the metrics of a step, and reads those of the one before.

        Raises:
          Diverged: if that went wrong, and the run shall stop.
          Rewind: if it shall go on from the last checkpoint.
        """
        self._pending.append(_Pending(metrics, batch, limit))
        if len(self._pending) > 1:
            self._report()

    def flush(self) -> None:
        """Reads the metrics of all steps; raises as `add` does."""
        while self._pending:
            self._report()

    def save(self, batch: Fetched) -> None:
        """Brings what `loop` has up to date; `batch` is the last one. All metrics must be read."""
        assert not self._pending
        self._loop.iterator, self._loop.sums = batch.position, self._sums
        self._loop.guard = self._guard.state()

    def _report(self) -> None:
        pending = self._pending.popleft()
        self._loop.read = data_counts.add(self._loop.read, data_counts.count(pending.batch.taken))
        found: dict[str, Any] = jax.device_get(pending.metrics)
        norms, skipped = found.pop("norms", None), bool(found.pop("skipped", False))
        metrics = {name: float(x) for name, x in found.items()}
        self._throughput.step_done(pending.batch.num_tokens)
        if self._is_first(pending.batch):
            self._guard.forget()
        loss, grad_norm = metrics["loss"] / max(metrics["tokens"], 1), metrics["grad_norm"]
        if bad := self._guard.judge(loss, grad_norm, pending.limit, skipped):
            self._pass_over(bad, pending, loss, grad_norm)
            return
        self._read += 1
        self._add(metrics)
        step = self._read
        if step % self._config.train.log_every and step != self._config.train.steps:
            self._bar.update(step)
        else:
            self._write(step, as_scalars(jax.tree.map(float, norms)) if norms else {})

    def _pass_over(self, bad: Bad, pending: _Pending, loss: float, grad_norm: float) -> None:
        step, batch = self._read + 1, pending.batch
        about = {
            "step": step,
            "batch": batch.number,
            "what": bad.what,
            "action": bad.action,
            "loss": loss,
            "grad_norm": grad_norm,
            "limit": pending.limit,
        }
        path = self._keep(batch, about)
        if error := self._guard.error(bad, step, path):
            raise error
        done = "going back to the last checkpoint" if bad.action == "rewind" else "passed over"
        self._bar.print(
            f"{bad.what} at step {step}: {done} ({self._guard.passed_over} of at most "
            f"{self._config.watch.most_passed_over}); the batch is in {path}"
        )
        if bad.action == "rewind":
            raise Rewind(batch.position, self._guard.passed_over)

    def _add(self, metrics: dict[str, float]) -> None:
        new = metrics | {"steps": 1}
        self._sums = {name: self._sums.get(name, 0) + value for name, value in new.items()}
        self._loop.target_tokens += metrics["tokens"]
        total, tokens = self._loop.since_evaluation
        self._loop.since_evaluation = [total + metrics["loss"], tokens + metrics["tokens"]]

    def _write(self, step: int, norms: dict[str, float]) -> None:
        """Writes a line for the steps since the last one, with norms of the last one."""
        sums, self._sums = self._sums, {}
        tokens = max(sums["tokens"], 1)
        rates = self._throughput.read()
        scalars = {
            "train/loss": sums["loss"] / tokens,
            "train/nll": sums["nll"] / tokens,
            "train/token_accuracy": 100 * sums["correct"] / tokens,
            "train/grad_norm": sums["grad_norm"] / sums["steps"],
            "train/learning_rate": float(self._schedule(step - 1)),
            "train/target_tokens": self._loop.target_tokens,
        } | {f"train/{name}": rate for name, rate in rates.items()}
        if "distillation" in sums:
            scalars["train/distillation"] = sums["distillation"] / tokens
        if self._guard.passed_over:
            scalars["train/passed_over"] = self._guard.passed_over
        scalars |= norms
        self._writer.write_scalars(step, scalars)
        self._bar.update(
            step,
            loss=scalars["train/loss"],
            tokens_per_second=rates.get("tokens_per_second"),
            mfu=rates.get("mfu"),
        )
