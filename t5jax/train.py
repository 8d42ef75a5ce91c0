"""The training loop, which can be read from top to bottom.

Parameters are taken from the last checkpoint in `run_dir`, otherwise from `init.model`, otherwise
they are initialized from the seed. A run that was stopped for any reason resumes when it is started
again, with bitwise the same result.
"""

import contextlib
import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path

import flax.traverse_util
import jax
from rich.console import Console

from t5jax import checkpoint, distributed, sharding, storage
from t5jax.adapters import digest
from t5jax.adapters import params as adapted
from t5jax.architectures import Architecture
from t5jax.checkpoint import Checkpoints
from t5jax.config import AdapterConfig, Config, LoraConfig, to_json
from t5jax.data.batches.examples import BatchIterator, EvalSet
from t5jax.distill import check_teacher, student_params
from t5jax.evaluation import Evaluator, Result, mean_loss
from t5jax.hf import io as hf_io
from t5jax.models import api
from t5jax.monitor import environment, log, plot, profile, progress, tables
from t5jax.monitor.goodput import Goodput, describe
from t5jax.plan.compiled import load as load_step
from t5jax.plan.flops import peak_share
from t5jax.program import Program, program
from t5jax.source import Source, adopt, find, find_base
from t5jax.special_tokens import trained_with
from t5jax.train_state import evaluated_params, split

# Schedules that depend on train.steps.
FALLING = {"cosine", "linear", "wsd"}


# What every start of a run adds to.
_GROWING = (log.METRICS_FILE, environment.ENVIRONMENT_FILE)


class NonFiniteLoss(ValueError):
    """The loss or the gradient is NaN or infinite."""


