"""A plot of a run's losses."""

import math
from pathlib import Path

import numpy as np

from t5jax.monitor.log import METRICS_FILE, read_metrics

TRAIN_LOSS = "train/loss"


def plot_losses(run_dir: str | Path, path: str | Path) -> None:
    """Plots the losses of a run against its steps, as a PNG.

    The training loss ("train/loss") is drawn as points and their running mean; every other name
    that ends in "/loss" is a validation loss, whose lowest value is in the legend. The axis is
    logarithmic if the losses differ by more than a factor of five.

    Raises:
      ValueError: if the run has not logged a loss.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    curves: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(run_dir):
        for name, value in record.items():
            if name.endswith("/loss") and math.isfinite(value):
                curves.setdefault(name, []).append((record["step"], value))
    if not curves:
        raise ValueError(
            f"{Path(run_dir) / METRICS_FILE} holds no loss to plot; expected lines with "
            f'"{TRAIN_LOSS}" or another name in "/loss" (has the run logged yet?)'
        )

    # Not pyplot, which would keep the figure and look for a display.
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if TRAIN_LOSS in curves:
        steps, values = map(np.asarray, zip(*curves.pop(TRAIN_LOSS), strict=True))
        smooth = _running_mean(values, width=len(values) // 25)
        if len(values) >= 50:  # With fewer, the running mean is over one value.
            axes.plot(steps, values, color="0.45", alpha=0.3, linewidth=0.8)
        marker = "." if len(values) < 50 else None
        label = f"training  {smooth[-1]:.3g} (last)"
        axes.plot(steps, smooth, color="0.2", linewidth=1.6, marker=marker, label=label)
    for name, points in curves.items():
        steps, values = map(np.asarray, zip(*points, strict=True))
        best = (
            len(values) - 1 - int(np.argmin(values[::-1]))
        )  # Of equal ones the last, as exported.
        name = name.removesuffix("/loss")
        label = f"{name}  {values[best]:.3g} (lowest, step {steps[best]:,})"
        axes.plot(steps, values, marker="o", markersize=3.5, linewidth=1.2, label=label)

    low, high = axes.dataLim.intervaly
    if low > 0 and high > 5 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("Step")
    axes.set_ylabel("Loss (nats per target token)")
    # parse_math: a dollar sign in a name is no formula.
    axes.set_title(Path(run_dir).resolve().name, loc="left", parse_math=False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False, fontsize="small").get_texts():
        text.set_parse_math(False)
    figure.savefig(path, format="png")


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean of about `width` values around each one, of fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index, half = np.arange(len(values)), width // 2
    first = np.maximum(index - half, 0)
    last = np.minimum(index + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
