"""T5Gemma's description, and its published sizes by name."""

import dataclasses
from typing import Literal

from t5jax.architectures.common import Dtype, Kind, RematPolicy, check_fields
from t5jax.architectures.gpt import GPTConfig, LayerKind


@dataclasses.dataclass(frozen=True)
class T5GemmaConfig:
    """T5Gemma: an encoder and a decoder of Gemma 2's layers, which may be of different sizes.

    Zhang et al. 2025 (arXiv:2504.06225); arXiv:2408.00118 for the layers.
    """

    family: Literal["t5gemma"] = "t5gemma"
    """Which network in `t5jax/models/` reads this description."""
    vocab_size: int = 256_000
    """Rows of both embeddings, which are two matrices."""
    d_model: int = 768
    """Width of the encoder's residual stream, and of the encoding."""
    d_ff: int = 2048
    """Width of the hidden layer of the encoder's MLPs."""
    num_encoder_layers: int = 12
    """Layers of the encoder."""
    num_heads: int = 12
    """Heads of the encoder's queries."""
    num_kv_heads: int = 12
    """Heads of the encoder's keys and values, each shared by num_heads / num_kv_heads heads of
    queries."""
    head_dim: int = 64
    """Width of one head of the encoder."""
    decoder_d_model: int = 768
    """Width of the decoder's residual stream; its cross-attention reads the encoder's width."""
    decoder_d_ff: int = 2048
    """Width of the hidden layer of the decoder's MLPs."""
    num_decoder_layers: int = 12
    """Layers of the decoder."""
    decoder_num_heads: int = 12
    """Heads of the decoder's queries, in self- and cross-attention."""
    decoder_num_kv_heads: int = 12
    """Heads of the decoder's keys and values, likewise."""
    decoder_head_dim: int = 64
    """Width of one head of the decoder."""
    max_positions: int = 8192
    """Tokens of the longest text that it was trained for, on either side."""
    rope_theta: float = 10_000.0
    """Base of the rotations' wavelengths. Cross-attention has no positions."""
    query_pre_attention_scalar: int | None = None
    """Scores are multiplied by its inverse square root. None: the head_dim of either side."""
    attention_softcap: float | None = 50.0
    """Squeeze scores into (-cap, cap) by tanh. None: no cap."""
    final_softcap: float | None = 30.0
    """Squeeze logits likewise. None: no cap."""
    layer_pattern: tuple[LayerKind, ...] = ("local", "global")
    """Kinds of either side's layers from the first one on, repeated to the last."""
    sliding_window: int | None = 4096
    """Tokens that a local layer of the decoder sees, itself among them; one of the encoder sees as
    many before it and as many behind it. None: there is no local layer."""
    norm_epsilon: float = 1e-6
    """Added to the variance in every RMSNorm."""
    tie_word_embeddings: bool = True
    """One matrix for the decoder's embedding and the output, or a separate lm_head."""
    dropout_rate: float = 0.0
    """Dropout in training, of embeddings, attention, all branches of every layer, and what either
    side returns; it was pretrained with 0."""
    initializer_range: float = 0.02
    """Standard deviation of initial matrices; those that write to a residual stream begin at
    (2 layers)^-0.5 of it."""
    pad_token_id: int = 0
    """Id of padding among the encoder's inputs; also what is written behind the end."""
    eos_token_id: int = 1
    """Id that ends a sequence."""
    more_eos_token_ids: tuple[int, ...] = ()
    """Further ids that end it when text is written, such as that behind a chat's turn."""
    decoder_start_token_id: int = 2
    """Id that the decoder starts from; Hugging Face: bos_token_id."""
    dtype: Dtype = "float32"
    """What activations are computed in; norms' statistics, rotations, softmax and logits stay
    float32."""
    param_dtype: Dtype = "float32"
    """What parameters are stored in; optimizer states are float32 always."""
    scan_layers: bool = True
    """Compile one layer and loop over it (fast to compile), or unroll the loop (faster to run
    on CPU). The parameters are the same."""
    remat: RematPolicy = "none"
    """Recompute in the backward pass: nothing, all but weight products (minimal), or all (full)."""

    def __post_init__(self):
        check_fields(self)
        for side in ("", "decoder_"):
            self._check_heads(side)
        # What either side shares with Gemma 2 is checked as there.
        _ = self.encoder, self.decoder

    def _check_heads(self, side: str):
        def field(name):
            return f"model.{side}{name}", getattr(self, side + name)

        (width_name, width), (heads_name, heads) = field("d_model"), field("num_heads")
        (kv_name, kv_heads), (head_name, head_dim) = field("num_kv_heads"), field("head_dim")
        if heads % kv_heads:
            raise ValueError(
                f"{heads_name} {heads} is not divisible by {kv_name} {kv_heads}; every head of "
                "keys serves as many heads of queries"
            )
        if head_dim % 2:
            raise ValueError(f"{head_name} is {head_dim}; rope turns pairs, so it must be even")
        if width % heads:
            raise ValueError(
                f"{width_name} {width} is not divisible by {heads_name} {heads}; transformers "
                "refuses such a t5gemma"
            )

    @property
    def kind(self) -> Kind:
        return "encoder_decoder"

    @property
    def num_outputs(self) -> int:
        """Width of the logits."""
        return self.vocab_size

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence, first the one that it was trained with."""
        return (self.eos_token_id, *self.more_eos_token_ids)

    @property
    def encoder(self) -> GPTConfig:
        """The Gemma 2 whose layers the encoder has."""
        return self._gemma2(
            d_model=self.d_model,
            d_ff=self.d_ff,
            num_layers=self.num_encoder_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
        )

    @property
    def decoder(self) -> GPTConfig:
        """The Gemma 2 whose layers the decoder has, beside cross-attention."""
        return self._gemma2(
            d_model=self.decoder_d_model,
            d_ff=self.decoder_d_ff,
            num_layers=self.num_decoder_layers,
            num_heads=self.decoder_num_heads,
            num_kv_heads=self.decoder_num_kv_heads,
            head_dim=self.decoder_head_dim,
        )

    def _gemma2(self, *, num_layers: int, **shape: int) -> GPTConfig:
        pattern, window = self.layer_pattern, self.sliding_window
        if num_layers < max(self.num_encoder_layers, self.num_decoder_layers):
            pattern = pattern[:num_layers]
            window = window if "local" in pattern else None
        shared = {field.name for field in dataclasses.fields(GPTConfig)} & {
            field.name for field in dataclasses.fields(self)
        }
        fields = {name: getattr(self, name) for name in shared} | {
            "family": "gemma2",
            "position": "rope",
            "norm": "rmsnorm",
            "norm_plus_one": True,
            "post_norms": True,
            "mlp_activation": "gated-gelu",
            "attention_bias": False,
            "mlp_bias": False,
            "scale_embedding": True,
            "layer_pattern": pattern,
            "sliding_window": window,
            "num_layers": num_layers,
        }
        return GPTConfig(**fields | shape)


# --- Published sizes ----------------------------------------------------------------------------


_SHAPE = ("d_model", "d_ff", "num_encoder_layers", "num_heads", "num_kv_heads", "head_dim")
_DECODER_SHAPE = tuple(
    "num_decoder_layers" if name == "num_encoder_layers" else f"decoder_{name}" for name in _SHAPE
)


def _t5gemma(encoder, decoder=None):
    shapes = zip((*_SHAPE, *_DECODER_SHAPE), (*encoder, *(decoder or encoder)), strict=True)
    return T5GemmaConfig(**dict(shapes))


_2B = (2304, 9216, 26, 8, 4, 256)
_9B = (3584, 14336, 42, 16, 8, 256)

SIZES: dict[str, T5GemmaConfig] = {
    "t5gemma_s_s": _t5gemma((512, 1024, 8, 8, 8, 64)),
    "t5gemma_b_b": _t5gemma((768, 2048, 12, 12, 12, 64)),
    "t5gemma_l_l": _t5gemma((1024, 2816, 24, 16, 16, 64)),
    "t5gemma_ml_ml": _t5gemma((1152, 6912, 26, 4, 4, 256)),
    "t5gemma_xl_xl": _t5gemma((2048, 5120, 24, 32, 32, 64)),
    "t5gemma_2b_2b": _t5gemma(_2B),
    "t5gemma_9b_2b": _t5gemma(_9B, _2B),
    "t5gemma_9b_9b": _t5gemma(_9B),
}
