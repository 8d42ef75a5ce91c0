"""Gemma 2 in Hugging Face's format; Gemma 3 shares most of it.

Source: the checkpoints on the Hub and transformers 4 and 5 (`models/gemma2`). Names are Llama's,
except for the norms, which store w of a factor 1 + w, as here.
"""

from collections.abc import Callable, Sequence
from typing import Any

from t5jax.architectures import GPTConfig, LayerKind
from t5jax.hf import llama, rope, tokens, windows
from t5jax.hf.keys import GELU_TANH, Key
from t5jax.hf.mapping import Row, Table, Tensors

_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def rows(config: GPTConfig) -> list[Row]:
    """Returns the table of a Gemma model."""
    return llama.rows(config, _NORMS)


# --- config.json --------------------------------------------------------------------------------

SHARED = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
}
SHARED_KEYS = {
    "query_pre_attn_scalar": Key(int, 256),
    "sliding_window": Key(int, 4096, may_be_null=True),
}
_KEYS = (
    llama.keys(**SHARED, vocab_size=256_000, max_position_embeddings=8192)
    | SHARED_KEYS
    | {
        "attn_logit_softcapping": Key(float, 50.0, may_be_null=True),
        "final_logit_softcapping": Key(float, 30.0, may_be_null=True),
    }
)
REQUIRED = {
    # If it is absent, transformers assumes this one, regardless of hidden_act.
    "hidden_activation": ("gelu_pytorch_tanh", *GELU_TANH),
    "use_bidirectional_attention": (False,),
}

# The first is read elsewhere, as is layer_types; the kind of cache in transformers 4.
_HARMLESS = ("layer_types", "hidden_act", "cache_implementation", "_sliding_window_pattern")


def read_gemma(
    raw: dict[str, Any],
    known: dict[str, Key],
    pattern: Callable[[dict[str, Any]], Sequence[LayerKind]],
    required: dict[str, tuple[Any, ...]],
    harmless: tuple[str, ...] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the values of the known keys, and the fields that all Gemmas have.

    Args:
      raw: config.json.
      known: the family's keys.
      pattern: from the values to the repeated kinds of layers, if there is no layer_types.
      required: as for `llama.read_shape`, in addition to those of all Gemmas.
      harmless: likewise.
    """
    values, fields = llama.read_shape(raw, known, REQUIRED | required, (*_HARMLESS, *harmless))
    scalar, num_layers = values["query_pre_attn_scalar"], fields["num_layers"]
    repeated = pattern(values)
    kinds = [repeated[i % len(repeated)] for i in range(num_layers)]
    return values, dict(
        mlp_activation="gated-gelu",
        mlp_bias=False,
        norm_plus_one=True,
        post_norms=True,
        scale_embedding=True,
        query_pre_attention_scalar=None if scalar == fields["head_dim"] else scalar,
        final_softcap=values["final_logit_softcapping"],
        **fields,
        **windows.read_layers(raw, num_layers, kinds, values["sliding_window"]),
        **tokens.read_token_ids(raw, bos=2, eos=1, pad=0),
    )


def read_config(raw: dict[str, Any], checkpoint: Tensors) -> GPTConfig:
    """Returns the description of the network in config.json.

    Raises:
      ValueError: if a value is not implemented here, or has another type than its key.
    """
    values, fields = read_gemma(raw, _KEYS, lambda values: ("local", "global"), {})
    return GPTConfig(
        family="gemma2",
        qk_norm=False,
        attention_softcap=values["attn_logit_softcapping"],
        **fields,
        **rope.read_rope(raw, theta=10_000.0),
    )


def write_config(config: GPTConfig) -> dict[str, Any]:
    """Returns config.json, without the dtype of the weights."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.query_pre_attention_scalar or config.head_dim,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        # transformers requires a window even if no layer is local.
        "sliding_window": config.sliding_window or config.max_positions,
        "layer_types": windows.write_layer_types(config),
        "use_bidirectional_attention": False,
        **llama.write_shape(config),
    }


TABLE = Table(
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM",),
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    ignored=llama.IGNORED,
    renames=llama.RENAMES,
)