def train(
    config: Config,
    *,
    compiled: str | None = None,
    watch: Callable[[int, dict[str, float]], str] | None = None,
) -> Path:
    """Trains until `train.steps`, or until the validation loss stops improving.

    Args:
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
    with storage.staged(
        run_dir, folder=True, fetch=_GROWING.__contains__, writes=distributed.is_main()
    ) as reports:
        _train(config, run_dir, reports, compiled, watch)
    return run_dir


def _train(
    config: Config,
    run_dir: Path,
    reports: storage.Staged,
    compiled: str | None,
    watch: Callable[[int, dict[str, float]], str] | None,
) -> None:
    """Trains, as `train` does.

    Args:
      config: the config.
      run_dir: the run's folder, from which checkpoints are read and into which they are written.
      reports: where all else is written that the run leaves there.
      compiled: see `train`.
      watch: see `train`.
    """
    from t5jax.data import pipeline, registry  # TensorFlow and SeqIO: only where data are read.

    goodput = Goodput()
    # --- Where the run stands, and what its model comes from ---
    distributed.check_same(to_json(config), "the config", "start the same command on every host")
    distributed.check_shared(run_dir)
    last = checkpoint.latest_checkpoint(run_dir)
    distributed.check_same(
        str(last and last.name),
        f"the last checkpoint in {run_dir}",
        "start again when all hosts see the same files",
    )
    loop = LoopState(**checkpoint.read_loop(last)) if last else LoopState()
    source, base = None, find_base(config) if config.adapter else None
    if config.init.model or loop.imported:
        # A run that has begun does not need its source, which may no longer exist.
        name = str(last or config.init.model)
        source = find(name, config.data.vocabulary)
        model = adopt(config.model, source, name)
        if own := source.own_tokenizer():
            model = trained_with(model, own)
        config = dataclasses.replace(config, model=model)
    if base:
        config = _with_new_head(config, base)
    if last:
        saved = checkpoint.read_config(last)
        if config.train.epochs is not None and config.train.epochs == saved.train.epochs:
            config = _with_steps(config, saved.train.steps)  # Counted when the run began.
        checkpoint.check_same_run(saved, config, begun=bool(loop.iterator))
        is_counted = config.train.epochs in (None, saved.train.epochs)
        if is_counted and (reason := loop.is_over(int(last.name), config)):
            say(f"nothing to do in {run_dir}: {reason}")
            return _finish(run_dir, reports, loop, config)

    # --- The program: what cannot work is said before a cache is written ---
    mesh = sharding.make_mesh(config.mesh)
    # The sizes of a published model cannot be changed to suit the mesh.
    rules = source.rules(mesh, config.axes, config.model) if source else config.axes
    # How many steps the epochs are is only known of the data.
    counts = config.train.epochs is not None and not (last and is_counted)
    early = _with_steps(config, _UNKNOWN_STEPS) if counts else config
    run = program(dataclasses.replace(early, axes=rules), mesh)

    # --- Data ---
    say("reading tasks")
    registry.load_tasks(config.data.task_files)
    given = source or (run.teacher and run.teacher.source)
    tokenizer = pipeline.tokenizer_for(config, given.tokenizer() if given else None)
    rows = sharding.process_rows(config.data.batch_size, run.mesh, run.rules)
    iterator = pipeline.train_iterator(config, tokenizer, rows)
    sharding.check_lengths(iterator.spec, run.mesh, run.rules)
    if run.teacher:
        check_teacher(run.teacher, config.model, tokenizer, iterator.spec)
    epoch = iterator.epoch(config.train.epochs if counts else None)
    if counts:
        # A state that was imported has steps of its own, before the first epoch.
        before = int(last.name) if last and not loop.iterator else 0
        config = _with_steps(config, before + epoch.total_steps)
        if last and (reason := loop.is_over(int(last.name), config)):
            say(f"nothing to do in {run_dir}: {reason}")
            return _finish(run_dir, reports, loop, config)
        run = program(dataclasses.replace(config, axes=rules), mesh)
    if compiled:
        run = load_step(compiled, run, dataclasses.replace(config, axes=rules), iterator.spec)
    if loop.iterator:
        iterator.restore(loop.iterator)
    eval_sets, evaluator = [], None
    if config.eval.every:
        eval_sets = pipeline.eval_sets(config, tokenizer=tokenizer)
        evaluator = Evaluator(
            run.model,
            tokenizer,
            run.mesh,
            run.rules,
            batch_size=config.eval.batch_size,
            max_tokens=config.eval.max_tokens or config.data.targets_length,
            generate=config.eval.generate,
            prefix_lm=config.data.prefix_lm,
        )
        for eval_set in eval_sets:
            evaluator.check(eval_set)
    distributed.check_same(
        repr(
            [iterator.state(), str(epoch), *(e.target_ids for s in eval_sets for e in s.examples)]
        ),
        "the data (files, tasks or caches)",
        "give every host the same ones",
    )

    with goodput, run.use(), Checkpoints(run_dir, keep=config.checkpoint.keep) as checkpoints:
        # --- Resume, or begin ---
        start = int(last.name) if last else 0
        if last:
            say(f"going on from step {start} of {run_dir}")
            _say_how_the_rate_falls(saved, config)
            with goodput.spend("checkpoint"):
                state = checkpoints.restore(last, run.saved(run.shapes), run.saved(run.shardings))
        else:
            with goodput.spend("other"):
                state = run.create(jax.random.key(config.train.seed))
            if source:
                how = ", dequantized" if source.is_quantized and not base else ""
                say(f"parameters from {source.place}{how}")
            if source and not base:
                new = _new_params(source, run.model, state.params)
                state = None  # Never two copies on the devices.
                state = run.begin(source.params(run.model, run.shardings.params, new))
        digests = None
        if base:
            own, key = run.saved(state), jax.random.key(config.train.seed)
            state = state.replace(params=None)
            params, digests = _params_over(
                base, run, config.adapter, own.params, key, begins=not last
            )
            state = state.replace(params=params)
            if last:
                digest.check(digests, checkpoint.read_base(last), str(run_dir), str(base.path))
        if distributed.is_main():
            log.truncate_metrics(reports.path, start)
            checkpoint.write_config(reports.path, config)
            environment.record(reports.path, list(run.mesh.devices.flat))
            tokenizer.save(reports.path / checkpoint.TOKENIZER_DIR)
            if source:
                generation = source.generation()
                hf_io.save_generation(reports.path / checkpoint.TOKENIZER_DIR, generation)
            reports.sync()
        taught = ()
        if run.teacher:
            say(f"learning from {run.teacher.source.place}")
            taught = (run.teacher.params(),)
            if config.distill.init_layers and not last:
                state = None
                state = run.begin(
                    student_params(run.teacher, taught[0], run.model, run.shardings.params)
                )
        num_params = sum(x.size for x in jax.tree.leaves(state.params))
        size = f"; an epoch is {epoch}" if epoch else ""
        if run.frozen:
            share = sum(x.size for x in jax.tree.leaves(split(state.params, run.frozen)[0]))
            size = f", {share:,} of them trained ({share / num_params:.2%}){size}"
        say(f"{num_params:,} parameters on {describe_mesh(run.mesh)}{size}")
        say(f"attention: {api.attention_backend()}")

        # --- Train ---
        batch_shapes = run.arguments(iterator.spec)[1]
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
            batches = Prefetch(iterator, run.mesh, run.rules, lambda: goodput.spend("input"))
            for step in itertools.count(start + 1):
                batch, num_tokens, position = next(batches)
                trace.before(step, steps.flush)
                # Implicit transfers from the devices are errors here.
                with jax.transfer_guard("disallow"), goodput.step() as counted:
                    state, metrics = run.step(state, batch, *taught)
                    counted.result = metrics
                done = step == config.train.steps
                stops = request.reached(step) and not done
                # What fails in the data or in an evaluation is raised when the step is saved.
                failure = None if done else batches.try_fetch()  # While the devices work.
                steps.add(step, metrics, num_tokens)
                if traced := trace.after(step, steps.flush):
                    bar.print(traced)

                evaluates = not failure and eval_sets and (done or step % config.eval.every == 0)
                saves = evaluates or done or failure or stops
                if saves or step % config.checkpoint.every == 0:
                    steps.flush()  # Raises before a state that is not finite could be saved.
                    loop.iterator, loop.sums = position, steps.sums
                    with throughput.pause():
                        loss = None
                        if evaluates:
                            try:
                                with goodput.spend("evaluation"):
                                    seen = run.seen(evaluated_params(state))
                                    results = run_evaluation(evaluator, seen, eval_sets)
                            except Exception as error:  # Such as too little memory to generate.
                                _raise_among_several(error)
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
                                failure = _failure_of(results)
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

    _finish(run_dir, reports, loop, config)


_UNKNOWN_STEPS = 10**9


def _with_steps(config: Config, steps: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def _new_params(source: Source, model: Architecture, params) -> dict[str, jax.Array]:
    """Returns the initial parameters that the source lacks, such as a new head's, by path."""
    missing = source.missing(model)
    if missing:
        say(f"new, as the seed has them: {', '.join(missing)}")
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {name: flat[name] for name in missing}


