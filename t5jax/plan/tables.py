"""Plans and searches as tables for a terminal."""

import sys
from collections.abc import Sequence
from typing import Any

from t5jax.plan.plan import GIB, Plan, describe
from t5jax.plan.search import Trial


def print_plan(plan: Plan, top: int = 12) -> None:
    """Prints a plan on stdout.

    Args:
      top: how many of the largest operations to list.
    """
    console = _console()
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1) or "one device"
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items())
    console.print(f"{plan.what} on {plan.topology}: {plan.num_devices} devices, {mesh}; {settings}")
    console.print(describe([plan]))
    console.print()
    console.print(_memory(plan))
    console.print(_time(plan))
    if plan.cost.collectives:
        console.print(_collectives(plan))
    console.print(_operations(plan, top))
    for what in plan.cost.unpriced:
        console.print(f"not fully counted: {what}")


def print_trials(trials: Sequence[Trial]) -> None:
    """Prints a search on stdout: the possible ways in order, then the reasons of the others."""
    console = _console()
    possible = [t for t in trials if t.plan and not t.reason]
    if possible:
        table = _table("", "step ms", "tokens/s", "MFU", "GiB needed", "left")
        for trial in possible:
            plan = trial.plan
            assert plan is not None
            table.add_row(
                short(trial.changes),
                f"{plan.seconds * 1e3:.1f}",
                f"{plan.tokens_per_second:,.0f}",
                f"{plan.mfu:.1%}",
                _gib(plan.memory.needed),
                _gib(plan.memory.left),
            )
        console.print(table)
        console.print(describe([t.plan for t in possible if t.plan]))
    for trial in trials:
        if trial.reason:
            console.print(f"{short(trial.changes)}: {trial.reason}")


def short(changes: dict[str, Any]) -> str:
    """Returns changes in few words: what has one device along an axis is left out."""
    words = []
    for name, value in changes.items():
        section, _, field = name.partition(".")
        if section == "mesh" and value == 1:
            continue
        words.append(f"{field.replace('_', '-')} {value}")
    return ", ".join(words)


def _memory(plan: Plan) -> Any:
    memory = plan.memory
    table = _table("memory of a device", "GiB")
    inputs = "batch" if plan.what == "train" else "cache"
    for name, size in (
        (f"parameters ({plan.num_params:,})", memory.parameters),
        ("optimizer state", memory.optimizer),
        (inputs, memory.batch),
        ("temporaries", memory.temporaries),
        ("program", memory.program),
        ("left" if plan.fits else "missing", abs(memory.left)),
        ("available", memory.available),
    ):
        table.add_row(name, _gib(size))
    return table


def _time(plan: Plan) -> Any:
    seconds = plan.seconds
    table = _table("time of a step", "")
    table.add_row("step", f"{seconds * 1e3:.1f} ms")
    table.add_row("of it in Pallas kernels", f"{plan.cost.kernels * 1e3:.1f} ms")
    table.add_row("of it waiting for other devices", f"{plan.cost.waiting * 1e3:.1f} ms")
    table.add_row("tokens per second", f"{plan.tokens_per_second:,.0f}")
    if plan.flops:
        table.add_row("MFU", f"{plan.mfu:.1%}")
    return table


def _collectives(plan: Plan) -> Any:
    table = _table("communication of a step", "network", "number", "MiB per device", "ms if alone")
    for c in plan.cost.collectives:
        row = (
            c.kind,
            c.network,
            f"{c.count:,}",
            f"{c.bytes / 2**20:,.1f}",
            f"{c.seconds * 1e3:.2f}",
        )
        table.add_row(*row)
    return table


def _operations(plan: Plan, top: int) -> Any:
    table = _table("largest operations", "ms", "share")
    for o in plan.cost.operations[:top]:
        name = f"{o.place}, a kernel" if o.kernel else o.place
        table.add_row(name, f"{o.seconds * 1e3:.2f}", f"{o.seconds / plan.seconds:.1%}")
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.4f}"


def _table(first: str, *others: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right")
    return table


def _console() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
