"""Llama in Hugging Face's format; several other families use its table and keys.

Source: the checkpoints on the Hub and transformers 4 and 5 (`models/llama`). They apply
rotary embeddings to the halves of a head, as we do; the files on the Hub are already permuted for
it.

Axes: v vocab, d model, h heads, k head dim, f mlp.
"""

import dataclasses
import warnings
from typing import Any

from t5jax.architectures import GPTConfig
from t5jax.hf import rope, tokens
from t5jax.hf.keys import SILU, Key, check_required, read_keys
from t5jax.hf.mapping import Rearrange, Row, Table, Tensors

_HEAD = "lm_head.weight"

# Our names of norms to theirs; Gemma, which also has one after attention, uses other names.
_NORMS = {
    "pre_attention_norm": "input_layernorm",
    "pre_mlp_norm": "post_attention_layernorm",
}


# --- Tensors ------------------------------------------------------------------------------------


def rows(config: GPTConfig, norms: dict[str, str] = _NORMS) -> list[Row]:
    """Returns the table of a model with Llama's names.

    Args:
      norms: our names of a layer's norms to theirs.
    """
    table = [
        Row(
            "token_embedder/embedding",
            "model.embed_tokens.weight",
            Rearrange("v d -> v d"),
            aliases=(_HEAD,) if config.tie_word_embeddings else (),
        )
    ]
    if not config.tie_word_embeddings:
        table.append(Row("lm_head/kernel", _HEAD, Rearrange("v d -> d v")))
    ours, theirs = "decoder/layers", "model.layers.{layer}"
    for name, their_name in norms.items():
        table.append(
            Row(f"{ours}/{name}/scale", f"{theirs}.{their_name}.weight", Rearrange("d -> d"))
        )
    for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        name, their_name = f"{ours}/attention/{part}", f"{theirs}.self_attn.{letter}_proj"
        table.append(Row(f"{name}/kernel", f"{their_name}.weight", Rearrange("(h k) d -> d h k")))
        if config.attention_bias:
            table.append(Row(f"{name}/bias", f"{their_name}.bias", Rearrange("(h k) -> h k")))
    name, their_name = f"{ours}/attention/out", f"{theirs}.self_attn.o_proj"
    table.append(Row(f"{name}/kernel", f"{their_name}.weight", Rearrange("d (h k) -> h k d")))
    if config.attention_bias:
        table.append(Row(f"{name}/bias", f"{their_name}.bias", Rearrange("d -> d")))
    if config.qk_norm:
        for part, letter in (("query", "q"), ("key", "k")):
            tensor = f"{theirs}.self_attn.{letter}_norm.weight"
            table.append(Row(f"{ours}/attention/{part}_norm/scale", tensor, Rearrange("k -> k")))
    for name, their_name, layout, bias in (
        ("wi_0", "gate_proj", "f d -> d f", "f -> f"),
        ("wi_1", "up_proj", "f d -> d f", "f -> f"),
        ("wo", "down_proj", "d f -> f d", "d -> d"),
    ):
        name, their_name = f"{ours}/mlp/{name}", f"{theirs}.mlp.{their_name}"
        table.append(Row(f"{name}/kernel", f"{their_name}.weight", Rearrange(layout)))
        if config.mlp_bias:
            table.append(Row(f"{name}/bias", f"{their_name}.bias", Rearrange(bias)))
    table.append(Row("decoder/final_norm/scale", "model.norm.weight", Rearrange("d -> d")))
    return table


# --- config.json --------------------------------------------------------------------------------

# Keys and the fields of `GPTConfig` with the same meaning.
_SHAPE = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_positions",
    "initializer_range": "initializer_range",
    "rms_norm_eps": "norm_epsilon",
    "attention_bias": "attention_bias",
    "attention_dropout": "dropout_rate",
    "tie_word_embeddings": "tie_word_embeddings",
}

