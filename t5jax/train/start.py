"""What a run begins or goes on with, before anything is on the devices: model, program, data.

What cannot work is said here, before the first step and as far as possible before a cache is
written.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5jax import checkpoint, distributed, sharding
from t5jax.config import Config, LoraConfig, to_json
from t5jax.data.batches.examples import BatchIterator, Epoch, EvalSet
from t5jax.distill.teacher import check_teacher
from t5jax.evaluation import Evaluator
from t5jax.monitor.progress import say
from t5jax.plan.compiled import load as load_step
from t5jax.program import Program, program
from t5jax.source import Source, adopt, find, find_base
from t5jax.special_tokens import trained_with
from t5jax.tokenizers import Tokenizer
from t5jax.train.state import LoopState


@dataclasses.dataclass
class Standing:
    """Where a run stands, and what its model comes from."""

    config: Config
    """With the model of its source, and the steps of its epochs where they are known."""
    last: Path | None
    """The last checkpoint; None: the run begins."""
    saved: Config | None
    """The config of the last checkpoint."""
    loop: LoopState
    source: Source | None = None
    base: Source | None = None
    """That of an adapter."""
    counts_epochs: bool = False
    """Whether the steps are only known of the data."""
    goes_back: bool = False
    """Whether the run went back to this checkpoint, and was not started anew."""

    @property
    def step(self) -> int:
        return int(self.last.name) if self.last else 0

    def over(self) -> str:
        """Returns why there is nothing to do, or ""."""
        if not self.last or self.counts_epochs:
            return ""
        return self.loop.is_over(self.step, self.config)


@dataclasses.dataclass
class Ready:
    """What a run computes, and of what."""

    run: Program
    tokenizer: Tokenizer
    iterator: BatchIterator
    epoch: Epoch | None
    eval_sets: list[EvalSet]
    evaluator: Evaluator | None
    data: dict[str, Any]
    """What `data_counts.write` says of the data."""


def find_standing(config: Config, run_dir: Path) -> Standing:
    """Returns where a run stands.

    Raises:
      ValueError: if the hosts disagree, or the run was begun with another model or other data.
    """
    distributed.check_same(to_json(config), "the config", "start the same command on every host")
    distributed.check_shared(run_dir)
    last, damaged = checkpoint.newest_sound(run_dir)
    for what in damaged:
        say(f"warning: {what}")
    loop = LoopState.of(last) if last else LoopState()
    distributed.check_same(
        str(last and (last.name, loop.owes_evaluation)),
        f"the last checkpoint in {run_dir}",
        "start again when all hosts see the same files",
    )
    source, base = None, find_base(config) if config.adapter else None
    if config.init.model or loop.imported:
        # A run that has begun does not need its source, which may no longer exist.
        name = str(last or config.init.model)
        moved = config.init.model if last and config.adapter else ""
        source = find(name, config.data.vocabulary, base=moved)
        if not config.adapter:
            source.check_whole()
        model = adopt(config.model, source, name)
        if own := source.own_tokenizer():
            model = trained_with(model, own)
        config = dataclasses.replace(config, model=model)
    if base:
        base.check_whole()
        config = _with_new_head(config, base)
    saved, epochs = checkpoint.read_config(last) if last else None, config.train.epochs
    if saved:
        if epochs is not None and epochs == saved.train.epochs:
            config = _with_steps(config, saved.train.steps)  # Counted when the run began.
        checkpoint.check_same_run(saved, config, begun=bool(loop.iterator))
    counts = epochs is not None and not (saved and epochs == saved.train.epochs)
    return Standing(config, last, saved, loop, source, base, counts)


def prepare(
    standing: Standing, compiled: str | None, between_batches: Callable[[], None]
) -> Ready | None:
    """Returns what the run computes; completes the config. None: `standing.over()` says why not.

    Args:
      standing: of the run.
      compiled: a file with the compiled step.
      between_batches: is called between the batches of an evaluation, which ends if it raises.
    """
    from t5jax.data import pipeline, registry  # TensorFlow and SeqIO: only where data are read.

    config, source, loop = standing.config, standing.source, standing.loop
    # --- The program ---
    mesh = sharding.make_mesh(config.mesh)
    # The sizes of a published model cannot be changed to suit the mesh.
    rules = source.rules(mesh, config.axes, config.model) if source else config.axes
    early = _with_steps(config, _UNKNOWN_STEPS) if standing.counts_epochs else config
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
    epoch = iterator.epoch(config.train.epochs if standing.counts_epochs else None)
    if standing.counts_epochs:
        assert epoch is not None
        assert epoch.total_steps is not None
        # A state that was imported has steps of its own, before the first epoch.
        before = standing.step if not loop.iterator else 0
        config = standing.config = _with_steps(config, before + epoch.total_steps)
        standing.counts_epochs = False
        if standing.over():
            return None
        run = program(dataclasses.replace(config, axes=rules), mesh)
    if compiled:
        run = load_step(compiled, run, dataclasses.replace(config, axes=rules), iterator.spec)
    if loop.iterator:
        iterator.restore(loop.iterator)
    eval_sets: list[EvalSet] = []
    evaluator = None
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
            between_batches=between_batches,
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
    data = {
        "mixtures": [
            {"first_step": first, "name": name, "shares": pipeline.task_shares(name)}
            for first, name in config.data.mixtures
        ],
        "epoch": str(epoch) if epoch else None,
        "fingerprint": iterator.state()["fingerprint"],
    }
    return Ready(run, tokenizer, iterator, epoch, eval_sets, evaluator, data)


_UNKNOWN_STEPS = 10**9


def _with_steps(config: Config, steps: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def _with_new_head(config: Config, base: Source) -> Config:
    """Returns a config that also trains the parameters that the base of its adapter lacks."""
    if not isinstance(config.adapter, LoraConfig):
        return config
    new = [name for name in base.missing(config.model) if name not in config.adapter.train]
    adapter = dataclasses.replace(config.adapter, train=(*config.adapter.train, *new))
    return dataclasses.replace(config, adapter=adapter)
