"""The features of a batch: the same names from the data to the loss (SeqIO's standard names).

A batch is a dict of int32 arrays [B, S] or [B, T]; loss weights are float32. Packed rows hold
several examples, numbered from 1 in the segment ids, where 0 is padding. Positions count from 0 in
each example.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from t5jax.architectures import Head
from t5jax.config import Config

ENCODER_INPUT_TOKENS = "encoder_input_tokens"
ENCODER_TARGET_TOKENS = "encoder_target_tokens"
ENCODER_LOSS_WEIGHTS = "encoder_loss_weights"
ENCODER_SEGMENT_IDS = "encoder_segment_ids"
ENCODER_POSITIONS = "encoder_positions"
ENCODER_TOKEN_TYPES = "encoder_token_types"
DECODER_INPUT_TOKENS = "decoder_input_tokens"
DECODER_TARGET_TOKENS = "decoder_target_tokens"
DECODER_LOSS_WEIGHTS = "decoder_loss_weights"
DECODER_CAUSAL_ATTENTION = "decoder_causal_attention"
DECODER_SEGMENT_IDS = "decoder_segment_ids"
DECODER_POSITIONS = "decoder_positions"
# What a teacher said of each target beforehand, see `losses.distillation_of_top`: [B, T, k] ids and
# float32 [B, T, k + 1].
TEACHER_IDS = "teacher_ids"
TEACHER_LOG_PROBS = "teacher_log_probs"

Batch = dict[str, np.ndarray]

Kind = Literal["encoder_decoder", "decoder", "prefix_lm", "encoder"]


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The shape of a batch: rows, lengths, packing, and the kind of model."""

    batch_size: int
    inputs_length: int
    targets_length: int
    pack: bool = False
    kind: Kind = "encoder_decoder"
    """decoder: rows contain inputs and targets, inputs_length + targets_length tokens, each
    predicted from the previous ones, with a loss on the targets; inputs_length is 0 if there are
    only targets.
    prefix_lm: the same with bidirectional attention among inputs. encoder: rows of inputs_length,
    in which targets are aligned with inputs."""
    has_pairs: bool = False
    """Of an encoder: whether its rows may have two texts, as token types 0 and 1."""
    pads_with_eos: bool = False
    """Whether an encoder's padding has the id of eos, as with vocabularies that have no id for it:
    then rows have segment ids, not only packed ones, since ids do not tell them apart."""

    @property
    def decoder_length(self) -> int:
        """The length of a decoder's row in tokens."""
        alone = self.kind in ("decoder", "prefix_lm")
        return self.inputs_length + self.targets_length if alone else self.targets_length

    def features(self) -> dict[str, tuple[tuple[int, int], np.dtype]]:
        """Returns the shape and dtype of every feature."""
        source, target = self.inputs_length, self.decoder_length
        if self.kind == "encoder":
            lengths = dict.fromkeys((ENCODER_INPUT_TOKENS, ENCODER_TARGET_TOKENS), source)
            weights = {ENCODER_LOSS_WEIGHTS: source}
            packed = dict.fromkeys((ENCODER_SEGMENT_IDS, ENCODER_POSITIONS), source)
            if self.has_pairs:
                lengths |= {ENCODER_TOKEN_TYPES: source}
        else:
            lengths = dict.fromkeys((DECODER_INPUT_TOKENS, DECODER_TARGET_TOKENS), target)
            weights = {DECODER_LOSS_WEIGHTS: target}
            packed = dict.fromkeys((DECODER_SEGMENT_IDS, DECODER_POSITIONS), target)
        if self.kind == "prefix_lm":
            lengths |= {DECODER_CAUSAL_ATTENTION: target}
        if self.kind == "encoder_decoder":
            lengths |= {ENCODER_INPUT_TOKENS: source}
            packed |= dict.fromkeys((ENCODER_SEGMENT_IDS, ENCODER_POSITIONS), source)
        if self.pads_with_eos and ENCODER_SEGMENT_IDS in packed:
            lengths |= {ENCODER_SEGMENT_IDS: source}
        tokens = lengths | packed if self.pack else lengths
        features = {name: ((self.batch_size, n), np.dtype("int32")) for name, n in tokens.items()}
        floats = {name: ((self.batch_size, n), np.dtype("float32")) for name, n in weights.items()}
        return features | floats


