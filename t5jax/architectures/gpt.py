"""The description of decoder-only networks, GPT-2 to Gemma 3, and their published sizes by name."""

import dataclasses
from typing import Any, Literal

from t5jax.architectures.common import (
    Dtype,
    Kind,
    RematPolicy,
    check_above_0,
    check_choice,
    check_fields,
)

GPTFamily = Literal["gpt2", "llama", "qwen3", "gemma2", "gemma3"]
GPTActivation = Literal["gelu", "gelu-exact", "relu", "gated-gelu", "gated-silu"]
LayerKind = Literal["global", "local"]
RopeScaling = Literal["none", "linear", "llama3"]


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Decoder-only models: GPT-2, Llama 3, Qwen 3, Gemma 2 and Gemma 3's text models.

    Radford et al. 2019 for GPT-2; arXiv:2407.21783 for Llama 3; arXiv:2505.09388 for Qwen 3;
    arXiv:2408.00118 for Gemma 2; arXiv:2503.19786 for Gemma 3. A family fixes some of the fields,
    as its checkpoints have no word for other values: start from a published size and change it.
    """

    family: GPTFamily = "gpt2"
    """Whose checkpoints hold such a network."""
    vocab_size: int = 50257
    """Rows of the embedding; may be more than the tokenizer has."""
    d_model: int = 768
    """Width of the residual stream."""
    num_layers: int = 12
    """Layers."""
    num_heads: int = 12
    """Heads of every layer's queries."""
    num_kv_heads: int = 12
    """Heads of keys and values, each shared by num_heads / num_kv_heads heads of queries."""
    head_dim: int = 64
    """Width of one head; num_heads * head_dim may differ from d_model, but not in GPT-2."""
    d_ff: int = 3072
    """Width of the MLP's hidden layer."""
    mlp_activation: GPTActivation = "gelu"
    """GPT-2: gelu (by tanh), gelu-exact or relu. Llama and Qwen: gated-silu. Gemma: gated-gelu."""
    position: Literal["learned", "rope"] = "learned"
    """A learned vector for each position (GPT-2), or queries and keys turned by their position."""
    max_positions: int = 1024
    """Tokens of the longest text: rows of the learned positions, or what rope was trained for."""
    rope_theta: float | None = None
    """rope: base of the wavelengths."""
    rope_local_theta: float | None = None
    """rope: base in local layers, which are not scaled (Gemma 3). None: local layers turn as
    global ones do."""
    rope_scaling: RopeScaling = "none"
    """rope: how wavelengths are stretched for longer texts than the network was first trained on:
    all of them alike (linear), or the long ones alone (llama3)."""
    rope_scaling_factor: float | None = None
    """rope_scaling: by how much."""
    rope_low_frequency_factor: float | None = None
    """llama3: wavelengths above rope_original_max_positions / this are stretched in full."""
    rope_high_frequency_factor: float | None = None
    """llama3: wavelengths below rope_original_max_positions / this stay as they are."""
    rope_original_max_positions: int | None = None
    """llama3: tokens of the longest text before the stretching."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """LayerNorm with scale and bias (GPT-2), or RMSNorm."""
    norm_plus_one: bool = False
    """rmsnorm: multiply by 1 + scale, and so begin at scale 0 (Gemma)."""
    norm_epsilon: float = 1e-5
    """Added to the variance in every norm."""
    qk_norm: bool = False
    """Norms of queries and keys over the width of a head (Qwen 3, Gemma 3)."""
    post_norms: bool = False
    """Norms behind attention and MLP too, before they join the residual stream (Gemma)."""
    attention_bias: bool = True
    """Biases in attention's four matrices."""
    mlp_bias: bool = True
    """Biases in the MLP's matrices."""
    scale_embedding: bool = False
    """Multiply embeddings by d_model^0.5 (Gemma)."""
    query_pre_attention_scalar: int | None = None
    """Scores are multiplied by its inverse square root (Gemma). None: head_dim."""
    attention_softcap: float | None = None
    """Squeeze scores into (-cap, cap) by tanh (Gemma 2). None: no cap."""
    final_softcap: float | None = None
    """Squeeze logits likewise. None: no cap."""
    layer_pattern: tuple[LayerKind, ...] = ("global",)
    """Kinds of the layers from the first one on, repeated to the last. A local layer's tokens see
    the last sliding_window tokens, themselves among them."""
    sliding_window: int | None = None
    """Tokens that a local layer sees. None: there is no local layer."""
    tie_word_embeddings: bool = True
    """One matrix for embedding and output, or a separate lm_head."""
    dropout_rate: float = 0.1
    """Dropout in training, of embeddings, attention and both branches of every layer."""
    initializer_range: float = 0.02
    """Standard deviation of initial matrices; those that write to the residual stream begin at
    (2 num_layers)^-0.5 of it."""
    pad_token_id: int = 50256
    """Id written where nothing is read; any will do, as padding is told by segment ids."""
    eos_token_id: int = 50256
    """Id that ends a text."""
    more_eos_token_ids: tuple[int, ...] = ()
    """Further ids that end it when text is written, such as that behind a chat's turn."""
    decoder_start_token_id: int = 50256
    """Id that a text begins with; Hugging Face: bos_token_id."""
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
        check_above_0(self, "norm_epsilon", "initializer_range")
        for name in ("attention_softcap", "final_softcap"):
            if getattr(self, name) is not None:
                check_above_0(self, name)
        ends = self.end_token_ids
        if len(set(ends)) < len(ends) or not all(0 <= i < self.vocab_size for i in ends):
            raise ValueError(
                f"model.more_eos_token_ids is {self.more_eos_token_ids}; expected different ids in "
                f"[0, {self.vocab_size}), the vocabulary, other than model.eos_token_id "
                f"{self.eos_token_id}"
            )
        self._check_heads()
        self._check_rope()
        self._check_layers()
        self._check_family()

    def _check_heads(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads "
                f"{self.num_kv_heads}; every head of keys serves as many heads of queries"
            )
        if self.norm == "layernorm" and (self.norm_plus_one or self.qk_norm):
            raise ValueError(
                "model.norm_plus_one and model.qk_norm are of rmsnorm; set model.norm to rmsnorm, "
                "or leave them out"
            )

    def _check_rope(self):
        fields = [f.name for f in dataclasses.fields(self) if f.name.startswith("rope_")]
        needed = {
            "none": set(),
            "linear": {"rope_scaling_factor"},
            "llama3": {name for name in fields if name.startswith(_LLAMA3)},
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
                check_above_0(self, name)
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(
                f"model.head_dim is {self.head_dim}; rope turns pairs, so it must be even"
            )
        if self.rope_scaling == "llama3" and not (
            self.rope_low_frequency_factor < self.rope_high_frequency_factor
        ):
            raise ValueError(
                f"model.rope_low_frequency_factor {self.rope_low_frequency_factor} must be below "
                f"model.rope_high_frequency_factor {self.rope_high_frequency_factor}"
            )

    def _check_layers(self):
        for kind in self.layer_pattern:
            check_choice(kind, LayerKind.__args__, "model.layer_pattern")
        if not 1 <= len(self.layer_pattern) <= self.num_layers:
            raise ValueError(
                f"model.layer_pattern has {len(self.layer_pattern)} entries; expected 1 to "
                f"{self.num_layers}, the number of layers"
            )
        if ("local" in self.layer_pattern) != (self.sliding_window is not None):
            raise ValueError(
                f"model.sliding_window is {self.sliding_window} with model.layer_pattern "
                f"{self.layer_pattern}; a window needs local layers, and they a window"
            )
        if self.rope_local_theta is not None and "local" not in self.layer_pattern:
            raise ValueError(
                f"model.rope_local_theta is {self.rope_local_theta}, but model.layer_pattern has "
                "no local layer; leave it out"
            )

    def _check_family(self):
        for name, allowed in _ALLOWED[self.family].items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"model.{name} is {value!r}, which no checkpoint of {self.family} can say; "
                    f"expected {' or '.join(map(repr, allowed))}, or another model.family"
                )
        if self.family == "gpt2":
            if (self.num_heads * self.head_dim, self.num_kv_heads) != (
                self.d_model,
                self.num_heads,
            ):
                raise ValueError(
                    f"model.num_heads {self.num_heads}, model.num_kv_heads {self.num_kv_heads} and "
                    f"model.head_dim {self.head_dim} do not fit gpt2: as many heads of keys as of "
                    f"queries, together model.d_model {self.d_model} wide"
                )
        elif self.family != "qwen3" and self.d_model % self.num_heads:
            raise ValueError(
                f"model.d_model {self.d_model} is not divisible by model.num_heads "
                f"{self.num_heads}; transformers refuses such a {self.family}"
            )
        if self.family == "gemma3" and "local" in self.layer_pattern and not self.rope_local_theta:
            raise ValueError("model.rope_local_theta is None; local layers of gemma3 need it")

    @property
    def kind(self) -> Kind:
        return "decoder"

    @property
    def num_outputs(self) -> int:
        """Width of the logits."""
        return self.vocab_size

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text, first the one that it was trained with."""
        return (self.eos_token_id, *self.more_eos_token_ids)

    @property
    def gated(self) -> bool:
        return self.mlp_activation.startswith("gated-")

    @property
    def query_scale(self) -> float:
        """What the scores of attention are multiplied by."""
        return (self.query_pre_attention_scalar or self.head_dim) ** -0.5

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it is a local one."""
        pattern = self.layer_pattern
        return tuple(pattern[i % len(pattern)] == "local" for i in range(self.num_layers))


