"""From examples to the arrays of a batch, packed or not, for every kind of model (NumPy).

The features equal those of SeqIO's converters, token for token, with three differences. Loss
weights are derived from lengths, since id 0 may be a word (in GPT-2's vocabulary); an encoder
predicts its targets, where SeqIO looks for one mask id; and if inputs and targets share a row,
there is no eos between them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from t5jax import batch as features
from t5jax.batch import Batch, BatchSpec, ExampleFormat
from t5jax.data.batches.examples import Example

Rows = Sequence[Sequence[Example]]


class Converter(Protocol):
    """Converts rows of examples to the arrays of a batch."""

    features: tuple[str, ...]
    """The features that an example must have."""
    capacity: dict[str, int]
    """The length of a row in tokens for each side, by the name of its setting."""

    def sizes(self, lengths: dict[str, np.ndarray]) -> np.ndarray:
        """Returns the lengths of examples on each side of a row.

        Args:
          lengths: the lengths of each feature, int [n].
        Returns:
          int [n, sides].
        """

    def __call__(self, rows: Rows) -> Batch:
        """Returns the arrays with these examples in each row, which must fit."""


def make_converter(spec: BatchSpec, form: ExampleFormat = ExampleFormat()) -> Converter:
    """Returns the converter for a spec's kind of model.

    Args:
      spec: the shape of the batch, without its number of rows.
      form: how the model reads an example.
    """
    if spec.kind == "encoder_decoder":
        return _EncoderDecoder(spec, form)
    if spec.kind in ("decoder", "prefix_lm"):
        return _Decoder(spec, form)
    return _Encoder(spec, form) if form.head == "masked_lm" else _Classifier(spec, form)


def example_lengths(spec: BatchSpec, form: ExampleFormat = ExampleFormat()) -> dict[str, int]:
    """Returns the maximum lengths of an example's inputs and targets in tokens, with eos.

    Args:
      spec: shape of the batch.
      form: how the model reads an example.
    """
    inputs, targets = max(spec.inputs_length, 1), spec.targets_length
    if spec.kind == "encoder_decoder":
        inputs -= form.num_added
    if spec.kind in ("decoder", "prefix_lm"):
        inputs -= max(form.num_added - 1, 0)  # The last token of a row is not read.
    if spec.kind == "encoder":
        if form.head != "masked_lm":
            inputs -= 1  # For the token that begins the text.
        targets = 2 if form.head == "sequence_classification" else inputs
    return {"inputs": inputs, "targets": targets}


class _EncoderDecoder:
    features: tuple[str, ...] = ("targets",)

    def __init__(self, spec: BatchSpec, form: ExampleFormat):
        self._spec, self._form = spec, form
        self.capacity = {
            "data.inputs_length": spec.inputs_length,
            "data.targets_length": spec.targets_length,
        }

    def sizes(self, lengths: dict[str, np.ndarray]) -> np.ndarray:
        targets = lengths["targets"]
        if "inputs" in lengths:
            inputs = np.maximum(lengths["inputs"], 1) + self._form.num_added
        else:
            inputs = np.full_like(targets, len(self._form.prompt(())))
        return np.stack([inputs, targets], axis=1)

    def __call__(self, rows: Rows) -> Batch:
        inputs = [[self._form.prompt(e.get("inputs", ())) for e in row] for row in rows]
        targets = [[e["targets"] for e in row] for row in rows]
        encoder = _Layout(inputs, self._spec.inputs_length)
        decoder = _Layout(targets, self._spec.targets_length)
        self._form.check_ids(encoder.tokens)
        self._form.check_ids(decoder.tokens)
        batch = {features.ENCODER_INPUT_TOKENS: encoder.padded(self._form.pad_id)}
        if self._spec.pack or self._spec.pads_with_eos:
            batch[features.ENCODER_SEGMENT_IDS] = encoder.segment_ids()
        if self._spec.pack:
            batch[features.ENCODER_POSITIONS] = encoder.positions()
        return batch | _decoder_features(decoder, self._spec.pack, self._form.start_id)


class _Decoder:
    def __init__(self, spec: BatchSpec, form: ExampleFormat):
        self._spec, self._form = spec, form
        self.features: tuple[str, ...] = ("targets",)
        side = "data.targets_length"
        if spec.inputs_length:
            self.features = ("inputs", "targets")
            side = f"data.inputs_length + {side}"
        self.capacity = {side: spec.decoder_length}

    def sizes(self, lengths: dict[str, np.ndarray]) -> np.ndarray:
        # Including an eos of the inputs, since lengths do not show whether there is one.
        total = np.sum([lengths[name] for name in self.features], axis=0)[:, None]
        return total + max(self._form.num_added - 1, 0) if self._spec.inputs_length else total

    def __call__(self, rows: Rows) -> Batch:
        length = self._spec.decoder_length
        if not self._spec.inputs_length:
            decoder = _Layout([[e["targets"] for e in row] for row in rows], length)
            self._form.check_ids(decoder.tokens)
            return _decoder_features(decoder, self._spec.pack, self._form.start_id)
        prompts = [[self._form.prompt(e["inputs"]) for e in row] for row in rows]
        # The first token is read, but not predicted.
        predicted = [
            [np.concatenate([p[1:], e["targets"]]) for p, e in zip(*row, strict=True)]
            for row in zip(prompts, rows, strict=True)
        ]
        decoder = _Layout(predicted, length)
        self._form.check_ids(decoder.tokens)
        starts = [prompt[0] for row in prompts for prompt in row]
        batch = _decoder_features(decoder, self._spec.pack, np.array(starts)[decoder.sizes > 0])
        num_inputs = np.repeat([len(p) - 1 for row in prompts for p in row], decoder.sizes)
        is_target = decoder.offsets >= num_inputs
        batch[features.DECODER_LOSS_WEIGHTS] = decoder.put(is_target, np.float32)
        if self._spec.kind == "prefix_lm":
            # The position of the last token of the prompt predicts the first target.
            batch[features.DECODER_CAUSAL_ATTENTION] = decoder.put(decoder.offsets <= num_inputs)
        return batch


class _Encoder:
    """Each position has a target, or id 0 for none."""

    features: tuple[str, ...] = ("inputs", "targets")

    def __init__(self, spec: BatchSpec, form: ExampleFormat):
        self._spec, self._form = spec, form
        self.capacity = {"data.inputs_length": spec.inputs_length}

    def sizes(self, lengths: dict[str, np.ndarray]) -> np.ndarray:
        return lengths["inputs"][:, None]

    def __call__(self, rows: Rows) -> Batch:
        encoder = _Layout([[e["inputs"] for e in row] for row in rows], self._spec.inputs_length)
        targets = np.concatenate([e["targets"] for row in rows for e in row])
        return _encoder_features(encoder, self._spec, self._form, targets, targets != 0)


class _Classifier:
    """The class of a text is the target of its [CLS]; or each piece of the text has a class.

    Targets are those of a `LabelTokenizer`: classes, an id for pieces without one, and eos.
    """

    features: tuple[str, ...] = ("inputs", "targets")

    def __init__(self, spec: BatchSpec, form: ExampleFormat):
        self._spec, self._form = spec, form
        self._start = np.array([form.start_id], np.int32)
        self._per_word = form.head == "token_classification"
        self._num_labels = form.num_labels
        self.capacity = {"data.inputs_length": spec.inputs_length}

    def sizes(self, lengths: dict[str, np.ndarray]) -> np.ndarray:
        return lengths["inputs"][:, None] + 1

    def __call__(self, rows: Rows) -> Batch:
        inputs = [[np.concatenate([self._start, e["inputs"]]) for e in row] for row in rows]
        encoder = _Layout(inputs, self._spec.inputs_length)
        examples = [e for row in rows for e in row]
        classes = np.concatenate([self._classes(e["inputs"], e["targets"]) for e in examples])
        is_asked = classes < self._num_labels
        if classes.min(initial=0) < 0:
            sizes = [len(e["inputs"]) + 1 for e in examples]
            number = int(np.repeat(np.arange(len(sizes)), sizes)[classes < 0][0])
            raise ValueError(
                f"example {number} of a batch has the class {classes.min()}: its targets are "
                f"{examples[number]['targets'][:9].tolist()}; classes begin at 0"
            )
        batch = _encoder_features(encoder, self._spec, self._form, classes, is_asked)
        if self._spec.has_pairs:
            # Between two texts, the id of padding stands for eos.
            is_break = [tokens == self._form.pad_id for row in inputs for tokens in row]
            types = np.concatenate([np.cumsum(x) - x for x in is_break])
            batch[features.ENCODER_TOKEN_TYPES] = encoder.put(types)
            batch[features.ENCODER_INPUT_TOKENS][encoder.put(np.concatenate(is_break), bool)] = (
                self._form.eos_id
            )
        return batch

    def _classes(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Returns a class for [CLS] and each token of the inputs; num_labels or more for none."""
        none = np.full(len(inputs) + 1, self._num_labels)
        if self._per_word and len(targets) == len(inputs):
            none[1:] = targets
            return none
        if not self._per_word and len(targets) == 2 and targets[0] < self._num_labels:
            none[0] = targets[0]
            return none
        expected = f"{len(inputs)}, one a piece" if self._per_word else "a class"
        raise ValueError(
            f"the targets of an example are {targets[:9].tolist()} ({len(targets)} ids); expected "
            f"{expected}{'' if self._per_word else f' below {self._num_labels}'}, with eos, "
            "as t5jax.data.prompted_task produces them for a model with labels"
        )


