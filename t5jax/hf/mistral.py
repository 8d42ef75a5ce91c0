"""Mistral in Hugging Face's format: Llama's names, and optionally a window in all layers.

Source: the checkpoints on the Hub and transformers 5 (`models/mistral`).
"""

from typing import Any

from t5jax.architectures import GPTConfig
from t5jax.hf import llama, rope, tokens
from t5jax.hf.mapping import SILU, Key, Table, Tensors

_KEYS = llama.keys(
    intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072
) | {"sliding_window": Key(int, 4096, may_be_null=True)}
_REQUIRED = {"hidden_act": SILU, "attention_bias": (False,)}


def read_config(raw: dict[str, Any], checkpoint: Tensors) -> GPTConfig:
    """Returns the description of the network in config.json.

    Raises:
      ValueError: if a value is not implemented here, or has another type than its key.
    """
    values, fields = llama.read_shape(raw, _KEYS, _REQUIRED)
    window = values["sliding_window"]
    return GPTConfig(
        family="mistral",
        mlp_activation="gated-silu",
        mlp_bias=False,
        layer_pattern=("global",) if window is None else ("local",),
        sliding_window=window,
        **fields,
        **rope.read_rope(raw, theta=10_000.0),
        **tokens.read_token_ids(raw, bos=1, eos=2),
    )


def write_config(config: GPTConfig) -> dict[str, Any]:
    """Returns config.json, without the dtype of the weights."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "sliding_window": config.sliding_window,
        **llama.write_shape(config),
    }


TABLE = Table(
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    read_config=read_config,
    write_config=write_config,
    rows=llama.rows,
    ignored=llama.IGNORED,
    renames=llama.RENAMES,
)
