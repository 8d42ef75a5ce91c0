"""Language modelling: of a prefix, causal, and masked."""

import dataclasses
from typing import ClassVar

import numpy as np


@dataclasses.dataclass(frozen=True)
class PrefixLM:
    """Splits the text at a random token into inputs and targets, each with eos.

    The split is uniform among those that fit both rows.
    """

    features: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    encoder_only: ClassVar[bool] = False

    max_targets: float = 1.0
    """Maximum fraction of the tokens in the targets; the mean is half of it."""
    prefix: str = ""
    """Text before the inputs."""

    def __post_init__(self):
        if not 0 < self.max_targets <= 1:
            raise ValueError(f"max_targets is {self.max_targets}; it must be above 0, at most 1")

    def tokens_length(self, tokenizer, inputs_length, targets_length):
        # At least one token moves to the targets, which makes room for eos.
        return inputs_length - len(tokenizer.encode(self.prefix))

    def bind(self, tokenizer, inputs_length, targets_length, tokens_length=None):
        n = tokens_length or self.tokens_length(tokenizer, inputs_length, targets_length)
        prefix = np.array(tokenizer.encode(self.prefix), np.int32)
        if n < 2 or targets_length < 2:
            raise ValueError(
                f"data.inputs_length {inputs_length} and data.targets_length {targets_length} are "
                f"too short for {self}; expected at least {len(prefix) + 2} and 2"
            )
        return _BoundPrefixLM(
            n, self.max_targets, targets_length, prefix, np.array([tokenizer.eos_id], np.int32)
        )


@dataclasses.dataclass(frozen=True)
class _BoundPrefixLM:
    tokens_length: int
    max_targets: float
    targets_length: int
    prefix: np.ndarray
    eos: np.ndarray

    def __call__(self, tokens, rng):
        split = self._split(len(tokens), rng)
        return {
            "inputs": np.concatenate([self.prefix, tokens[:split], self.eos]),
            "targets": np.concatenate([tokens[split:], self.eos]),
        }

    def lengths(self, n, rng):
        split = self._split(n, rng)
        return {"inputs": len(self.prefix) + split + 1, "targets": n - split + 1}

    def _split(self, n: int, rng) -> int:
        """Returns how many of n tokens are inputs; 0 for a single token."""
        longest = min(self.targets_length - 1, max(int(n * self.max_targets), 1), max(n - 1, 1))
        return n - int(rng.integers(1, longest, endpoint=True))


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """The targets are the text itself. The encoder of an encoder-decoder only reads eos."""

    features: ClassVar[tuple[str, ...]] = ("targets",)
    encoder_only: ClassVar[bool] = False

    def tokens_length(self, tokenizer, inputs_length, targets_length):
        return targets_length

    def bind(self, tokenizer, inputs_length, targets_length, tokens_length=None):
        return _BoundCausalLM(tokens_length or targets_length)


@dataclasses.dataclass(frozen=True)
class _BoundCausalLM:
    tokens_length: int

    def __call__(self, tokens, rng):
        return {"targets": tokens}

    def lengths(self, n, rng):
        return {"targets": n}


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """BERT's: some tokens are predicted; 8 of 10 are masked, 1 is a random one, 1 stays.

    Inputs are bos (BERT: [CLS]), the text and eos ([SEP]), which also stands between documents.
    Targets are the predicted tokens where they stand, and 0 elsewhere. As BERT has it, the share is
    one of all tokens, but those that frame texts are not predicted: of 512 tokens 77 are. A random
    token is any but id 0, which is padding, where BERT takes any.
    """

    features: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    encoder_only: ClassVar[bool] = True

    share: float = 0.15
    """Share of the tokens that is predicted; at least one token is, if there are words."""

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}; it must be between 0 and 1")

    def tokens_length(self, tokenizer, inputs_length, targets_length):
        return inputs_length - 2

    def bind(self, tokenizer, inputs_length, targets_length, tokens_length=None):
        for name in ("bos_id", "mask_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(
                    f"{tokenizer} has no {name.removesuffix('_id')} token; {self} needs a "
                    "vocabulary that has, such as BERT's (data.vocabulary; `tasks --vocabulary`)"
                )
        if tokenizer.pad_id != 0:
            raise ValueError(
                f"{tokenizer} pads with id {tokenizer.pad_id}; {self} needs id 0 for what is not "
                "predicted"
            )
        n = tokens_length or self.tokens_length(tokenizer, inputs_length, targets_length)
        if n < 1:
            raise ValueError(f"data.inputs_length is {inputs_length}; {self} needs at least 3")
        return _BoundMaskedLM(
            n, self.share, tokenizer.bos_id, tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id,
            tokenizer.vocab_size,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _BoundMaskedLM:
    tokens_length: int
    share: float
    bos_id: int
    mask_id: int
    eos_id: int
    pad_id: int
    vocab_size: int

    def __call__(self, tokens, rng):
        inputs = np.concatenate([[self.bos_id], tokens, [self.eos_id]]).astype(np.int32)
        targets = np.zeros_like(inputs)
        special = (self.bos_id, self.mask_id, self.eos_id, self.pad_id)
        words = np.flatnonzero(~np.isin(inputs, special))
        count = min(max(round(len(inputs) * self.share), 1), len(words))
        chosen = rng.choice(words, count, replace=False)
        targets[chosen] = inputs[chosen]
        fate = rng.random(len(chosen))
        inputs[chosen[fate < 0.8]] = self.mask_id
        random = chosen[fate >= 0.9]
        inputs[random] = rng.integers(1, self.vocab_size, len(random))
        return {"inputs": inputs, "targets": targets}

    def lengths(self, n, rng):
        return {"inputs": n + 2, "targets": n + 2}
