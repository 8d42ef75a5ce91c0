"""The training loop, read from top to bottom.

Parameters come, in this order, from the last checkpoint in `run_dir`, from `init.model`, or from
the seed. A run that was stopped, however it was, goes on by itself when it is started again, and
ends in the same bits.
"""

import dataclasses
import itertools
import math
import os
import sys
from collections import deque
from pathlib import Path

import jax
from rich.console import Console

from t5jax import checkpoint, monitor, pretrained, sharding
from t5jax.checkpoint import Checkpoints
from t5jax.config import Config
from t5jax.data.api import BatchIterator, EvalSet
from t5jax.evaluate import Evaluator, Result, as_table, mean_loss
from t5jax.models import api
from t5jax.optimizers import make_optimizer, make_schedule
from t5jax.train_state import create_train_state, train_state_shapes, train_state_shardings
from t5jax.train_step import make_train_step


class NonFiniteLoss(ValueError):
    """The loss or the gradient is NaN or infinite."""


def train(config: Config) -> Path:
    """Trains until `train.steps`, or until the validation loss stops falling.

    Returns:
      The run's folder: checkpoints, metrics.jsonl, TensorBoard events, loss.png, the tokenizer.
    Raises:
      ValueError: for anything in the config that cannot work, before the first step where that
        can be known; for a run that was begun with another model or other data; NonFiniteLoss
        when training diverges, with the last good checkpoint left in place.
    """
    from t5jax.data import pipeline  # TensorFlow and SeqIO: only where data are read.

    # --- What is trained, and on what ---
    run_dir = create_run_dir(config)
    mesh = sharding.make_mesh(config.mesh)
    rules = config.axes
    sharding.check_batch_size(config.data.batch_size, mesh, rules)
    _check_microbatches(config, mesh)

    source = None
    if config.init.model:
        source = pretrained.find(config.init.model)
        model = pretrained.adopt(config.model, source, config.init.model)
        config = dataclasses.replace(config, model=model)
    model = config.model

    # --- Data ---
    say("reading tasks")
    pipeline.load_tasks(config.data.task_files)
    tokenizer = pipeline.tokenizer_for(config, source and source.tokenizer())
    iterator = pipeline.train_iterator(config, tokenizer)
    eval_sets = pipeline.eval_sets(config, tokenizer=tokenizer) if config.eval.every else []

    # --- Optimizer, step, and what they need on the devices ---
    tx = make_optimizer(config.optimizer, config.train.steps, api.param_axes(model))
    schedule = make_schedule(config.optimizer, config.train.steps)
    shardings = train_state_shardings(model, tx, mesh, rules)
    train_step = jax.jit(
        make_train_step(
            model,
            tx,
            config.loss,
            seed=config.train.seed,
            microbatches=config.train.microbatches,
        ),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )

    with sharding.use_mesh(mesh, rules):
        # --- Resume, or begin ---
        checkpoints = Checkpoints(run_dir, keep=config.checkpoint.keep)
        loop = LoopState()
        start = checkpoints.latest_step()
        if start is not None:
            saved = checkpoint.read_config(run_dir / checkpoint.CHECKPOINTS_DIR / str(start))
            checkpoint.check_same_run(saved, config)
            state, values = checkpoints.restore(start, train_state_shapes(model, tx), shardings)
            loop = LoopState.from_values(values)
            iterator.restore(loop.iterator)
            monitor.truncate_metrics(run_dir, start)
            say(f"going on from step {start} of {run_dir}")
        else:
            start = 0
            key = jax.random.key(config.train.seed)
            create = jax.jit(
                lambda key: create_train_state(model, tx, key), out_shardings=shardings
            )
            state = create(key)
            if source:
                say(f"parameters from {source.path}")
                state = state.replace(params=None)  # Never two copies on the devices.
                state = state.replace(params=source.params(model, shardings.params))
            monitor.truncate_metrics(run_dir, 0)
        checkpoint.write_config(run_dir, config)
        tokenizer.save(run_dir / checkpoint.TOKENIZER_DIR)
        num_params = sum(x.size for x in jax.tree.leaves(state.params))
        say(f"{num_params:,} parameters on {describe_mesh(mesh)}")

        # --- Train ---
        writer = monitor.make_writer(run_dir)
        throughput = monitor.Throughput()
        bar = monitor.ProgressBar(config.train.steps, start)
        evaluator = Evaluator(
            model,
            tokenizer,
            mesh,
            rules,
            batch_size=config.eval.batch_size,
            max_tokens=config.eval.max_tokens or config.data.targets_length,
            generate=config.eval.generate,
        )
        reports = Reports(config, writer, bar, throughput, schedule)
        batches = Prefetch(iterator, mesh, rules)
        done = start >= config.train.steps or loop.stopped
        with bar:
            for step in itertools.count(start + 1):
                if done:
                    break
                batch, num_tokens, position = next(batches)
                # Nothing in here reads from the devices without saying so.
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, batch)
                batches.fetch()  # While the devices work on the step.
                reports.add(step, metrics, num_tokens)
                loop.iterator = position

                done = step == config.train.steps
                evaluates = eval_sets and (done or step % config.eval.every == 0)
                if evaluates or done or step % config.checkpoint.every == 0:
                    reports.flush()  # Raises before a state that is not finite could be saved.
                    with throughput.pause():
                        loss = None
                        if evaluates:
                            results = run_evaluation(evaluator, state.params, eval_sets)
                            loss = mean_loss([result for _, result in results.values()])
                            report_evaluation(step, results, loss, config, writer, bar)
                            done |= loop.stops(step, loss, config.eval.patience)
                        checkpoints.save(step, state, loop.values(), config, loss)
            reports.flush()
            checkpoints.wait()
        checkpoints.close()
        writer.close()

    if config.eval.every and loop.best_step:
        say(f"best validation loss {loop.best_loss:.4f} at step {loop.best_step}")
    monitor.plot_losses(run_dir, run_dir / "loss.png")
    say(f"done: {run_dir} (loss.png shows the losses)")
    return run_dir


