"""The training loop, which can be read from top to bottom."""

import contextlib
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5jax import checkpoint, distributed, run_lock, storage
from t5jax.checkpoint import Checkpoints
from t5jax.config import Config
from t5jax.distill.cache import TaughtBatches
from t5jax.hf import io as hf_io
from t5jax.models import api
from t5jax.monitor import data_counts, environment, log, plot, profile, progress, run_log, trackers
from t5jax.monitor.goodput import Goodput, describe
from t5jax.monitor.progress import say
from t5jax.plan.flops import peak_share
from t5jax.program import Program
from t5jax.run_lock import RunLock
from t5jax.train import bad_batches
from t5jax.train.evaluations import Evaluated, Watch, evaluate
from t5jax.train.guard import Rewind
from t5jax.train.initial import begin_or_restore
from t5jax.train.prefetch import Fetched, Prefetch
from t5jax.train.reports import Reports
from t5jax.train.start import Ready, Standing, find_standing, prepare
from t5jax.train.state import LoopState
from t5jax.train_state import split

# What every start of a run adds to.
_GROWING = (
    log.METRICS_FILE,
    environment.ENVIRONMENT_FILE,
    run_log.LOG_FILE,
    trackers.NAME_FILE,
)


def train(config: Config, *, compiled: str | None = None, watch: Watch | None = None) -> Path:
    """Trains until `train.steps`, or until the validation loss stops improving.

    Args:
      config: of the run.
      compiled: a file with the compiled step, as `t5jax plan --save` writes it.
      watch: takes the step and the metrics of each evaluation; the run stops when it returns why.
    Returns:
      The run's folder: checkpoints, metrics.jsonl, TensorBoard events, loss.png, the tokenizer.
    Raises:
      ValueError: if the config is invalid, before the first step if possible; if the run was begun
        with another model or other data; NonFiniteLoss if training diverges, in which case the last
        good checkpoint is kept.
      distributed.Preempted: after SIGTERM, when the step is saved.
    """
    run_dir = checkpoint.create_run_dir(config.run_dir)
    with _lock(run_dir) as lock, _reports(run_dir) as reports, run_log.kept() as kept:
        goodput = Goodput()
        trackers.check_installed(config.watch.trackers)
        standing = find_standing(config, run_dir)
        request = distributed.StopRequest()
        ready = None if standing.over() else prepare(standing, compiled, request.check)
        if ready is None:
            say(f"nothing to do in {run_dir}: {standing.over()}")
        else:
            if distributed.is_main():
                kept.begin(reports.path)
            with goodput, ready.run.use():
                while True:
                    try:
                        _run(standing, ready, run_dir, reports, lock, goodput, request, watch)
                        break
                    except Rewind as rewind:
                        _go_back(standing, ready, run_dir, rewind)
        _finish(run_dir, reports, standing)
    return run_dir


def _lock(run_dir: Path) -> contextlib.AbstractContextManager[RunLock]:
    # Of several processes the first one, whose failure ends the others.
    if distributed.is_main():
        return run_lock.hold(run_dir, say)
    return contextlib.nullcontext(RunLock())


def _reports(run_dir: Path) -> contextlib.AbstractContextManager[storage.Staged]:
    writes = distributed.is_main()
    return storage.staged(run_dir, folder=True, fetch=_GROWING.__contains__, writes=writes)


