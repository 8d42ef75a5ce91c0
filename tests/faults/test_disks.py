"""A disk that is full or cannot be written: one message, and the same command goes on."""

import os
import re
import subprocess
import time

import jax.numpy as jnp
import pytest

from command_line import run
from t5jax import checkpoint, checksums
from t5jax.config import Config, to_json
from t5jax.train import train
from t5jax.train_state import TrainState
from tiny import NO_EVAL, assert_same_bits, make_config, one_device  # noqa: F401

SECTIONS = {
    "train": {"steps": 8, "log_every": 1},
    "eval": NO_EVAL,
    "checkpoint": {"every": 2, "keep": 1},
}


def mount(*words):
    return subprocess.run(["mount", *map(str, words)], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own, of 900 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() or not mount("-t", "tmpfs", "-o", "size=900k", "tmpfs", folder):
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(disk, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(to_json(make_config(disk / "run", **SECTIONS)))
    (disk / "other").write_bytes(bytes(250_000))
    status, out, err = run(capsys, "train", path)
    assert (status, out) == (1, "")
    message = err.splitlines()[-1]
    # By chance it is a checkpoint or TensorBoard's file that finds no room.
    assert re.search(
        r"checkpoints/4 cannot be written: No space left on device; the run ends, .* Make room, and"
        r"|the disk of /.* is full \(No space left on device\); make room, and give the same",
        message,
    )
    assert "Traceback" not in err
    assert checkpoint.latest_checkpoint(disk / "run").name == "2"

    assert mount("-o", "remount,ro", disk)
    status, _, err = run(capsys, "train", path)
    assert (status, "cannot be written (Read-only file system); choose another" in err) == (1, True)

    assert mount("-o", "remount,rw,size=9000k", disk)
    status, _, err = run(capsys, "train", path)
    assert status == 0, err
    assert "going on from step 2" in err
    train(make_config(tmp_path / "whole", **SECTIONS))
    assert_same_bits(disk / "run", tmp_path / "whole", 8)


def test_a_save_that_fails_in_the_background_is_told_at_the_next_step(tmp_path, monkeypatch):
    """Not only at the next save, which may be hours away."""

    def fail(folder, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "write", fail)
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(1, TrainState(jnp.int32(1), {"w": jnp.ones(3)}, {}), {"at": 1}, Config())

    def step_by_step():
        for _ in range(6000):
            saved.check()
            time.sleep(0.01)

    with pytest.raises(ValueError, match="checkpoints/1 cannot be written: No space left on dev"):
        step_by_step()
