"""T5Gemma in Hugging Face's format.

Source: the checkpoints on the Hub and transformers 4 and 5 (`models/t5gemma`). Encoder and decoder
are each a Gemma 2, in config.json and in the names of tensors, and are read and written as such
(`t5jax/hf/gemma2.py`). Fields that `T5GemmaConfig` has only once must be the same in both.

Axes: d model, s encoder's model, h heads, k head dim, v vocab.
"""

import dataclasses
import warnings
from typing import Any

from t5jax.architectures import GPTConfig, T5GemmaConfig
from t5jax.hf import gemma2, llama, tokens
from t5jax.hf.keys import Key, check_required, read_keys
from t5jax.hf.mapping import Rearrange, Row, Table, Tensors

_HEAD = "lm_head.out_proj.weight"
_NORMS = {
    "pre_attention_norm": "pre_self_attn_layernorm",
    "post_attention_norm": "post_self_attn_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


# --- Tensors ------------------------------------------------------------------------------------


def rows(config: T5GemmaConfig) -> list[Row]:
    """Returns the table of a T5Gemma."""
    table = [*_stack("encoder", config.encoder), *_stack("decoder", config.decoder)]
    ours, theirs = "decoder/layers", "model.decoder.layers.{layer}"
    for side in ("pre", "post"):
        name = f"{theirs}.{side}_cross_attn_layernorm.weight"
        table.append(Row(f"{ours}/{side}_cross_attention_norm/scale", name, Rearrange("d -> d")))
    for part, letter, layout in (
        ("query", "q", "(h k) d -> d h k"),
        ("key", "k", "(h k) s -> s h k"),
        ("value", "v", "(h k) s -> s h k"),
        ("out", "o", "d (h k) -> h k d"),
    ):
        name = f"{theirs}.cross_attn.{letter}_proj.weight"
        table.append(Row(f"{ours}/cross_attention/{part}/kernel", name, Rearrange(layout)))
    if config.tie_word_embeddings:
        tied = "decoder_embedder/embedding"
        return [
            dataclasses.replace(row, aliases=(_HEAD,)) if row.ours == tied else row for row in table
        ]
    return [*table, Row("lm_head/kernel", _HEAD, Rearrange("v d -> d v"))]


def _stack(side: str, config: GPTConfig) -> list[Row]:
    """Returns the rows of one stack, which are those of Gemma 2 without its head."""
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    return [
        dataclasses.replace(
            row,
            ours=row.ours.replace("decoder/", f"{side}/").replace("token_", f"{side}_"),
            theirs=row.theirs.replace("model.", f"model.{side}."),
            aliases=(),
        )
        for row in llama.rows(tied, _NORMS)
    ]


# --- config.json --------------------------------------------------------------------------------

_KEYS = {
    "dropout_rate": Key(float, 0.0),
    "attention_dropout": Key(float),
    "tie_word_embeddings": Key(bool, True),
}
_REQUIRED = {"is_encoder_decoder": (True,), "pruned_heads": ({},), "quantization_config": ()}

# Keys that are read elsewhere, belong to other heads, or repeat those of the stacks.
_HARMLESS = (
    *("encoder", "decoder", *tokens.KEYS, "decoder_start_token_id"),
    *("classifier_dropout_rate", "initializer_range", "vocab_size"),
)
# Keys of a stack that transformers overwrites with those of the whole model.
_OVERWRITTEN = (
    *("is_decoder", "dropout_rate", "attention_dropout", "cross_attention_hidden_size"),
    "tie_word_embeddings",
)

# Fields of the `GPTConfig` of a stack, and those of `T5GemmaConfig`.
_SHAPE = {
    "d_model": ("d_model", "decoder_d_model"),
    "d_ff": ("d_ff", "decoder_d_ff"),
    "num_layers": ("num_encoder_layers", "num_decoder_layers"),
    "num_heads": ("num_heads", "decoder_num_heads"),
    "num_kv_heads": ("num_kv_heads", "decoder_num_kv_heads"),
    "head_dim": ("head_dim", "decoder_head_dim"),
}
# Fields that must be the same in both stacks, and their keys.
_SHARED = {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "initializer_range": "initializer_range",
}


def read_config(raw: dict[str, Any], checkpoint: Tensors) -> T5GemmaConfig:
    """Returns the description of the network in config.json.

    Raises:
      ValueError: if a value is not implemented here, has another type than its key, or differs
        between the stacks although there is only one field for both.
    """
    check_required(raw, _REQUIRED)
    values = read_keys(raw, _KEYS, (*_REQUIRED, *_HARMLESS))
    rates = values["dropout_rate"], values["attention_dropout"]
    if rates[1] not in (None, rates[0]):
        warnings.warn(
            f"config.json: dropout_rate and attention_dropout differ ({rates[0]}, {rates[1]}); "
            "training uses the first for both",
            stacklevel=2,
        )
    encoder, decoder = (_read_side(raw, side) for side in ("encoder", "decoder"))
    return T5GemmaConfig(
        **{ours: getattr(encoder, name) for name, (ours, _) in _SHAPE.items()},
        **{ours: getattr(decoder, name) for name, (_, ours) in _SHAPE.items()},
        **{
            name: _same(key, getattr(encoder, name), getattr(decoder, name))
            for name, key in _SHARED.items()
        },
        **_read_layers(encoder, decoder),
        query_pre_attention_scalar=_read_scalar(encoder, decoder),
        dropout_rate=values["dropout_rate"],
        tie_word_embeddings=values["tie_word_embeddings"],
        **_read_token_ids(raw),
    )


def _read_side(raw: dict[str, Any], side: str) -> GPTConfig:
    section = raw.get(side)
    if not isinstance(section, dict):
        raise ValueError(f"config.json: {side} is {section!r}; expected an object")
    section = {key: value for key, value in section.items() if key not in _OVERWRITTEN}
    try:
        config = gemma2.read_config(section, {})
    except ValueError as error:
        raise ValueError(f"{side}: {error}") from None
    if config.attention_bias or config.rope_scaling != "none":
        name = "attention_bias" if config.attention_bias else "rope_scaling"
        raise ValueError(
            f"{side}: config.json: {name} is {getattr(config, name)!r}, which is not implemented; "
            "expected a T5Gemma without"
        )
    return config


def _same(key: str, encoder: Any, decoder: Any) -> Any:
    if encoder != decoder:
        raise ValueError(
            f"config.json: {key} is {encoder!r} in encoder and {decoder!r} in decoder, which is "
            "not implemented; expected the same"
        )
    return encoder


def _read_layers(encoder: GPTConfig, decoder: GPTConfig) -> dict[str, Any]:
    """Returns layer_pattern and sliding_window of the deeper stack; the other one must match it."""
    short, long = sorted((encoder, decoder), key=lambda config: config.num_layers)
    pattern = long.layer_pattern
    expected = [pattern[i % len(pattern)] == "local" for i in range(short.num_layers)]
    if list(short.local_layers) != expected:
        raise ValueError(
            f"config.json: layer_types are {encoder.layer_pattern}, repeated, in encoder and "
            f"{decoder.layer_pattern} in decoder, which is not implemented; expected the same"
        )
    window = long.sliding_window
    if short.sliding_window is not None:
        window = _same("sliding_window", encoder.sliding_window, decoder.sliding_window)
    return {"layer_pattern": pattern, "sliding_window": window}


def _read_scalar(encoder: GPTConfig, decoder: GPTConfig) -> int | None:
    """Returns query_pre_attention_scalar, or None if it is the head_dim in both stacks."""
    given = [side.query_pre_attention_scalar for side in (encoder, decoder)]
    if given == [None, None]:
        return None
    return _same(
        "query_pre_attn_scalar",
        *(side.query_pre_attention_scalar or side.head_dim for side in (encoder, decoder)),
    )


def _read_token_ids(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that are token ids: the decoder's, unless the whole model has others."""
    outer = {key: raw[key] for key in tokens.KEYS if raw.get(key) is not None}
    default = {"bos": 2, "eos": 1, "pad": 0}
    fields, inner, encoder = (
        tokens.read_token_ids(keys, **default)
        for keys in (raw["decoder"] | outer, raw["decoder"], raw["encoder"])
    )
    # transformers trains with the decoder's own ids, and generates with those of the whole model.
    start = raw.get("decoder_start_token_id")
    start = fields["decoder_start_token_id"] if start is None else start
    for key, found, expected in (
        ("bos_token_id", inner["decoder_start_token_id"], start),
        ("pad_token_id", encoder["pad_token_id"], fields["pad_token_id"]),
    ):
        if found != expected:
            raise ValueError(
                f"config.json: {key} is {found} in one place and {expected} in another, which is "
                "not implemented; expected the same in encoder, in decoder, and outside of them"
            )
    return fields


def write_config(config: T5GemmaConfig) -> dict[str, Any]:
    """Returns config.json, without the dtype of the weights."""
    around = {
        **tokens.write_token_ids(config.decoder),
        "pad_token_id": config.pad_token_id,
        "dropout_rate": config.dropout_rate,
        "attention_dropout": config.dropout_rate,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
    }
    return {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "model_type": "t5gemma",
        "is_encoder_decoder": True,
        "encoder": _write_side(config, config.encoder) | around | {"is_decoder": False},
        "decoder": _write_side(config, config.decoder)
        | around
        | {"is_decoder": True, "cross_attention_hidden_size": config.d_model},
        **around,
    }


def _write_side(config: T5GemmaConfig, side: GPTConfig) -> dict[str, Any]:
    keys = gemma2.write_config(side) | {
        "model_type": "t5_gemma_module",
        # transformers computes a mask for local layers even if there are none.
        "sliding_window": config.sliding_window or config.max_positions,
    }
    for key in ("architectures", "hidden_act", "use_bidirectional_attention"):
        del keys[key]
    return keys


TABLE = Table(
    model_types=("t5gemma",),
    architectures=("T5GemmaForConditionalGeneration",),
    read_config=read_config,
    write_config=write_config,
    rows=rows,
)
