"""Batches with which training went wrong, kept in the run's folder as text.

    run_dir/bad_batches/00000123.jsonl

The first line says what was wrong at which step; each further line is one example: its row and
segment, its number among the examples that the run reads, its texts and their ids.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5jax import distributed, storage
from t5jax.batch import (
    DECODER_LOSS_WEIGHTS,
    DECODER_SEGMENT_IDS,
    DECODER_TARGET_TOKENS,
    ENCODER_INPUT_TOKENS,
    ENCODER_LOSS_WEIGHTS,
    ENCODER_SEGMENT_IDS,
    ENCODER_TARGET_TOKENS,
    Batch,
)
from t5jax.tokenizers import Tokenizer
from t5jax.train.prefetch import Fetched

FOLDER = "bad_batches"


def keep(folder: Path, batch: Fetched, about: dict[str, Any], tokenizer: Tokenizer) -> Path:
    """Writes a batch; to be called in every process, of which the first one writes.

    Args:
      folder: of the run.
      batch: the batch.
      about: what was wrong, the first line.
      tokenizer: of the run.
    Returns:
      The file's path in the folder.
    """
    arrays, name = _on_host(batch.arrays), f"{batch.number:08d}.jsonl"
    if distributed.is_main():
        lines = [about, *examples(arrays, batch.taken.numbers, tokenizer)]
        content = "".join(storage.to_json(line) + "\n" for line in lines)
        storage.write_file(folder / FOLDER / name, content.encode("utf-8", "surrogatepass"))
    return Path(FOLDER, name)


def _on_host(arrays: dict[str, jax.Array]) -> Batch:
    """Returns the rows of all processes."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    from jax.experimental.multihost_utils import process_allgather

    return {name: np.asarray(process_allgather(x, tiled=True)) for name, x in arrays.items()}


def examples(
    batch: Batch, numbers: list[list[int]], tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """Yields the examples of a batch, row by row."""
    for row, found in enumerate(numbers):
        for segment, number in enumerate(found, 1):
            yield {"row": row, "segment": segment, "example": number} | _texts(
                {name: x[row] for name, x in batch.items()}, segment, tokenizer
            )


def _texts(row: dict[str, np.ndarray], segment: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the texts of one example of a row, with their ids."""
    parts: dict[str, np.ndarray] = {}
    if ENCODER_INPUT_TOKENS in row:
        tokens = row[ENCODER_INPUT_TOKENS]
        mask = row.get(ENCODER_SEGMENT_IDS)
        parts["inputs"] = tokens[tokens != tokenizer.pad_id if mask is None else mask == segment]
    if DECODER_TARGET_TOKENS in row:
        tokens, weights = row[DECODER_TARGET_TOKENS], row[DECODER_LOSS_WEIGHTS]
        mask = row.get(DECODER_SEGMENT_IDS)
        # Behind the last token with a loss there is padding, whatever its id is.
        own = np.arange(len(tokens)) <= np.max(np.flatnonzero(weights), initial=-1)
        own = own if mask is None else mask == segment
        if ENCODER_INPUT_TOKENS not in row and (own & (weights == 0)).any():
            parts["inputs"] = tokens[own & (weights == 0)]
            own = own & (weights > 0)
        parts["targets"] = tokens[own]
    if ENCODER_TARGET_TOKENS in row:
        weights, mask = row[ENCODER_LOSS_WEIGHTS], row.get(ENCODER_SEGMENT_IDS)
        own = weights > 0 if mask is None else (weights > 0) & (mask == segment)
        parts["targets"] = row[ENCODER_TARGET_TOKENS][own]
    found: dict[str, Any] = {}
    for name, tokens in parts.items():
        # The targets of a classifier are no tokens.
        if name == "inputs" or ENCODER_TARGET_TOKENS not in row:
            found[name] = _decode(tokens.tolist(), tokenizer)
    ids = {f"{name.removesuffix('s')}_ids": tokens.tolist() for name, tokens in parts.items()}
    return found | ids


def _decode(ids: list[int], tokenizer: Tokenizer) -> str:
    known = [i for i in ids if 0 <= i < tokenizer.vocab_size]
    return tokenizer.decode(known)
