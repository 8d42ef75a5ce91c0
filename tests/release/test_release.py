"""A release: what stops it, in a repository of its own, and its steps with stand-ins for tools."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from release import __main__ as release
from release import checks

ROOT = Path(__file__).parents[2]
CHANGELOG = """# Changelog

## [Unreleased]

## [0.2.0] - 2026-01-31

- Something.
"""


def git(root: Path, *words: str) -> None:
    author = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    subprocess.run(["git", *author, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def root(tmp_path):
    """A repository that is ready for the release of v0.2.0."""
    (tmp_path / "t5jax").mkdir()
    (tmp_path / "t5jax/__init__.py").write_text('"""A package."""\n\n__version__ = "0.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / ".gitignore").write_text("dist/\nbuild/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "Ready")
    git(tmp_path, "tag", "v0.2.0")
    return tmp_path


def test_a_version_that_is_ready_has_no_faults(root):
    assert checks.faults(root, "v0.2.0") == []


@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        (
            "t5jax/__init__.py",
            "0.2.0",
            "0.1.9",
            "t5jax/__init__.py has the version 0.1.9; expected",
        ),
        ("CITATION.cff", "0.2.0", "0.3.0", "CITATION.cff has the version 0.3.0; expected 0.2.0"),
        ("CHANGELOG.md", "[0.2.0] -", "[0.1.0] -", "first version is '[0.1.0] - 2026-01-31'; exp"),
        ("CHANGELOG.md", " - 2026-01-31", "", "first version is '[0.2.0]'; expected '[0.2.0] - 2"),
        ("CHANGELOG.md", "2026-01", "9026-01", "dates 0.2.0 to 9026-01-31, which is still to come"),
        ("CHANGELOG.md", "ed]\n", "ed]\n\n- More.\n", "has lines under [Unreleased]; they belong"),
        ("CHANGELOG.md", "## [Unreleased]\n", "", "no section of a version below [Unreleased]"),
    ],
)
def test_each_fault_is_said(root, file, old, new, fault):
    path = root / file
    path.write_text(path.read_text().replace(old, new))
    git(root, "commit", "-qam", "Changed")
    git(root, "tag", "--force", "v0.2.0")
    (found,) = checks.faults(root, "v0.2.0")
    assert fault in found


def test_tag_commit_and_tree_have_to_agree(root):
    assert checks.faults(root, "0.2.0") == [
        "the tag is '0.2.0'; expected v and a version, such as v0.2.0"
    ]
    git(root, "tag", "--delete", "v0.2.0")
    assert checks.faults(root, "v0.2.0") == ["there is no tag v0.2.0; git tag --annotate v0.2.0"]
    assert checks.faults(root, "v0.2.0", tagged=False) == []
    git(root, "tag", "v0.2.0")
    (root / "junk.txt").touch()
    assert "the tree is not clean: junk.txt" in checks.faults(root, "v0.2.0")[0]
    git(root, "add", "-A")
    git(root, "commit", "-qm", "More")
    assert "v0.2.0 is another commit than" in checks.faults(root, "v0.2.0")[0]


@pytest.mark.parametrize(
    ("license", "is_allowed"),
    [
        ("MIT", True),
        ("ISC License (ISCL)", True),
        ("Apache Software License; MIT License", True),
        ("Apache-2.0 AND CNRI-Python", True),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND (GPL-3.0-only OR Apache-2.0)", True),
        ("GPL-3.0-only", False),
        ("MIT AND GPL-3.0-only", False),
        ("UNKNOWN", False),
        ("", False),
    ],
)
def test_a_license_is_allowed_by_its_name(license, is_allowed):
    packages = [{"Name": "a", "Version": "1", "License": license}]
    packages += [{"Name": "num2words", "Version": "1", "License": "LGPL"}]  # By its own name.
    found = checks.forbidden(packages, ROOT / "release/licenses.toml")
    assert found == ([] if is_allowed else [f"a 1: {license!r}"])


@pytest.fixture
def commands(root, monkeypatch):
    """Takes environments and tools away; returns what is run."""
    run = []
    licenses = [{"Name": "numpy", "Version": "2", "License": "BSD-3-Clause"}]

    def stand_in(*command, cwd=None):
        words = [str(word).replace(f"{root}/", "") for word in command]
        run.append(words)
        if "build" in words:
            for name in ("t5jax-0.2.0-py3-none-any.whl", "t5jax-0.2.0.tar.gz"):
                (root / "dist" / name).parent.mkdir(exist_ok=True)
                (root / "dist" / name).write_text(name)
        elif "--output-file" in words:
            Path(command[command.index("--output-file") + 1]).write_text(
                '{"metadata": {"component": {"name": "t5jax"}}}'
            )
        if words[0].endswith("pip-licenses"):
            return json.dumps(licenses)
        return "t5jax 0.2.0\n" if "--version" in words else ""

    (root / "release").mkdir()
    shutil.copy(ROOT / "release/licenses.toml", root / "release")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "Licenses")
    git(root, "tag", "--force", "v0.2.0")
    monkeypatch.setattr(release, "_run", stand_in)
    monkeypatch.setattr(release.venv, "create", lambda folder, with_pip: None)
    run.append(licenses)
    return run


def test_a_release_is_built_checked_installed_and_listed(root, commands, capsys):
    commands.pop()
    assert release.main(["v0.2.0"], root) == 0
    steps = [" ".join(words) for words in commands]
    wheel = "dist/t5jax-0.2.0-py3-none-any.whl"
    assert steps[1].endswith(f"-m build --outdir dist {root}")
    assert f"twine check --strict {wheel} dist/t5jax-0.2.0.tar.gz" in steps[2]
    assert steps[3].endswith(f"{wheel}[{release.EXTRAS}]")
    assert "--python=build/release/installed/bin/python" in steps[5]
    assert "cyclonedx-py environment build/release/installed/bin/python" in steps[6]
    parts = json.loads((root / "dist/t5jax-0.2.0.cdx.json").read_text())
    assert parts["metadata"]["component"]["version"] == "0.2.0"
    sums = (root / "dist/SHA256SUMS").read_text()
    assert [line.split()[1] for line in sums.splitlines()] == [
        "t5jax-0.2.0-py3-none-any.whl", "t5jax-0.2.0.tar.gz", "t5jax-0.2.0.cdx.json",
    ]  # fmt: skip
    assert "bin/twine upload" in capsys.readouterr().out


def test_a_release_stops_at_a_license_and_at_a_tool_that_fails(root, commands, capsys, monkeypatch):
    commands.pop()[0]["License"] = "GPL-3.0-only"
    assert release.main(["v0.2.0"], root) == 1
    assert "does not allow:\n  numpy 2: 'GPL-3.0-only'" in capsys.readouterr().err
    assert not (root / "dist/SHA256SUMS").exists()

    def fail(*command, cwd=None):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(release, "_run", fail)
    assert release.main(["v0.2.0"], root) == 1
    assert "requirements.txt` failed" in capsys.readouterr().err


def test_a_fault_stops_a_release_before_anything_is_built(root, commands, capsys):
    commands.clear()
    (root / "junk.txt").touch()
    assert release.main(["v0.2.0"], root) == 1
    assert "release: the tree is not clean" in capsys.readouterr().err
    assert commands == []
