"""The blocks of every page of docs/ run."""

from pathlib import Path

import pytest

from pages import ROOT, read_blocks, run_page
from tiny import one_device  # noqa: F401

PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_there_are_pages():
    assert ROOT / "docs/tasks.md" in PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_task_of_the_page_fits_on_a_screen(page: Path):
    """What a page saves is short, and is Python that compiles."""
    for block in read_blocks(page.read_text()):
        if block.language == "python":
            compile(block.code, f"{page.name}, line {block.line}", "exec")
            assert len(block.code.splitlines()) <= 24


@pytest.mark.slow
@pytest.mark.usefixtures("clean_registries")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_the_page_runs(page: Path, tmp_path: Path):
    assert run_page(page.read_text(), tmp_path) > 0
