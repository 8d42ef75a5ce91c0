"""`t5jax prune` and `t5jax trim-vocabulary`: smaller models."""

import dataclasses
import sys
from typing import Any, Literal

from t5jax.commands.parse import check_options, check_used, fields, parse


@dataclasses.dataclass(frozen=True)
class Report:
    """What is said of the result."""

    tasks: tuple[str, ...] = ()
    """Tasks on which the result is compared with the original, each score with an interval."""
    split: str = "test"
    """Split of the tasks."""
    num_examples: int | None = None
    """Maximum number of examples of each task. None: all."""
    batch_size: int = 64
    """Rows per batch."""
    inputs_length: int | None = None
    """Maximum length of inputs in tokens; longer ones are truncated. None: as in the run, or
    512."""
    max_tokens: int | None = None
    """Maximum length of targets and answers in tokens. None: as in the run, or 128."""


@dataclasses.dataclass(frozen=True)
class Prune:
    """Writes a model with fewer weights, as a Hugging Face folder.

    Single weights that are 0 take as long to compute with as others here; 2:4 is what some GPUs
    compute faster. Without heads or MLP columns, a model is smaller and faster everywhere. To prune
    in steps while training, see `t5jax train --help`, --prune.
    """

    model: str
    """Hub name, Hugging Face folder, run (its best checkpoint), or one checkpoint."""
    output: str
    """Folder to write."""
    base: str = ""
    """Of an adapter: where its base is now. Empty: where the adapter says."""
    sparsity: float = 0.5
    """Share to remove: of the weights, heads or MLP columns."""
    pattern: Literal["unstructured", "2:4", "heads", "mlp"] = "unstructured"
    """unstructured: single weights of the smallest magnitude. 2:4: the two smallest of every four
    inputs. heads: whole attention heads. mlp: columns of the MLP."""
    scope: Literal["layer", "global"] | None = None
    """unstructured: the same share of each layer's matrix, or of all weights together. None:
    layer."""
    keep: tuple[str, ...] = ()
    """Matrices to leave as they are: patterns of their paths, such as */wo/kernel."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights in the files."""
    overwrite: bool = False
    """Replace an existing model."""
    eval: Report = Report()
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, in addition to ./tasks/*.py and the shipped ones."""


@dataclasses.dataclass(frozen=True)
class TrimVocabulary:
    """Writes a model with only those pieces of its vocabulary that texts need.

    Special tokens, bytes and sentinels stay; embeddings and output matrix lose the rows of what is
    gone. A text of pieces that are kept is split as before and has the same logits.
    """

    model: str
    """Hub name, Hugging Face folder, run (its best checkpoint), or one checkpoint."""
    output: str
    """Folder to write."""
    base: str = ""
    """Of an adapter: where its base is now. Empty: where the adapter says."""
    tasks: tuple[str, ...] = ()
    """Tasks, variants and mixtures, whose examples of all splits are read."""
    text: tuple[str, ...] = ()
    """Text files: paths and globs, compressed or not."""
    min_count: int = 1
    """How often a piece occurs at least, to be kept; single characters are kept in any case."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights in the files."""
    overwrite: bool = False
    """Replace an existing model."""
    eval: Report = Report()
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, in addition to ./tasks/*.py and the shipped ones."""


def prune(args: list[str]) -> None:
    options = parse(Prune, args, prog="t5jax prune", positional=True)
    given = _arguments(options)
    from t5jax.prune.prune import prune_model

    del given["task_files"]
    _say(prune_model(**given), options)


def trim_vocabulary(args: list[str]) -> None:
    options = parse(TrimVocabulary, args, prog="t5jax trim-vocabulary", positional=True)
    check_options(options, 1, "min_count")
    given = _arguments(options)
    from t5jax.prune.trim import trim_model

    _say(trim_model(**given), options)


def _arguments(options: Any) -> dict[str, Any]:
    """Returns the arguments of what makes the model, once it is known that it can be reported."""
    numbers = ("num_examples", "batch_size", "inputs_length", "max_tokens")
    check_used(options.eval, "tasks", "split", *numbers, section="eval.")
    check_options(options.eval, 1, *numbers, section="eval.")
    from t5jax import tradeoff
    from t5jax.source import find

    given = fields(options)
    del given["eval"]
    given["model"] = find(options.model, base=given.pop("base"))
    tradeoff.check(given["model"], task_files=options.task_files, **fields(options.eval))
    return given


def _say(done: str, options: Any) -> None:
    from t5jax import tradeoff

    print(f"{options.output}: {done}")
    found = tradeoff.measure(
        options.model,
        options.output,
        base=options.base,
        task_files=options.task_files,
        **fields(options.eval),
    )
    for line in found.lines():
        print(line)
    print(f"wrote {options.output}", file=sys.stderr)
