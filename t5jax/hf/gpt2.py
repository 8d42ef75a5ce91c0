"""GPT-2 in Hugging Face's format.

Source: the checkpoints on the Hub and transformers 4 and 5 (`models/gpt2`). Matrices are stored
[input, output] (Conv1D), queries, keys and values as one. Names in published files have no prefix,
in newer ones they begin with "transformer."; older ones contain the causal mask as buffers.

Axes: v vocab, d model, h heads, k head dim, f mlp, p positions.
"""

import warnings
from typing import Any

from t5jax.architectures import GPTActivation, GPTConfig
from t5jax.hf.keys import GELU_EXACT, GELU_TANH, Key, check_required, read_keys
from t5jax.hf.mapping import Part, Rearrange, Row, Table, Tensors
from t5jax.hf.tokens import KEYS as TOKEN_KEYS
from t5jax.hf.tokens import read_token_ids, write_token_ids

_HEAD = "lm_head.weight"


# --- Tensors ------------------------------------------------------------------------------------


def rows(config: GPTConfig) -> list[Row]:
    """Returns the table of a GPT-2 model."""
    table = [
        Row(
            "token_embedder/embedding",
            "transformer.wte.weight",
            Rearrange("v d -> v d"),
            aliases=(_HEAD,) if config.tie_word_embeddings else (),
        ),
        Row("position_embedder/embedding", "transformer.wpe.weight", Rearrange("p d -> p d")),
    ]
    ours, theirs = "decoder/layers", "transformer.h.{layer}"
    attention = f"{theirs}.attn.c_attn"
    parts = ("query", "key", "value")
    for leaf, view, axis in (
        ("kernel", Rearrange("d (h k) -> d h k"), 1),
        ("bias", Rearrange("(h k) -> h k"), 0),
    ):
        tensor = f"{attention}.{'weight' if leaf == 'kernel' else 'bias'}"
        for place, part in enumerate(parts):
            view_of_part = Part(view, axis, place, len(parts))
            table.append(Row(f"{ours}/attention/{part}/{leaf}", tensor, view_of_part))
    table += _matrix(f"{ours}/attention/out", f"{theirs}.attn.c_proj", "(h k) d -> h k d", "d")
    table += _matrix(f"{ours}/mlp/wi", f"{theirs}.mlp.c_fc", "d f -> d f", "f")
    table += _matrix(f"{ours}/mlp/wo", f"{theirs}.mlp.c_proj", "f d -> f d", "d")
    table += _norm(f"{ours}/pre_attention_norm", f"{theirs}.ln_1")
    table += _norm(f"{ours}/pre_mlp_norm", f"{theirs}.ln_2")
    table += _norm("decoder/final_norm", "transformer.ln_f")
    if not config.tie_word_embeddings:
        table.append(Row("lm_head/kernel", _HEAD, Rearrange("v d -> d v")))
    return table


def _matrix(ours: str, theirs: str, layout: str, bias: str) -> list[Row]:
    return [
        Row(f"{ours}/kernel", f"{theirs}.weight", Rearrange(layout)),
        Row(f"{ours}/bias", f"{theirs}.bias", Rearrange(f"{bias} -> {bias}")),
    ]


def _norm(ours: str, theirs: str) -> list[Row]:
    return [
        Row(f"{ours}/scale", f"{theirs}.weight", Rearrange("d -> d")),
        Row(f"{ours}/bias", f"{theirs}.bias", Rearrange("d -> d")),
    ]


# --- config.json --------------------------------------------------------------------------------

_KEYS = {
    "vocab_size": Key(int, 50257),
    "n_positions": Key(int, 1024),
    "n_embd": Key(int, 768),
    "n_layer": Key(int, 12),
    "n_head": Key(int, 12),
    "n_inner": Key(int),
    "activation_function": Key(str, "gelu_new"),
    "resid_pdrop": Key(float, 0.1),
    "embd_pdrop": Key(float, 0.1),
    "attn_pdrop": Key(float, 0.1),
    "layer_norm_epsilon": Key(float, 1e-5),
    "initializer_range": Key(float, 0.02),
    "tie_word_embeddings": Key(bool, True),
}

# Other names of keys that transformers accepts.
_SYNONYMS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

# Our names to theirs, of which the first one is written.
_ACTIVATIONS: dict[GPTActivation, tuple[str, ...]] = {
    "gelu": GELU_TANH,
    "gelu-exact": GELU_EXACT,
    "relu": ("relu",),
}

_REQUIRED = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": (),
}

# Keys of other heads; the length of the mask; the order of equivalent multiplications.
_HARMLESS = (
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "n_ctx",
    "reorder_and_upcast_attn",
    "is_decoder",
)


def read_config(raw: dict[str, Any], tensors: Tensors) -> GPTConfig:
    """Returns the description of the network in config.json.

    Raises:
      ValueError: if a value is not implemented here, or has another type than its key.
    """
    raw = {_SYNONYMS.get(key, key): value for key, value in raw.items()}
    check_required(raw, _REQUIRED)
    values = read_keys(raw, _KEYS, (*TOKEN_KEYS, *_REQUIRED, *_HARMLESS))
    activations = {theirs: ours for ours, names in _ACTIVATIONS.items() for theirs in names}
    if values["activation_function"] not in activations:
        raise ValueError(
            f"config.json: activation_function is {values['activation_function']!r}, which is not "
            f"implemented; expected one of {', '.join(activations)}"
        )
    rates = [values[key] for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    if len(set(rates)) > 1:
        warnings.warn(
            "config.json: resid_pdrop, embd_pdrop and attn_pdrop differ "
            f"({', '.join(map(str, rates))}); training uses the first for all three",
            stacklevel=2,
        )
    width, heads = values["n_embd"], values["n_head"]
    if width % heads:
        raise ValueError(f"config.json: n_embd {width} is not divisible by n_head {heads}")
    return GPTConfig(
        family="gpt2",
        vocab_size=values["vocab_size"],
        d_model=width,
        num_layers=values["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        d_ff=4 * width if values["n_inner"] is None else values["n_inner"],
        mlp_activation=activations[values["activation_function"]],
        max_positions=values["n_positions"],
        norm_epsilon=values["layer_norm_epsilon"],
        tie_word_embeddings=values["tie_word_embeddings"],
        dropout_rate=rates[0],
        initializer_range=values["initializer_range"],
        **read_token_ids(raw, bos=50256, eos=50256),
    )


def write_config(config: GPTConfig) -> dict[str, Any]:
    """Returns config.json, without the dtype of the weights."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_ctx": config.max_positions,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "activation_function": _ACTIVATIONS[config.mlp_activation][0],
        "resid_pdrop": config.dropout_rate,
        "embd_pdrop": config.dropout_rate,
        "attn_pdrop": config.dropout_rate,
        "layer_norm_epsilon": config.norm_epsilon,
        "initializer_range": config.initializer_range,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        **write_token_ids(config),
    }


TABLE = Table(
    model_types=("gpt2",),
    architectures=("GPT2LMHeadModel",),
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    renames=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
)
