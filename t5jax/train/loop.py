"""The training loop, which can be read from top to bottom."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import jax

from t5jax import checkpoint, distributed, run_lock, storage
from t5jax.checkpoint import Checkpoints
from t5jax.config import Config
from t5jax.evaluation import mean_loss
from t5jax.hf import io as hf_io
from t5jax.models import api
from t5jax.monitor import environment, log, plot, profile, progress
from t5jax.monitor.goodput import Goodput, describe
from t5jax.monitor.progress import say
from t5jax.plan.flops import peak_share
from t5jax.run_lock import RunLock
from t5jax.train.evaluations import failure_of, report_evaluation, run_evaluation
from t5jax.train.initial import begin_or_restore
from t5jax.train.prefetch import Prefetch, raise_among_several
from t5jax.train.reports import Reports
from t5jax.train.start import Ready, Standing, find_standing, prepare
from t5jax.train_state import evaluated_params, split

Watch = Callable[[int, dict[str, float]], str]

# What every start of a run adds to.
_GROWING = (log.METRICS_FILE, environment.ENVIRONMENT_FILE)


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
    with _lock(run_dir) as lock, _reports(run_dir) as reports:
        goodput = Goodput()
        standing = find_standing(config, run_dir)
        ready = None if standing.over() else prepare(standing, compiled)
        if ready is None:
            say(f"nothing to do in {run_dir}: {standing.over()}")
        else:
            _run(standing, ready, run_dir, reports, lock, goodput, watch)
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
      watch: see `train`.
    """
    config, loop, start, run = standing.config, standing.loop, standing.step, ready.run
    with (
        goodput,
        run.use(),
        Checkpoints(run_dir, keep=config.checkpoint.keep, before_save=lock.check) as checkpoints,
    ):
        # --- Resume, or begin ---
        taught: tuple[api.Params, ...] = ()
        if run.teacher:
            say(f"learning from {run.teacher.source.place}")
            taught = (run.teacher.params(),)
        state, digests = begin_or_restore(standing, run, checkpoints, goodput, run_dir, *taught)
        if distributed.is_main():
            log.truncate_metrics(reports.path, start)
            _leave_files(reports.path, standing, ready)
            reports.sync()
        _say_what_is_trained(state.params, ready)

        # --- Train ---
        batch_shapes = run.arguments(ready.iterator.spec)[1]
        throughput = progress.Throughput(
            positions=progress.count_positions(batch_shapes),
            peak_share=peak_share(run.model, batch_shapes, run.mesh.devices.flat),
        )
        trace = profile.Trace(
            reports.path, config.train.profile, start, config.train.steps, run_dir
        )
        bar = progress.ProgressBar(config.train.steps, start, quiet=not distributed.is_main())
        with (
            bar,
            contextlib.closing(log.make_writer(reports.path, distributed.is_main())) as writer,
            distributed.StopRequest() as request,
        ):
            steps = Reports(config, writer, bar, throughput, run.schedule, loop.sums)
            batches = Prefetch(ready.iterator, run.mesh, run.rules, lambda: goodput.spend("input"))
            for step in itertools.count(start + 1):
                checkpoints.check()
                batch = next(batches)
                trace.before(step, steps.flush)
                # Implicit transfers from the devices are errors here.
                with jax.transfer_guard("disallow"), goodput.step() as counted:
                    state, metrics = run.step(state, batch.arrays, *taught)
                    counted.result = metrics
                done = step == config.train.steps
                stops = request.reached(step) and not done
                # What fails in the data or in an evaluation is raised when the step is saved.
                failure = None if done else batches.try_fetch()  # While the devices work.
                steps.add(step, metrics, batch.num_tokens)
                if traced := trace.after(step, steps.flush):
                    bar.print(traced)

                evaluates = ready.evaluator is not None and not failure
                evaluates = evaluates and (done or step % config.eval.every == 0)
                saves = evaluates or done or failure or stops
                if saves or step % config.checkpoint.every == 0:
                    steps.flush()  # Raises before a state that is not finite could be saved.
                    loop.iterator, loop.sums = batch.position, steps.sums
                    with throughput.pause():
                        loss = None
                        if evaluates:
                            assert ready.evaluator is not None
                            try:
                                with goodput.spend("evaluation"):
                                    seen = run.seen(evaluated_params(state))
                                    results = run_evaluation(ready.evaluator, seen, ready.eval_sets)
                            except Exception as error:  # Such as too little memory to generate.
                                raise_among_several(error)
                                failure = error
                            else:
                                loss = mean_loss([result for _, result in results.values()])
                                scalars = report_evaluation(
                                    step, results, loss, config, writer, bar
                                )
                                loop.add(step, loss)
                                if watch and (why := watch(step, scalars)):
                                    bar.print(f"stopping at step {step}: {why}")
                                    done = True
                                failure = failure_of(results)
                                if loop.stops(config.eval.patience):
                                    bar.print(f"stopping at step {step}: {loop.reason()}")
                                    done = True
                        with goodput.spend("checkpoint"):
                            # A run that goes on from here has the metrics until here.
                            writer.flush()
                            reports.sync()
                            plain = dataclasses.asdict(loop)
                            checkpoints.save(step, run.saved(state), plain, config, loss, digests)
                            if done or stops:
                                checkpoints.wait()
                        seconds = goodput.seconds()
                        writer.write_scalars(step, {f"time/{p}": s for p, s in seconds.items()})
                if failure:
                    say(f"the checkpoint of step {step} is saved")
                    raise failure
                if done:
                    say(describe(seconds))
                    break
                if stops:
                    raise distributed.Preempted(
                        f"asked to stop (SIGTERM): step {step} is saved; the same command goes on"
                    )


def _leave_files(folder: Path, standing: Standing, ready: Ready) -> None:
    """Writes what explains the run: its config, where it runs, its tokenizer."""
    checkpoint.write_config(folder, standing.config)
    environment.record(folder, list(ready.run.mesh.devices.flat))
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
    if standing.loop.best_step:
        # The checkpoint that export and init.model take.
        loss, best = checkpoint.best_loss(run_dir), checkpoint.best_checkpoint(run_dir)
        say(f"best {standing.config.eval.split} loss {loss:.4f} at step {best.name}")
    if distributed.is_main():
        plot.plot_losses(reports.path, reports.path / "loss.png")
    say(f"done: {run_dir} (loss.png shows the losses)")
