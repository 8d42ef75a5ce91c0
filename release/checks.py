"""What has to be so before a version is published."""

import datetime
import re
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path


def faults(root: Path, tag: str, *, tagged: bool = True) -> list[str]:
    """Returns what is wrong with a checkout that is to be published as `tag`.

    Args:
      root: the checkout.
      tag: the tag, v and a version.
      tagged: whether the tag has to be there, on the commit that is checked out.
    """
    version = tag.removeprefix("v")
    if not re.fullmatch(r"v\d+\.\d+\.\d+((a|b|rc)\d+)?", tag):
        return [f"the tag is {tag!r}; expected v and a version, such as v0.2.0"]
    found = [
        f"{file} has the version {has or 'of none'}; expected {version}"
        for file, pattern in (
            ("t5jax/__init__.py", r'^__version__ = "(.*)"$'),
            ("CITATION.cff", r"^version: (.*)$"),
        )
        if (has := _first(pattern, (root / file).read_text())) != version
    ]
    found += _faults_of_changelog((root / "CHANGELOG.md").read_text(), version)
    if changed := _git(root, "status", "--porcelain"):
        found.append(f"the tree is not clean: {', '.join(changed.split()[1::2])}; commit or remove")
    if tagged:
        commit = _git(root, "rev-list", "--max-count=1", tag)
        if not commit:
            found.append(f"there is no tag {tag}; git tag --annotate {tag}")
        elif commit != _git(root, "rev-parse", "HEAD"):
            found.append(f"{tag} is another commit than the one that is checked out")
    return found


def _faults_of_changelog(text: str, version: str) -> list[str]:
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    heads = [section.partition("\n")[0] for section in sections]
    if heads[:1] != ["[Unreleased]"] or len(heads) < 2:
        return ["CHANGELOG.md has no section of a version below [Unreleased]"]
    found = []
    if sections[0].partition("\n")[2].strip():
        found.append(f"CHANGELOG.md has lines under [Unreleased]; they belong to [{version}]")
    match = re.fullmatch(r"\[(.+)\] - (\d{4}-\d{2}-\d{2})", heads[1])
    if not match or match[1] != version:
        expected = f"[{version}] - {datetime.date.today()}"
        found.append(f"CHANGELOG.md's first version is {heads[1]!r}; expected {expected!r}")
    elif datetime.date.fromisoformat(match[2]) > datetime.date.today():
        found.append(f"CHANGELOG.md dates {version} to {match[2]}, which is still to come")
    return found


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else ""


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    return done.stdout.strip()


def forbidden(packages: Sequence[Mapping[str, str]], allowed: Path) -> list[str]:
    """Returns the packages whose license is not allowed.

    Args:
      packages: what `pip-licenses --format=json` says: Name, Version, License.
      allowed: release/licenses.toml.
    """
    table = tomllib.loads(allowed.read_text())
    licenses, exceptions = set(table["licenses"]), table["packages"]
    found = []

    def is_allowed(part: str) -> bool:
        # Of alternatives, which are in brackets beside others, one is enough.
        return bool(licenses & {part, *part.strip("()").split(" OR ")})

    for package in packages:
        name, text = package["Name"].lower(), package["License"].strip()
        if name in exceptions:
            continue
        if text in licenses or all(map(is_allowed, re.split(r" AND |; ", text))):
            continue
        found.append(f"{package['Name']} {package['Version']}: {text[:80]!r}")
    return found
