"""The description of T5Gemma, and its published sizes by name."""

import dataclasses
import re
from typing import Any, Literal

from t5jax.architectures.base import Kind, description
from t5jax.architectures.gpt import GPTConfig
from t5jax.architectures.stack import StackConfig

# Fields that each stack has: `d_model` is the encoder's, `decoder_d_model` the decoder's.
_SHAPE = ("d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim")


@description(
    vocab_size=256_000,
    d_ff=2048,
    max_positions=8192,
    norm_epsilon=1e-6,
    attention_softcap=50.0,
    final_softcap=30.0,
    layer_pattern=("local", "global"),
    sliding_window=4096,
    dropout_rate=0.0,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=2,
)
class T5GemmaConfig(StackConfig):
    """T5Gemma: an encoder and a decoder of Gemma 2's layers, which may be of different sizes.

    Zhang et al. 2025 (arXiv:2504.06225); arXiv:2408.00118 for the layers.
    """

    family: Literal["t5gemma"] = "t5gemma"
    """The family, named after the `model_type` of its Hugging Face checkpoints."""
    num_encoder_layers: int = 12
    """Number of layers of the encoder."""
    num_decoder_layers: int = 12
    """Number of layers of the decoder."""
    decoder_d_model: int = 768
    """Width of the decoder's residual stream."""
    decoder_d_ff: int = 2048
    """Width of the hidden layer of the decoder's MLPs."""
    decoder_num_heads: int = 12
    """Query heads of the decoder, in self- and cross-attention."""
    decoder_num_kv_heads: int = 12
    """Key and value heads of the decoder, likewise."""
    decoder_head_dim: int = 64
    """Dimension of a head of the decoder."""
    rope_theta: float = 10_000.0
    """Base of the wavelengths of rotary embeddings. Cross-attention has no positions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Creating them checks the fields that are shared with Gemma 2.
        _ = self.encoder, self.decoder

    @property
    def kind(self) -> Kind:
        return "encoder_decoder"

    @property
    def prompt_start(self) -> tuple[int, ...]:
        return (self.decoder_start_token_id,)

    @property
    def encoder(self) -> GPTConfig:
        """The encoder's layers, as a Gemma 2."""
        return self._gemma2("", self.num_encoder_layers)

    @property
    def decoder(self) -> GPTConfig:
        """The decoder's layers without cross-attention, as a Gemma 2."""
        return self._gemma2("decoder_", self.num_decoder_layers)

    def _gemma2(self, side: str, num_layers: int) -> GPTConfig:
        pattern, window = self.layer_pattern, self.sliding_window
        if num_layers < max(self.num_encoder_layers, self.num_decoder_layers):
            pattern = pattern[:num_layers]
            window = window if "local" in pattern else None
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(StackConfig)}
        fields: dict[str, Any] = shared | {
            **{name: getattr(self, side + name) for name in _SHAPE},
            "family": "gemma2",
            "position": "rope",
            "rope_theta": self.rope_theta,
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
        try:
            return GPTConfig(**fields)
        except ValueError as error:
            names = rf"model\.({'|'.join(_SHAPE)})\b"
            message = re.sub(names, rf"model.{side}\1", str(error))
            raise ValueError(message.replace("gemma2", self.family)) from None


# --- Published sizes ----------------------------------------------------------------------------


_Shape = tuple[int, int, int, int, int, int]


def _t5gemma(encoder: _Shape, decoder: _Shape | None = None) -> T5GemmaConfig:
    sides = {"encoder": encoder, "decoder": decoder or encoder}
    fields: dict[str, Any] = {}
    for side, (d_model, d_ff, num_layers, *heads) in sides.items():
        fields[f"num_{side}_layers"] = num_layers
        prefix = "decoder_" if side == "decoder" else ""
        shape = zip(_SHAPE, (d_model, d_ff, *heads), strict=True)
        fields |= {prefix + name: size for name, size in shape}
    return T5GemmaConfig(**fields)


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