def _encoder_features(
    encoder: "_Layout",
    spec: BatchSpec,
    form: ExampleFormat,
    targets: np.ndarray,
    is_asked: np.ndarray,
) -> Batch:
    form.check_ids(encoder.tokens)
    batch = {
        features.ENCODER_INPUT_TOKENS: encoder.padded(form.pad_id),
        features.ENCODER_TARGET_TOKENS: encoder.put(np.where(is_asked, targets, 0)),
        features.ENCODER_LOSS_WEIGHTS: encoder.put(is_asked, np.float32),
    }
    if spec.pack or spec.pads_with_eos:
        batch[features.ENCODER_SEGMENT_IDS] = encoder.segment_ids()
    if spec.pack:
        batch[features.ENCODER_POSITIONS] = encoder.positions()
    return batch


def _decoder_features(decoder: "_Layout", pack: bool, start_ids: int | np.ndarray) -> Batch:
    """Returns the features of targets; `start_ids` come before those that have tokens."""
    inputs = np.roll(decoder.tokens, 1, axis=-1)
    inputs[:, 0] = 0
    inputs.flat[decoder.first] = start_ids
    batch = {
        features.DECODER_INPUT_TOKENS: inputs,
        features.DECODER_TARGET_TOKENS: decoder.tokens,
        features.DECODER_LOSS_WEIGHTS: decoder.put(1, np.float32),
    }
    if pack:
        segment_ids = decoder.segment_ids()
        inputs[segment_ids == 0] = 0  # The last token of a row, shifted into the padding.
        batch[features.DECODER_SEGMENT_IDS] = segment_ids
        batch[features.DECODER_POSITIONS] = decoder.positions()
    return batch


