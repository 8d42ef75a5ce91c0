"""Metrics in trackio and Weights & Biases, with the packages themselves and without a network."""

import sqlite3
import struct
import time
from pathlib import Path

import pytest

from t5jax.config import Config, WatchConfig
from t5jax.monitor import trackers

SECRET = "0123456789planted0secret0123456789abcdef"


def start(folder: Path, name: str, *steps: int) -> None:
    """Writes the metrics of one start of a run."""
    config = Config(run_dir="runs/a b", watch=WatchConfig(trackers=(name,), project="p"))
    (writer,) = trackers.make_trackers(folder, config)
    for step in steps:
        writer.write_scalars(step, {"train/loss": 1 / step})
        writer.write_texts(step, {"validation/t/samples": "- input: `x`"})
    writer.write_histograms(1, {})
    writer.flush()
    writer.close()


def records_of(path: Path) -> list:
    """Returns what Weights & Biases has written for its server: a log in LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 < len(content):
        if (left := 32768 - at % 32768) < 7:  # The end of a block.
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # Whole, or the last part.
            records.append(Record())
            records[-1].ParseFromString(parts)
            parts = b""
    return records


def test_weights_and_biases_goes_on_with_its_run(tmp_path: Path, monkeypatch, capfd):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    start(tmp_path, "wandb", 1, 2)
    time.sleep(1.1)  # Its folders are named by the second.
    start(tmp_path, "wandb", 2, 3)  # From the checkpoint of step 1.
    name = (tmp_path / trackers.NAME_FILE).read_text().strip()
    assert name.startswith("a-b-")
    wandb.teardown()  # Its service, which writes the files, ends by that.
    steps, projects = [], set()
    for path in sorted(tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb")):
        for record in records_of(path):
            if record.HasField("run"):
                projects.add((record.run.run_id, record.run.project))
            values = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if "train/loss" in values:
                steps.append((values["step"], values["train/loss"]))
    assert projects == {(name, "p")}
    assert [step for step, _ in steps] == ["1", "2", "2", "3"]
    assert capfd.readouterr().out == ""
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_trackio_goes_on_with_its_run(tmp_path: Path, monkeypatch, capfd):
    pytest.importorskip("trackio", reason="trackio needs a Pillow below 13, which may be there")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "db", raising=False)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "db", raising=False)
    start(tmp_path, "trackio", 1, 2)
    start(tmp_path, "trackio", 3)
    (database,) = tmp_path.rglob("p.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step from metrics order by step").fetchall()
    name = (tmp_path / trackers.NAME_FILE).read_text().strip()
    assert {run for run, _ in rows} == {name}
    assert sorted({step for _, step in rows}) == [1, 2, 3]
    assert capfd.readouterr().out == ""


def test_without_its_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"names wandb, which is missing; pip install 't5jax\[wan"):
        trackers.check_installed(("wandb",))


def test_one_that_cannot_begin_is_named(tmp_path: Path, monkeypatch):
    def refuse(*about):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(trackers._Wandb, "__init__", refuse)
    with pytest.raises(ValueError, match=r"wandb does not begin \(api_key not .* WANDB_MODE=off"):
        start(tmp_path, "wandb")
