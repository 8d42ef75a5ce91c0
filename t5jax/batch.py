"""Batch features: one vocabulary of names from the data to the loss (SeqIO's standard names).

A batch is a dict of int32 arrays [B, S] or [B, T]; loss weights are float32. Packed rows hold
several examples; segment ids number them from 1, and 0 is padding. Positions count from 0 in each.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from t5jax.config import Config

ENCODER_INPUT_TOKENS = "encoder_input_tokens"
ENCODER_TARGET_TOKENS = "encoder_target_tokens"
ENCODER_LOSS_WEIGHTS = "encoder_loss_weights"
ENCODER_SEGMENT_IDS = "encoder_segment_ids"
ENCODER_POSITIONS = "encoder_positions"
DECODER_INPUT_TOKENS = "decoder_input_tokens"
DECODER_TARGET_TOKENS = "decoder_target_tokens"
DECODER_LOSS_WEIGHTS = "decoder_loss_weights"
DECODER_CAUSAL_ATTENTION = "decoder_causal_attention"
DECODER_SEGMENT_IDS = "decoder_segment_ids"
DECODER_POSITIONS = "decoder_positions"

Batch = dict[str, np.ndarray]

Kind = Literal["encoder_decoder", "decoder", "prefix_lm", "encoder"]


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Shape of a batch: rows, tokens of each side, packed or not, and for which kind of model."""

    batch_size: int
    inputs_length: int
    targets_length: int
    pack: bool = False
    kind: Kind = "encoder_decoder"
    """decoder: targets alone, each token predicted from those before it. prefix_lm: a decoder whose
    rows hold inputs and targets, inputs_length + targets_length tokens; the loss is that of the
    targets. encoder: rows of inputs_length, targets where their inputs stand."""

    def features(self) -> dict[str, tuple[tuple[int, int], np.dtype]]:
        """Returns the shape and dtype of every feature."""
        source, target = self.inputs_length, self.targets_length
        if self.kind == "encoder":
            lengths = dict.fromkeys((ENCODER_INPUT_TOKENS, ENCODER_TARGET_TOKENS), source)
            weights = {ENCODER_LOSS_WEIGHTS: source}
            packed = dict.fromkeys((ENCODER_SEGMENT_IDS, ENCODER_POSITIONS), source)
        else:
            if self.kind == "prefix_lm":
                target += source
            lengths = dict.fromkeys((DECODER_INPUT_TOKENS, DECODER_TARGET_TOKENS), target)
            weights = {DECODER_LOSS_WEIGHTS: target}
            packed = dict.fromkeys((DECODER_SEGMENT_IDS, DECODER_POSITIONS), target)
        if self.kind == "prefix_lm":
            lengths |= {DECODER_CAUSAL_ATTENTION: target}
        if self.kind == "encoder_decoder":
            lengths |= {ENCODER_INPUT_TOKENS: source}
            packed |= dict.fromkeys((ENCODER_SEGMENT_IDS, ENCODER_POSITIONS), source)
        tokens = lengths | packed if self.pack else lengths
        features = {name: ((self.batch_size, n), np.dtype("int32")) for name, n in tokens.items()}
        floats = {name: ((self.batch_size, n), np.dtype("float32")) for name, n in weights.items()}
        return features | floats


def train_spec(config: Config) -> BatchSpec:
    """Returns the shape of the batches that a run trains on."""
    data = config.data
    return BatchSpec(data.batch_size, data.inputs_length, data.targets_length, data.pack)


def validate_batch(batch: Batch, spec: BatchSpec) -> None:
    """Raises ValueError where a batch has not the features, shapes and dtypes of its spec."""
    features = spec.features()
    if set(batch) != set(features):
        missing, extra = sorted(set(features) - set(batch)), sorted(set(batch) - set(features))
        raise ValueError(f"batch features differ from the spec: missing {missing}, extra {extra}")
    for name, (shape, dtype) in features.items():
        got = batch[name]
        if got.shape != shape or got.dtype != dtype:
            raise ValueError(
                f"batch feature {name} is {got.dtype}{list(got.shape)}; "
                f"expected {dtype}{list(shape)}"
            )


def shift_right(targets, start_id: int):
    """Returns decoder inputs for targets [..., T]: one position later, `start_id` in front.

    For unpacked rows only; in a packed row every segment starts anew.
    """
    inputs = np.roll(targets, 1, axis=-1)
    inputs[..., 0] = start_id
    return inputs


def pad_ids(rows: Sequence[Sequence[int]], batch_size: int, length: int) -> np.ndarray:
    """Returns lists of token ids as int32 [batch_size, length], cut or padded with 0."""
    tokens = np.zeros((batch_size, length), np.int32)
    for i, row in enumerate(rows):
        row = row[:length]
        tokens[i, : len(row)] = row
    return tokens


def pad_rows(batch: Batch, batch_size: int) -> Batch:
    """Returns the batch with rows of zeros behind it; their loss weights are 0, so they count
    nowhere."""
    rows = len(next(iter(batch.values())))
    if rows > batch_size:
        raise ValueError(f"a batch of {rows} rows cannot be padded to {batch_size}")
    pad = batch_size - rows
    return {k: np.pad(v, ((0, pad),) + ((0, 0),) * (v.ndim - 1)) for k, v in batch.items()}