# --- Pieces of the loop --------------------------------------------------------------------------


@dataclasses.dataclass
class LoopState:
    """What the loop remembers besides the train state; saved with it."""

    iterator: dict = dataclasses.field(default_factory=dict)
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_since_best: int = 0
    stopped: bool = False

    def stops(self, step: int, loss: float, patience: int | None) -> bool:
        """Takes in a validation loss; returns whether training should stop early."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.evaluations_since_best = loss, step, 0
        else:
            self.evaluations_since_best += 1
        self.stopped = patience is not None and self.evaluations_since_best >= patience
        if self.stopped:
            say(
                f"stopping at step {step}: {patience} evaluations without a validation loss below "
                f"{self.best_loss:.4f}"
            )
        return self.stopped

    def values(self) -> dict:
        # JSON has no infinity.
        return dataclasses.asdict(self) | {"best_loss": self.best_loss if self.best_step else None}

    @classmethod
    def from_values(cls, values: dict) -> "LoopState":
        return cls(**values | {"best_loss": values["best_loss"] or math.inf})


class Prefetch:
    """Puts the next batch onto the devices while the current step runs there."""

    def __init__(self, iterator: BatchIterator, mesh: jax.sharding.Mesh, rules):
        self._iterator, self._mesh, self._rules = iterator, mesh, rules
        self._slot = None

    def fetch(self) -> None:
        batch = next(self._iterator)
        on_devices = sharding.shard_batch(batch, self._mesh, self._rules)
        # The position after this batch: what a checkpoint of its step has to remember, though the
        # iterator itself is one batch ahead by then.
        self._slot = on_devices, monitor.count_tokens(batch), self._iterator.state()

    def __next__(self):
        if self._slot is None:
            self.fetch()
        slot, self._slot = self._slot, None
        return slot


class Reports:
    """Reads a step's metrics once the next step is under way, so that the devices never wait."""

    def __init__(self, config, writer, bar, throughput, schedule):
        self._config, self._writer, self._bar = config, writer, bar
        self._throughput, self._schedule = throughput, schedule
        self._pending = deque()
        self._sums = None

    def add(self, step: int, metrics: dict[str, jax.Array], num_tokens: int) -> None:
        self._pending.append((step, metrics, num_tokens))
        if len(self._pending) > 1:
            self._report()

    def flush(self) -> None:
        while self._pending:
            self._report()

    def _report(self) -> None:
        step, metrics, num_tokens = self._pending.popleft()
        metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
        self._throughput.step_done(num_tokens)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise NonFiniteLoss(
                    f"{name} is {metrics[name]} at step {step}; the last good checkpoint stands. "
                    "Lower optimizer.learning_rate, set optimizer.clip_norm or a longer warm-up, "
                    "or set model.dtype to float32 to see whether precision is the cause"
                )
        sums = self._sums or dict.fromkeys((*metrics, "steps"), 0.0)
        self._sums = {name: sums[name] + value for name, value in (metrics | {"steps": 1}).items()}
        if step % self._config.train.log_every and step != self._config.train.steps:
            self._bar.update(step)
            return
        sums, self._sums = self._sums, None
        tokens = max(sums["tokens"], 1)
        rates = self._throughput.read()
        scalars = {
            "train/loss": sums["loss"] / tokens,
            "train/nll": sums["nll"] / tokens,
            "train/token_accuracy": 100 * sums["correct"] / tokens,
            "train/grad_norm": sums["grad_norm"] / sums["steps"],
            "train/learning_rate": float(self._schedule(step - 1)),
        } | {f"train/{name}": rate for name, rate in rates.items()}
        self._writer.write_scalars(step, scalars)
        self._bar.update(
            step, loss=scalars["train/loss"], tokens_per_second=rates.get("tokens_per_second")
        )