class _Layout:
    """The positions of all tokens on one side of a batch, computed without a loop."""

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
        """The position of every token in its part."""
        self._index = np.repeat(start, self.sizes) + self.offsets
        self.first = start[self.sizes > 0]
        """Index of each part's first token in the flat array."""
        self.tokens = self.put(np.concatenate(parts))

    def put(self, values: Any, dtype: Any = np.int32) -> np.ndarray:
        """Returns [rows, length] with a value for every token and 0 elsewhere."""
        array = np.zeros(self._shape, dtype)
        array.ravel()[self._index] = values
        return array

    def padded(self, pad_id: int) -> np.ndarray:
        """Returns the tokens, with `pad_id` elsewhere."""
        return self.tokens if pad_id == 0 else np.where(self.put(1) == 1, self.tokens, pad_id)

    def segment_ids(self) -> np.ndarray:
        return self.put(np.repeat(self._number, self.sizes))

    def positions(self) -> np.ndarray:
        return self.put(self.offsets)


# --- Packing ------------------------------------------------------------------------------------


def pack(sizes: np.ndarray, capacity: Sequence[int]) -> list[list[int]]:
    """Packs examples into few rows: the largest first, each into the first row with enough room.

    A row may have several sides, such as inputs and targets, and an example needs room on each. For
    1,024 examples of common tasks the fuller side is 96 to 99 % full.

    Args:
      sizes: int [n, sides], the lengths of each example, at most the capacity.
      capacity: the length of a row on each side.
    Returns:
      The numbers of the examples in each row, in order; every example is in one row.
    """
    num_examples, sides = sizes.shape
    # Contiguous for each side, so that all rows are compared with an example at once.
    free = np.empty((sides, num_examples), np.int64)
    rows: list[list[int]] = []
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