def _run(
    standing: Standing,
    ready: Ready,
    run_dir: Path,
    reports: storage.Staged,
    lock: RunLock,
    goodput: Goodput,
    request: distributed.StopRequest,
    watch: Watch | None,
) -> None:
    """Trains from where the run stands.

    Args:
      standing: where that is; its `loop` is kept up to date.
      ready: what is computed, and of what.
      run_dir: the run's folder, from which checkpoints are read and into which they are written.
      reports: where all else is written that the run leaves there.
      lock: of the run's folder.
      goodput: what counts where the time goes.
      request: what knows whether the run is asked to stop.
      watch: see `train`.
    Raises:
      Rewind: if the run shall go on from its last checkpoint.
    """
    config, loop, start, run = standing.config, standing.loop, standing.step, ready.run
    with Checkpoints(run_dir, keep=config.checkpoint.keep, before_save=lock.check) as checkpoints:
        # --- Resume, or begin ---
        taught: tuple[api.Params, ...] = ()
        if run.teacher:
            say(f"learning from {run.teacher.source.place}")
            taught = (run.teacher.params(),)
        state, digests = begin_or_restore(standing, run, checkpoints, goodput, run_dir, *taught)
        said = None
        if run.teacher_features:
            taught = ()  # Before it is read again, to be asked.
            said = TaughtBatches(ready.iterator, run, config)
            say(f"{len(said.answers):,} rows of its answers in {config.distill.cache}")
        if distributed.is_main():
            log.truncate_metrics(reports.path, start, evaluates_again=loop.owes_evaluation)
            if not standing.goes_back:
                _leave_files(reports.path, standing, ready)
            reports.sync()
        _say_what_is_trained(state.params, ready)
        saved = start if standing.last else None  # The step of the last checkpoint.
        if config.watch.rewinds and not standing.last:
            first = dataclasses.replace(loop, iterator=ready.iterator.state())
            plain = dataclasses.asdict(first)
            checkpoints.save(start, run.saved(state), plain, config, None, digests)
            saved = start

        # --- Train ---
        batch_shapes = run.arguments(ready.iterator.spec)[1]
        throughput = progress.Throughput(
            positions=progress.count_positions(batch_shapes),
            peak_share=peak_share(run.model, batch_shapes, run.mesh.devices.flat),
        )
        bar = progress.ProgressBar(config.train.steps, start, quiet=not distributed.is_main())

        def keep(batch: Fetched, about: dict[str, Any]) -> Path:
            return run_dir / bad_batches.keep(reports.path, batch, about, ready.tokenizer)

        with (
            bar,
            profile.Trace(
                reports.path, config.train.profile, start, config.train.steps, run_dir
            ) as trace,
            contextlib.closing(said) if said else contextlib.nullcontext(),
            contextlib.closing(
                log.make_writer(
                    reports.path,
                    distributed.is_main(),
                    lambda: trackers.make_trackers(reports.path, config),
                )
            ) as writer,
            request,
        ):
            steps = Reports(config, writer, bar, throughput, run.schedule, loop, start, keep)
            if loop.owes_evaluation and ready.evaluator:
                with throughput.pause():
                    found = evaluate(start, state, ready, loop, config, goodput, writer, bar, watch)
                if found.loss is None:
                    raise found.failure or _preempted(start)
                writer.flush()
                reports.sync()  # What was said of the loss is there before it.
                checkpoints.add_loss(start, found.loss)
                if found.ends or start >= config.train.steps:
                    say(describe(goodput.seconds()))
                    return
            iterator = said or ready.iterator
            batches = Prefetch(iterator, run.mesh, run.rules, lambda: goodput.spend("input"))
            for turn in itertools.count(start + 1):  # Not the step, where batches are passed over.
                checkpoints.check()
                batch = next(batches)
                trace.before(turn, steps.flush)
                limit = steps.limit(batch)
                arguments = (batch.arrays, *taught, *_limits(run, config, limit, taught))
                # Implicit transfers from the devices are errors here.
                with jax.transfer_guard("disallow"), goodput.step() as counted:
                    state, metrics = run.step(state, *arguments)
                    counted.result = metrics
                asked, ends = request.reached(), steps.step + 1 >= config.train.steps
                # What fails in the data or in an evaluation is raised when the step is saved.
                failure = None if ends else batches.try_fetch()  # While the devices work.
                steps.add(metrics, batch, limit)
                if traced := trace.after(turn, steps.flush):
                    bar.print(traced)

                step = steps.step
                done = step >= config.train.steps
                evaluates = ready.evaluator is not None
                evaluates = evaluates and (done or step % config.eval.every == 0)
                saves = evaluates or done or failure or asked
                if saves or step % config.checkpoint.every == 0:
                    steps.flush()  # Raises before a state that is not finite could be saved.
                    if steps.step < step:  # It was passed over.
                        step, done, evaluates = steps.step, False, False
                        saves = failure or asked
                if (saves or step % config.checkpoint.every == 0) and step != saved:
                    steps.save(batch)
                    loop.owes_evaluation = evaluates
                    with throughput.pause():
                        found = Evaluated()
                        if evaluates and not failure and not asked:
                            found = evaluate(
                                step, state, ready, loop, config, goodput, writer, bar, watch
                            )
                            failure, done = found.failure, done or found.ends
                            asked = request.asked
                        with goodput.spend("checkpoint"):
                            # A run that goes on from here has the metrics until here.
                            writer.flush()
                            if distributed.is_main():
                                data_counts.write(reports.path, ready.data, loop.read)
                            reports.sync()
                            plain = dataclasses.asdict(loop)
                            checkpoints.save(
                                step, run.saved(state), plain, config, found.loss, digests
                            )
                            saved = step
                            if done or asked or failure:
                                checkpoints.wait()
                        seconds = goodput.seconds()
                        writer.write_scalars(step, {f"time/{p}": s for p, s in seconds.items()})
                if failure:
                    say(f"the checkpoint of step {step} is saved")
                    raise failure
                if done and not loop.owes_evaluation:
                    say(describe(seconds))
                    break
                if asked:
                    raise _preempted(step)


