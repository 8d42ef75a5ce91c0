"""What the hosts of a slice are told: install, start, status, log, stop.

All that they need lies in the bucket's launch folder, written once. So a slice that is made again
runs the same version as the first, and no value of a command goes through a shell twice.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gcp.backends import Backend, State
from gcp.settings import Settings
from gcp.steps import CommandFailed, Commands, base_name

ROOT = Path(__file__).parent.parent
UV_VERSION = "0.9.9"
STOPPED, DELETED = "stopped", "deleted"
"""Objects of the launch folder that tell watchers: the run is not to go on, the slice not to be."""

_STATUS = re.compile(r"t5jax-status (\S+) (\w+) ?(\S*)")
_IGNORED = shutil.ignore_patterns("__pycache__", ".*")


@dataclasses.dataclass(frozen=True)
class Status:
    """What the service of one host does."""

    host: str
    state: str
    """running, finished, failed, stopping or none."""
    exit_status: str


def write_launch_folder(s: Settings, folder: Path) -> None:
    """Writes what the hosts install and start.

    Raises:
      ValueError: if the wheel cannot be built.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    for name in s.files:
        source, target = s.folder / name, folder / "files" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=_IGNORED, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)
    shutil.copy(Path(__file__).with_name("worker.sh"), folder)
    (folder / "launch.env").write_text(launch_env(s))
    (folder / "run.sh").write_text(run_script(s))
    if not s.image:
        shutil.copy(ROOT / "constraints" / "py312.txt", folder / "constraints.txt")
        build_wheel(folder)


