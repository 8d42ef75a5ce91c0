"""The README's blocks and the quickstart's commands run; so does what runs them, `pages`."""

import os
import re
import shutil
import subprocess

import pytest

from pages import ROOT, as_run, commands_of, read_blocks, run_page, t5jax_arguments
from tiny import one_device  # noqa: F401


def quickstart_commands() -> str:
    """Returns what `make quickstart` runs, once everything is installed."""
    options = ["--dry-run", "--no-print-directory", "--assume-old=install", "BIN=."]
    recipe = subprocess.run(
        ["make", *options, "quickstart"],
        cwd=ROOT,
        # As if no other make had started the tests, whose options it would take over.
        env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return recipe.replace("./t5jax", "t5jax")


@pytest.mark.slow(seconds=90)
@pytest.mark.usefixtures("clean_registries")
def test_every_block_of_the_readme_runs(tmp_path):
    """In the order of the page, with `make quickstart` in full: later blocks use its run."""
    folder = tmp_path / "checkout"
    # What the package reads is that of this process.
    left_out = shutil.ignore_patterns(".*", "runs", "__pycache__", "tasks", "configs", "t5jax")
    shutil.copytree(ROOT, folder, ignore=left_out)
    commands = quickstart_commands()
    assert "--train.steps 2" in as_run(commands)
    page, found = re.subn(
        r"^make quickstart\b.*$",
        lambda _: commands,
        (ROOT / "README.md").read_text(),
        count=1,
        flags=re.MULTILINE,
    )
    assert found
    assert run_page(page, folder) > 0
    weights = folder / "runs/quickstart/export/model.safetensors"
    assert weights.stat().st_size > 4 * 2 * 384 * 16  # Two embeddings at least.


def test_blocks_run_in_order_in_one_folder(tmp_path):
    page = """
        ```bash
        git clone https://example.com/nothing
        cd nothing
        echo one > first  # A comment.
        cat first \\
          first > second
        ```

        <!-- not run: needs the hub -->

        ```bash
        false
        ```

        <!-- saved as: data/rows.jsonl -->
        ```jsonl
        {"a": 1}
        ```

        ```python
        from pathlib import Path
        Path("third").write_text(Path("second").read_text() + Path("data/rows.jsonl").read_text())
        ```

        ```text
        shown only
        ```
    """
    page = "\n".join(line[8:] for line in page.splitlines())
    assert run_page(page, tmp_path) == 2
    assert (tmp_path / "third").read_text() == 'one\none\n{"a": 1}\n'


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("bash\necho before\nfalse\necho after", "before"),
        ("bash\nfalse | cat", "false"),
        ("bash\necho $UNDEFINED_NAME", "UNDEFINED_NAME"),
        ("python\n1 / 0", "ZeroDivisionError"),
        ("bash\nmake no-such-target", "no-such-target"),
        ("bash\nt5jax trian quickstart", "did you mean train"),
    ],
)
def test_a_block_that_fails_is_reported_with_its_line_and_output(code, output, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    with pytest.raises(AssertionError) as error:
        run_page(f"# Title\n\n```{code}\n```\n", tmp_path)
    assert str(error.value).startswith("line 3:")
    assert output in str(error.value)
    assert "\nafter" not in str(error.value).split("+ false")[-1]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```sh\nls\n```\n", "line 1: language 'sh'; expected bash, python"),
        ("```\nls\n```\n", "line 1: language ''"),
        ("\n<!-- not run -->\n```bash\nls\n```\n", "line 3: '<!-- not run -->' in front"),
        ("<!-- not run:  -->\n```bash\nls\n```\n", "expected '<!-- not run: REASON -->'"),
        ("```bash\nls\n", "line 1: the block is not closed"),
    ],
)
def test_a_block_that_would_be_missed_is_refused(page, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_blocks(page)


@pytest.mark.parametrize(
    ("command", "instead"),
    [
        ("make quickstart   # some minutes", "make --dry-run quickstart"),
        ("make", "make --dry-run"),
        ("make quickstart && ls", "make quickstart && ls"),
        ('pip install -e ".[dev]"', "true"),
        (
            "t5jax train mine --init.model runs/a",
            "t5jax train mine --init.model runs/a --train.steps 2 --optimizer.warmup-steps 1 "
            "--eval.num-examples 4",
        ),
        ("t5jax train quickstart --print-config", "t5jax train quickstart --print-config"),
        ("t5jax train --help", "t5jax train --help"),
        ("t5jax eval runs/a", "t5jax eval runs/a --num-examples 4"),
        ("t5jax infer runs/a --prompt b", "t5jax infer runs/a --prompt b"),
    ],
)
def test_what_is_run_instead_of_a_command(command, instead):
    assert as_run(command + "\n") == instead


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("t5jax a 'b c' # d", ["a", "b c"]),
        ("t5jax a 'b|c; $d?' \"e?\"", ["a", "b|c; $d?", "e?"]),
        ("t5jax a | cat", None),
        ("t5jax a>b", None),
        ("t5jax a;t5jax b", None),
        ("t5jax a $B", None),
        ('t5jax a "$B"', None),
        ("t5jax a $(date)", None),
        ("t5jax a &", None),
        ("t5jax a *.model", None),
        ("t5jax a 'b", None),
        ("A=1 t5jax a", None),
        ("", None),
    ],
)
def test_what_needs_no_shell(line, arguments):
    assert t5jax_arguments(line) == arguments


def test_lines_run_together_where_one_may_change_the_next():
    (block,) = read_blocks("```bash\nt5jax a\necho b | t5jax c\n```")
    assert commands_of(block) == [["a"], "echo b | t5jax c"]
    (block,) = read_blocks("```bash\nexport A=1\nt5jax a\n```")
    assert commands_of(block) == ["export A=1\nt5jax a"]


def test_commands_that_run_here_stop_at_the_first_that_fails(tmp_path):
    page = "```bash\nt5jax tasks --help\nt5jax --version\nt5jax trian\nt5jax vocab\n```"
    with pytest.raises(AssertionError, match="did you mean train") as error:
        run_page(page, tmp_path)
    assert "+ t5jax --version" in str(error.value)
    assert "+ t5jax vocab" not in str(error.value)
    page, other = "```bash\nt5jax tasks list --no-such-option\n```", tmp_path / "other"
    other.mkdir()
    with pytest.raises(AssertionError, match="no-such-option"):
        run_page(page, other)
