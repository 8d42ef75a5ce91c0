"""The description of the T5 family, and its published sizes by name."""

import dataclasses
from typing import Any, Literal, Self

from t5jax.architectures.base import Architecture, Kind, description

MlpActivation = Literal["relu", "gated-gelu", "gated-silu"]


@description()
class T5Config(Architecture):
    """The T5 family: 1.0, 1.1 / LM-adapted / FLAN, mT5, UMT5, ByT5 and UL2.

    Raffel et al. 2020 (arXiv:1910.10683); Shazeer 2020 (arXiv:2002.05202) for the gated MLP of
    1.1; Chung et al. 2023 (arXiv:2304.09151) for UMT5; Tay et al. 2022 (arXiv:2205.05131) for UL2.
    """

    family: Literal["t5"] = "t5"
    """The family, named after the `model_type` of its Hugging Face checkpoints."""
    vocab_size: int = 32128
    """Rows of the embedding; larger than the tokenizer's vocabulary."""
    d_model: int = 512
    """Width of the residual stream."""
    d_kv: int = 64
    """Dimension of an attention head; num_heads * d_kv may differ from d_model."""
    d_ff: int = 1024
    """Width of the MLP's hidden layer."""
    num_heads: int = 6
    """Attention heads per layer."""
    num_encoder_layers: int = 8
    """Number of layers of the encoder (Hugging Face: num_layers)."""
    num_decoder_layers: int = 8
    """Number of layers of the decoder. 0: only the encoder, which computes embeddings."""
    mlp_activation: MlpActivation = "gated-gelu"
    """relu (1.0), gated-gelu (1.1, mT5, UMT5, ByT5) or gated-silu (UL2); HF: feed_forward_proj."""
    tie_word_embeddings: bool = False
    """Use the embedding as the output matrix (1.0), or a separate lm_head (1.1 and later)."""
    scale_decoder_outputs: bool = False
    """Multiply the decoder's output by d_model^-0.5 before the output matrix (1.0)."""
    relative_attention_num_buckets: int = 32
    """Number of buckets of the relative position bias."""
    relative_attention_max_distance: int = 128
    """Distance in tokens beyond which all positions share the last bucket."""
    per_layer_relative_bias: bool = False
    """Use a bias table in every self-attention layer (UMT5), or one per stack."""
    layer_norm_epsilon: float = 1e-6
    """Added to the variance in every RMSNorm."""
    dropout_rate: float = 0.1
    """Dropout in training; 1.1 was pre-trained with 0 and is fine-tuned with 0.1."""
    initializer_factor: float = 1.0
    """Multiplies all initial standard deviations."""
    pad_token_id: int = 0
    """Id of padding."""
    eos_token_id: int = 1
    """Id that ends a sequence."""
    more_eos_token_ids: tuple[int, ...] = ()
    """Further ids that end generation."""
    decoder_start_token_id: int = 0
    """Id that begins the decoder's text."""

    MAY_BE_ZERO = ("num_decoder_layers",)
    TAKES_SOFT_PROMPTS = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("layer_norm_epsilon", "initializer_factor")
        self._check_ends()
        for name in ("tie_word_embeddings", "scale_decoder_outputs"):
            if self.kind == "encoder" and getattr(self, name):
                raise ValueError(
                    f"model.{name} is True, but with model.num_decoder_layers 0 there is no output "
                    "matrix; set it to False"
                )
        if self.relative_attention_num_buckets % 4:
            raise ValueError(
                f"model.relative_attention_num_buckets is {self.relative_attention_num_buckets}; "
                "it must be a multiple of 4: each direction halves it, then near and far do"
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError(
                f"model.relative_attention_max_distance is {self.relative_attention_max_distance}; "
                "it must be larger than half the buckets "
                f"({self.relative_attention_num_buckets // 2}), which count single tokens"
            )

    @property
    def kind(self) -> Kind:
        return "encoder_decoder" if self.num_decoder_layers else "encoder"

    @property
    def start_token_id(self) -> int:
        return self.decoder_start_token_id

    @property
    def prompt_end(self) -> tuple[int, ...]:
        return (self.eos_token_id,)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        return (self.eos_token_id, *self.more_eos_token_ids)

    @property
    def gated(self) -> bool:
        return self.mlp_activation.startswith("gated-")

    def encoder_alone(self) -> Self | None:
        if self.kind == "encoder":
            return None
        return dataclasses.replace(
            self,
            num_decoder_layers=0,
            tie_word_embeddings=False,
            scale_decoder_outputs=False,
            kv_cache=None,
        )


# --- Published sizes ----------------------------------------------------------------------------

_T5_1_0: dict[str, Any] = {
    "mlp_activation": "relu",
    "tie_word_embeddings": True,
    "scale_decoder_outputs": True,
}


def _t5(
    d_model: int,
    d_ff: int,
    d_kv: int,
    num_heads: int,
    layers: int,
    decoder_layers: int | None = None,
    **rest: Any,
) -> T5Config:
    return T5Config(
        d_model=d_model,
        d_ff=d_ff,
        d_kv=d_kv,
        num_heads=num_heads,
        num_encoder_layers=layers,
        num_decoder_layers=decoder_layers or layers,
        **rest,
    )


SIZES: dict[str, T5Config] = {
    "t5_small": _t5(512, 2048, 64, 8, 6, **_T5_1_0),
    "t5_base": _t5(768, 3072, 64, 12, 12, **_T5_1_0),
    "t5_large": _t5(1024, 4096, 64, 16, 24, **_T5_1_0),
    "t5_3b": _t5(1024, 16384, 128, 32, 24, **_T5_1_0),
    "t5_11b": _t5(1024, 65536, 128, 128, 24, **_T5_1_0),
    "t5_1_1_small": _t5(512, 1024, 64, 6, 8),
    "t5_1_1_base": _t5(768, 2048, 64, 12, 12),
    "t5_1_1_large": _t5(1024, 2816, 64, 16, 24),
    "t5_1_1_xl": _t5(2048, 5120, 64, 32, 24),
    "t5_1_1_xxl": _t5(4096, 10240, 64, 64, 24),
    "ul2": _t5(4096, 16384, 256, 16, 32, mlp_activation="gated-silu"),
}
for _size in ("small", "base", "large", "xl", "xxl"):
    _shape = SIZES[f"t5_1_1_{_size}"]
    # FLAN and the LM-adapted models are 1.1 trained further.
    SIZES[f"flan_t5_{_size}"] = _shape
    SIZES[f"mt5_{_size}"] = dataclasses.replace(_shape, vocab_size=250112)
    if _size != "large":  # Never published.
        SIZES[f"umt5_{_size}"] = dataclasses.replace(
            _shape, vocab_size=256384, per_layer_relative_bias=True
        )
SIZES |= {
    "flan_ul2": SIZES["ul2"],
    "byt5_small": _t5(1472, 3584, 64, 6, 12, 4, vocab_size=384),
    "byt5_base": _t5(1536, 3968, 64, 12, 18, 6, vocab_size=384),
    "byt5_large": _t5(1536, 3840, 64, 16, 36, 12, vocab_size=384),
    "byt5_xl": _t5(2560, 6720, 64, 32, 36, 12, vocab_size=384),
    "byt5_xxl": _t5(4672, 12352, 64, 64, 36, 12, vocab_size=384),
    # Not published: the 1.1 of the quickstart, which learns a small task on a CPU.
    "t5_tiny": _t5(128, 256, 32, 4, 2, vocab_size=384),
}
