"""The page of one or several runs: one HTML file, which loads nothing from elsewhere."""

import datetime
import math
import re
from pathlib import Path
from typing import Any

from t5jax.html import as_script, fill
from t5jax.report.runs import Run, differences

MOST_POINTS = 2000
"""Points of a curve in the page; of longer ones every k-th, and the last."""


def render(runs: list[Run]) -> str:
    """Returns the page.

    Args:
      runs: one or more, in the order in which they are shown.
    """
    return fill(
        Path(__file__).with_name("page.html.jinja"),
        names=_names(runs),
        summaries=[_summary(run) for run in runs],
        scores=_scores(runs),
        times=[_times(run) for run in runs],
        data_read=[_data(run) for run in runs],
        bad_batches=[[_bad_batch(lines) for lines in run.bad_batches] for run in runs],
        config=differences(runs),
        starts=[[_start(start) for start in run.starts] for run in runs],
        data=as_script(
            {
                "runs": _names(runs),
                "curves": _curves(runs),
                "samples": [_samples(run) for run in runs],
            }
        ),
    )


def _names(runs: list[Run]) -> list[str]:
    """Returns the names of the folders, with their parents' where that is needed to tell them
    apart."""
    names = [run.name for run in runs]
    return [
        run.name if names.count(run.name) == 1 else "/".join(run.path.parts[-2:]) for run in runs
    ]


def _summary(run: Run) -> dict[str, str]:
    steps = run.config.train.steps
    best = None if run.best_loss is None else f"{run.best_loss:.4f} at step {run.best_step:,}"
    times = _times(run)
    seconds, since = sum(times.values()), run.latest("train/overfits_since")
    goodput = times.get("steps", 0.0) / seconds if seconds else None
    tokens = run.latest("train/tokens_per_second")
    mfu = run.latest("train/mfu")
    padding = run.latest("train/padding")
    return {
        "State": f"{run.state}: {run.reason}" if run.reason else run.state,
        "Step": f"{run.step:,} of {steps:,}",
        "Lowest validation loss": best or "–",
        "Last training loss": _number(run.latest("train/loss"), 4),
        "Overfitting": "–" if since is None else f"since step {since:,.0f}",
        "Batches passed over": _number(run.latest("train/passed_over") or 0, 0),
        "Wall time of the last start": str(datetime.timedelta(seconds=round(seconds)))
        if seconds
        else "–",
        "Goodput": "–" if goodput is None else f"{100 * goodput:.1f} % of it in steps",
        "Target tokens": _number(run.latest("train/target_tokens"), 0),
        "Tokens a second": _number(tokens, 0),
        "MFU": "–" if mfu is None else f"{mfu:.1f} %",
        "Padding": "–" if padding is None else f"{padding:.1f} %",
        "Data": run.config.data.mixture or "–",
        "Last active": _when(run.last_active),
    }


def _scores(runs: list[Run]) -> list[dict[str, Any]]:
    """Returns rows of the last value of each metric that evaluations gave, with the best one."""
    rows: dict[str, dict[int, tuple[int, float]]] = {}
    for index, run in enumerate(runs):
        for name, points in run.curves().items():
            if not name.startswith(("train/", "time/")):
                rows.setdefault(name, {})[index] = points[-1]
    return [
        {
            "name": name,
            "values": [_number(found[i][1], 4) if i in found else "–" for i in range(len(runs))],
            "steps": [f"step {found[i][0]:,}" if i in found else "" for i in range(len(runs))],
        }
        for name, found in rows.items()
    ]


def _times(run: Run) -> dict[str, float]:
    """Returns the seconds of each part of the last start's wall time."""
    prefix = "time/"
    for record in reversed(run.records):
        found = {n.removeprefix(prefix): v for n, v in record.items() if n.startswith(prefix)}
        if found:
            return found
    return {}


def _curves(runs: list[Run]) -> dict[str, list[list[tuple[int, float]]]]:
    """Returns the points of each run by the name of the metric, the losses first."""
    found = [run.curves() for run in runs]
    names = dict.fromkeys(name for curves in found for name in curves)
    shown = [n for n in names if not n.startswith("time/") and n != "train/overfits_since"]
    # The losses, which share a chart; then how training went; then each task's metrics.
    shown.sort(key=lambda name: (not name.endswith("/loss"), not name.startswith("train/")))
    return {name: [_thin(curves.get(name, [])) for curves in found] for name in shown}


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = points[::every]
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _data(run: Run) -> dict[str, Any]:
    """Returns what the page says of the data: mixtures, and a row for each side of the batches."""
    sides = []
    for side, read in run.data.get("read", {}).items():
        examples, positions = max(read["examples"], 1), max(read["positions"], 1)
        most, bins = max(*read["lengths"], 1), len(read["lengths"])
        sides.append(
            {
                "side": side,
                "limit": f"{read['limit']:,}",
                "examples": f"{read['examples']:,}",
                "tokens": f"{read['tokens']:,}",
                "mean": f"{read['tokens'] / examples:.1f}",
                "padding": f"{100 * (1 - read['tokens'] / positions):.1f} %",
                "full": f"{100 * read['full'] / examples:.1f} %",
                "bars": [
                    {
                        "height": 100 * number / most,
                        "label": f"up to {(i + 1) * read['limit'] // bins} tokens: {number:,}",
                    }
                    for i, number in enumerate(read["lengths"])
                ],
            }
        )
    mixtures = [
        {
            "name": mixture["name"],
            "first_step": mixture["first_step"],
            "shares": sorted(mixture["shares"].items(), key=lambda item: -item[1]),
        }
        for mixture in run.data.get("mixtures", ())
    ]
    return {"sides": sides, "mixtures": mixtures, "epoch": run.data.get("epoch")}


def _bad_batch(lines: list[dict[str, Any]]) -> dict[str, Any]:
    about, *examples = lines
    return {
        "title": f"step {about.get('step')}, batch {about.get('batch')}: {about.get('what')} "
        f"({about.get('action')})",
        "examples": [
            {name: example[name] for name in ("inputs", "targets") if name in example}
            for example in examples
        ],
    }


def _samples(run: Run) -> list[dict[str, Any]]:
    """Returns the samples as (step, task, rows of what and text)."""
    return [
        {
            "step": step,
            "task": task,
            "rows": re.findall(r"^- (input|target|prediction): (.*)$", text, re.MULTILINE),
        }
        for step, task, text in run.samples()
    ]


def _start(start: dict[str, Any]) -> dict[str, str]:
    devices = start.get("devices", {})
    versions = start.get("versions", {})
    return {
        "When": _when(start.get("time")),
        "Command": start.get("command", "–"),
        "Devices": ", ".join(f"{count} {kind}" for kind, count in devices.items()) or "–",
        "Machine": f"{start.get('machine', '–')}, Python {start.get('python', '–')}",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or "–",
        "Commit": start.get("commit") or "–",
    }


def _when(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    at = datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)
    return at.strftime("%Y-%m-%d %H:%M UTC")


def _number(value: float | None, digits: int) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}".replace("-", "\u2212")
