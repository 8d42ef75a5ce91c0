"""Gemma 2 and the text models of Gemma 3 in Hugging Face's format.

Source: the checkpoints on the hub and transformers 4 and 5 (`models/gemma2`, `gemma3`). Names are
Llama's, but for the norms; these hold w of 1 + w, here as there.

Gemma 3 of 4B and more is published with an image encoder around the text model. The text model is
read out of it; written is the text model alone.
"""

import warnings
from typing import Any

from t5jax.architectures import GPTConfig
from t5jax.hf import llama, rope, tokens, windows
from t5jax.hf.mapping import Family, Key, Row, Tensors, warn_unknown

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

_SHARED = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
}
_SHARED_KEYS = {
    "query_pre_attn_scalar": Key(int, 256),
    "sliding_window": Key(int, 4096, may_be_null=True),
}
_GEMMA2_KEYS = (
    llama.keys(**_SHARED, vocab_size=256_000, max_position_embeddings=8192)
    | _SHARED_KEYS
    | {
        "attn_logit_softcapping": Key(float, 50.0, may_be_null=True),
        "final_logit_softcapping": Key(float, 30.0, may_be_null=True),
    }
)
_GEMMA3_KEYS = (
    llama.keys(**_SHARED, vocab_size=262_208, max_position_embeddings=131_072)
    | _SHARED_KEYS
    | {"final_logit_softcapping": Key(float), "sliding_window_pattern": Key(int, 6)}
)

_REQUIRED = {
    # transformers takes this one for granted where it is absent, whatever hidden_act says.
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False,),
}

# The first is read elsewhere, as is layer_types; how transformers 4 cached.
_HARMLESS = ("layer_types", "hidden_act", "cache_implementation", "_sliding_window_pattern")

# Of the model around Gemma 3's text model.
_WITH_IMAGES = (
    "text_config",
    "vision_config",
    "mm_tokens_per_image",
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
    "initializer_range",
)


def _read(raw, family, keys, required, default_layers, thetas, harmless=()) -> GPTConfig:
    values, fields = llama.read_shape(raw, keys, _REQUIRED | required, (*_HARMLESS, *harmless))
    scalar = values["query_pre_attn_scalar"]
    layers = windows.read_layers(
        raw, fields["num_layers"], default_layers(values), values["sliding_window"]
    )
    positions = rope.read_rope(raw, **thetas)
    if "local" not in layers["layer_pattern"]:
        positions["rope_local_theta"] = None
    return GPTConfig(
        family=family,
        mlp_activation="gated-gelu",
        mlp_bias=False,
        norm_plus_one=True,
        post_norms=True,
        qk_norm=family == "gemma3",
        scale_embedding=True,
        query_pre_attention_scalar=None if scalar == fields["head_dim"] else scalar,
        attention_softcap=values.get("attn_logit_softcapping"),
        final_softcap=values["final_logit_softcapping"],
        **fields,
        **layers,
        **positions,
        **tokens.read_token_ids(raw, bos=2, eos=1, pad=0),
    )


def _repeated(pattern: list, num_layers: int) -> list:
    return [pattern[i % len(pattern)] for i in range(num_layers)]


def read_gemma2(raw: dict[str, Any], checkpoint: Tensors) -> GPTConfig:
    """Returns the description of the network in config.json.

    Raises:
      ValueError: for a value that is not implemented here, or not of the key's type.
    """

    def layers(values):
        return _repeated(["local", "global"], values["num_hidden_layers"])

    return _read(raw, "gemma2", _GEMMA2_KEYS, {}, layers, {"theta": 10_000.0})


def read_gemma3(raw: dict[str, Any], checkpoint: Tensors) -> GPTConfig:
    """Returns the description of the text model in config.json, and warns where there is more.

    Raises:
      ValueError: for a value that is not implemented here, or not of the key's type.
    """
    if raw["model_type"] == "gemma3":
        if not isinstance(raw.get("text_config"), dict):
            raise ValueError("config.json: model_type is 'gemma3', but there is no text_config")
        warnings.warn(
            "config.json is of a Gemma 3 that reads images; its text model is taken, the rest left",
            stacklevel=2,
        )
        warn_unknown(raw, (*_WITH_IMAGES, *_GEMMA3_KEYS, *_REQUIRED, *tokens.KEYS))
        around = {key: raw[key] for key in (*tokens.KEYS, "tie_word_embeddings") if key in raw}
        raw = raw["text_config"] | {key: v for key, v in around.items() if v is not None}

    def layers(values):
        pattern = ["local"] * (values["sliding_window_pattern"] - 1) + ["global"]
        return _repeated(pattern, values["num_hidden_layers"])

    # transformers has a key for a cap of scores, and no use for it.
    required = {"attn_logit_softcapping": (None,)}
    thetas = {"theta": 1_000_000.0, "local_theta": 10_000.0}
    return _read(raw, "gemma3", _GEMMA3_KEYS, required, layers, thetas, (rope.LOCAL_KEY,))


def write_config(config: GPTConfig) -> dict[str, Any]:
    """Returns config.json, without the dtype of the weights."""
    keys = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.query_pre_attention_scalar or config.head_dim,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        # transformers asks for a window even where no layer is local.
        "sliding_window": config.sliding_window or config.max_positions,
        "layer_types": windows.write_layer_types(config),
        "use_bidirectional_attention": False,
        **llama.write_shape(config),
    }
    if config.family == "gemma2":
        return {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **keys}
    pattern = config.layer_pattern
    if pattern[-1] == "global" and "global" not in pattern[:-1]:
        keys["sliding_window_pattern"] = len(pattern)  # For readers that know no layer_types.
    return {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **keys}


GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM",),
    read_config=read_gemma2,
    write_config=write_config,
    rows=rows,
    ignored=llama.IGNORED,
)
GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    read_config=read_gemma3,
    write_config=write_config,
    rows=rows,
    ignored=(*llama.IGNORED, r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
    renames=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(model\.)?language_model\.(model\.)?", "model."),
    ),
)
