"""`t5jax eval`, `embed`, `export` and `import`, commands that take a model."""

import dataclasses
import io
import sys
from pathlib import Path
from typing import Literal

from t5jax import storage
from t5jax.commands.parse import check_options, fields, model_first, parse
from t5jax.config import MeshConfig
from t5jax.storage import split_lines, to_json

# --- eval ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluates a model on tasks: loss, perplexity and the tasks' metrics, beside baselines.

    With --output, every prediction is kept, and an evaluation that was stopped goes on.
    """

    model: str
    """Hub name, Hugging Face folder, run (its best checkpoint), or one checkpoint; or --model
    MODEL."""
    tasks: tuple[str, ...] = ()
    """Tasks, variants and mixtures; "numbers_*" is every task of such a name. Empty: the one that
    the run was trained on."""
    split: str = "test"
    """Split to evaluate on."""
    shots: int = 0
    """Solved training examples before each prompt."""
    metrics: tuple[str, ...] = ()
    """Metrics in addition to those of the tasks, such as f1_macro, bleu or word_perplexity."""
    choices: tuple[str, ...] = ()
    """Answers to rank by their probability (rank_accuracy), in place of those of the tasks'
    templates."""
    baseline: tuple[str, ...] = ("majority", "copy")
    """What to compare with: majority (the most frequent target), copy (of the input), other models,
    folders that --output wrote, or files of scores that --json wrote."""
    resamples: int = 1000
    """Bootstrap resamples for intervals and verdicts; 0: none."""
    seed: int = 0
    """Seed of the resamples."""
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, in addition to ./tasks/*.py, the shipped ones and the
    run's."""
    batch_size: int = 64
    """Rows per batch."""
    num_examples: int | None = None
    """Maximum number of examples of each task, drawn from all of them. None: all."""
    inputs_length: int | None = None
    """Maximum length of inputs in tokens; longer ones are truncated. None: as in the run, or
    512."""
    max_tokens: int | None = None
    """Maximum length of targets and answers in tokens. None: as in the run, or 128."""
    base: str = ""
    """Of an adapter: where its base is now. Empty: where the adapter says."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of computation. None: as in training."""
    mesh: MeshConfig = MeshConfig()
    """Devices to use."""
    num_samples: int = 0
    """Number of predictions to show for each task."""
    output: Path | None = None
    """A folder for predictions (one JSON line an example), scores and a page that shows them; the
    same command goes on there."""
    json: Path | None = None
    """A file for the scores, in addition to the table."""
    html: Path | None = None
    """A file for the page of scores and examples side by side, in addition to the table."""


def evaluate(args: list[str]) -> None:
    options = parse(Eval, model_first(args), prog="t5jax eval", positional=True)
    from t5jax import distributed
    from t5jax.compilation import keep_programs
    from t5jax.evaluation import evaluate_model
    from t5jax.source import find

    distributed.start()
    keep_programs()
    given = fields(options)
    if base := given.pop("base"):
        given["model"] = find(options.model, base=base)
    evaluate_model(**given)


# --- embed --------------------------------------------------------------------------------------


