"""The command line: `t5jax COMMAND`. Each command is a dataclass, whose fields are its options.

Imports are inside functions, so that help answers at once. What a user can cause ends in one
message on standard error and a non-zero exit; results alone go to standard output.
"""

import dataclasses
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from t5jax.config import MeshConfig

USAGE = """\
usage: t5jax COMMAND ...

T5 models in JAX, from a prompted task to a trained, evaluated, exported model.

commands:
  train CONFIG [--section.field VALUE ...]   train; goes on by itself where the run stopped
  eval MODEL                                 a task's metrics, loss and perplexity
  infer --model MODEL --prompt TEXT          answers to prompts
  export MODEL OUTPUT                        write a Hugging Face folder
  import MODEL OUTPUT                        make a Hugging Face model a run to train from

MODEL is a Hugging Face hub name, a Hugging Face folder, a run, or one checkpoint of a run.
CONFIG is a Python file, the name of one in ./configs or among those that come with t5jax, or a
.json file that --print-config wrote.

t5jax COMMAND --help shows every option of a command with its default.
t5jax --version shows the version.
T5JAX_TRACEBACK=1 in the environment shows where an error comes from.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] == "--version":
        from t5jax import __version__

        print(__version__)
        return 0
    command = COMMANDS.get(args[0])
    if command is None:
        import difflib

        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return _fail(f"there is no command {args[0]!r}; {hint}known are {', '.join(COMMANDS)}", 2)
    try:
        return command(args[1:]) or 0
    except KeyboardInterrupt:
        hint = "; the same command goes on from the last checkpoint" if args[0] == "train" else ""
        return _fail(f"interrupted{hint}", 130)
    except BrokenPipeError:  # The reader of our output, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("T5JAX_TRACEBACK"):
            raise
        return _fail(str(error))


def _fail(message: str, status: int = 1) -> int:
    print(f"t5jax: error: {message}", file=sys.stderr)
    return status


def _parse(kind, args, *, prog: str, default=None, positional: bool = False, description=None):
    """Returns the dataclass that the arguments describe; prints help, or exits with 2.

    Args:
      positional: required fields are given by position, not by name.
    """
    import tyro

    markers = (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
    return tyro.cli(
        kind,
        args=args,
        prog=prog,
        description=description or inspect.cleandoc(kind.__doc__),
        default=tyro.MISSING_NONPROP if default is None else default,
        config=markers if positional else (),
    )


# --- train --------------------------------------------------------------------------------------


def _train(args: list[str]) -> None:
    """Trains what a config describes, with fields overridden: `--data.batch-size 64`.

    A run that was stopped, however it was, goes on when the same command is given again.
    """
    from t5jax.config import Config, to_json

    print_config = "--print-config" in args
    args = [arg for arg in args if arg != "--print-config"]
    prog, config = "t5jax train CONFIG", Config()
    known = ", ".join(_known_configs())
    if args and not args[0].startswith("-"):
        prog, config = f"t5jax train {args[0]}", _load_config(args[0])
        args = args[1:]
    elif "--help" not in args and "-h" not in args:
        raise ValueError(
            "train needs a CONFIG in front of its options: a Python file, a .json file that "
            f"--print-config wrote, or a name such as {known}"
        )
    description = (
        f"{inspect.cleandoc(_train.__doc__)}\n\n--print-config prints the whole config as JSON "
        "instead. CONFIG is a Python file, a .json file that --print-config wrote, or one of: "
        f"{known}. With CONFIG in front of --help, defaults are those of that config."
    )
    config = _parse(Config, args, prog=prog, description=description, default=config)
    if print_config:
        print(to_json(config), end="")
        return
    from t5jax.train import train

    train(config)


def _load_config(name_or_path: str):
    """Returns the config of a file; an error inside of it names the line."""
    from t5jax import shipped
    from t5jax.config import from_json, load_config

    if name_or_path.endswith(".json"):
        try:
            return from_json(Path(name_or_path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"config {name_or_path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{name_or_path}: {error}") from error

    path = str(shipped.find("configs", name_or_path))
    try:
        return load_config(name_or_path)
    except Exception as error:  # Whatever a user's Python may raise.
        frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            frames.append((error.filename, error.lineno))
        lines = [line for filename, line in frames if filename == path]
        where = f"{path}, line {lines[-1]}: " if lines else ""
        what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}{what}{getattr(error, 'msg', error)}") from error


def _known_configs() -> list[str]:
    from t5jax import shipped

    return list(shipped.list_files("configs"))


# --- eval ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Eval:
    """Measures a model on tasks: their own metrics beside two baselines, loss and perplexity."""

    model: str
    """Hub name, Hugging Face folder, run (its best checkpoint), or one checkpoint."""
    mixture: str = ""
    """SeqIO task or mixture. Empty: the one that the run was trained on."""
    split: str = "test"
    """Split to measure."""
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, beside ./tasks/*.py, the shipped ones and the run's."""
    batch_size: int = 64
    """Rows at a time."""
    num_examples: int | None = None
    """Examples of each task at most. None: all."""
    inputs_length: int | None = None
    """Tokens of an input; longer ones are cut. None: as in the run, or 512."""
    max_tokens: int | None = None
    """Tokens of a target, and to generate. None: as in the run, or 128."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What to compute in. None: as the model was trained."""
    mesh: MeshConfig = MeshConfig()
    """Devices to use."""
    num_samples: int = 0
    """Predictions to show for each task."""
    json: Path | None = None
    """File to write the scores to, beside the table."""


