"""The description of decoder-only networks of all families.

Each family's own file has its restrictions and its published sizes.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from t5jax.architectures.base import Kind, description
from t5jax.architectures.families import FAMILIES
from t5jax.architectures.stack import StackConfig
from t5jax.checks import check_positive

if TYPE_CHECKING:
    GPTFamily = str
else:
    GPTFamily = Literal[tuple(n for n, f in FAMILIES.items() if f.description == "gpt.GPTConfig")]
GPTActivation = Literal["gelu", "gelu-exact", "relu", "gated-gelu", "gated-silu"]
RopeScaling = Literal["none", "linear", "llama3"]


@description()
class GPTConfig(StackConfig):
    """Decoder-only models.

    A family fixes some of the fields, as its checkpoints cannot represent other values; start from
    a published size and change it.
    """

    family: GPTFamily = "gpt2"
    """The family, named after the `model_type` of its Hugging Face checkpoints."""
    num_layers: int = 12
    """Number of layers."""
    mlp_activation: GPTActivation = "gelu"
    """gelu (tanh approximation), gelu-exact or relu; gated ones have a second input matrix."""
    position: Literal["learned", "rope"] = "learned"
    """Learned position embeddings, or rotary ones of queries and keys."""
    rope_theta: float | None = None
    """rope: base of the wavelengths."""
    rope_local_theta: float | None = None
    """rope: base in local layers, which are not scaled. None: the same as in global layers."""
    rope_scaling: RopeScaling = "none"
    """rope: how wavelengths are scaled for texts longer than those of the initial training: all of
    them alike (linear), or only the long ones (llama3)."""
    rope_scaling_factor: float | None = None
    """rope_scaling: the factor."""
    rope_low_frequency_factor: float | None = None
    """llama3: wavelengths above rope_original_max_positions / this are fully scaled."""
    rope_high_frequency_factor: float | None = None
    """llama3: wavelengths below rope_original_max_positions / this are not scaled."""
    rope_original_max_positions: int | None = None
    """llama3: longest text in tokens before the scaling."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """LayerNorm with scale and bias, or RMSNorm."""
    norm_plus_one: bool = False
    """rmsnorm: multiply by 1 + scale; the scale is initialized to 0."""
    qk_norm: bool = False
    """Normalize queries and keys over the dimension of a head."""
    post_norms: bool = False
    """Also normalize the outputs of attention and MLP, before the residual addition."""
    attention_bias: bool = True
    """Biases in the four projections of attention."""
    mlp_bias: bool = True
    """Biases in the MLP."""
    scale_embedding: bool = False
    """Multiply embeddings by d_model^0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm == "layernorm" and (self.norm_plus_one or self.qk_norm):
            raise ValueError(
                "model.norm_plus_one and model.qk_norm are of rmsnorm; set model.norm to rmsnorm, "
                "or leave them out"
            )
        self._check_rope()
        if not 1 <= len(self.layer_pattern) <= self.num_layers:
            raise ValueError(
                f"model.layer_pattern has {len(self.layer_pattern)} entries; expected 1 to "
                f"{self.num_layers}, the number of layers"
            )
        if self.rope_local_theta is not None and "local" not in self.layer_pattern:
            raise ValueError(
                f"model.rope_local_theta is {self.rope_local_theta}, but model.layer_pattern has "
                "no local layer; leave it out"
            )
        importlib.import_module(f"t5jax.architectures.{self.family}").check(self)

    def _check_rope(self) -> None:
        fields = [f.name for f in dataclasses.fields(self) if f.name.startswith("rope_")]
        needed = {
            "none": set(),
            "linear": {"rope_scaling_factor"},
            "llama3": {name for name in fields if name.startswith(_STRETCHED)},
        }[self.rope_scaling]
        if self.position == "rope":
            needed = needed | {"rope_theta"}
        elif self.rope_scaling != "none":
            raise ValueError(
                f"model.rope_scaling is {self.rope_scaling!r}, but model.position is "
                f"{self.position!r}; leave it out"
            )
        optional = {"rope_scaling"} | ({"rope_local_theta"} if self.position == "rope" else set())
        for name in fields:
            value = getattr(self, name)
            if name in needed and value is None:
                raise ValueError(
                    f"model.{name} is None; model.position {self.position} with "
                    f"model.rope_scaling {self.rope_scaling} needs it"
                )
            if name not in needed | optional and value is not None:
                raise ValueError(
                    f"model.{name} is {value}, but model.position {self.position} with "
                    f"model.rope_scaling {self.rope_scaling} has no use for it; leave it out"
                )
            if name != "rope_scaling" and value is not None:
                check_positive(value, f"model.{name}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(
                f"model.head_dim is {self.head_dim}; rope turns pairs, so it must be even"
            )
        low, high = self.rope_low_frequency_factor, self.rope_high_frequency_factor
        if low is not None and high is not None and not low < high:
            raise ValueError(
                f"model.rope_low_frequency_factor {low} must be below "
                f"model.rope_high_frequency_factor {high}"
            )

    @property
    def kind(self) -> Kind:
        return "decoder"

    @property
    def longest_row(self) -> int | None:
        return self.max_positions if self.position == "learned" else None

    @property
    def gated(self) -> bool:
        return self.mlp_activation.startswith("gated-")

    @property
    def query_scale(self) -> float:
        """The factor of the attention scores."""
        scale: float = (self.query_pre_attention_scalar or self.head_dim) ** -0.5
        return scale

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it is local."""
        pattern = self.layer_pattern
        return tuple(pattern[i % len(pattern)] == "local" for i in range(self.num_layers))


_STRETCHED = ("rope_scaling_factor", "rope_low_", "rope_high_", "rope_original_")


# --- Shared by the families' own files ------------------------------------------------------------

Allowed = Mapping[str, tuple[Any, ...]]
"""Fields and the values of them that a family's checkpoints can represent."""


def check_allowed(config: GPTConfig, allowed: Allowed) -> None:
    """Raises ValueError for a value that the family's checkpoints cannot represent."""
    for name, values in allowed.items():
        value = getattr(config, name)
        if value not in values:
            raise ValueError(
                f"model.{name} is {value!r}, which no checkpoint of {config.family} can say; "
                f"expected {' or '.join(map(repr, values))}, or another model.family"
            )


def check_even_width(config: GPTConfig) -> None:
    """Raises ValueError for a width that transformers rejects, even if head_dim is given."""
    if config.d_model % config.num_heads:
        raise ValueError(
            f"model.d_model {config.d_model} is not divisible by model.num_heads "
            f"{config.num_heads}; transformers refuses such a {config.family}"
        )


def rope_config(
    d_model: int,
    d_ff: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    **rest: Any,
) -> GPTConfig:
    """Returns a network with rotary embeddings and RMSNorm, without biases and dropout."""
    return GPTConfig(
        d_model=d_model,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        position="rope",
        norm="rmsnorm",
        attention_bias=False,
        mlp_bias=False,
        dropout_rate=0.0,
        **rest,
    )
