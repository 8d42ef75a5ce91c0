"""What describes a stack of layers with grouped attention and rotary positions.

`GPTConfig` is one stack, `T5GemmaConfig` two.
"""

import dataclasses
from typing import Literal, Self, get_args

from t5jax.architectures.base import Architecture, description
from t5jax.checks import check_choice, check_positive

LayerKind = Literal["global", "local"]


@description()
class StackConfig(Architecture):
    """Sizes, attention, positions and special tokens of one stack of layers, or of two alike."""

    vocab_size: int = 50257
    """Rows of the embedding; may be more than the tokenizer has."""
    d_model: int = 768
    """Width of the residual stream; where there is an encoder, of the encoder's."""
    num_heads: int = 12
    """Heads of every layer's queries, likewise."""
    num_kv_heads: int = 12
    """Heads of keys and values, each shared by num_heads / num_kv_heads heads of queries."""
    head_dim: int = 64
    """Width of one head; num_heads * head_dim may differ from d_model."""
    d_ff: int = 3072
    """Width of the MLP's hidden layer."""
    max_positions: int = 1024
    """Tokens of the longest text that it was trained for: rows of learned positions, where it has
    them."""
    norm_epsilon: float = 1e-5
    """Added to the variance in every norm."""
    query_pre_attention_scalar: int | None = None
    """Scores are multiplied by its inverse square root. None: head_dim."""
    attention_softcap: float | None = None
    """Squeeze scores into (-cap, cap) by tanh. None: no cap."""
    final_softcap: float | None = None
    """Squeeze logits likewise. None: no cap."""
    layer_pattern: tuple[LayerKind, ...] = ("global",)
    """Kinds of the layers from the first one on, repeated to the last. A local layer's tokens see
    the last sliding_window tokens, themselves among them; those of an encoder also as many behind
    them."""
    sliding_window: int | None = None
    """Tokens that a local layer sees. None: there is no local layer."""
    tie_word_embeddings: bool = True
    """One matrix for embedding and output, or a separate lm_head."""
    dropout_rate: float = 0.1
    """Dropout in training, of embeddings, attention and the branches of every layer; where there is
    an encoder, also of what either side returns."""
    initializer_range: float = 0.02
    """Standard deviation of initial matrices; those that write to the residual stream begin at
    (2 layers)^-0.5 of it."""
    pad_token_id: int = 50256
    """Id of padding among an encoder's inputs, and behind the end of a text. A decoder alone reads
    segment ids, so that any id will do."""
    eos_token_id: int = 50256
    """Id that ends a text."""
    more_eos_token_ids: tuple[int, ...] = ()
    """Further ids that end it when text is written, such as that behind a chat's turn."""
    decoder_start_token_id: int = 50256
    """Id that a decoder's text begins with; Hugging Face: bos_token_id."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("norm_epsilon", "initializer_range")
        for name in ("attention_softcap", "final_softcap"):
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), f"model.{name}")
        ends = self.end_token_ids
        if len(set(ends)) < len(ends) or not all(0 <= i < self.vocab_size for i in ends):
            raise ValueError(
                f"model.more_eos_token_ids is {self.more_eos_token_ids}; expected different ids in "
                f"[0, {self.vocab_size}), the vocabulary, other than model.eos_token_id "
                f"{self.eos_token_id}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads "
                f"{self.num_kv_heads}; every head of keys serves as many heads of queries"
            )
        for kind in self.layer_pattern:
            check_choice(kind, get_args(LayerKind), "model.layer_pattern")
        if ("local" in self.layer_pattern) != (self.sliding_window is not None):
            raise ValueError(
                f"model.sliding_window is {self.sliding_window} with model.layer_pattern "
                f"{self.layer_pattern}; a window needs local layers, and they a window"
            )

    @property
    def start_token_id(self) -> int:
        return self.decoder_start_token_id

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        return (self.eos_token_id, *self.more_eos_token_ids)

    def ended_by(self, eos_id: int) -> Self:
        if eos_id not in self.end_token_ids:
            return self
        rest = tuple(i for i in self.end_token_ids if i != eos_id)
        return dataclasses.replace(self, eos_token_id=eos_id, more_eos_token_ids=rest)