def _given_or_lines(given: tuple[str, ...], what: str) -> list[str]:
    """Returns the texts of an option, or without it, the lines of standard input."""
    if given:
        return list(given)
    if sys.stdin.isatty():
        print(f"one {what} a line; Ctrl-D ends", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(newline="\n")  # Otherwise a lone \r ends a line as well.
    lines = split_lines(sys.stdin.read())
    if not lines:
        raise ValueError(f"there is no {what}; give --{what} TEXT, or lines on standard input")
    return lines


@dataclasses.dataclass(frozen=True)
class Embed:
    """Computes embeddings of texts, with BERT or the encoder of a T5.

    Without --text, each line of standard input is a text. Embeddings go to standard output, one
    JSON list of numbers per line, or to a file.
    """

    model: str
    """Hub name, Hugging Face folder, run (its best checkpoint), or one checkpoint; or --model
    MODEL."""
    text: tuple[str, ...] = ()
    """One or more texts."""
    output: Path | None = None
    """A .npy file to write, float32 [texts, d_model], instead of standard output."""
    pooling: Literal["mean", "first", "max", "pooler"] = "mean"
    """mean or max over a text's tokens including special ones; first: the vector of the first
    token;
    pooler: BERT's layer over it, if its head has one."""
    max_length: int | None = None
    """Maximum length of a text in tokens; longer ones are truncated. None: no limit."""
    base: str = ""
    """Of an adapter: where its base is now. Empty: where the adapter says."""
    batch_size: int = 32
    """Texts per batch."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of computation and parameters. None: as in training."""
    mesh: MeshConfig = MeshConfig()
    """Devices to use."""


def embed(args: list[str]) -> None:
    options = parse(Embed, model_first(args), prog="t5jax embed", positional=True)
    check_options(options, 1, "batch_size")
    output = options.output and storage.path(options.output, "--output")
    is_there = output and (storage.is_remote(output) or output.parent.is_dir())
    if output and (output.suffix != ".npy" or not is_there):
        raise ValueError(
            f"--output {output}: expected a file that ends in .npy, in a folder that exists"
        )
    texts = _given_or_lines(options.text, "text")

    import numpy as np

    from t5jax.compilation import keep_programs
    from t5jax.pretrained import load

    keep_programs()
    model = load(options.model, dtype=options.dtype, mesh=options.mesh, base=options.base)
    vectors = model.embed(
        texts,
        pooling=options.pooling,
        max_length=options.max_length,
        batch_size=options.batch_size,
    )
    if output:
        with storage.staged(output) as place:
            np.save(place.path, vectors)
        print(f"wrote {output}: {len(vectors)} x {vectors.shape[1]}", file=sys.stderr)
        return
    for vector in vectors:
        # Formatted as text, with as few digits as a float32 needs.
        print(to_json([float(str(x)) for x in vector]))


# --- export and import --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a model as a Hugging Face folder: safetensors, config.json and the tokenizer; or for
    CTranslate2. An adapter is written alone, for PEFT, or merged."""

    model: str
    """Run (its best checkpoint), one checkpoint, hub name, or Hugging Face folder."""
    output: str
    """Folder to write."""
    base: str = ""
    """Of an adapter: where its base is now. Empty: where the adapter says."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights in the files."""
    max_shard_bytes: int = 5 * 10**9
    """Largest size of a file of weights in bytes; several files get an index."""
    overwrite: bool = False
    """Replace an existing model."""
    encoder_only: bool = False
    """Only write the encoder of a T5, as for transformers' T5EncoderModel."""
    format: Literal["huggingface", "ctranslate2", "peft"] | None = None
    """What is to read the folder. None: peft for a model with an adapter, which is written alone,
    otherwise huggingface. CTranslate2's own converter scales the logits of T5 1.1, mT5 and
    UMT5 wrongly under transformers 5."""
    merge: bool = False
    """Write the whole model, with its adapter merged."""
    quantization: (
        Literal["int8", "int8_float32", "int8_bfloat16", "int16", "float16", "bfloat16"] | None
    ) = None
    """For CTranslate2: type of its weights. None: --dtype."""
    dequantize: bool = False
    """Of a model that `t5jax compress` wrote: write the floats that its matrices stand for."""


@dataclasses.dataclass(frozen=True)
class Import:
    """Imports a Hugging Face model or a T5X checkpoint as a run.

    Other runs can start from its parameters; with --loss-tokens, `t5jax train` can also continue a
    T5X run. Importing a Hugging Face model is optional, since `--init.model` accepts it directly;
    it saves the conversion of a large model at every start.
    """

    model: str
    """Hub name, Hugging Face folder, run, checkpoint; or T5X's checkpoint_STEP."""
    output: str
    """Folder to write."""
    vocabulary: str = ""
    """T5X: the tokenizer, which its checkpoints do not contain: a SentencePiece .model file,
    "bytes", or a folder or Hub name with a tokenizer."""
    mlp_activation: Literal["relu", "gated-gelu", "gated-silu"] | None = None
    """T5X: the activation of the MLP. None: what a config.gin beside the checkpoint says, or else
    that of a published size with the same shapes."""
    base: str = ""
    """Of an adapter: where its base is now. Empty: where the adapter says."""
    loss_tokens: float | None = None
    """T5X: continue with its Adafactor state, for a loss summed over this many target tokens: those
    of a batch if LOSS_NORMALIZING_FACTOR is None (BATCH_SIZE times the targets' length, if packed);
    1 if it is NUM_REAL_TARGET_TOKENS. None: only parameters."""
    mesh: MeshConfig = MeshConfig()
    """Devices over which the state is sharded meanwhile."""


def export(args: list[str]) -> None:
    options = parse(Export, args, prog="t5jax export", positional=True)
    from t5jax.convert import export_model
    from t5jax.source import AdaptedSource, find

    given = fields(options)
    source = given["model"] = find(options.model, base=given.pop("base"))
    export_model(**given)
    if options.merge and options.dtype != "float32" and isinstance(source, AdaptedSource):
        print(source.merge_error(options.dtype), file=sys.stderr)
    print(f"wrote {options.output}", file=sys.stderr)


def import_(args: list[str]) -> None:
    options = parse(Import, args, prog="t5jax import", positional=True)
    from t5jax.convert import import_model
    from t5jax.source import find
    from t5jax.t5x.importing import import_t5x, is_t5x

    if is_t5x(options.model):
        if options.base:
            raise ValueError(
                f"--base {options.base} is of an adapter, and {options.model} is a T5X "
                "checkpoint; leave it out"
            )
        given = fields(options)
        del given["base"]
        for line in import_t5x(**given):
            print(line, file=sys.stderr)
    else:
        for name in ("vocabulary", "mlp_activation", "loss_tokens"):
            if getattr(options, name) not in (None, ""):
                raise ValueError(
                    f"--{name.replace('_', '-')} is for T5X checkpoints; {options.model} says "
                    "itself what it is"
                )
        source = find(options.model, base=options.base)
        import_model(source, options.output, mesh=options.mesh)
    print(f"wrote {options.output}", file=sys.stderr)