def _with_new_head(config: Config, base: Source) -> Config:
    """Returns a config that also trains the parameters that the base of its adapter lacks."""
    if not isinstance(config.adapter, LoraConfig):
        return config
    new = [name for name in base.missing(config.model) if name not in config.adapter.train]
    adapter = dataclasses.replace(config.adapter, train=(*config.adapter.train, *new))
    return dataclasses.replace(config, adapter=adapter)


def _params_over(
    base: Source,
    run: Program,
    adapter: AdapterConfig,
    own: api.Params,
    key: jax.Array,
    *,
    begins: bool,
) -> tuple[api.Params, dict[str, str]]:
    """Returns the parameters of an adapter over its base, which is read, and the base's digests.

    Args:
      own: the parameters that the base does not have, and those of it that are trained.
      begins: whether no step has been trained, so that the base's are as they were.
    """
    own = flax.traverse_util.flatten_dict(own, sep="/")
    new = {path: own[path] for path in base.missing(run.model)}
    shardings = adapted.shardings(run.model, None, run.mesh, run.rules)
    params = base.params(run.model, shardings, new)
    read = flax.traverse_util.flatten_dict(params, sep="/")
    digests = digest.digests({path: read[path] for path in sorted(run.base)})
    if getattr(adapter, "base", None):
        round_base = jax.jit(lambda params: adapted.rounded(run.model, adapter, params))
        read = flax.traverse_util.flatten_dict(round_base(params), sep="/")
    if begins:
        own = {path: x for path, x in own.items() if path not in read}
    params = flax.traverse_util.unflatten_dict(read | own, sep="/")
    if getattr(adapter, "base", None):
        params = jax.device_put(params, run.shardings.params)
    return (adapted.begin(run.model, params, key) if begins else params), digests


def _say_how_the_rate_falls(saved: Config, config: Config) -> None:
    """Says where a schedule that falls until train.steps does not go on as it began."""
    schedules = {saved.optimizer.schedule, config.optimizer.schedule}
    if saved.train.steps != config.train.steps and schedules <= FALLING:
        say(
            f"the {config.optimizer.schedule} schedule falls until step {config.train.steps} from "
            f"here on; so far it fell until {saved.train.steps}"
        )


def _finish(run_dir: Path, reports: storage.Staged, loop: "LoopState", config: Config) -> None:
    if loop.best_step:
        # The checkpoint that export and init.model take.
        loss, best = checkpoint.best_loss(run_dir), checkpoint.best_checkpoint(run_dir)
        say(f"best {config.eval.split} loss {loss:.4f} at step {best.name}")
    if distributed.is_main():
        plot.plot_losses(reports.path, reports.path / "loss.png")
    say(f"done: {run_dir} (loss.png shows the losses)")


