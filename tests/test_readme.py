"""Runs the README: every block of shell and of Python, in order, in one copy of the checkout.

A comment in front of a block changes what happens to it:

    <!-- not run: REASON -->       leaves it out
    <!-- saved as: PATH -->        writes it to a file, which later blocks use

Commands that set up a machine, or take long, are replaced as `INSTEAD` says. A block of nothing but
t5jax's commands runs in this process, where all that they import is there already.
"""

import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from t5jax.cli import main
from tiny import one_device  # noqa: F401

ROOT = Path(__file__).parent.parent

# (pattern of a command, what is run in its place, what runs the command itself)
INSTEAD = [
    # make fails here too if it has no such target.
    (r"make( [a-z-]+)?", "make --dry-run{0}", ".ci/run, and make quickstart below"),
    (r"(git clone|cd|(python -m )?pip install|python3? -m venv|source)\b.*", "true", ".ci/run"),
    # The numbers it reaches are not asserted here, only that what follows finds its files.
    (
        r"(t5jax train quickstart(?!.*(?:--help|--print-config)).*)",
        "{0} --train.steps 2 --optimizer.warmup-steps 1 --eval.every 0 --data.batch-size 8 "
        "--model.num-encoder-layers 1 --model.num-decoder-layers 1 --model.d-model 16 "
        "--model.d-kv 4 --model.d-ff 32",
        "tests/test_train.py, and make quickstart",
    ),
    (
        r"(t5jax train (?!.*(?:--help|--print-config)).*)",
        "{0} --train.steps 2 --optimizer.warmup-steps 1 --eval.num-examples 4",
        "tests/test_train.py",
    ),
    (r"(t5jax eval (?!.*--help).*)", "{0} --num-examples 4", "tests/test_evaluate.py"),
]
# Languages of blocks that are only shown, such as a command's output.
SHOWN = {"text", "json", "jsonl", "toml"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: what it holds, the line it starts on, and the comment in front of it."""

    language: str
    code: str
    line: int
    comment: str


def read_blocks(text: str) -> list[Block]:
    """Returns the fenced blocks of a Markdown page.

    Raises:
      ValueError: for a block that would never be run by mistake: one without a language or in one
        that is unknown here, a comment without a reason, or a fence that is not closed.
    """
    blocks, comment, start, lines = [], "", None, []
    for number, line in enumerate(text.splitlines(), start=1):
        if start is not None and line.strip() == "```":
            language, code = lines[0].strip().removeprefix("```"), "\n".join(lines[1:]) + "\n"
            blocks.append(Block(language, code, start, comment))
            comment, start = "", None
        elif start is not None:
            lines.append(line)
        elif line.strip().startswith("```"):
            start, lines = number, [line]
        elif line.strip():
            comment = line.strip() if line.strip().startswith("<!--") else ""
    if start is not None:
        raise ValueError(f"line {start}: the block is not closed")
    for block in blocks:
        if block.language not in {"bash", "python", *SHOWN}:
            raise ValueError(
                f"line {block.line}: language {block.language!r}; expected bash, python, or one "
                f"that is only shown: {', '.join(sorted(SHOWN))}"
            )
        if block.comment and not re.fullmatch(r"<!-- (not run|saved as): \S.* -->", block.comment):
            raise ValueError(
                f"line {block.line}: {block.comment!r} in front of a block; expected "
                "'<!-- not run: REASON -->' or '<!-- saved as: PATH -->'"
            )
    return blocks


def as_run(code: str) -> str:
    """Returns a block of shell with what `INSTEAD` replaces, and one command a line."""
    lines = []
    for line in code.replace("\\\n", " ").splitlines():
        for pattern, replacement, _ in INSTEAD:
            # A comment behind a command stays out of what is put together.
            if match := re.fullmatch(pattern, re.sub(r"\s+#.*$", "", line).strip()):
                line = replacement.format(*(group or "" for group in match.groups()))
                break
        lines.append(line)
    return "\n".join(lines)


def run_page(text: str, folder: Path) -> int:
    """Runs the blocks of a page in a folder; returns how many were run.

    Raises:
      AssertionError: at the first that fails, with its line and its output.
    """
    commands = folder / ".commands"
    commands.mkdir()
    for name, arguments in (("python", ""), ("t5jax", " -m t5jax.cli")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        (commands / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    env.pop("XLA_FLAGS", None)  # One device, as readers have, not the tests' eight.
    num_run = 0
    for block in read_blocks(text):
        if block.comment.startswith("<!-- not run"):
            continue
        if block.comment:
            path = folder / block.comment.removeprefix("<!-- saved as: ").removesuffix(" -->")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code)
            continue
        if block.language in SHOWN:
            continue
        output = ""
        for command in commands_of(block):
            if isinstance(command, list):
                status, printed = _run_here(command, folder)
            else:
                status, printed = _run_there(block.language, command, folder, env)
            output += printed
            assert status == 0, f"line {block.line}:\n{block.code}\n{output}"
        num_run += 1
    return num_run


def commands_of(block: Block) -> list[list[str] | str]:
    """Returns what a block runs: arguments of t5jax, for this process, and texts for another."""
    if block.language == "python":
        return [block.code]
    commands, code = [], as_run(block.code)
    for line in code.splitlines():
        arguments = t5jax_arguments(line)
        if arguments is None and not line.startswith("echo "):
            return [code]  # Its lines may depend on one another.
        commands.append(line if arguments is None else arguments)
    return commands


def t5jax_arguments(line: str) -> list[str] | None:
    """Returns the arguments of a line of t5jax; None for others, and for what needs a shell."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # A text of several lines.
        return None
    bare = re.sub(r"""'[^']*'|"[^"$`]*\"""", "", line)
    if words[:1] != ["t5jax"] or re.search(r"[|&;<>()$`*?]", bare):
        return None
    return words[1:]


def _run_here(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Runs t5jax in a folder; returns its status and what it has printed."""
    output = io.StringIO(f"+ t5jax {shlex.join(arguments)}\n")
    output.seek(0, io.SEEK_END)
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            status = main(arguments)
        except SystemExit as error:  # After --help, or for an option that there is not.
            status = error.code or 0
    return status, output.getvalue()


def _run_there(language: str, code: str, folder: Path, env: dict) -> tuple[int, str]:
    """Runs code of a shell or of Python in a folder; returns its status and what it has printed."""
    shell = [sys.executable] if language == "python" else ["bash", "-euxo", "pipefail"]
    done = subprocess.run(
        [*shell, "-c", code],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


@pytest.fixture
def clean_registries(monkeypatch):
    """Sets aside what other tests have registered in this process, and then what a page has."""
    from t5jax.data import pipeline
    from t5jax.data.tf import seqio

    registries = (seqio.TaskRegistry, seqio.MixtureRegistry)

    def take_out():
        taken = {r: {name: r.get(name) for name in r.names()} for r in registries}
        for registry, entries in taken.items():
            for name in entries:
                registry.remove(name)
        return taken

    monkeypatch.setattr(pipeline, "_loaded", set())
    others = take_out()
    yield
    take_out()
    for registry, entries in others.items():
        for name, entry in entries.items():
            registry.add_provider(name, entry)


@pytest.mark.slow
@pytest.mark.usefixtures("clean_registries")
def test_every_block_of_the_readme_runs(tmp_path):
    folder = tmp_path / "checkout"
    # What the package reads is that of this process.
    left_out = shutil.ignore_patterns(".*", "runs", "__pycache__", "tasks", "configs", "t5jax")
    shutil.copytree(ROOT, folder, ignore=left_out)
    assert run_page((ROOT / "README.md").read_text(), folder) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("clean_registries")
def test_every_command_of_make_quickstart_runs(tmp_path):
    recipe = subprocess.run(
        [
            "make",
            "--dry-run",
            "--no-print-directory",
            "--assume-old=install",
            "BIN=.",
            "quickstart",
        ],
        cwd=ROOT,
        # As if no other make had started the tests, whose options it would take over.
        env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    commands = recipe.replace("./t5jax", "t5jax")
    assert "--train.steps 2" in as_run(commands)
    assert run_page(f"```bash\n{commands}```\n", tmp_path) == 1
    weights = tmp_path / "runs/quickstart/export/model.safetensors"
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
            "t5jax train finetune --init.model runs/a",
            "t5jax train finetune --init.model runs/a --train.steps 2 --optimizer.warmup-steps 1 "
            "--eval.num-examples 4",
        ),
        ("t5jax train quickstart --print-config", "t5jax train quickstart --print-config"),
        ("t5jax train --help", "t5jax train --help"),
        ("t5jax eval runs/a", "t5jax eval runs/a --num-examples 4"),
        ("t5jax infer --model runs/a --prompt b", "t5jax infer --model runs/a --prompt b"),
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