def launch_env(s: Settings) -> str:
    """Returns what worker.sh reads, and a digest of the run's files."""
    values = {
        "IMAGE": s.image,
        "SECRET_NAMES": "\n".join(f"{name}={secret}" for name, secret in s.secrets.items()),
        "PROJECT": s.project,
        "UV_VERSION": UV_VERSION,
        "FILES": _digest(s),
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def _digest(s: Settings) -> str:
    found = hashlib.sha256()
    for path in sorted(path for name in s.files for path in _below(s.folder / name)):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        found.update(f"{path.relative_to(s.folder).as_posix()} {content}\n".encode())
    return found.hexdigest()


def _below(path: Path) -> list[Path]:
    """Returns the files that are copied of a file or a folder."""
    if not path.is_dir():
        return [path]
    names = [child.name for child in path.iterdir()]
    ignored = _IGNORED(str(path), names)
    return [file for name in names if name not in ignored for file in _below(path / name)]


def build_wheel(folder: Path) -> None:
    """Builds the wheel of this checkout into a folder."""
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    if importlib.util.find_spec("hatchling"):
        build.append("--no-isolation")  # Downloads nothing.
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(
            "the wheel of t5jax cannot be built (pip install build, or name an image): "
            + " ".join((done.stdout + done.stderr).split()[-60:])
        )


def run_script(s: Settings) -> str:
    """Returns the script that each host runs."""
    # A host that does not find the others would train alone: t5jax refuses another number.
    env = {"JAX_NUM_PROCESSES": str(s.hosts), "JAX_PLATFORMS": "tpu,cpu", **s.env}
    command = shlex.join(s.argv)
    lines = ["#!/usr/bin/env bash", "set -euo pipefail"]
    if s.image:
        options = [f"--env={name}={value}" for name, value in env.items()]
        options += [f"--env={name}" for name in s.secrets]  # The value is that of the service.
        docker = ["docker", "run", "--rm", "--name=t5jax", "--privileged", "--net=host", *options]
        docker += ["--env=HOME=/tmp", "--workdir=/work"]
        lines.append("sudo docker rm --force t5jax >/dev/null 2>&1 || true")
        here = '--user="$(id -u):$(id -g)" --volume="$PWD:/work"'  # As the owner of the files.
        start = f"exec sudo --preserve-env {shlex.join(docker)} {here}"
        lines.append(f"{start} {shlex.quote(s.image)} {command}")
    else:
        lines += [f"export {name}={shlex.quote(value)}" for name, value in env.items()]
        lines.append('export PATH="$PWD/../.venv/bin:$PATH"')
        lines.append(f"exec {command}")
    return "\n".join(lines) + "\n"


def upload(commands: Commands, s: Settings, folder: Path) -> None:
    """Writes the launch folder, and copies it into the bucket."""
    copy = ["gcloud", "storage", "rsync", str(folder), s.launch, f"--project={s.project}"]
    copy += ["--recursive", "--delete-unmatched-destination-objects", "--quiet"]
    if commands.dry_run:
        commands.say(f"# the wheel, its lock file, worker.sh and this run.sh, in {folder}:")
        commands.say("".join(f"#   {line}\n" for line in run_script(s).splitlines()).rstrip())
        commands.say(shlex.join(copy))
        return
    write_launch_folder(s, folder)
    commands.say(f"copying {folder} to {s.launch}")
    commands.change(copy, attempts=3)


def is_uploaded(commands: Commands, s: Settings) -> bool:
    """Returns whether the launch folder is in the bucket, with this command and these files."""
    if not {"launch.env", "run.sh"} <= _objects(commands, s):
        return False
    names = [f"{s.launch}/{name}" for name in ("launch.env", "run.sh")]
    question = ["gcloud", "storage", "cat", *names, f"--project={s.project}"]
    status, output, errors = commands.machine.run(question)
    if status != 0:
        raise CommandFailed(question, status, errors)
    return output == launch_env(s) + run_script(s)


def marks(commands: Commands, s: Settings) -> set[str]:
    """Returns which of STOPPED and DELETED are set."""
    return _objects(commands, s) & {STOPPED, DELETED}


def _objects(commands: Commands, s: Settings) -> set[str]:
    question = ["gcloud", "storage", "ls", f"{s.launch}/*", f"--project={s.project}"]
    status, output, errors = commands.machine.run(question)
    if status != 0 and "matched no objects" in errors:
        return set()
    if status != 0:
        raise CommandFailed(question, status, errors)
    return {base_name(name.strip()) for name in output.splitlines()}


def mark(commands: Commands, s: Settings, name: str) -> None:
    """Sets STOPPED or DELETED."""
    # An empty object: commands have no standard input here.
    copy = ["gcloud", "storage", "cp", "-", f"{s.launch}/{name}", f"--project={s.project}"]
    _change(commands, [*copy, "--quiet"])


def clear_marks(commands: Commands, s: Settings) -> None:
    """Takes STOPPED and DELETED away."""
    found = {STOPPED, DELETED} if commands.dry_run else marks(commands, s)
    for name in sorted(found):
        remove = ["gcloud", "storage", "rm", f"{s.launch}/{name}", f"--project={s.project}"]
        _change(commands, [*remove, "--quiet"])


def _change(commands: Commands, command: list[str]) -> None:
    if commands.dry_run:
        commands.say(shlex.join(command))
    else:
        commands.change(command, attempts=3)


def tell(commands: Commands, backend: Backend, s: Settings, words: str, host: str = "") -> str:
    """Runs `worker.sh WORDS` on all hosts, or on one by its own name; returns what they print.

    Raises:
      CommandFailed: if one fails.
    """
    script = f"bash t5jax/worker.sh {words}"
    if host:  # By which number Google knows it, its name does not say.
        script = f'test "$(hostname)" != {shlex.quote(host)} || {script}'
    return "".join(_each(commands, backend.ssh(commands, s, None, script), attempts=1))


def stop(commands: Commands, backend: Backend, s: Settings) -> None:
    """Ends the command on all hosts that there are."""
    if not commands.dry_run and backend.state(commands, s)[0] is not State.READY:
        commands.say(f"{s.name} has no hosts on which something could run")
        return
    script = "test ! -f t5jax/worker.sh || bash t5jax/worker.sh stop"
    _each(commands, backend.ssh(commands, s, None, script), attempts=3)


def install(commands: Commands, backend: Backend, s: Settings, attempts: int = 3) -> None:
    """Copies the launch folder to every host, and installs what is in it."""
    fetch = f"gcloud storage rsync {shlex.quote(s.launch)} t5jax --recursive --quiet"
    # Of another version, the wheel has another name.
    prepare = "mkdir -p t5jax && rm -f t5jax/*.whl"
    script = f"{prepare} && {fetch} && bash t5jax/worker.sh install"
    _each(commands, backend.ssh(commands, s, None, script), attempts)


def _each(commands: Commands, ssh: Sequence[list[str]], attempts: int) -> list[str]:
    if commands.dry_run:
        for command in ssh:
            commands.say(shlex.join(command))
        return []
    with concurrent.futures.ThreadPoolExecutor(max(1, min(64, len(ssh)))) as pool:
        return list(pool.map(lambda command: commands.change(command, attempts), ssh))


def statuses(commands: Commands, backend: Backend, s: Settings) -> list[Status]:
    """Returns what every host does.

    Raises:
      CommandFailed: if one does not answer.
    """
    # Hosts on which nothing is installed yet have no worker.sh.
    script = (
        "if [ -f t5jax/worker.sh ]; then bash t5jax/worker.sh status; "
        'else echo "t5jax-status $(hostname) none"; fi'
    )
    ssh = backend.ssh(commands, s, None, script)
    output = "".join(_each(commands, ssh, attempts=1))
    found = [Status(*match) for match in _STATUS.findall(output)]
    if not commands.dry_run and len(found) != s.hosts:
        answers = f"{len(found)} of {s.hosts} hosts answered"
        raise CommandFailed(ssh[0] if ssh else ["ssh"], 0, answers)
    return found
