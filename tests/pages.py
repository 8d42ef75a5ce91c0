"""Runs a Markdown page: every block of shell and of Python, in order, in one folder.

A comment in front of a block changes what happens to it:

    <!-- not run: REASON -->       leaves it out
    <!-- saved as: PATH -->        writes it to a file, which later blocks use

Commands that set up a machine, or take long, are replaced as `INSTEAD` says. A block of nothing but
t5jax's commands runs in this process, where all that they import is there already; every other in
processes that are forked from one where it is.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import forks
import quick
from processes import Process, environment
from t5jax.cli import main

ROOT = Path(__file__).parent.parent

# (pattern of a command, what is run in its place, what runs the command itself)
INSTEAD = [
    # make fails here too if it has no such target.
    (r"make( [a-z-]+)?", "make --dry-run{0}", ".ci/run, and make quickstart below"),
    (r"(git clone|cd|(python -m )?pip install|python3? -m venv|source)\b.*", "true", ".ci/run"),
    # With conftest.py's flags, which make compiling quick.
    (
        r"export JAX_PLATFORMS=cpu XLA_FLAGS=(\S+)",
        'export XLA_FLAGS="$XLA_FLAGS {0}"',
        "nothing: JAX reads the variable",
    ),
    # The numbers it reaches are not asserted here, only that what follows finds its files.
    (
        r"(t5jax train quickstart(?!.*(?:--help|--print-config)).*)",
        "{0} --train.steps 2 --optimizer.warmup-steps 1 --eval.every 0 --data.batch-size 8 "
        "--model.num-encoder-layers 1 --model.num-decoder-layers 1 --model.d-model 16 "
        "--model.d-kv 4 --model.d-ff 32",
        "tests/test_train.py, and make quickstart",
    ),
    (
        r"(t5jax train finetune (?!.*--(?:data.batch-size|data.inputs|print-config)).*)",
        "{0} --train.steps 2 --optimizer.warmup-steps 1 --eval.num-examples 4 --data.batch-size 8 "
        "--data.inputs-length 32 --data.targets-length 16",
        "tests/test_train.py",
    ),
    (
        r"(t5jax train (?!.*(?:--help|--print-config)).*)",
        "{0} --train.steps 2 --optimizer.warmup-steps 1 --eval.num-examples 4",
        "tests/test_train.py",
    ),
    # It would wait for minutes between two questions to Google.
    (r"(python -m gcp (?:create|watch) .*)", "{0} --interval 0", "tests/gcp"),
    (r"(t5jax eval (?!.*--help).*)", "{0} --num-examples 4", "tests/test_evaluate.py"),
]
# (text of a block of Python, what stands in its place)
SMALLER = [('("train", 1900, 20000)', '("train", 1900, 2000)')]  # Rows.
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
        directive = block.language.startswith("{")  # Of the site: a table of contents, say.
        if block.language not in {"bash", "python", *SHOWN} and not directive:
            raise ValueError(
                f"line {block.line}: language {block.language!r}; expected bash, python, or one "
                f"that is only shown: {', '.join(sorted(SHOWN))}"
            )
        if block.comment and not re.fullmatch(r"<!-- (not run|saved as): \S.* -->", block.comment):
            raise ValueError(
                f"line {block.line}: {block.comment!r} in front of a block; expected "
                "'<!-- not run: REASON -->' or '<!-- saved as: PATH -->'"
            )
    return [block for block in blocks if not block.language.startswith("{")]


def is_run(block: Block) -> bool:
    """Returns whether a block is run, and not only shown or saved."""
    return block.language not in SHOWN and not block.comment


def as_run(code: str) -> str:
    """Returns a block of shell with what `INSTEAD` replaces, and one command a line."""
    lines = []
    for line in code.replace("\\\n", " ").splitlines():
        for pattern, replacement, _ in INSTEAD:
            # A comment behind a command stays out of what is put together.
            if match := re.fullmatch(pattern, re.sub(r"\s+#.*$", "", line).strip()):
                line = replacement.format(*(group or "" for group in match.groups()))
                break
        # A checkpoint of the quickstart, which ends earlier here.
        lines.append(
            line.replace("runs/quickstart/checkpoints/600", "runs/quickstart/checkpoints/2")
        )
    return "\n".join(lines)


def run_page(text: str, folder: Path) -> int:
    """Runs the blocks of a page in a folder; returns how many were run.

    Raises:
      AssertionError: at the first that fails, with its line and its output.
    """
    commands = folder / ".commands"
    commands.mkdir()
    # Isolated and without the packages of the environment, which starts at once.
    start = f'exec "{sys.executable}" -IS "{forks.__file__}" run "{forks.address()}"'
    for name, arguments in (("python", ""), ("t5jax", " -m t5jax.cli")):
        (commands / name).write_text(f'#!/bin/sh\n{start}{arguments} "$@"\n')
        (commands / name).chmod(0o755)
    env = environment() | {quick.ASKED: "1"}  # One device, as readers have, not the tests' eight.
    env["PATH"] = f"{commands}{os.pathsep}{env['PATH']}"
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


def run_notebook(text: str, folder: Path) -> int:
    """Runs the cells of a notebook in a folder, in this process; returns how many were run.

    Commands are replaced as on pages, and nothing is installed.

    Raises:
      AssertionError: at the first command that fails, with its output.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    num_run = 0
    for cell in json.loads(text)["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or code.startswith("%pip "):
            continue
        if code.startswith("%%writefile "):
            head, _, content = code.partition("\n")
            (folder / head.split()[1]).write_text(content)
        elif code.startswith("!"):
            for line in as_run(code.replace("!", "")).splitlines():
                arguments = t5jax_arguments(line)
                assert arguments is not None, f"{line}: not a command of t5jax"
                status, printed = _run_here(arguments, folder)
                assert status == 0, f"{code}\n{printed}"
        else:
            with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), _quick():
                exec(compile(code, cell["id"], "exec"), names)
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


# Many pages begin with this run. One is trained, in the folder of a page, and the others copy it.
_QUICKSTART = t5jax_arguments(as_run("t5jax train quickstart"))
_trained: list[tempfile.TemporaryDirectory] = []


def _run_here(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Runs t5jax in a folder; returns its status and what it has printed."""
    run_dir = folder / "runs/quickstart"
    begins = arguments == _QUICKSTART and not run_dir.exists()
    if begins and _trained:
        shutil.copytree(_trained[0].name, run_dir)
        return 0, "(a copy of another page's run)\n"
    status, output = _run_main(arguments, folder)
    if begins and not status:
        _trained.append(tempfile.TemporaryDirectory())
        shutil.copytree(run_dir, _trained[0].name, dirs_exist_ok=True)
    return status, output


@contextlib.contextmanager
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        for replacement in quick.replacements():
            patch.setattr(*replacement)
        yield


def _run_main(arguments: list[str], folder: Path) -> tuple[int, str]:
    output = io.StringIO(f"+ t5jax {shlex.join(arguments)}\n")
    output.seek(0, io.SEEK_END)
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        _quick(),
    ):
        try:
            status = main(arguments)
        except SystemExit as error:  # After --help, or for an option that there is not.
            status = error.code or 0
    return status, output.getvalue()


def _run_there(language: str, code: str, folder: Path, env: dict) -> tuple[int, str]:
    """Runs code of a shell or of Python in a folder; returns its status and what it has printed."""
    if language == "python":
        for text, smaller in SMALLER:
            code = code.replace(text, smaller)
        done = Process("-c", code, env=env, folder=folder).wait(timeout=600)
        return done.status, done.out + done.err
    shell = ["bash", "-euxo", "pipefail"]
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
