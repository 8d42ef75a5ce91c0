"""What a user installs: the wheel, run from an empty folder with no checkout in reach.

Also the files around the code that no other test reads: pyproject.toml and the constraints.
"""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CODE = ("t5jax", "tasks", "configs", "benchmarks", "gcp", "release", "tests")
# Top-level modules whose distribution installs them under more than one name, or shares them.
DISTRIBUTIONS = {"google": "protobuf", "orbax": "orbax-checkpoint"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The project's source archive, built here from this checkout, and a wheel of it."""
    folder = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def run_installed(wheel, tmp_path_factory):
    """Runs Python on the installed wheel, from an empty folder, without the checkout."""
    target, empty = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("empty")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
    subprocess.run([*pip, wheel], check=True)

    def run(*args):
        # PYTHONPATH stands before the environment's own packages, an editable t5jax among them.
        env = os.environ | {"PYTHONPATH": str(target)}
        done = subprocess.run(
            [sys.executable, *args], cwd=empty, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert Path(run("-c", "import t5jax; print(t5jax.__file__)").strip()).is_relative_to(target)
    return run


@pytest.mark.slow
def test_the_wheel_holds_code_tasks_and_configs_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {}
    for folder in ("t5jax", "tasks", "configs"):
        kinds = (".py", ".typed", ".html", ".jinja", ".css", ".js")
        found = (ROOT / folder).rglob("*")
        for path in (path for path in found if path.suffix in kinds):
            name = path.relative_to(ROOT).as_posix()
            expected[name] = name if folder == "t5jax" else f"t5jax/shipped/{name}"
    assert {"tasks/numbers.py", "configs/quickstart.py"} <= expected.keys()
    assert {name for name in names if ".dist-info/" not in name} == set(expected.values())
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_a_package_index_shows_the_readme_without_links_that_lead_nowhere(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        shown = opened.read(name).decode().partition("\n\n")[2]
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"\]\((?!https?:)", readme)
    assert re.search(r"\]\((?!https?:)", shown) is None
    # Only links differ.
    assert shown.splitlines()[0] == "# t5jax"
    assert "imported (docs/t5x.md)" in shown
    blocks = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    assert blocks.findall(shown) == blocks.findall(readme)


@pytest.mark.slow
def test_the_source_archive_holds_what_is_tracked(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no repository")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    left_out = {name for name in tracked - names if not name.startswith((".ci/", ".github/"))}
    assert left_out == {".pre-commit-config.yaml"}
    assert {"tests/tiny.py", "docs/start.md", "Makefile", "constraints/py311.txt"} <= names
    junk = re.compile(r"__pycache__|\.pyc$|^(runs|build|dist|shared)/")
    assert [name for name in names if junk.search(name)] == []


@pytest.mark.slow
def test_the_shipped_tasks_and_configs_are_found_from_anywhere(run_installed):
    code = "from t5jax import shipped; print(*shipped.list_files({!r}))"
    for kind in ("tasks", "configs"):
        expected = sorted(path.stem for path in (ROOT / kind).glob("*.py"))
        assert run_installed("-c", code.format(kind)).split() == expected


@pytest.mark.slow
def test_the_command_line_runs_from_anywhere(run_installed):
    from t5jax.config import load_config, to_json

    printed = run_installed("-m", "t5jax.cli", "train", "quickstart", "--print-config")
    assert printed == to_json(load_config(str(ROOT / "configs" / "quickstart.py")))
    version = run_installed("-m", "t5jax.cli", "--version").strip()
    code = "from importlib.metadata import entry_points as e; print(*e(name='t5jax'))"
    assert "value='t5jax.cli:main'" in run_installed("-c", code)
    code = "from importlib.metadata import version; print(version('t5jax'))"
    assert run_installed("-c", code).strip() == version


def _third_party_imports() -> dict[str, str]:
    """Returns each top-level module that is neither ours nor Python's, with a file that has it."""
    found = {}
    for path in (path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            for module in modules:
                found.setdefault(module.split(".")[0], str(path.relative_to(ROOT)))
    # The folder of a test or a benchmark is on the path while it runs.
    ours = {*CODE, *(path.stem for f in ("tests", "benchmarks") for path in (ROOT / f).iterdir())}
    return {k: v for k, v in found.items() if k not in ours and k not in sys.stdlib_module_names}


DECLARED_BY = ("dev", "torch", "beam", "trackio")


def test_every_package_that_is_imported_is_declared():
    declared = {
        canonicalize_name(Requirement(line).name)
        for line in [*PROJECT["dependencies"], *(x for e in DECLARED_BY for x in EXTRAS[e])]
    }
    installed = importlib.metadata.packages_distributions()
    undeclared = {}
    for module, path in _third_party_imports().items():
        names = installed.get(module, [module])
        name = DISTRIBUTIONS.get(module, names[0])
        if canonicalize_name(name) not in declared:
            undeclared[module] = path
    assert undeclared == {}


@pytest.mark.parametrize(
    ("constraints", "python", "extras"),
    [("py311.txt", "3.11", ("dev", "torch")), ("py312.txt", "3.12", ("dev",))],
)
def test_the_constraints_pin_every_requirement_within_its_bounds(constraints, python, extras):
    pins = {}
    for line in (ROOT / "constraints" / constraints).read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            assert re.fullmatch(r"[0-9a-z.]+", version), f"{line}: not a public release"
            pins[canonicalize_name(name)] = version
    requirements = [*PROJECT["dependencies"], *(line for e in extras for line in EXTRAS[e])]
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert "t5jax" not in pins
    assert ("torch" in pins) == ("torch" in extras)


def make(*args, **variables):
    """Returns make's dry run of this checkout: the exit status, output and errors."""
    command = ["make", "--dry-run", *args, *(f"{k}={v}" for k, v in variables.items())]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_make_tests_with_torch_and_shows_the_quickstart_without(tmp_path):
    variables = {"PYTHON": sys.executable, "VENV": tmp_path / "venv"}
    steps = make("test", **variables).stdout
    assert f"{sys.executable} -m venv" in steps
    assert ("-e '.[torch]'" in steps) == (sys.version_info[:2] == (3, 11))
    constraints = "py311.txt" if sys.version_info[:2] == (3, 11) else "py312.txt"
    assert f"-c constraints/{constraints} -e '.[dev]'" in steps
    steps = make("quickstart", **variables).stdout
    assert "t5jax train quickstart" in steps
    assert ".[torch]" not in steps


def test_make_says_which_python_it_needs(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "install", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"{old} does not run or is not Python 3.11, 3.12 or 3.13" in done.stderr
    assert "make install PYTHON=/path/to/python3.11" in done.stderr
    assert not (tmp_path / "venv").exists()