def _preempted(step: int) -> distributed.Preempted:
    return distributed.Preempted(
        f"asked to stop (SIGTERM): step {step} is saved; the same command goes on"
    )


def _limits(run: Program, config: Config, limit: float, taught: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the last arguments of a step that skips."""
    if not run.skips:
        return ()
    value = np.float32(limit if config.watch.on_spike == "skip" else math.inf)
    place = jax.sharding.NamedSharding(run.mesh, jax.sharding.PartitionSpec())
    on_devices = jax.make_array_from_callback((), place, lambda _: value)
    return (on_devices,) if taught else (None, on_devices)


def _go_back(standing: Standing, ready: Ready, run_dir: Path, rewind: Rewind) -> None:
    """Brings a run to its last checkpoint, and its data behind the batch that went wrong."""

    standing.last, _ = checkpoint.newest_sound(run_dir)
    assert standing.last is not None  # That of step 0, at least.
    standing.saved, standing.goes_back = standing.config, True
    standing.loop = LoopState.of(standing.last)
    standing.loop.guard["passed_over"] = rewind.passed_over
    ready.iterator.restore(rewind.position)


def _leave_files(folder: Path, standing: Standing, ready: Ready) -> None:
    """Writes what explains the run: its config, where it runs, its tokenizer."""
    checkpoint.write_config(folder, standing.config)
    environment.record(folder, list(ready.run.mesh.devices.flat))
    data_counts.write(folder, ready.data, standing.loop.read)
    ready.tokenizer.save(folder / checkpoint.TOKENIZER_DIR)
    if standing.source:
        generation = standing.source.generation()
        hf_io.save_generation(folder / checkpoint.TOKENIZER_DIR, generation)


def _say_what_is_trained(params: api.Params, ready: Ready) -> None:
    run = ready.run
    num_params = sum(x.size for x in jax.tree.leaves(params))
    size = f"; an epoch is {ready.epoch}" if ready.epoch else ""
    if run.frozen:
        share = sum(x.size for x in jax.tree.leaves(split(params, run.frozen)[0]))
        size = f", {share:,} of them trained ({share / num_params:.2%}){size}"
    say(f"{num_params:,} parameters on {_describe_mesh(run.mesh)}{size}")
    say(f"attention: {api.attention_backend()}")


def _describe_mesh(mesh: jax.sharding.Mesh) -> str:
    kind = mesh.devices.flat[0].device_kind
    hosts = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    if mesh.size == 1:
        return f"1 {kind} device"
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} {kind} devices ({shape}{hosts})"


def _finish(run_dir: Path, reports: storage.Staged, standing: Standing) -> None:
    # The checkpoint that export and init.model take; that with the loss may be gone, or damaged.
    best = checkpoint.best_checkpoint(run_dir)
    if (loss := checkpoint.validation_loss(best)) < math.inf:
        say(f"best {standing.config.eval.split} loss {loss:.4f} at step {best.name}")
    if distributed.is_main():
        plot.plot_losses(reports.path, reports.path / "loss.png")
    say(f"done: {run_dir} (loss.png shows the losses)")