_LLAMA3 = ("rope_scaling_factor", "rope_low_", "rope_high_", "rope_original_")

# What the checkpoints of a family can say; they have no word for any other value.
_NO, _NONE = (False,), (None,)
_ROPE: dict[str, tuple[Any, ...]] = {
    "position": ("rope",),
    "norm": ("rmsnorm",),
    "norm_plus_one": _NO,
    "mlp_activation": ("gated-silu",),
    "qk_norm": _NO,
    "post_norms": _NO,
    "scale_embedding": _NO,
    "query_pre_attention_scalar": _NONE,
    "attention_softcap": _NONE,
    "final_softcap": _NONE,
    "rope_local_theta": _NONE,
}
_GEMMA = {
    "position": ("rope",),
    "norm": ("rmsnorm",),
    "norm_plus_one": (True,),
    "mlp_activation": ("gated-gelu",),
    "mlp_bias": _NO,
    "post_norms": (True,),
    "scale_embedding": (True,),
}
_ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": _ROPE
    | {
        "position": ("learned",),
        "norm": ("layernorm",),
        "mlp_activation": ("gelu", "gelu-exact", "relu"),
        "attention_bias": (True,),
        "mlp_bias": (True,),
        "layer_pattern": (("global",),),
    },
    "llama": _ROPE | {"layer_pattern": (("global",),)},
    "qwen3": _ROPE | {"qk_norm": (True,), "mlp_bias": _NO},
    "gemma2": _GEMMA | {"qk_norm": _NO, "rope_local_theta": _NONE},
    "gemma3": _GEMMA | {"qk_norm": (True,), "attention_softcap": _NONE},
}