@dataclasses.dataclass(frozen=True)
class ExampleFormat:
    """How a model reads an example, besides the shape of its batches.

    `special_tokens.example_format` returns that of a model with its tokenizer.
    """

    eos_id: int = 1
    """What the tokenizer appends to the inputs of an example."""
    start_id: int = 0
    """What a decoder reads before the first token of a text, and a classifier before the text,
    which comes without it."""
    pad_id: int = 0
    """Padding of an encoder's rows; in the inputs of an example, what stands between two texts."""
    num_embeddings: int | None = None
    """Ids must be below. None: not checked."""
    prompt_start: tuple[int, ...] = ()
    """What inputs begin with."""
    prompt_end: tuple[int, ...] = (1,)
    """What inputs end with, instead of eos."""
    nothing: int = 1
    """What is read instead of a prompt without tokens."""
    head: Head = "masked_lm"
    """The head of an encoder."""
    num_labels: int = 0
    """The number of classes of a classifier."""

    def prompt(self, inputs: Any) -> np.ndarray:
        """Returns what the model reads for the inputs of an example, int32 [n], n at least 1.

        Args:
          inputs: token ids, with or without the tokenizer's eos. A start that is written in the
            text, as by chat templates, is not repeated.
        """
        inputs, start = np.asarray(inputs, np.int32), self.prompt_start
        if self.prompt_end != (self.eos_id,):
            inputs = without_eos(inputs, self.eos_id)
            inputs = np.append(inputs, np.array(self.prompt_end, np.int32))
        if start and tuple(inputs[: len(start)].tolist()) != start:
            inputs = np.concatenate([np.array(start, np.int32), inputs])
        return inputs if len(inputs) else np.array([self.nothing], np.int32)

    def check_ids(self, tokens: np.ndarray) -> None:
        """Raises ValueError if one of the token ids has no embedding.

        Args:
          tokens: int32 [rows, n].
        """
        end = np.iinfo(np.int32).max if self.num_embeddings is None else self.num_embeddings
        if tokens.min(initial=0) >= 0 and tokens.max(initial=0) < end:
            return
        row, place = map(int, np.argwhere((tokens < 0) | (tokens >= end))[0])
        near = " ".join(map(str, tokens[row, max(place - 4, 0) : place + 5]))
        where = f"row {row} of a batch, token {place}, where the ids are … {near} …"
        if tokens[row, place] < 0:
            raise ValueError(f"an example has id {tokens[row, place]} ({where}); ids begin at 0")
        raise ValueError(
            f"an example has id {tokens[row, place]}, but model.vocab_size is {end}: it has no "
            f"embedding; take this special token out of the data ({where})"
        )

    @property
    def num_added(self) -> int:
        """How much longer a prompt may be than inputs with eos."""
        ends = () if self.prompt_end == (self.eos_id,) else self.prompt_end
        return len(self.prompt_start) + len(ends)


def without_eos(inputs: Any, eos_id: int) -> Any:
    """Returns token ids without the eos at their end."""
    return inputs[:-1] if len(inputs) and inputs[-1] == eos_id else inputs


def train_spec(config: Config, *, has_inputs: bool = True, has_pairs: bool = False) -> BatchSpec:
    """Returns the shape of the batches that a run trains on.

    Args:
      has_inputs: whether the examples of its tasks have inputs in addition to targets.
      has_pairs: whether the inputs of some of them are two texts.
    """
    data, kind = config.data, config.model.kind
    if kind != "decoder":
        return BatchSpec(
            data.batch_size,
            data.inputs_length,
            data.targets_length,
            data.pack,
            kind,
            has_pairs,
            config.model.pads_with_eos,
        )
    return BatchSpec(
        data.batch_size,
        data.inputs_length if has_inputs else 0,
        data.targets_length,
        data.pack,
        "prefix_lm" if data.prefix_lm and has_inputs else "decoder",
    )


def validate_batch(batch: Batch, spec: BatchSpec) -> None:
    """Raises ValueError if a batch does not have the features, shapes and dtypes of its spec."""
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


def shift_right(targets: np.ndarray, start_id: int) -> np.ndarray:
    """Returns decoder inputs for targets [..., T]: shifted by one, with `start_id` first.

    For unpacked rows only; in a packed row every segment has a start token.
    """
    inputs = np.roll(targets, 1, axis=-1)
    inputs[..., 0] = start_id
    return inputs


def pad_ids(
    rows: Sequence[Sequence[int]], batch_size: int, length: int, pad_id: int = 0
) -> np.ndarray:
    """Returns lists of token ids as int32 [batch_size, length], truncated or padded."""
    tokens = np.full((batch_size, length), pad_id, np.int32)
    for i, row in enumerate(rows):
        row = row[:length]
        tokens[i, : len(row)] = row
    return tokens


def prompt_batch(
    prompts: Sequence[Sequence[int]], kind: Kind, batch_size: int, length: int
) -> Batch:
    """Returns the batch of prompts for `prefill` and `encode`.

    Segment ids are 1 at tokens and 0 at padding, so that any id may be a token; rows beyond the
    prompts are padding.

    Args:
      prompts: the tokens of each, at most `length`, as `ExampleFormat.prompt` returns them.
      kind: the kind of the model.
    """
    names = (ENCODER_INPUT_TOKENS, ENCODER_SEGMENT_IDS, ENCODER_POSITIONS)
    if kind in ("decoder", "prefix_lm"):
        names = (DECODER_INPUT_TOKENS, DECODER_SEGMENT_IDS, DECODER_POSITIONS)
    batch = {name: np.zeros((batch_size, length), np.int32) for name in names}
    for i, prompt in enumerate(prompts):
        values = dict(zip(names, (prompt, 1, range(len(prompt))), strict=True))
        for name, value in values.items():
            batch[name][i, : len(prompt)] = value
    if kind == "prefix_lm":
        batch[DECODER_CAUSAL_ATTENTION] = batch[DECODER_SEGMENT_IDS]
    return batch


def pad_rows(batch: Batch, batch_size: int) -> Batch:
    """Returns the batch padded with rows of zeros, which have no effect since their loss weights
    are 0."""
    rows = len(next(iter(batch.values())))
    if rows > batch_size:
        raise ValueError(f"a batch of {rows} rows cannot be padded to {batch_size}")
    pad = batch_size - rows
    return {k: np.pad(v, ((0, pad),) + ((0, 0),) * (v.ndim - 1)) for k, v in batch.items()}