# The defaults of transformers.
_KEYS = {
    "vocab_size": Key(int, 32000),
    "hidden_size": Key(int, 4096),
    "intermediate_size": Key(int, 11008),
    "num_hidden_layers": Key(int, 32),
    "num_attention_heads": Key(int, 32),
    "num_key_value_heads": Key(int, may_be_null=True),
    "head_dim": Key(int, may_be_null=True),
    "max_position_embeddings": Key(int, 2048),
    "initializer_range": Key(float, 0.02),
    "rms_norm_eps": Key(float, 1e-6),
    "attention_bias": Key(bool, False),
    "attention_dropout": Key(float, 0.0),
    "tie_word_embeddings": Key(bool, False),
}

# Keys for which other values mean a network that is not implemented here, in all families.
REQUIRED = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "quantization_config": (),
}


def keys(**defaults: Any) -> dict[str, Key]:
    """Returns the keys of all families with Llama's names, with other defaults."""
    return _KEYS | {
        name: dataclasses.replace(_KEYS[name], default=value) for name, value in defaults.items()
    }


def read_shape(
    raw: dict[str, Any],
    known: dict[str, Key],
    required: dict[str, tuple[Any, ...]],
    harmless: tuple[str, ...] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the values of the known keys, and the fields that all families have.

    Args:
      raw: config.json.
      known: `keys(...)` and those of the family.
      required: as for `check_required`, in addition to those of all families.
      harmless: keys that are read elsewhere or have no effect.
    """
    required = REQUIRED | required
    check_required(raw, required)
    harmless = (*rope.KEYS, *tokens.KEYS, "is_decoder", *required, *harmless)
    values = read_keys(raw, known, harmless)
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values["head_dim"] is None:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    fields = {ours: values[theirs] for theirs, ours in _SHAPE.items()}
    return values, fields | {"position": "rope", "norm": "rmsnorm"}


def write_shape(config: GPTConfig) -> dict[str, Any]:
    """Returns the keys that all families have: sizes, positions, tokens."""
    return {
        **{theirs: getattr(config, ours) for theirs, ours in _SHAPE.items()},
        **rope.write_rope(config),
        **tokens.write_token_ids(config),
        "use_cache": True,
    }


# rope_interleaved: pairs of neighbours, as SmolLM's training had them.
_REQUIRED = {"hidden_act": SILU, "rope_interleaved": (False,)}


def read_config(raw: dict[str, Any], checkpoint: Tensors) -> GPTConfig:
    """Returns the description of the network in config.json.

    Raises:
      ValueError: if a value is not implemented here, or has another type than its key.
    """
    known = keys() | {"mlp_bias": Key(bool, False)}
    # pretraining_tp: the number of parts of a product in transformers 4.
    values, fields = read_shape(raw, known, _REQUIRED, ("pretraining_tp",))
    return GPTConfig(
        family="llama",
        mlp_activation="gated-silu",
        mlp_bias=values["mlp_bias"],
        **fields,
        **rope.read_rope(raw, theta=10_000.0),
        **tokens.read_token_ids(raw, bos=1, eos=2),
    )


def write_config(config: GPTConfig) -> dict[str, Any]:
    """Returns config.json, without the dtype of the weights.

    Warns if other readers compute something different.
    """
    if config.num_heads * config.head_dim != config.d_model:
        warnings.warn(
            f"a Llama whose heads are {config.head_dim} wide instead of hidden_size / "
            f"num_attention_heads = {config.d_model // config.num_heads} is read by transformers "
            "and vLLM; CTranslate2 takes the latter without a word",
            stacklevel=2,
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "mlp_bias": config.mlp_bias,
        **write_shape(config),
    }


# Files of a network without its head, as of an embedding model, lack the prefix.
RENAMES = ((r"^(embed_tokens|layers|norm)\.", r"model.\1."),)

# Files from 2023 contain the wavelengths of rotary embeddings.
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

TABLE = Table(
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    ignored=IGNORED,
    renames=RENAMES,
)
