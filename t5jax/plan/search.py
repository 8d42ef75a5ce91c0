"""Searches for the fastest way to run a config on a topology, or for the nearest that fits."""

import dataclasses
import itertools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from t5jax import sharding
from t5jax.architectures.base import RematPolicy
from t5jax.batch import BatchSpec
from t5jax.config import Config, override
from t5jax.plan.chips import Topology
from t5jax.plan.plan import Plan, plan_step
from t5jax.program import program

REMATS: tuple[str, ...] = typing.get_args(RematPolicy)
"""From the one that saves most to the one that recomputes most."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One way to run a config, and what came of it."""

    changes: dict[str, Any]
    """Fields of the config, as the command line names them."""
    plan: Plan | None
    reason: str = ""
    """Why it is impossible, if it is."""


def search(
    config: Config,
    topology: Topology,
    spec: BatchSpec,
    *,
    batch_sizes: Sequence[int] = (),
    remats: Sequence[str] = (),
    microbatches: Sequence[int] = (),
    max_compiles: int = 12,
    report: Callable[[str], None] = lambda text: None,
) -> list[Trial]:
    """Returns the trials, the fastest per token first, then those that are impossible.

    Meshes are all divisions of the devices into the axes that the config's rules use; those that
    need least communication are compiled first. Where a policy saves more than fits, the next one
    is tried.

    Args:
      spec: the shape of a batch.
      batch_sizes, remats, microbatches: the values to try; by default those of the config, all
        policies, and as few microbatches as possible.
      max_compiles: the most programs to compile.
      report: is told what is being compiled.
    """
    trials: list[Trial] = []
    compiles = 0
    sizes = batch_sizes or [config.data.batch_size]
    parts = microbatches or [config.train.microbatches]
    for mesh, size, split in itertools.product(meshes(config, topology), sizes, parts):
        for remat in remats or REMATS:
            changes: dict[str, Any] = {f"mesh.{axis}": n for axis, n in mesh.items()}
            changes |= {
                "data.batch_size": size,
                "train.microbatches": split,
                "model.remat": remat,
            }
            reason = impossible(config, topology, changes)
            if not reason and compiles >= max_compiles:
                reason = f"not compiled: {max_compiles} programs were (--max-compiles)"
            if reason:
                trials.append(Trial(changes, None, reason))
                continue
            compiles += 1
            report(f"{compiles}: {describe_changes(changes)}")
            trials.append(try_out(config, topology, spec, changes))
    return sorted(trials, key=_rank)


def nearest(
    config: Config,
    topology: Topology,
    spec: BatchSpec,
    report: Callable[[str], None] = lambda text: None,
) -> Trial | None:
    """Returns the first small change of a config under which it fits, or None.

    Tried in this order: policies that save less, more microbatches, more sharding.
    """
    for changes in _smaller(config, topology):
        if impossible(config, topology, changes):
            continue
        report(describe_changes(changes))
        trial = try_out(config, topology, spec, changes)
        if trial.plan and trial.plan.fits:
            return trial
    return None


def _smaller(config: Config, topology: Topology) -> Iterator[dict[str, Any]]:
    less = REMATS[REMATS.index(config.model.remat) + 1 :]
    for remat in less:
        yield {"model.remat": remat}
    last = {"model.remat": REMATS[-1]} if less else {}
    split = config.train.microbatches
    while (split := 2 * split) <= config.data.batch_size:
        yield last | {"train.microbatches": split}
    inner = config.mesh.sequence * config.mesh.model
    wide = {"mesh.data": 1, "mesh.fsdp": len(topology.devices) // inner}
    if config.mesh.fsdp < wide["mesh.fsdp"]:
        yield last | wide
        split = config.train.microbatches
        while (split := 2 * split) <= config.data.batch_size:
            yield last | wide | {"train.microbatches": split}


def try_out(config: Config, topology: Topology, spec: BatchSpec, changes: dict[str, Any]) -> Trial:
    """Compiles a config with changes."""
    changed = override(config, changes)
    spec = dataclasses.replace(spec, batch_size=changed.data.batch_size)
    try:
        plan, _ = plan_step(changed, topology, spec)
    except ValueError as error:
        return Trial(changes, None, str(error))
    if not plan.fits:
        return Trial(changes, plan, f"{-plan.memory.left / 2**30:.2f} GiB too much")
    return Trial(changes, plan)


def impossible(config: Config, topology: Topology, changes: dict[str, Any]) -> str:
    """Returns why a config cannot run, as far as that is known without compiling; "" if it may."""
    try:
        changed = override(config, changes)
        program(changed, sharding.make_mesh(changed.mesh, topology.devices))
    except ValueError as error:
        return str(error)
    return ""


def meshes(config: Config, topology: Topology) -> list[dict[str, int]]:
    """Returns the divisions of the devices into data, fsdp and model.

    Those with less tensor parallelism come first, and among them those that shard most.
    """
    count = len(topology.devices) // config.mesh.sequence
    found = [
        {"data": count // (fsdp * model), "fsdp": fsdp, "model": model}
        for model in _divisors(count)
        for fsdp in _divisors(count // model)
        if model <= 8
    ]
    return sorted(found, key=lambda m: (m["model"], -m["fsdp"]))


def describe_changes(changes: dict[str, Any]) -> str:
    """Returns the changes as options of the command line."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _rank(trial: Trial) -> tuple[bool, float]:
    if trial.plan is None or trial.reason:
        return True, 0.0
    return False, trial.plan.seconds / trial.plan.tokens
