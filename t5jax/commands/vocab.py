"""`t5jax vocab train`: a SentencePiece vocabulary of one's own."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from t5jax.commands.parse import check_options, parse, run_group

USAGE = """\
usage: t5jax vocab COMMAND ...

commands:
  train TASK|FILES... --output FILE   learn a SentencePiece vocabulary from a task or text files
"""


def vocab(args: list[str]) -> int | None:
    """Runs one of the commands on vocabularies."""
    return run_group(args, USAGE, "vocab", {"train": train})


@dataclasses.dataclass(frozen=True)
class Train:
    """Learns a SentencePiece vocabulary as T5's is: pad 0, eos 1, unk 2, digits one by one.

    From one task or variant, its texts as the model sees them, or from text files: paths and globs,
    compressed or not, local or gs://. The same texts give the same vocabulary. The sentinels of
    span corruption come on top when it is used: `--data.vocabulary x.model`.
    """

    texts: tuple[str, ...]
    """A task, or files of text."""
    output: Path = Path("vocabulary.model")
    """The .model file to write."""
    size: int = 32_000
    """Pieces, special ones among them."""
    type: Literal["unigram", "bpe"] = "unigram"
    """How pieces are found; unigram is T5's."""
    split: str = "train"
    """Split of the task."""
    max_lines: int = 1_000_000
    """Lines to learn from, drawn at random where there are more; held in memory."""
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, beside ./tasks/*.py and the shipped ones."""


def train(args: list[str]) -> None:
    """Trains a vocabulary, checks it and says what it does."""
    options = parse(Train, args, prog="t5jax vocab train", positional=True)
    if options.output.suffix != ".model":
        raise ValueError(f"--output is {options.output}; expected a file ending in .model")
    check_options(options, 1, "size", "max_lines")
    from t5jax.data.registry import load_tasks
    from t5jax.data.texts import read_lines
    from t5jax.tokenizers import load_tokenizer
    from t5jax.tokenizers.training import measure, sample, train_sentencepiece

    load_tasks(options.task_files)
    lines = sample(read_lines(options.texts, options.split), options.max_lines)
    path = train_sentencepiece(lines, options.size, options.output, model_type=options.type)
    tokenizer = load_tokenizer(path)
    score = measure(tokenizer, lines[:10_000])
    print(f"{tokenizer}, learned from {len(lines):,} lines")
    print(f"{score.characters_per_token:.2f} characters a token")
    print(f"{score.unknown:.3%} of tokens are unknown")
    print(f"{score.unchanged:.2%} of lines come back as they were, before NFKC and single spaces")
    print(f"wrote {path}; use it with --data.vocabulary {path}", file=sys.stderr)
