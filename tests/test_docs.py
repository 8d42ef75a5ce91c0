"""The blocks of every page of docs/ run, and what pages say of the project's files is so."""

import ast
import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest

import google_cloud
from pages import ROOT, is_run, read_blocks, run_notebook, run_page
from t5jax.commands.train import known_configs, load_config_file
from t5jax.optimizers.schedules import make_schedule
from tiny import one_device  # noqa: F401

PAGES = sorted((ROOT / "docs").rglob("*.md"))
WITH_BLOCKS = [page for page in PAGES if any(map(is_run, read_blocks(page.read_text())))]
ABOUT_THE_CODE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]


def test_there_are_pages():
    assert ROOT / "docs/tasks.md" in WITH_BLOCKS


@pytest.mark.parametrize("page", ABOUT_THE_CODE, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page: Path):
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir())
    named = re.findall(rf"`((?:\.ci|{folders})/[\w./-]*)`", page.read_text())
    named += [name for name in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())]
    made_by_examples = ("runs/", "tasks/")
    missing = {
        name
        for name in named
        if not (ROOT / name).exists()
        and not (page.parent / name).exists()
        and "FAMILY" not in name
        and not name.startswith(made_by_examples)
    }
    assert not missing


def test_the_design_names_every_room_and_types_that_there_are():
    page = (ROOT / "docs/design.md").read_text()
    rooms = re.findall(r"\w+", "".join(re.findall(r"^    [\w, ]+$", page, re.MULTILINE)))
    found = [path for path in (ROOT / "t5jax").iterdir() if path.suffix in ("", ".py")]
    here = {path.stem for path in found if not path.stem.startswith("_")}
    assert set(rooms) == here - {"data"}
    types = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `([\w/.]+)` \|", page, re.MULTILINE)
    assert len(types) > 8
    for names, file in types:
        source = (ROOT / file).read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(class {name}\b|{name}\b.* =)", source, re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_task_of_the_page_fits_on_a_screen(page: Path):
    """What a page saves is short, and is Python that compiles."""
    for block in read_blocks(page.read_text()):
        if block.language == "python":
            compile(block.code, f"{page.name}, line {block.line}", "exec")
            assert len(block.code.splitlines()) <= 24


@functools.cache
def known_options() -> set[str]:
    """Returns the last words of all options: fields of configs and of the commands' options."""
    paths = [*(ROOT / "t5jax/config").rglob("*.py"), *(ROOT / "t5jax/commands").rglob("*.py")]
    paths += [*(ROOT / "t5jax/architectures").rglob("*.py"), ROOT / "t5jax/cli.py"]
    text = "".join(path.read_text() for path in paths)
    found = re.findall(r"^    (\w+): ", text, re.MULTILINE)
    return {name.replace("_", "-") for name in found} | set(re.findall(r'"--([\w-]+)"', text))


@pytest.mark.parametrize("page", ABOUT_THE_CODE, ids=lambda page: page.stem)
def test_options_of_commands_that_are_not_run_exist(page: Path):
    for block in read_blocks(page.read_text()):
        if block.comment.startswith("<!-- not run"):
            for line in re.findall(r"^t5jax .*$", block.code.replace("\\\n", " "), re.MULTILINE):
                options = re.findall(r" --([a-z][\w.-]*)", line.partition(" --beam")[0])
                unknown = {o for o in options if o.split(".")[-1] not in known_options()}
                assert not unknown, line


@pytest.mark.parametrize("page", ABOUT_THE_CODE, ids=lambda page: page.stem)
def test_runs_of_a_page_have_steps_after_their_warm_up(page: Path):
    """As they are typed: when pages are run, the numbers of steps are others."""
    for block in read_blocks(page.read_text()):
        code = block.code.replace("\\\n", " ")
        for name, options in re.findall(r"^t5jax train ([\w:]+) (.*)$", code, re.MULTILINE):
            if name.partition(":")[0] not in known_configs():
                continue  # One of the reader's own.
            config = load_config_file(name)
            given = dict(re.findall(r"--(train.steps|optimizer.warmup-steps) (\d+)", options))
            steps = int(given.get("train.steps", config.train.steps))
            warmup = int(given.get("optimizer.warmup-steps", config.optimizer.warmup_steps))
            make_schedule(dataclasses.replace(config.optimizer, warmup_steps=warmup), steps)


@pytest.mark.slow
@pytest.mark.usefixtures("clean_registries")
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.stem)
def test_every_block_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch, request):
    text = page.read_text()
    if page.stem == "google_cloud":
        cloud = google_cloud.GoogleCloud(work=300.0)  # A page's commands wait for nothing.
        for name, value in google_cloud.install(tmp_path / ".google", cloud).items():
            monkeypatch.setenv(name, value)
    if page.stem == "storage":
        request.getfixturevalue("bucket")
    if "import ctranslate2" in text:
        pytest.importorskip("ctranslate2")
        pytest.importorskip("torch")
    assert run_page(text, tmp_path) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("clean_registries")
def test_the_notebook_runs(tmp_path: Path):
    text = (ROOT / "docs/quickstart.ipynb").read_text()
    assert run_notebook(text, tmp_path) == 9
    assert (tmp_path / "exported/model.safetensors").exists()
    assert (tmp_path / "runs/legs/checkpoints").is_dir()
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert not any(cell.get("outputs") for cell in notebook["cells"])  # They would grow old.


def test_the_site_builds_without_a_warning(tmp_path: Path):
    """Every link, every docstring, and every page in the table of contents."""
    from sphinx.cmd import build

    warnings = tmp_path / "warnings.txt"
    command = ["-n", "-q", "-E", "-d", tmp_path / "doctrees", "-w", warnings]
    build.main([str(word) for word in (*command, ROOT / "docs", tmp_path / "site")])
    assert warnings.read_text() == ""
    assert (tmp_path / "site/index.html").exists()
    page = (tmp_path / "site/tasks.html").read_text()
    captions = re.findall('caption-text">(tasks/.*?)<', page)
    files = ["weekdays", "common_years", "leap", "calendar"]
    assert captions == [f"tasks/{name}.py" for name in files]


def test_messages_that_the_page_explains_are_those_of_the_code():
    said = "\n".join(
        node.value
        for path in (ROOT / "t5jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    rows = re.findall(
        r"^\| (`.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE
    )
    named = [part for row in rows for part in re.findall("`(.*?)`", row)]
    theirs = {"RESOURCE_EXHAUSTED"}  # XLA's.
    assert len(named) > 20
    assert [part for part in named if part not in said and part not in theirs] == []
