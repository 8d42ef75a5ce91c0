"""`t5jax eval`, `infer`, `embed`, `export` and `import`: what takes a model."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal

from t5jax.commands.parse import check_options, fields, model_first, parse
from t5jax.config import MeshConfig

# --- eval ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Eval:
    """Measures a model on tasks: their own metrics beside two baselines, loss and perplexity."""

    model: str
    """Hub name, Hugging Face folder, run (its best checkpoint), or one checkpoint; or --model
    MODEL."""
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
    options = parse(Eval, model_first(args), prog="t5jax eval", positional=True)
    from t5jax.evaluate import evaluate_model

    evaluate_model(**fields(options))


# --- infer --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Infer:
    """Answers prompts, greedily. Answers go to standard output, everything else to standard error.

    Without --prompt, each line of standard input is a prompt, and each line of output an answer.
    """

    model: str
    """Hub name, Hugging Face folder, run (its best checkpoint), or one checkpoint; or --model
    MODEL."""
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
    options = parse(Infer, model_first(args), prog="t5jax infer", positional=True)
    check_options(options, 1, "max_tokens", "batch_size")
    prompts = _given_or_lines(options.prompt, "prompt")

    from t5jax.pretrained import load

    answers = load(options.model, dtype=options.dtype, mesh=options.mesh).generate(
        prompts, max_tokens=options.max_tokens, batch_size=options.batch_size
    )
    for answer in answers:
        print(answer if options.prompt else answer.replace("\n", " "))


def _given_or_lines(given: tuple[str, ...], what: str) -> list[str]:
    """Returns the texts of an option, or where it has none, the lines of standard input."""
    if given:
        return list(given)
    if sys.stdin.isatty():
        print(f"one {what} a line; Ctrl-D ends", file=sys.stderr)
    lines = sys.stdin.read().splitlines()
    if not lines:
        raise ValueError(f"there is no {what}; give --{what} TEXT, or lines on standard input")
    return lines


# --- embed --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Embed:
    """Gives each text a vector: BERT's, or that of a T5's encoder.

    Without --text, each line of standard input is a text. Vectors go to standard output, each a
    line that is a JSON list of numbers, or all of them to a file.
    """

    model: str
    """Hub name, Hugging Face folder, run (its best checkpoint), or one checkpoint; or --model
    MODEL."""
    text: tuple[str, ...] = ()
    """One or more texts."""
    output: Path | None = None
    """A .npy file to write, float32 [texts, d_model], instead of standard output."""
    pooling: Literal["mean", "first", "max", "pooler"] = "mean"
    """mean or max over a text's tokens, the special ones among them; first: the first token's
    vector; pooler: BERT's layer over it, where its head has one."""
    max_length: int | None = None
    """Tokens of a text, at most; longer ones are cut. None: nothing is cut."""
    batch_size: int = 32
    """Texts at a time."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What to compute in, and to hold parameters in. None: as the model was trained."""
    mesh: MeshConfig = MeshConfig()
    """Devices to use."""


def embed(args: list[str]) -> None:
    options = parse(Embed, model_first(args), prog="t5jax embed", positional=True)
    check_options(options, 1, "batch_size")
    output = options.output
    if output and (output.suffix != ".npy" or not output.parent.is_dir()):
        raise ValueError(
            f"--output {output}: expected a file that ends in .npy, in a folder that exists"
        )
    texts = _given_or_lines(options.text, "text")

    import numpy as np

    from t5jax.pretrained import load

    vectors = load(options.model, dtype=options.dtype, mesh=options.mesh).embed(
        texts,
        pooling=options.pooling,
        max_length=options.max_length,
        batch_size=options.batch_size,
    )
    if output:
        np.save(output, vectors)
        print(f"wrote {output}: {len(vectors)} x {vectors.shape[1]}", file=sys.stderr)
        return
    for vector in vectors:
        # By way of text: as few digits as tell a float32.
        print(json.dumps([float(str(x)) for x in vector]))


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
    encoder_only: bool = False
    """Write the encoder of a T5 model alone, as transformers' T5EncoderModel reads it."""


@dataclasses.dataclass(frozen=True)
class Import:
    """Makes a run's folder of a Hugging Face model or of a T5X checkpoint.

    Other runs start from its parameters; with --loss-tokens, `t5jax train` also goes on where T5X
    stood. A Hugging Face model need not be imported, since `--init.model` takes it directly:
    importing spares reading and converting a large one at every start.
    """

    model: str
    """Hub name, Hugging Face folder, run, checkpoint; or T5X's checkpoint_STEP."""
    output: str
    """Folder to write."""
    vocabulary: str = ""
    """T5X: what it was trained with, as its checkpoints have no tokenizer: a SentencePiece .model
    file, "bytes", or a folder or hub name with a tokenizer."""
    mlp_activation: Literal["relu", "gated-gelu", "gated-silu"] | None = None
    """T5X: of the MLP. None: that of the published sizes with the same shapes."""
    loss_tokens: float | None = None
    """T5X: go on with its Adafactor, whose statistics are of a loss summed over so many target
    tokens: those of a batch, where LOSS_NORMALIZING_FACTOR is None (BATCH_SIZE times the targets'
    length, if packed); 1, where it is NUM_REAL_TARGET_TOKENS. None: parameters alone."""
    mesh: MeshConfig = MeshConfig()
    """Devices to split the state over on its way."""


def export(args: list[str]) -> None:
    options = parse(Export, args, prog="t5jax export", positional=True)
    from t5jax.convert import export_model

    export_model(**fields(options))
    print(f"wrote {options.output}", file=sys.stderr)


def import_(args: list[str]) -> None:
    options = parse(Import, args, prog="t5jax import", positional=True)
    from t5jax.convert import import_model
    from t5jax.t5x.importing import import_t5x, is_t5x

    if is_t5x(options.model):
        for line in import_t5x(**fields(options)):
            print(line, file=sys.stderr)
    else:
        for name in ("vocabulary", "mlp_activation", "loss_tokens"):
            if getattr(options, name) not in (None, ""):
                raise ValueError(
                    f"--{name.replace('_', '-')} is for T5X checkpoints; {options.model} says "
                    "itself what it is"
                )
        import_model(options.model, options.output, mesh=options.mesh)
    print(f"wrote {options.output}", file=sys.stderr)
