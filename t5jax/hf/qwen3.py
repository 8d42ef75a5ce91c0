"""Qwen 3 in Hugging Face's format: Llama's names, and norms of queries and keys.

Source: the checkpoints on the Hub and transformers 4 and 5 (`models/qwen3`).
"""

from typing import Any

from t5jax.architectures import GPTConfig, LayerKind
from t5jax.hf import llama, rope, tokens, windows
from t5jax.hf.keys import SILU, Key
from t5jax.hf.mapping import Table, Tensors

_KEYS = llama.keys(
    vocab_size=151936,
    intermediate_size=22016,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=32768,
) | {
    "use_sliding_window": Key(bool, False),
    "sliding_window": Key(int, 4096, may_be_null=True),
    "max_window_layers": Key(int, 28),
}


def read_config(raw: dict[str, Any], checkpoint: Tensors) -> GPTConfig:
    """Returns the description of the network in config.json.

    Raises:
      ValueError: if a value is not implemented here, or has another type than its key.
    """
    values, fields = llama.read_shape(raw, _KEYS, {"hidden_act": SILU}, ("layer_types",))
    num_layers, window = fields["num_layers"], None
    kinds: list[LayerKind] = ["global"] * num_layers
    if values["use_sliding_window"]:
        window = values["sliding_window"]
        first = min(values["max_window_layers"], num_layers)
        kinds[first:] = ["local"] * (num_layers - first)
    return GPTConfig(
        family="qwen3",
        mlp_activation="gated-silu",
        mlp_bias=False,
        qk_norm=True,
        **fields,
        **windows.read_layers(raw, num_layers, kinds, window),
        **rope.read_rope(raw, theta=10_000.0),
        **tokens.read_token_ids(raw),
    )


def write_config(config: GPTConfig) -> dict[str, Any]:
    """Returns config.json, without the dtype of the weights."""
    local = config.local_layers
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "use_sliding_window": any(local),
        "sliding_window": config.sliding_window,
        # layer_types also represents other patterns.
        "max_window_layers": local.index(True) if any(local) else config.num_layers,
        "layer_types": windows.write_layer_types(config),
        **llama.write_shape(config),
    }


TABLE = Table(
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    read_config=read_config,
    write_config=write_config,
    rows=llama.rows,
    ignored=llama.IGNORED,
    renames=llama.RENAMES,
)
