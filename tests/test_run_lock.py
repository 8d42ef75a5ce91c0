"""Two runs in one folder: the second is refused, unless the first is dead."""

import json
import signal
import subprocess
import sys
import time

import pytest

from processes import environment
from t5jax import buckets, run_lock, storage

HOLD = """
import sys, time
from pathlib import Path
from t5jax import run_lock, storage
with run_lock.hold(storage.path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "_PATIENCE", 0.2)
    monkeypatch.setattr(run_lock, "_RENEWED", 0.2)
    monkeypatch.setattr(run_lock, "_EXPIRED", 1.0)


def silent(text):
    raise AssertionError(text)


def holder(place, **env):
    command = [sys.executable, "-c", HOLD, str(place)]
    env = environment() | env
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_refused_and_told_who_is_there(tmp_path):
    with run_lock.hold(tmp_path, silent):
        with (
            pytest.raises(ValueError, match="in use by another run: process .*, or choose another"),
            run_lock.hold(tmp_path, silent),
        ):
            pass
        with run_lock.hold(tmp_path.parent, silent):  # Another folder.
            pass
    with run_lock.hold(tmp_path, silent):
        pass
    assert list(tmp_path.iterdir()) == []


def test_that_of_a_process_that_was_killed_counts_for_nothing(tmp_path):
    process = holder(tmp_path)
    message = rf"{tmp_path} is in use by another run: process {process.pid} on .*kill {process.pid}"
    with pytest.raises(ValueError, match=message), run_lock.hold(tmp_path, silent):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / run_lock.FILE).exists()
    with run_lock.hold(tmp_path, silent):
        pass


def test_an_object_is_held_while_it_is_renewed(bucket, monkeypatch):
    monkeypatch.setattr(run_lock, "_EXPIRED", 60.0)
    place = storage.path("gs://bucket/run")
    place_object = bucket.buckets["bucket"]
    with run_lock.hold(place, silent) as lock:
        before = place_object["run/run.lock"]
        until = time.monotonic() + 60
        while place_object["run/run.lock"] == before:  # Until there is a sign of life.
            assert time.monotonic() < until
            time.sleep(0.02)
        # As of another machine, whose processes cannot be looked at.
        monkeypatch.setattr(run_lock, "_lives_here", lambda process: None)
        said = []
        with (
            pytest.raises(ValueError, match="gs://bucket/run is in use by another run: process"),
            run_lock.hold(place, said.append),
        ):
            pass
        assert "waiting 60 s for a sign of life" in said[0]
        lock.check()
    assert place_object == {}


def test_an_object_of_a_dead_machine_expires(bucket):
    dead = {"host": "vm-3", "pid": 7, "process": ["boot", "pid:[1]", "7", "1"]}
    bucket.buckets["bucket"]["run/run.lock"] = json.dumps(dead).encode()
    said = []
    with run_lock.hold(storage.path("gs://bucket/run"), said.append) as lock:
        lock.check()
    assert "was in use by process 7 on vm-3; waiting 1 s" in said[0]
    # Nonsense expires as well.
    bucket.buckets["bucket"]["run/run.lock"] = b"\xff{"
    with run_lock.hold(storage.path("gs://bucket/run"), said.append):
        pass


def test_an_object_of_a_process_killed_here_is_taken_at_once(bucket):
    process = holder("gs://bucket/run", **bucket.environment())
    place = storage.path("gs://bucket/run")
    with pytest.raises(ValueError, match=f"process {process.pid} on"), run_lock.hold(place, silent):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with run_lock.hold(place, silent):
        pass


def test_who_has_lost_the_folder_writes_no_more(bucket):
    with run_lock.hold(storage.path("gs://bucket/run"), silent) as lock:
        buckets.write("gs://bucket/run/run.lock", b'{"host": "vm-4", "pid": 9}')
        time.sleep(0.5)
        with pytest.raises(ValueError, match="has been taken over by process 9 on vm-4, since"):
            lock.check()
    assert "run/run.lock" in bucket.buckets["bucket"]