# --- Published sizes ----------------------------------------------------------------------------


def _gpt2(d_model, layers, heads):
    return GPTConfig(
        d_model=d_model,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=64,
        d_ff=4 * d_model,
    )


def _rope(family, d_model, d_ff, layers, heads, kv_heads, head_dim, **rest):
    return GPTConfig(
        family=family,
        d_model=d_model,
        d_ff=d_ff,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        position="rope",
        norm="rmsnorm",
        attention_bias=False,
        mlp_bias=False,
        dropout_rate=0.0,
        **rest,
    )


def _llama(*shape, stretched=None, tied=False):
    stretch = {
        "rope_scaling": "llama3",
        "rope_scaling_factor": stretched,
        "rope_low_frequency_factor": 1.0,
        "rope_high_frequency_factor": 4.0,
        "rope_original_max_positions": 8192,
    }
    return _rope(
        "llama",
        *shape,
        mlp_activation="gated-silu",
        vocab_size=128256,
        max_positions=131072 if stretched else 8192,
        rope_theta=500_000.0,
        tie_word_embeddings=tied,
        pad_token_id=128001,
        eos_token_id=128001,
        decoder_start_token_id=128000,
        **(stretch if stretched else {}),
    )


def _qwen3(d_model, d_ff, layers, heads, tied=True):
    return _rope(
        "qwen3",
        *(d_model, d_ff, layers, heads, 8, 128),
        mlp_activation="gated-silu",
        vocab_size=151936,
        max_positions=40960,
        rope_theta=1_000_000.0,
        norm_epsilon=1e-6,
        qk_norm=True,
        tie_word_embeddings=tied,
        pad_token_id=151645,
        eos_token_id=151645,
        decoder_start_token_id=151643,
    )


