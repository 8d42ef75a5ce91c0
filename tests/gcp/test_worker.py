"""gcp/worker.sh on a stand-in of a host: systemd, sudo, uv and gcloud are programs that record."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "gcp" / "worker.sh"
SCRIPTS = [WORKER, ROOT / "launchers" / "slurm.sbatch"]
SECRET = "hf_thevalueofthesecret00"
# What each prints or does; every one records its words first.
PROGRAMS = {
    "sudo": 'if [ "$1" = tee ]; then cat >> env; exit; fi\n'
    'if [ "$1" = rm ]; then rm -f env; exit; fi\nif [ "$1" = install ]; then exit; fi\nexec "$@"',
    "systemctl": 'case "$1 $3" in\n"show --property=ActiveState") cat active;;\n'
    '"show --property=SubState") cat sub;;\n"show --property=ExecMainStatus") echo 7;;\n'
    # What has failed stays so, until it is reset.
    "stop*) grep -q failed active || { echo inactive > active; echo dead > sub; };;\n"
    "reset-failed*) grep -q failed active && { echo inactive > active; echo dead > sub; };;\nesac",
    "systemd-run": "echo active > active; echo running > sub",
    "journalctl": "echo the log",
    "gcloud": f'if [ "$1" = secrets ]; then echo {SECRET}; fi',
    "curl": 'echo \'mkdir -p "$UV_UNMANAGED_INSTALL"; cp uv "$UV_UNMANAGED_INSTALL"\'',
    "docker": "true",
}


@pytest.fixture
def host(tmp_path):
    """Runs worker.sh in a folder, and returns what it prints."""
    (tmp_path / "bin").mkdir()
    record = f'#!/bin/sh\necho "$(basename "$0") $*" >> {tmp_path}/calls\ncd {tmp_path}\n'
    for name, script in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"{record}{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "uv").write_text(f"{record}mkdir -p .venv/bin\n")
    (tmp_path / "uv").chmod(0o755)
    shutil.copy(WORKER, tmp_path)
    for name in ("t5jax-1.0-py3-none-any.whl", "constraints.txt"):
        (tmp_path / name).write_text("1")
    (tmp_path / "active").write_text("inactive")
    (tmp_path / "sub").write_text("dead")

    def run(*words: str, image: str = "", secrets: str = "HF_TOKEN=hf-token\n") -> str:
        env = f"IMAGE={image}\nPROJECT=my-project\nUV_VERSION=1\nSECRET_NAMES='{secrets}'\n"
        (tmp_path / "launch.env").write_text(env)
        path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(tmp_path / "worker.sh"), *words],
            env=os.environ | {"PATH": path, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
        return done.stdout + done.stderr

    run.folder = tmp_path
    return run


def calls(host, *programs: str) -> list[str]:
    lines = (host.folder / "calls").read_text().splitlines()
    assert not any(SECRET in line for line in lines)
    return [line for line in lines if line.split(" ")[0] in programs]


def test_it_installs_once_for_each_lock(host):
    assert "installed" in host("install")
    assert "installed already" in host("install")
    made = calls(host, "uv")
    assert [line.split()[1] for line in made] == ["venv", "pip"]
    assert "--python 3.12" in made[0]
    assert "--constraints constraints.txt t5jax[tpu,gcs] @ file:///" in made[1]
    (host.folder / "constraints.txt").write_text("2")
    host("install")
    assert len(calls(host, "uv")) == 4
    assert len(calls(host, "curl")) == 1


def test_an_image_is_pulled(host):
    host("install", image="us-docker.pkg.dev/p/images/t5jax:1")
    assert "docker pull --quiet us-docker.pkg.dev/p/images/t5jax:1" in calls(host, "docker")
    assert "gcloud auth configure-docker us-docker.pkg.dev --quiet" in calls(host, "gcloud")
    assert not (host.folder / ".venv").exists()


def test_it_starts_once_and_says_how_it_is(host):
    assert "t5jax-status" in host("status")
    assert " none 7" in host("status")
    assert "started" in host("start")
    assert " running 7" in host("status")
    assert "runs already" in host("start")
    (started,) = calls(host, "systemd-run")
    assert "--unit=t5jax" in started
    assert started.endswith(f"bash {host.folder}/run.sh")
    assert (host.folder / "env").read_text() == f'HF_TOKEN="{SECRET}"\n'
    for active, sub, state in (
        ("active", "exited", "finished"),
        ("failed", "failed", "failed"),
        ("deactivating", "stop-sigterm", "stopping"),
    ):
        (host.folder / "active").write_text(active)
        (host.folder / "sub").write_text(sub)
        assert f" {state} 7" in host("status")
    assert "the log" in host("tail")
    for state in ("active", "failed"):
        (host.folder / "active").write_text(state)
        assert "stopped" in host("stop")
        assert " none 7" in host("status")
    assert not (host.folder / "env").exists()
    assert "started" in host("start", secrets="")
    assert not (host.folder / "env").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_clean(script):
    programs = Path(sys.executable).parent  # Of the extra `dev`.
    assert subprocess.run([programs / "shellcheck", script]).returncode == 0
    assert subprocess.run([programs / "shfmt", "-i", "2", "-ci", "-d", script]).returncode == 0
