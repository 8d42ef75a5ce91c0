"""`t5jax vocab train`: trains a SentencePiece vocabulary."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from t5jax import storage
from t5jax.commands.parse import check_options, parse, run_group

USAGE = """\
usage: t5jax vocab COMMAND ...

commands:
  train TASK|FILES... --output FILE   train a SentencePiece vocabulary on a task or text files
"""


def vocab(args: list[str]) -> int | None:
    """Runs one of the commands on vocabularies."""
    return run_group(args, USAGE, "vocab", {"train": train})


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains a SentencePiece vocabulary like T5's: pad 0, eos 1, unk 2, digits split.

    It is trained on one task or variant, with its texts as the model sees them, or on text files:
    paths and globs, compressed or not, local or gs://. The result is deterministic. The sentinels
    of span corruption are added when it is used: `--data.vocabulary x.model`.
    """

    texts: tuple[str, ...]
    """A task, or text files."""
    output: Path = Path("vocabulary.model")
    """The .model file to write."""
    size: int = 32_000
    """Number of pieces, including special ones."""
    type: Literal["unigram", "bpe"] = "unigram"
    """The algorithm; T5 uses unigram."""
    split: str = "train"
    """The split of the task."""
    max_lines: int = 1_000_000
    """Maximum number of lines to train on, sampled at random; held in memory."""
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, in addition to ./tasks/*.py and the shipped ones."""


def train(args: list[str]) -> None:
    """Trains a vocabulary and reports how it tokenizes."""
    options = parse(Train, args, prog="t5jax vocab train", positional=True)
    output = storage.path(options.output, "--output")
    if options.output.suffix != ".model":
        raise ValueError(f"--output is {options.output}; expected a file ending in .model")
    check_options(options, 1, "size", "max_lines")
    from t5jax.data.registry import load_tasks
    from t5jax.data.texts import read_lines
    from t5jax.tokenizers import load_tokenizer
    from t5jax.tokenizers.training import measure, sample, train_sentencepiece

    load_tasks(options.task_files)
    lines = sample(read_lines(options.texts, options.split), options.max_lines)
    with storage.staged(output) as place:
        path = train_sentencepiece(lines, options.size, place.path, model_type=options.type)
        tokenizer = load_tokenizer(path)
    score = measure(tokenizer, sample(lines, 10_000))
    print(f"{tokenizer}, trained on {len(lines):,} lines")
    print(f"{score.characters_per_token:.2f} characters per token")
    print(f"{score.unknown:.3%} of tokens are unknown")
    print(f"{score.unchanged:.2%} of lines are restored exactly, up to NFKC and white space")
    print(f"wrote {output}; use it with --data.vocabulary {output}", file=sys.stderr)
