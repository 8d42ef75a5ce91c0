"""Runs the steps of the Dockerfile in an empty folder, where no engine for containers is at hand.

    python tests/container.py FOLDER --python python3.12      (or make container-steps)

COPY takes what .dockerignore lets through, RUN is a shell in which paths begin with the folder, ENV
and WORKDIR hold for CMD, which is run at the end. What changes the machine itself, packages of the
system and users, is left out.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OF_THE_MACHINE = ("apt-get", "useradd")


def instructions() -> list[tuple[str, str]]:
    """Returns the instructions of the Dockerfile, each with its words."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, words) for name, words in (x.split(maxsplit=1) for x in lines if x.strip())]


def check_version(python: str) -> None:
    """Raises ValueError if a Python is not of the version that the image has."""
    expected = re.search(r"^FROM python:([\d.]+)", (ROOT / "Dockerfile").read_text(), re.M)[1]
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    if found != expected:
        raise ValueError(
            f"{python} is {f'Python {found}' if found else 'no Python'}, and the image has "
            f"{expected}; name one: make container-steps CONTAINER_PYTHON=/path/to/python{expected}"
        )


def run_steps(folder: Path, python: str, accelerator: str = "cpu") -> str:
    """Runs all steps; returns what the container prints.

    Args:
      folder: an empty folder, which takes the place of /.
      python: the interpreter that the image has.
      accelerator: the argument ACCELERATOR.
    """
    folder = folder.resolve()
    programs = folder / "usr" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(shutil.which(python) or python)
    env = {"PATH": f"{programs}{os.pathsep}{os.defpath}", "HOME": str(folder), "LANG": "C.UTF-8"}
    env |= {name: os.environ[name] for name in os.environ if name.startswith("PIP_")}
    where, output = folder, ""
    for name, words in instructions():
        words = re.sub(r"(?<![\w.])/(?=src|opt|home)", f"{folder}/", words)
        if name == "ARG":
            env |= {words.partition("=")[0]: accelerator}
        elif name == "COPY" and not words.startswith("--from="):
            *sources, target = words.split()
            for source in sources:
                _copy(source, Path(target), is_folder=target.endswith("/"))
        elif name == "RUN" and not any(word in words for word in OF_THE_MACHINE):
            subprocess.run(["sh", "-c", words], cwd=where, env=env, check=True)
        elif name == "ENV":
            pairs = dict(pair.split("=", 1) for pair in words.split())
            env |= {key: value.replace("$PATH", env["PATH"]) for key, value in pairs.items()}
        elif name == "WORKDIR":
            where = Path(words)
            where.mkdir(parents=True)
        elif name == "CMD":
            command = re.findall(r'"(.*?)"', words)
            done = subprocess.run(command, cwd=where, env=env, stdout=subprocess.PIPE, check=True)
            output = done.stdout.decode()
    return output


def _copy(source: str, target: Path, is_folder: bool) -> None:
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    if f"!{source}" not in allowed:
        raise ValueError(f"COPY {source}: .dockerignore keeps it out")
    path = ROOT / source
    target = target / path.name if is_folder else target
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(path, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="python3.12")
    parser.add_argument("--accelerator", default="cpu")
    options = parser.parse_args()
    try:
        check_version(options.python)
    except ValueError as error:
        sys.exit(f"container: {error}")
    sys.stdout.write(run_steps(options.folder, options.python, options.accelerator))
