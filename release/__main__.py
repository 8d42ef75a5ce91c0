"""`python -m release TAG`: checks, builds and installs a version; lists its licenses and parts.

Nothing is uploaded: at the end, the commands that do so are printed.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from release import checks

ROOT = Path(__file__).parent.parent
EXTRAS = "serve,gcs,compress,sweep"
"""What the list of parts and licenses covers, beside the plain installation."""


def main(args: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Makes a release; returns the exit status."""
    options = _parse(args)
    found = checks.faults(root, options.tag, tagged=not options.without_tag)
    for fault in found:
        print(f"release: {fault}", file=sys.stderr)
    if found or options.check:
        return 1 if found else 0
    try:
        _build(root, options.tag)
    except subprocess.CalledProcessError as error:
        print(f"release: `{' '.join(map(str, error.cmd))}` failed", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


def _build(root: Path, tag: str) -> None:
    work, dist = root / "build" / "release", root / "dist"
    for folder in (work, dist):
        shutil.rmtree(folder, ignore_errors=True)
    constraints = (
        root / "constraints" / ("py311.txt" if sys.version_info < (3, 12) else "py312.txt")
    )
    tools, installed = work / "tools", work / "installed"
    _environment(tools, "-r", root / "release" / "requirements.txt")
    _run(tools / "bin/python", "-m", "build", "--outdir", dist, root)
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    _run(tools / "bin/python", "-m", "twine", "check", "--strict", wheel, source)

    # What a user gets: the wheel, in an environment with nothing else.
    _environment(installed, "-c", constraints, f"{wheel}[{EXTRAS}]")
    version = _run(installed / "bin/t5jax", "--version", cwd=work).strip()
    if version.split()[-1] != tag.removeprefix("v"):
        raise ValueError(f"the wheel says {version}; expected {tag}")
    python = installed / "bin/python"
    packages = json.loads(
        _run(tools / "bin/pip-licenses", f"--python={python}", "--format=json", "--from=mixed")
    )
    if wrong := checks.forbidden(packages, root / "release" / "licenses.toml"):
        raise ValueError(
            "licenses that release/licenses.toml does not allow:\n  " + "\n  ".join(wrong)
        )
    parts = dist / f"{wheel.name.partition('-py3')[0]}.cdx.json"
    _run(
        *(
            tools / "bin/cyclonedx-py",
            "environment",
            python,
            "--pyproject",
            root / "pyproject.toml",
        ),
        *("--output-format", "JSON", "--output-file", parts, "--validate"),
    )
    document = json.loads(parts.read_text())
    document["metadata"]["component"]["version"] = tag.removeprefix("v")  # It reads no dynamic one.
    parts.write_text(json.dumps(document, indent=1))
    files = (wheel, source, parts)
    sums = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files]
    (dist / "SHA256SUMS").write_text("".join(sums))
    print("".join(sums), end="")
    upload = f"{tools / 'bin/twine'} upload {wheel} {source}"
    print(f"\nto publish:\n  git push origin {tag}\n  {upload}")


def _environment(folder: Path, *packages: str | Path) -> None:
    venv.create(folder, with_pip=True)
    pip = (folder / "bin/python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet")
    _run(*pip, *packages)


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    """Runs a command and returns its output; what it reports is seen."""
    print("+", *command, file=sys.stderr, flush=True)
    words = list(map(str, command))
    # Packages of the caller's are not those of the release.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m release", description=__doc__)
    parser.add_argument("tag", metavar="TAG", help="v and a version: v0.2.0")
    parser.add_argument("--check", action="store_true", help="check, and build nothing")
    parser.add_argument("--without-tag", action="store_true", help="before the tag is set")
    return parser.parse_args(args)


if __name__ == "__main__":
    sys.exit(main())