# --- Pieces of the loop --------------------------------------------------------------------------


@dataclasses.dataclass
class LoopState:
    """The state of the loop other than the train state, as plain values; saved with it."""

    iterator: dict = dataclasses.field(default_factory=dict)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    """Metrics of the steps since the last report."""
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    imported: bool = False
    """The run began with another program's state, with its model and tokenizer but without a
    position in the data."""

    def add(self, step: int, loss: float) -> None:
        """Records the validation loss of a step."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.evaluations_since_best = loss, step, 0
        else:
            self.evaluations_since_best += 1

    def stops(self, patience: int | None) -> bool:
        """Returns whether the validation loss has not improved for too long."""
        return patience is not None and self.evaluations_since_best >= patience

    def reason(self) -> str:
        best = "that is finite" if self.best_loss is None else f"below {self.best_loss:.4f}"
        return f"{self.evaluations_since_best} evaluations without a loss {best}"

    def is_over(self, step: int, config: Config) -> str:
        """Returns why a run that is started again is finished, or "" if it is not."""
        if step >= config.train.steps:
            limit = f"train.steps is {config.train.steps}"
            if config.train.epochs is not None:
                limit += f", which train.epochs {config.train.epochs:g} are"
            return f"step {step} is reached, {limit}; raise it to go on"
        if self.stops(config.eval.patience):
            return f"stopped early, after {self.reason()}; raise eval.patience to go on"
        return ""


class Prefetch:
    """Transfers the next batch to the devices while they run the current step."""

    def __init__(
        self, iterator: BatchIterator, mesh: jax.sharding.Mesh, rules, timed=contextlib.nullcontext
    ):
        """Fetches nothing yet; `timed` returns a context for each fetch."""
        self._iterator, self._mesh, self._rules, self._timed = iterator, mesh, rules, timed
        self._slot: tuple | None = None

    def fetch(self) -> None:
        with self._timed():
            self._fetch()

    def _fetch(self) -> None:
        batch = next(self._iterator)
        batch_size = self._iterator.spec.batch_size
        on_devices = sharding.shard_batch(batch, self._mesh, self._rules, batch_size)
        # Of all processes, estimated from this one's rows.
        share = len(next(iter(batch.values()))) / batch_size
        num_tokens = round(progress.count_tokens(batch) / share)
        # The position after this batch, which a checkpoint of its step needs: by then the iterator
        # is one batch ahead.
        self._slot = on_devices, num_tokens, self._iterator.state()

    def try_fetch(self) -> Exception | None:
        """Fetches; returns the error of the data instead of raising it."""
        try:
            self.fetch()
        except Exception as error:
            _raise_among_several(error)
            return error
        return None

    def __next__(self):
        if self._slot is None:
            self.fetch()
        slot, self._slot = self._slot, None
        return slot


class Reports:
    """Reads a step's metrics after the next step was dispatched, so that devices never wait."""

    def __init__(self, config, writer, bar, throughput, schedule, sums: dict[str, float]):
        """Continues from `sums`, the metrics of the steps since the last report of a resumed
        run."""
        self._config, self._writer, self._bar = config, writer, bar
        self._throughput, self._schedule = throughput, schedule
        self._pending = deque()
        self.sums = sums

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


def run_evaluation(
    evaluator: Evaluator, params: api.Params, eval_sets: list[EvalSet]
) -> dict[str, tuple[EvalSet, Result]]:
    return {s.task: (s, evaluator.evaluate(params, s)) for s in eval_sets}


def _failure_of(results: dict[str, tuple[EvalSet, Result]]) -> ValueError | None:
    """Returns the error of the first task whose own code failed."""
    errors = [result.error for _, result in results.values() if result.error]
    if not errors:
        return None
    return ValueError(
        f"{errors[0]}; mend the function, and the same command goes on from the last step"
    )


def _raise_among_several(error: Exception) -> None:
    """Raises the error if there are other processes: they would wait in vain for this one."""
    if jax.process_count() > 1:
        raise error


def report_evaluation(step, results, loss, config: Config, writer, bar) -> dict[str, float]:
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


def describe_mesh(mesh: jax.sharding.Mesh) -> str:
    kind = mesh.devices.flat[0].device_kind
    hosts = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    if mesh.size == 1:
        return f"1 {kind} device"
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} {kind} devices ({shape}{hosts})"


def say(text: str) -> None:
    """Prints on standard error, since standard output is for results."""
    if distributed.is_main():
        # Paths are no markup, whatever brackets are in them.
        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        console.print(text, soft_wrap=True)