def run_evaluation(
    evaluator: Evaluator, params: api.Params, eval_sets: list[EvalSet]
) -> dict[str, tuple[EvalSet, Result]]:
    return {s.task: (s, evaluator.evaluate(params, s)) for s in eval_sets}


def report_evaluation(step, results, loss, config: Config, writer, bar) -> None:
    """Writes the scores of an evaluation, and shows a line and samples of each task."""
    split = config.eval.split
    scalars = {f"{split}/loss": loss}
    bar.print(f"step {step}: {split} loss {loss:.4f}")
    for task, (eval_set, result) in results.items():
        scalars |= {f"{split}/{task}/{name}": value for name, value in result.scores.items()}
        scores = ", ".join(
            f"{name} {value:.2f}" for name, value in result.scores.items() if name != "loss"
        )
        bar.print(f"  {task}: {scores}")
        shown = min(config.eval.num_samples, len(result.predictions))
        if shown:
            examples = eval_set.examples[:shown]
            columns = (
                [e.inputs for e in examples],
                [e.targets for e in examples],
                result.predictions[:shown],
            )
            bar.print(monitor.samples_table(*columns))
            writer.write_texts(
                step, {f"{split}/{task}/samples": monitor.samples_markdown(*columns)}
            )
    writer.write_scalars(step, scalars)
    writer.flush()


def create_run_dir(config: Config) -> Path:
    """Returns the run's folder, made if need be.

    Raises:
      ValueError: if it cannot be written.
    """
    run_dir = Path(config.run_dir).expanduser()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"run_dir {run_dir} cannot be written ({error.strerror}); choose another run_dir"
        ) from None
    return run_dir


def _check_microbatches(config: Config, mesh) -> None:
    size = config.data.batch_size // config.train.microbatches
    name = f"data.batch_size / train.microbatches = {config.data.batch_size} / "
    sharding.check_batch_size(size, mesh, config.axes, f"{name}{config.train.microbatches} =")


def describe_mesh(mesh: jax.sharding.Mesh) -> str:
    kind = mesh.devices.flat[0].device_kind
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"{mesh.size} {kind} device{'s' if mesh.size > 1 else ''} ({shape})"


def say(text: str) -> None:
    """Tells the person at the terminal; standard output is for results."""
    if jax.process_index() == 0:
        Console(stderr=True, highlight=False).print(text, soft_wrap=True)
