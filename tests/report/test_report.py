"""The list of runs and their page, of folders as a run writes them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from t5jax.cli import main
from t5jax.config import Config, DataConfig, TrainConfig, to_json
from t5jax.monitor import environment
from t5jax.report import read_run, render
from t5jax.report.runs import differences, runs_table

NASTY = "</script><b>bold</b> & \u2028 $x$"


def write_run(path: Path, *, steps=20, last=20, rate=1.0, mixture="numbers", loop=None) -> Path:
    """Writes a run that is at the step `last` of `steps`."""
    path.mkdir(parents=True)
    config = Config(
        run_dir=str(path), data=DataConfig(mixture=mixture), train=TrainConfig(steps=steps)
    )
    (path / "t5jax_config.json").write_text(to_json(config))
    lines = [
        {"step": step, "time": 1000.0 + step, "train/loss": rate / step, "train/learning_rate": 0.1}
        for step in range(1, last + 1)
    ]
    sample = f"- input: `{NASTY}`\n- target: `a`\n- prediction: `b`\n"
    lines += [
        {"step": last, "time": 1100.0, "validation/numbers/samples": sample},
        {"step": last, "time": 1100.0, "validation/loss": rate, "validation/numbers/bleu": None},
        {"step": last, "time": 1100.0, "time/steps": 30.0, "time/input": 10.0},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loop = {"iterator": {"at": 3}, "best_loss": rate, "best_step": last} | (loop or {})
    for part, value in (("loop", loop), ("config", json.loads(to_json(config)))):
        folder = path / "checkpoints" / str(last) / part
        folder.mkdir(parents=True)
        (folder / "metadata").write_text(json.dumps(value))
    (path / "checkpoints" / str(last) / "_CHECKPOINT_METADATA").write_text("{}")
    return path


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data" type="application/json">(.*?)</script>', page)[1])


def test_a_run_is_read_as_its_folder_has_it(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a", last=7, rate=2.0))
    assert (run.state, run.step, run.best_loss, run.best_step) == ("unfinished", 7, 2.0, 7)
    assert run.latest("train/loss") == 2 / 7
    assert "validation/numbers/bleu" not in run.curves()  # Never finite.
    assert run.curves()["train/loss"][1] == (2, 1.0)
    assert run.last_active == 1100.0


@pytest.mark.parametrize(
    ("loop", "state"),
    [({}, "finished"), ({"iterator": {}, "imported": True}, "imported")],
)
def test_states(tmp_path: Path, loop: dict, state: str):
    assert read_run(write_run(tmp_path / "a", loop=loop)).state == state


def test_parameters_alone_are_an_imported_run(tmp_path: Path):
    run = write_run(tmp_path / "a", last=0)
    (run / "checkpoints/0/loop/metadata").write_text("{}")
    assert read_run(run).state == "imported"


def test_the_table_has_every_run(tmp_path: Path, capsys):
    write_run(tmp_path / "x" / "one")
    write_run(tmp_path / "two", last=5, rate=0.5)
    assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"one +finished +20 of 20 +1\.0000 +20", shown)
    assert re.search(r"two +unfinished +5 of 20 +0\.5000 +5", shown)


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path, capsys):
    write_run(tmp_path / "good")
    (write_run(tmp_path / "bad") / "t5jax_config.json").write_text("{")
    (write_run(tmp_path / "odd") / "checkpoints/20/loop/metadata").write_text('{"no": "field"}')
    with (
        pytest.warns(UserWarning, match=r"bad.* is damaged"),
        pytest.warns(UserWarning, match=r"odd is not of the form"),
    ):
        assert main(["runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"good +finished", shown)
    assert re.search(r"bad +damaged .*\n.*odd +damaged", shown)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(5, "5 seconds ago"), (119, "119 seconds ago"), (7200, "2 hours ago"), (3e5, "3 days ago")],
)
def test_when_a_run_was_active(tmp_path: Path, seconds: float, said: str):
    table = runs_table([read_run(write_run(tmp_path / "a"))], now=1100.0 + seconds)
    assert list(table.columns[-1].cells) == [said]


def test_the_page_shows_text_as_text_and_loads_nothing(tmp_path: Path):
    page = render([read_run(write_run(tmp_path / "<i>a"))])
    assert "<b>bold</b>" not in page
    assert "<i>a" not in page
    (sample,) = data_of(page)["samples"][0]
    assert sample["rows"][0] == ["input", f"`{NASTY}`"]
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "75.0 %" in page  # Of 40 s, 30 in steps.


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a", steps=4999, last=4999))
    points = data_of(render([run]))["curves"]["train/loss"][0]
    assert len(points) <= 2001
    assert points[0][0] == 1
    assert points[-1] == [4999, pytest.approx(1 / 4999)]


def test_several_runs_are_told_apart(tmp_path: Path):
    runs = [
        read_run(write_run(tmp_path / "x" / "a")),
        read_run(write_run(tmp_path / "y" / "a", mixture="books")),
    ]
    assert differences(runs)["data.mixture"] == ["numbers", "books"]
    assert "train.steps" not in differences(runs)
    assert data_of(render(runs))["runs"] == ["x/a", "y/a"]


def test_of_one_run_what_is_not_the_default(tmp_path: Path):
    changed = differences([read_run(write_run(tmp_path / "a", steps=33))])
    assert changed["train.steps"] == [33, TrainConfig().steps]
    assert "optimizer.name" not in changed


def test_report_writes_beside_the_run(tmp_path: Path, capsys):
    run = write_run(tmp_path / "a")
    assert main(["report", str(run)]) == 0
    assert Path(capsys.readouterr().out.strip()) == run / "report.html"
    assert main(["report", str(run), str(run), "--output", str(tmp_path / "b.html")]) == 0
    assert data_of((tmp_path / "b.html").read_text())["runs"] == ["a"]  # The same run once.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "holds no run"),
        (lambda path: (path / "a").mkdir(parents=True), "holds no run"),
        (lambda path: (write_run(path / "a") / "t5jax_config.json").write_text("{"), "is damaged"),
        (lambda path: (write_run(path / "a") / "metrics.jsonl").write_text("1\n2\n"), "line 1 of"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, capsys, make, message: str):
    make(tmp_path / "runs")
    assert main(["report", str(tmp_path / "runs")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.html"))


def test_the_page_draws_itself_in_a_browser(tmp_path: Path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("there is no Chromium on this machine")
    page = tmp_path / "page.html"
    page.write_text(render([read_run(write_run(tmp_path / "a"))]))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    drawn = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    assert drawn.count("<polyline") >= 2
    assert "validation 1" in drawn


def test_a_start_is_recorded_without_secrets(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("sys.argv", ["/somewhere/t5jax", "train", "quickstart"])
    environment.record(tmp_path, [])
    environment.record(tmp_path, [])
    with open(tmp_path / environment.ENVIRONMENT_FILE, "a") as file:
        file.write('{"cut')
    starts = environment.read(tmp_path)
    assert [start["command"] for start in starts] == ["t5jax train quickstart"] * 2
    assert "jax" in starts[0]["versions"]
    assert "hf_secret" not in (tmp_path / environment.ENVIRONMENT_FILE).read_text()


def test_what_was_read_what_was_passed_over_and_overfitting(tmp_path: Path):
    path = write_run(tmp_path / "a")
    side = {"limit": 16, "examples": 4, "tokens": 40, "positions": 64, "full": 1}
    data = {
        "mixtures": [{"first_step": 0, "name": "both", "shares": {"x": 0.25, "y": 0.75}}],
        "epoch": "40 examples",
        "read": {"inputs": side | {"lengths": [0] * 12 + [3, 0, 0, 1]}},
    }
    (path / "data.json").write_text(json.dumps(data))
    lines = [
        {"step": 9, "batch": 9, "what": "loss is nan", "action": "skip", "loss": None},
        {"row": 0, "segment": 1, "example": 7, "inputs": NASTY, "targets": "b"},
    ]
    (path / "bad_batches").mkdir()
    kept = path / "bad_batches" / "00000009.jsonl"
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    with open(path / "metrics.jsonl", "a") as file:
        last = {"train/overfits_since": 8, "train/passed_over": 1, "train/update_ratio/a/b": 0.5}
        file.write(json.dumps({"step": 20, "time": 1200.0} | last) + "\n")
    page = render([read_run(path)])
    for text in ("y 75.0 %", "an epoch is 40 examples", "37.5 %", "25.0 %", "10.0", "since step 8"):
        assert text in page
    assert "step 9, batch 9: loss is nan (skip)" in page
    assert "<b>bold</b>" not in page
    assert 'href="#passed-over"' in page
    curves = data_of(page)["curves"]
    assert "train/overfits_since" not in curves
    assert curves["train/update_ratio/a/b"] == [[[20, 0.5]]]
    assert 'href="#passed-over"' not in render([read_run(write_run(tmp_path / "b"))])
