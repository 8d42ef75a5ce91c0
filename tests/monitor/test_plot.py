"""The loss curve: which lines are drawn, and what the legend says of them."""

import json

import numpy as np
import pytest

from t5jax.monitor import log, plot


def write_lines(run_dir, *records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / log.METRICS_FILE).write_text(text)


def test_running_mean():
    values = np.array([1.0, 2, 3, 4, 10])
    np.testing.assert_allclose(plot._running_mean(values, 3), [1.5, 2, 3, 17 / 3, 7])
    np.testing.assert_allclose(plot._running_mean(values, 0), values)


def drawn_figure(run_dir, path, monkeypatch):
    """Plots, and returns the axes that were drawn."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda f, *a, **k: figures.append(savefig(f, *a, **k) or f)
    )
    plot.plot_losses(run_dir, path)
    return figures[0].axes[0]


def test_plot_losses(tmp_path, monkeypatch):
    train = [{"step": s, "train/loss": 1 + 1 / s, "train/grad_norm": 9.0} for s in range(1, 101)]
    train[50]["train/loss"] = None
    validation = [
        {"step": s, "validation/rte/loss": v, "validation/rte/accuracy": 70.0}
        for s, v in ((50, 1.5), (75, 1.25), (100, 1.75))
    ]
    write_lines(tmp_path, *train, *validation)
    axes = drawn_figure(tmp_path, tmp_path / "losses.png", monkeypatch)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    raw, smooth, rte = axes.lines
    assert len(raw.get_xdata()) == 99  # The loss that is not finite is left out.
    # Three values, of which the last point has two.
    assert smooth.get_ydata()[-1] == pytest.approx(1 + (1 / 99 + 1 / 100) / 2, rel=1e-9)
    np.testing.assert_allclose(rte.get_xdata(), [50, 75, 100])
    assert rte.get_label() == "validation/rte  1.25 (lowest, step 75)"
    assert (axes.get_xlabel(), axes.get_yscale()) == ("Step", "linear")
    assert axes.get_ylabel() == "Loss (nats per target token)"


@pytest.mark.parametrize(("lowest", "scale"), [(1.9, "log"), (2.1, "linear"), (-1.0, "linear")])
def test_plot_losses_has_a_logarithmic_axis_for_a_long_fall(lowest, scale, tmp_path, monkeypatch):
    write_lines(tmp_path, {"step": 1, "train/loss": 10.0}, {"step": 2, "train/loss": lowest})
    axes = drawn_figure(tmp_path, tmp_path / "losses.png", monkeypatch)
    assert axes.get_yscale() == scale
    assert len(axes.lines) == 1  # Two points are no noise to smooth.


def test_plot_losses_of_one_point(tmp_path, monkeypatch):
    write_lines(tmp_path, {"step": 1, "train/loss": 10.0})
    axes = drawn_figure(tmp_path, tmp_path / "losses.png", monkeypatch)
    assert axes.lines[0].get_marker() == "."  # A line of one point would be invisible.


def test_plot_without_losses_is_refused(tmp_path):
    write_lines(tmp_path, {"step": 1, "train/lr": 1.0}, {"step": 2, "train/loss": None})
    with pytest.raises(ValueError, match=r"metrics.jsonl holds no loss to plot; expected lines"):
        plot.plot_losses(tmp_path, tmp_path / "losses.png")
    assert not (tmp_path / "losses.png").exists()


def test_names_are_no_formulas_and_of_equal_losses_the_last_counts(tmp_path, monkeypatch):
    """As for the checkpoint that is exported."""
    run_dir = tmp_path / r"lr$\frac$1"
    run_dir.mkdir()
    write_lines(run_dir, *({"step": s, r"$\x$/loss": v} for s, v in ((1, 2.0), (2, 1.0), (3, 1.0))))
    axes = drawn_figure(run_dir, tmp_path / "losses.png", monkeypatch)
    assert axes.get_title(loc="left") == run_dir.name
    assert axes.lines[0].get_label() == r"$\x$  1 (lowest, step 3)"
