"""Mistral in Hugging Face's format: Llama's names, and optionally a window in all layers.

Where only some have one (config.json's layer_types), transformers takes it for a Ministral; it is
refused.

Source: the checkpoints on the Hub and transformers 5 (`models/mistral`).
"""

from typing import Any

from t5jax.architectures import GPTConfig, LayerKind
from t5jax.hf import llama, rope, tokens, windows
from t5jax.hf.keys import SILU, Key
from t5jax.hf.mapping import Table, Tensors

_KEYS = llama.keys(
    intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072
) | {"sliding_window": Key(int, 4096, may_be_null=True)}
_REQUIRED = {"hidden_act": SILU, "attention_bias": (False,)}


def read_config(raw: dict[str, Any], checkpoint: Tensors) -> GPTConfig:
    """Returns the description of the network in config.json.

    Raises:
      ValueError: if a value is not implemented here, or has another type than its key.
    """
    values, fields = llama.read_shape(raw, _KEYS, _REQUIRED, ("layer_types",))
    window, num_layers = values["sliding_window"], fields["num_layers"]
    kinds: list[LayerKind] = ["global" if window is None else "local"] * num_layers
    layers = windows.read_layers(raw, num_layers, kinds, window)
    if len(layers["layer_pattern"]) > 1:
        raise ValueError(
            f"config.json: layer_types is {raw['layer_types']}, which is not implemented for "
            "Mistral; expected the same for all layers"
        )
    return GPTConfig(
        family="mistral",
        mlp_activation="gated-silu",
        mlp_bias=False,
        **fields,
        **layers,
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