def _eval(args: list[str]) -> None:
    options = _parse(Eval, args, prog="t5jax eval", positional=True)
    from t5jax.evaluate import evaluate_model

    evaluate_model(**_fields(options))


# --- infer --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Infer:
    """Answers prompts, greedily. Answers go to standard output, everything else to standard error.

    Without --prompt, each line of standard input is a prompt, and each line of output an answer.
    """

    model: str
    """Hub name, Hugging Face folder, run (its best checkpoint), or one checkpoint."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    max_tokens: int = 64
    """Tokens of an answer, at most."""
    batch_size: int = 32
    """Prompts at a time."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What to compute in, and to hold parameters in. None: as the model was trained."""
    mesh: MeshConfig = MeshConfig()
    """Devices to use."""


def _infer(args: list[str]) -> None:
    options = _parse(Infer, args, prog="t5jax infer")
    for name in ("max_tokens", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; expected 1 or more"
            )
    if options.prompt:
        prompts = list(options.prompt)
    else:
        if sys.stdin.isatty():
            print("one prompt a line; Ctrl-D ends", file=sys.stderr)
        prompts = sys.stdin.read().splitlines()
    if not prompts:
        raise ValueError("there is no prompt; give --prompt TEXT, or lines on standard input")

    from t5jax.pretrained import load

    answers = load(options.model, dtype=options.dtype, mesh=options.mesh).generate(
        prompts, max_tokens=options.max_tokens, batch_size=options.batch_size
    )
    for answer in answers:
        print(answer if options.prompt else answer.replace("\n", " "))


# --- export and import --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a model as a Hugging Face folder: safetensors, config.json and the tokenizer."""

    model: str
    """Run (its best checkpoint), one checkpoint, hub name, or Hugging Face folder."""
    output: str
    """Folder to write."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the files."""
    max_shard_bytes: int = 5 * 10**9
    """Largest file of weights, in bytes; with more than one file an index is written."""
    overwrite: bool = False
    """Replace a model that is there."""


@dataclasses.dataclass(frozen=True)
class Import:
    """Makes a run's folder of a Hugging Face model, whose parameters other runs start from.

    Not needed for `--init.model`, which takes a hub name or a folder directly: it spares reading
    and converting a large model at every start.
    """

    model: str
    """Hub name, Hugging Face folder, run, or checkpoint."""
    output: str
    """Folder to write."""


def _export(args: list[str]) -> None:
    options = _parse(Export, args, prog="t5jax export", positional=True)
    from t5jax.pretrained import export_model

    export_model(**_fields(options))
    print(f"wrote {options.output}", file=sys.stderr)


def _import(args: list[str]) -> None:
    options = _parse(Import, args, prog="t5jax import", positional=True)
    from t5jax.pretrained import import_model

    import_model(**_fields(options))
    print(f"wrote {options.output}", file=sys.stderr)


def _fields(options) -> dict:
    """Returns a dataclass's fields as arguments, without copying what they hold."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": _train,
    "eval": _eval,
    "infer": _infer,
    "export": _export,
    "import": _import,
}

if __name__ == "__main__":
    sys.exit(main())
