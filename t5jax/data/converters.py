"""From examples to the arrays of a batch, packed or a row each, for every kind of model (numpy).

The features are those of SeqIO's converters, token for token, with two differences. Loss weights
come from lengths, so that a vocabulary whose id 0 is a word (GPT-2's) loses nothing; and an encoder
predicts what its targets say, where SeqIO looks for one mask id.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from t5jax import batch as features
from t5jax.batch import Batch, BatchSpec
from t5jax.data.api import Example

Rows = Sequence[Sequence[Example]]


class Converter(Protocol):
    """Puts rows of examples into the arrays of a kind of model."""

    features: tuple[str, ...]
    """Features that an example must have."""
    capacity: dict[str, int]
    """Tokens that a row holds on each of its sides, by what its setting is called."""

    def sizes(self, lengths: dict[str, np.ndarray]) -> np.ndarray:
        """Returns what examples take of each side of a row.

        Args:
          lengths: of each feature, int [n].
        Returns:
          int [n, sides].
        """

    def __call__(self, rows: Rows) -> Batch:
        """Returns the arrays whose rows hold these examples side by side, which must fit."""


def make_converter(spec: BatchSpec, *, eos_id: int = 1, start_id: int = 0) -> Converter:
    """Returns the converter for a spec's kind of model.

    Args:
      spec: shape of the batch; its number of rows is not used.
      eos_id: what an encoder-decoder reads where examples have targets alone.
      start_id: what a decoder reads before the first token of an example.
    """
    if spec.kind == "encoder_decoder":
        return _EncoderDecoder(spec, eos_id, start_id)
    if spec.kind == "decoder":
        return _Decoder(spec, start_id)
    if spec.kind == "prefix_lm":
        return _PrefixLM(spec, start_id)
    return _Encoder(spec)


class _EncoderDecoder:
    features: tuple[str, ...] = ("targets",)

    def __init__(self, spec: BatchSpec, eos_id: int, start_id: int):
        self._spec, self._start_id = spec, start_id
        self._no_inputs = np.array([eos_id], np.int32)
        self.capacity = {
            "data.inputs_length": spec.inputs_length,
            "data.targets_length": spec.targets_length,
        }

    def sizes(self, lengths):
        targets = lengths["targets"]
        return np.stack([lengths.get("inputs", np.ones_like(targets)), targets], axis=1)

    def __call__(self, rows):
        inputs = [[e.get("inputs", self._no_inputs) for e in row] for row in rows]
        targets = [[e["targets"] for e in row] for row in rows]
        encoder = _Layout(inputs, self._spec.inputs_length)
        decoder = _Layout(targets, self._spec.targets_length)
        batch = {features.ENCODER_INPUT_TOKENS: encoder.tokens}
        if self._spec.pack:
            batch[features.ENCODER_SEGMENT_IDS] = encoder.segment_ids()
            batch[features.ENCODER_POSITIONS] = encoder.positions()
        return batch | _decoder_features(decoder, self._spec.pack, self._start_id)


class _Decoder:
    features: tuple[str, ...] = ("targets",)

    def __init__(self, spec: BatchSpec, start_id: int):
        self._spec, self._start_id = spec, start_id
        self.capacity = {"data.targets_length": spec.targets_length}

    def sizes(self, lengths):
        return lengths["targets"][:, None]

    def __call__(self, rows):
        decoder = _Layout([[e["targets"] for e in row] for row in rows], self._spec.targets_length)
        return _decoder_features(decoder, self._spec.pack, self._start_id)


class _PrefixLM:
    features: tuple[str, ...] = ("inputs", "targets")

    def __init__(self, spec: BatchSpec, start_id: int):
        self._spec, self._start_id = spec, start_id
        self._length = spec.inputs_length + spec.targets_length
        self.capacity = {"data.inputs_length + data.targets_length": self._length}

    def sizes(self, lengths):
        return (lengths["inputs"] + lengths["targets"])[:, None]

    def __call__(self, rows):
        parts = [[np.concatenate([e["inputs"], e["targets"]]) for e in row] for row in rows]
        decoder = _Layout(parts, self._length)
        batch = _decoder_features(decoder, self._spec.pack, self._start_id)
        num_inputs = np.array([len(e["inputs"]) for row in rows for e in row])
        num_inputs = np.repeat(num_inputs, decoder.sizes)
        is_target = decoder.offsets >= num_inputs
        batch[features.DECODER_LOSS_WEIGHTS] = decoder.put(is_target, np.float32)
        # One position more than there are inputs: it reads the last of them, and the input before
        # it is the start. T5's own rule, and SeqIO's.
        batch[features.DECODER_CAUSAL_ATTENTION] = decoder.put(decoder.offsets <= num_inputs)
        return batch


class _Encoder:
    features: tuple[str, ...] = ("inputs", "targets")

    def __init__(self, spec: BatchSpec):
        self._spec = spec
        self.capacity = {"data.inputs_length": spec.inputs_length}

    def sizes(self, lengths):
        return lengths["inputs"][:, None]

    def __call__(self, rows):
        length = self._spec.inputs_length
        encoder = _Layout([[e["inputs"] for e in row] for row in rows], length)
        targets = np.concatenate([e["targets"] for row in rows for e in row])
        batch = {
            features.ENCODER_INPUT_TOKENS: encoder.tokens,
            features.ENCODER_TARGET_TOKENS: encoder.put(targets),
            features.ENCODER_LOSS_WEIGHTS: encoder.put(targets != 0, np.float32),
        }
        if self._spec.pack:
            batch[features.ENCODER_SEGMENT_IDS] = encoder.segment_ids()
            batch[features.ENCODER_POSITIONS] = encoder.positions()
        return batch


def _decoder_features(decoder: "_Layout", pack: bool, start_id: int) -> Batch:
    inputs = features.shift_right(decoder.tokens, start_id)
    batch = {
        features.DECODER_INPUT_TOKENS: inputs,
        features.DECODER_TARGET_TOKENS: decoder.tokens,
        features.DECODER_LOSS_WEIGHTS: decoder.put(1, np.float32),
    }
    if pack:
        segment_ids = decoder.segment_ids()
        inputs.flat[decoder.first] = start_id
        inputs[segment_ids == 0] = 0  # The last token of a row, shifted into the padding.
        batch[features.DECODER_SEGMENT_IDS] = segment_ids
        batch[features.DECODER_POSITIONS] = decoder.positions()
    return batch


class _Layout:
    """Where the tokens of one side of a batch stand; all of them at once, without a loop."""

    def __init__(self, rows: Sequence[Sequence[np.ndarray]], length: int):
        parts = [part for row in rows for part in row]
        per_row = np.array([len(row) for row in rows])
        self.sizes = np.array([len(part) for part in parts])
        self._shape = (len(rows), length)
        # A part begins where those before it in its row end. Parts count through all rows, `row`
        # says which one is a part's, and `first_part` is the first of each row.
        row = np.repeat(np.arange(len(rows)), per_row)
        assert np.bincount(row, self.sizes).max() <= length, "a row overflows into the next one"
        first_part = np.cumsum(per_row) - per_row
        before = np.cumsum(self.sizes) - self.sizes
        start = row * length + before - before[first_part][row]
        self._number = np.arange(len(parts)) - first_part[row] + 1
        self.offsets = np.arange(self.sizes.sum()) - np.repeat(before, self.sizes)
        """Position of every token in its part."""
        self._index = np.repeat(start, self.sizes) + self.offsets
        self.first = start[self.sizes > 0]
        """Index of each part's first token in the flat array."""
        self.tokens = self.put(np.concatenate(parts))

    def put(self, values, dtype=np.int32) -> np.ndarray:
        """Returns [rows, length] with a value for every token, and 0 elsewhere."""
        array = np.zeros(self._shape, dtype)
        array.ravel()[self._index] = values
        return array

    def segment_ids(self) -> np.ndarray:
        return self.put(np.repeat(self._number, self.sizes))

    def positions(self) -> np.ndarray:
        return self.put(self.offsets)


