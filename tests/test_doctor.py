"""Each finding of `t5jax doctor`, sound and not, and its exit status."""

import fcntl
import importlib.metadata

import pytest

from t5jax import distributed, doctor
from t5jax.cli import main
from t5jax.plan import chips

REQUIRES = [
    "jax>=0.10.2",
    "flax<0.13; python_version > '3'",
    "lost>=1",
    "gcsfs>=99; extra == 'gcs'",
]


def test_a_sound_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_LEAST_MEMORY", 0)
    monkeypatch.setattr(doctor, "_LEAST_DISK", 0)
    monkeypatch.setattr(doctor, "libtpu", lambda: doctor.Finding("libtpu", "not installed"))
    monkeypatch.setattr(doctor, "libtpu_lock", lambda: doctor.Finding("TPU lock", "none"))
    assert main(["doctor", "--folder", str(tmp_path / "runs/new")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok     ") for line in lines)
    assert "ok     devices: 8 cpu" in lines
    assert f"ok     {tmp_path}/runs/new: writable, " in "\n".join(lines)
    assert lines[-1].startswith("ok     compiler: a small program in ")
    assert not (tmp_path / "runs").exists()  # Nothing is changed.


def test_what_is_wrong_ends_with_1_and_its_remedy(capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert main(["doctor"]) == 1
    assert (
        "wrong  processes: fails\n"
        "       JAX_NUM_PROCESSES and JAX_PROCESS_ID is set, but not JAX_COORDINATOR_ADDRESS; set"
    ) in capsys.readouterr().out


def test_versions_out_of_bounds_are_named(monkeypatch):
    def installed(name):
        if name == "lost":
            raise importlib.metadata.PackageNotFoundError
        return {"flax": "0.13.1"}.get(name, "0.10.2")

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    finding = doctor.versions(installed)
    assert finding.found == "flax 0.13.1, lost is missing"
    assert finding.remedy == "pip install 'flax<0.13' 'lost>=1'"


def test_libtpu_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(chips, "libtpu_version", lambda: "0.0.1")
    monkeypatch.setattr(chips, "_wanted_libtpu", lambda: "==0.0.42.*")
    assert 'pip install "libtpu==0.0.42.*"' in doctor.libtpu().remedy
    monkeypatch.setattr(chips, "libtpu_version", lambda: None)
    assert not doctor.libtpu().remedy
    monkeypatch.setattr(distributed, "num_tpu_chips", lambda: 4)
    assert "libtpu is not installed" in doctor.libtpu().remedy


def test_the_lock_of_a_tpu(tmp_path):
    path = tmp_path / "lock"
    assert doctor.libtpu_lock(path).found == "none"
    path.touch()
    assert not doctor.libtpu_lock(path).remedy
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert doctor.libtpu_lock(path).remedy.startswith("end the process that uses the TPU: ")


@pytest.mark.parametrize(("available", "is_wrong"), [(8 * 2**20, False), (2**20, True)])
def test_memory(tmp_path, available, is_wrong):
    table = tmp_path / "meminfo"
    table.write_text(f"MemTotal: 99999999 kB\nMemAvailable:    {available} kB\n")
    assert bool(doctor.memory(table).remedy) == is_wrong
    assert doctor.memory(tmp_path / "none").found == "unknown"


def test_folders(tmp_path):
    assert doctor.writable(tmp_path, lambda path: 10**11).found == "writable, 93.1 GiB free"
    assert "make room" in doctor.writable(tmp_path, lambda path: 10**9).remedy
    file = tmp_path / "file"
    file.touch()
    assert doctor.writable(file / "runs").remedy == "choose another folder"