def _gemma(family, *shape, **rest):
    return _rope(
        family,
        *shape,
        mlp_activation="gated-gelu",
        norm_epsilon=1e-6,
        norm_plus_one=True,
        post_norms=True,
        scale_embedding=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=2,
        **rest,
    )


def _gemma2(*shape, scalar=None):
    return _gemma(
        "gemma2",
        *shape,
        vocab_size=256_000,
        max_positions=8192,
        rope_theta=10_000.0,
        query_pre_attention_scalar=scalar,
        attention_softcap=50.0,
        final_softcap=30.0,
        layer_pattern=("local", "global"),
        sliding_window=4096,
    )


def _gemma3(*shape, large=True, scalar=None):
    stretch = {"rope_scaling": "linear", "rope_scaling_factor": 8.0}
    return _gemma(
        "gemma3",
        *shape,
        vocab_size=262_208 if large else 262_144,
        max_positions=131_072 if large else 32_768,
        rope_theta=1_000_000.0,
        rope_local_theta=10_000.0,
        qk_norm=True,
        query_pre_attention_scalar=scalar,
        layer_pattern=(*("local",) * 5, "global"),
        sliding_window=1024 if large else 512,
        **(stretch if large else {}),
    )


SIZES: dict[str, GPTConfig] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2_medium": _gpt2(1024, 24, 16),
    "gpt2_large": _gpt2(1280, 36, 20),
    "gpt2_xl": _gpt2(1600, 48, 25),
    "llama3_8b": _llama(4096, 14336, 32, 32, 8, 128),
    "llama3_70b": _llama(8192, 28672, 80, 64, 8, 128),
    "llama3_1_8b": _llama(4096, 14336, 32, 32, 8, 128, stretched=8.0),
    "llama3_1_70b": _llama(8192, 28672, 80, 64, 8, 128, stretched=8.0),
    "llama3_2_1b": _llama(2048, 8192, 16, 32, 8, 64, stretched=32.0, tied=True),
    "llama3_2_3b": _llama(3072, 8192, 28, 24, 8, 128, stretched=32.0, tied=True),
    "qwen3_0_6b": _qwen3(1024, 3072, 28, 16),
    "qwen3_1_7b": _qwen3(2048, 6144, 28, 16),
    "qwen3_4b": _qwen3(2560, 9728, 36, 32),
    "qwen3_8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3_14b": _qwen3(5120, 17408, 40, 40, tied=False),
    "qwen3_32b": _qwen3(5120, 25600, 64, 64, tied=False),
    "gemma2_2b": _gemma2(2304, 9216, 26, 8, 4, 256),
    "gemma2_9b": _gemma2(3584, 14336, 42, 16, 8, 256),
    "gemma2_27b": _gemma2(4608, 36864, 46, 32, 16, 128, scalar=144),
    "gemma3_270m": _gemma3(640, 2048, 18, 4, 1, 256, large=False),
    "gemma3_1b": _gemma3(1152, 6912, 26, 4, 1, 256, large=False),
    "gemma3_4b": _gemma3(2560, 10240, 34, 8, 4, 256),
    "gemma3_12b": _gemma3(3840, 15360, 48, 16, 8, 256),
    "gemma3_27b": _gemma3(5376, 21504, 62, 32, 16, 128, scalar=168),
}