# --- Packing ------------------------------------------------------------------------------------


def pack(sizes: np.ndarray, capacity: Sequence[int]) -> list[list[int]]:
    """Puts examples into few rows: the largest first, each into the first row that has room.

    A row may have several sides, such as inputs and targets, and an example needs room on each.
    On 1,024 examples of the usual tasks the fuller side is 96 to 99 % full.

    Args:
      sizes: int [n, sides], what each example takes; at most the capacity.
      capacity: what a row holds on each side.
    Returns:
      Example numbers by row, rising in each; every example is in one row.
    """
    num_examples, sides = sizes.shape
    # One row of memory a side, so that rows are compared with an example all at once.
    free = np.empty((sides, num_examples), np.int64)
    rows = []
    largest_first = np.argsort(-(sizes / np.asarray(capacity)).sum(axis=1), kind="stable")
    for number, example in zip(largest_first.tolist(), sizes[largest_first], strict=True):
        fits = free[0, : len(rows)] >= example[0]
        for side in range(1, sides):
            fits &= free[side, : len(rows)] >= example[side]
        row = int(fits.argmax()) if rows else 0
        if not rows or not fits[row]:
            row = len(rows)
            free[:, row] = capacity
            rows.append([])
        free[:, row] -= example
        rows[row].append(number)
    return [sorted(row) for row in rows]
