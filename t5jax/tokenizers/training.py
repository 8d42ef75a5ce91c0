"""Trains SentencePiece vocabularies, and measures how a vocabulary tokenizes texts."""

import dataclasses
import hashlib
import io
import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import sentencepiece

from t5jax.storage import cache_dir, write_file
from t5jax.tokenizers.common import Tokenizer

T = TypeVar("T")


def train_sentencepiece(
    lines: Iterable[str],
    vocab_size: int,
    path: str | Path | None = None,
    *,
    model_type: str = "unigram",
) -> Path:
    """Trains a SentencePiece model like T5's: pad 0, eos 1, unk 2, no bos, digits split.

    The result is deterministic.

    Args:
      lines: the texts to train on; held in memory.
      vocab_size: the number of pieces, including special ones; sentinels are added when the model
        is loaded.
      path: the .model file to write. None: a file in `cache_dir()` named by a hash of the lines
        and settings, which is reused if it exists.
      model_type: "unigram", as for T5, "bpe", "char" or "word".
    Returns:
      The path of the .model file.
    Raises:
      ValueError: if a vocabulary of this size cannot be trained on the lines.
    """
    lines = list(lines)
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "model_type": model_type,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "split_digits": True,
        "character_coverage": 1.0,
        # SentencePiece takes nothing below 10.
        "max_sentence_length": max([9, *(len(line.encode()) for line in lines)]) + 1,
    }
    if path is None:
        key = json.dumps([sentencepiece.__version__, settings, lines]).encode()
        path = cache_dir() / "vocabularies" / f"{hashlib.sha256(key).hexdigest()[:16]}.model"
        if path.is_file():
            return path
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **settings
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"cannot train a SentencePiece vocabulary of {vocab_size} pieces on {len(lines)} "
            f"lines: {_reason(str(error))}"
        ) from None
    return write_file(Path(path), model.getvalue())


def _reason(error: str) -> str:
    """Returns what SentencePiece says, where it is a common case, without its own options."""
    if most := re.search(r"too high .* <= (\d+)", error):
        return (
            f"they have no more than {most[1]}; set that size or a smaller one, or give more text"
        )
    if least := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return (
            f"their characters and the special pieces are {least[1]} already; set a size from there"
        )
    if any(
        what in error for what in ("sentences_.empty", "all_chars_count", "required_chars_.empty")
    ):
        return "there is no text in them"
    return error


def sample(items: Iterable[T], size: int) -> list[T]:
    """Returns the items, or a random but deterministic sample of `size` of them.

    All items are equally likely (reservoir sampling), and no more are held in memory.
    """
    rng, chosen = random.Random(0), []
    for number, item in enumerate(items):
        if number < size:
            chosen.append(item)
        elif (place := rng.randrange(number + 1)) < size:
            chosen[place] = item
    return chosen


@dataclasses.dataclass(frozen=True)
class Measure:
    """How a vocabulary tokenizes texts."""

    characters_per_token: float
    unknown: float
    """Fraction of tokens that are unknown."""
    unchanged: float
    """Fraction of texts that are the same after encoding and decoding."""


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Measure:
    """Measures how a vocabulary tokenizes texts, of which there must be at least one."""
    ids = [tokenizer.encode(text) for text in texts]
    num_tokens = max(sum(map(len, ids)), 1)
    same = sum(tokenizer.decode(row) == text for row, text in zip(ids, texts, strict=True))
    return Measure(
        characters_per_token=sum(map(len, texts)) / num_tokens,
        unknown=sum(row.count(tokenizer.unk_id) for row in ids) / num_tokens,
        unchanged=same / len(texts),
    )
