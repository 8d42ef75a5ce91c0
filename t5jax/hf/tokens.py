"""The special tokens in a decoder-only model's config.json.

Our decoder_start_token_id is their bos_token_id, or if there is none, the id that ends a text.
Theirs may have no id of padding: here padding is recognized by segment ids, so eos is used for it,
as in transformers.
"""

import warnings
from typing import Any

from t5jax.architectures import GPTConfig

KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_token_ids(
    raw: dict[str, Any],
    *,
    bos: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
) -> dict[str, Any]:
    """Returns the fields of `GPTConfig` that are token ids.

    Args:
      raw: config.json.
      bos: the default of bos_token_id in transformers; None for none.
      eos: likewise.
      pad: likewise.
    Raises:
      ValueError: if a value is not an id, or not a list of ids that end a text.
    """
    # A smaller vocabulary does not have the defaults of the published one.
    rows = raw.get("vocab_size")
    bos, eos, pad = (
        raw.get(key, None if type(rows) is int and default and default >= rows else default)
        for key, default in zip(KEYS, (bos, eos, pad), strict=True)
    )
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    ids = [i for i in (bos, pad) if i is not None]
    for key, found in (("eos_token_id", ends), ("bos_token_id and pad_token_id", ids)):
        if any(type(i) is not int for i in found):
            raise ValueError(f"config.json: {key} is {found}; expected whole numbers")
    if not ends:
        warnings.warn(
            "config.json names no eos_token_id; 0 is taken, and may end a text too early: set it "
            "there, or add the model's tokenizer",
            stacklevel=3,
        )
        ends = [0]
    return {
        "decoder_start_token_id": ends[0] if bos is None else bos,
        "eos_token_id": ends[0],
        "more_eos_token_ids": tuple(ends[1:]),
        "pad_token_id": ends[0] if pad is None or pad < 0 else pad,
    }


def write_token_ids(config: GPTConfig) -> dict[str, Any]:
    """Returns the keys of config.json."""
    ends = list(config.end_token_ids)
    return {
        "bos_token_id": config.decoder_start_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        # torch does not train the embedding of the padding id.
        "pad_token_id": None if config.pad_token_id == ends[0] else config.pad_token_id,
    }
