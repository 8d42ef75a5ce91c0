"""Trains SentencePiece vocabularies, and measures what a vocabulary does to texts."""

import dataclasses
import hashlib
import io
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from t5jax.storage import cache_dir, write_file
from t5jax.tokenizers.common import Tokenizer


def train_sentencepiece(
    lines: Iterable[str],
    vocab_size: int,
    path: str | Path | None = None,
    *,
    model_type: str = "unigram",
) -> Path:
    """Trains a SentencePiece model as T5's are: pad 0, eos 1, unk 2, no bos, digits one by one.

    The same lines and settings give the same model.

    Args:
      lines: texts to learn from; held in memory.
      vocab_size: pieces, special ones among them. The sentinels come on top when it is loaded.
      path: the .model file to write. None: a file in `cache_dir()` named by a hash of the lines
        and settings; where it exists, nothing is trained.
      model_type: "unigram", as T5's, "bpe", "char" or "word".
    Returns:
      The path of the .model file.
    Raises:
      ValueError: where the lines do not give a vocabulary of this size.
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
        "max_sentence_length": max((len(line.encode()) for line in lines), default=0) + 1,
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
            f"lines: {error}"
        ) from None
    return write_file(Path(path), model.getvalue())


def sample(lines: Iterable[str], size: int) -> list[str]:
    """Returns the lines, or where there are more, `size` of them drawn at random, always the same.

    Every line is as likely as any other (reservoir sampling), and no more are held in memory.
    """
    rng, chosen = random.Random(0), []
    for number, line in enumerate(lines):
        if number < size:
            chosen.append(line)
        elif (place := rng.randrange(number + 1)) < size:
            chosen[place] = line
    return chosen


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a vocabulary does to texts."""

    characters_per_token: float
    unknown: float
    """Share of tokens that stand for what the vocabulary lacks."""
    unchanged: float
    """Share of texts that are the same after encoding and decoding."""


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Measure:
    """Returns what a vocabulary does to texts, of which there is at least one."""
    ids = [tokenizer.encode(text) for text in texts]
    num_tokens = max(sum(map(len, ids)), 1)
    same = sum(tokenizer.decode(row) == text for row, text in zip(ids, texts, strict=True))
    return Measure(
        characters_per_token=sum(map(len, texts)) / num_tokens,
        unknown=sum(row.count(tokenizer.unk_id) for row in ids) / num_tokens,
        unchanged=same / len(texts),
    )
