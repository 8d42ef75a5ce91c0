"""The description of a stack of layers with grouped-query attention.

`GPTConfig` is one stack, `T5GemmaConfig` two.
"""

from typing import Literal, get_args

from t5jax.architectures.base import Architecture, description
from t5jax.checks import check_choice, check_positive

LayerKind = Literal["global", "local"]


@description()
class StackConfig(Architecture):
    """Sizes, attention and special tokens of one stack of layers, or of two similar ones."""

    vocab_size: int = 50257
    """Rows of the embedding; may be more than the tokenizer's vocabulary."""
    d_model: int = 768
    """Width of the residual stream, of the encoder's if there is an encoder."""
    num_heads: int = 12
    """Query heads per layer, likewise."""
    num_kv_heads: int = 12
    """Key and value heads, each shared by num_heads / num_kv_heads query heads."""
    head_dim: int = 64
    """Dimension of a head; num_heads * head_dim may differ from d_model."""
    d_ff: int = 3072
    """Width of the MLP's hidden layer."""
    max_positions: int = 1024
    """Longest text in tokens that the network was trained for; the number of learned positions, if
    it has any."""
    norm_epsilon: float = 1e-5
    """Added to the variance in every norm."""
    query_pre_attention_scalar: int | None = None
    """Attention scores are divided by its square root. None: head_dim."""
    attention_softcap: float | None = None
    """Squash attention scores into (-cap, cap) with tanh. None: no cap."""
    final_softcap: float | None = None
    """Squash logits likewise. None: no cap."""
    layer_pattern: tuple[LayerKind, ...] = ("global",)
    """The kinds of the layers, repeated from the first to the last. In a local layer, a token
    attends to the last sliding_window tokens including itself; in an encoder, also to as many after
    it."""
    sliding_window: int | None = None
    """Window of the local layers in tokens. None if there are none."""
    tie_word_embeddings: bool = True
    """Use the embedding as the output matrix, or a separate lm_head."""
    dropout_rate: float = 0.1
    """Dropout in training, of embeddings, attention and the branches of every layer; with an
    encoder, also of the outputs of both stacks."""
    initializer_range: float = 0.02
    """Standard deviation of initial matrices; that of output matrices of a branch is multiplied by
    (2 layers)^-0.5."""
    pad_token_id: int = 50256
    """Id of padding. A decoder-only network recognizes padding by segment ids, so that it may be
    any id."""
    eos_token_id: int = 50256
    """Id that ends a text."""
    more_eos_token_ids: tuple[int, ...] = ()
    """Further ids that end generation, such as the end of a turn in a chat."""
    decoder_start_token_id: int = 50256
    """Id that begins a decoder's text; Hugging Face: bos_token_id."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("norm_epsilon", "initializer_range")
        for name in ("attention_softcap", "final_softcap"):
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), f"model.{name}")
        self._check_ends()
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
