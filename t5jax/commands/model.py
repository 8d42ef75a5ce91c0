"""`t5jax eval`, `infer`, `export` and `import`: what takes a model."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from t5jax.commands.parse import fields, parse
from t5jax.config import MeshConfig

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


def evaluate(args: list[str]) -> None:
    options = parse(Eval, args, prog="t5jax eval", positional=True)
    from t5jax.evaluate import evaluate_model

    evaluate_model(**fields(options))


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


def infer(args: list[str]) -> None:
    options = parse(Infer, args, prog="t5jax infer")
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


def export(args: list[str]) -> None:
    options = parse(Export, args, prog="t5jax export", positional=True)
    from t5jax.pretrained import export_model

    export_model(**fields(options))
    print(f"wrote {options.output}", file=sys.stderr)


def import_(args: list[str]) -> None:
    options = parse(Import, args, prog="t5jax import", positional=True)
    from t5jax.pretrained import import_model

    import_model(**fields(options))
    print(f"wrote {options.output}", file=sys.stderr)
