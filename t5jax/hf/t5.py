"""The T5 family in Hugging Face's format: T5 1.0, 1.1, LM-adapted, FLAN, mT5, UMT5, ByT5, UL2.

Complete models or only their encoders. Source: the checkpoints on the Hub and transformers 4 and 5
(`models/t5`, `mt5`, `umt5`). Where the two differ, comments say how.

Axes: v vocab, d model, h heads, k head dim, f mlp, n buckets.
"""

import warnings
from typing import Any

from t5jax.architectures import MlpActivation, T5Config
from t5jax.hf.keys import GELU_TANH, SILU, check_required, warn_unknown
from t5jax.hf.mapping import Rearrange, Row, Table, Tensors, same_values

_EMBEDDING = "shared.weight"
_EMBEDDING_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEAD = "lm_head.weight"


# --- Tensors ------------------------------------------------------------------------------------


def rows(config: T5Config) -> list[Row]:
    """Returns the table of a T5 model."""
    if config.kind == "encoder":
        view = Rearrange("v d -> v d")
        embedding = Row("token_embedder/embedding", _EMBEDDING, view, _EMBEDDING_ALIASES[:1])
        return [embedding, *_stack("encoder", config, {"attention": "SelfAttention"})]
    head = _HEAD if config.tie_word_embeddings else None
    table = [
        Row(
            "token_embedder/embedding",
            _EMBEDDING,
            Rearrange("v d -> v d"),
            aliases=_EMBEDDING_ALIASES + ((head,) if head else ()),
            # A tied head whose input is not scaled: transformers 4 and CTranslate2 scale it
            # whenever config.json says that it is tied, so it is written as a separate head.
            copies=(head,) if head and not config.scale_decoder_outputs else (),
        )
    ]
    if not head:
        table.append(Row("lm_head/kernel", _HEAD, Rearrange("v d -> d v")))
    table += _stack("encoder", config, {"attention": "SelfAttention"})
    table += _stack(
        "decoder", config, {"self_attention": "SelfAttention", "cross_attention": "EncDecAttention"}
    )
    return table


def _stack(stack: str, config: T5Config, attentions: dict[str, str]) -> list[Row]:
    """Returns the rows of a stack; `attentions` maps our names to theirs, in their order."""
    ours, theirs = f"{stack}/layers", f"{stack}.block.{{layer}}.layer"
    scale = Rearrange("d -> d")
    table = []
    for place, (name, their_name) in enumerate(attentions.items()):
        norm = f"{ours}/pre_{name}_norm/scale"
        table.append(Row(norm, f"{theirs}.{place}.layer_norm.weight", scale))
        for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            tensor = f"{theirs}.{place}.{their_name}.{letter}.weight"
            table.append(Row(f"{ours}/{name}/{part}/kernel", tensor, Rearrange("(h k) d -> d h k")))
        tensor = f"{theirs}.{place}.{their_name}.o.weight"
        table.append(Row(f"{ours}/{name}/out/kernel", tensor, Rearrange("d (h k) -> h k d")))

    place = len(attentions)
    table.append(Row(f"{ours}/pre_mlp_norm/scale", f"{theirs}.{place}.layer_norm.weight", scale))
    mlp = f"{theirs}.{place}.DenseReluDense"
    for name in ("wi_0", "wi_1") if config.gated else ("wi",):
        table.append(
            Row(f"{ours}/mlp/{name}/kernel", f"{mlp}.{name}.weight", Rearrange("f d -> d f"))
        )
    table.append(Row(f"{ours}/mlp/wo/kernel", f"{mlp}.wo.weight", Rearrange("d f -> f d")))

    table.append(Row(f"{stack}/final_norm/scale", f"{stack}.final_layer_norm.weight", scale))
    bias = f"{theirs}.0.SelfAttention.relative_attention_bias.weight"
    if config.per_layer_relative_bias:
        table.append(Row(f"{ours}/relative_bias/embedding", bias, Rearrange("n h -> h n")))
    else:  # The table of the stack is in its first block.
        bias = bias.format(layer=0)
        table.append(Row(f"{stack}/relative_bias/embedding", bias, Rearrange("n h -> h n")))
    return table


# --- config.json --------------------------------------------------------------------------------

# The defaults of transformers; the type of a key is that of its default.
_DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_MULTILINGUAL = _DEFAULTS | {
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}
_DEFAULTS_OF = {
    "t5": _DEFAULTS,
    "mt5": _DEFAULTS | _MULTILINGUAL,
    "umt5": _DEFAULTS | _MULTILINGUAL,
}

# Other names of keys that transformers accepts.
_SYNONYMS = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}

# feed_forward_proj: (ours, names of the inner function, of which the first is written).
_ACTIVATIONS: dict[str, tuple[MlpActivation, tuple[str, ...]]] = {
    "relu": ("relu", ("relu",)),
    "gated-gelu": ("gated-gelu", GELU_TANH),
    **{f"gated-{name}": ("gated-gelu", GELU_TANH) for name in GELU_TANH},
    **{f"gated-{name}": ("gated-silu", SILU) for name in SILU},
}

# Keys for which other values mean a network that is not implemented here.
_REQUIRED = {
    "is_encoder_decoder": (True,),
    "is_decoder": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": (),
}

# Classes of encoders, whose config.json often is that of the complete model.
_ENCODERS = ("T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel")

# A former limit of T5 1.0's inputs, which the network does not have; dropout of a classifier;
# settings of T5X and of encoders' classes that transformers does not read.
_HARMLESS = (
    "n_positions",
    "classifier_dropout",
    "add_cross_attention",
    "scalable_attention",
    "initializer_range",
)

_OPTIONAL = (
    "num_decoder_layers",
    "decoder_start_token_id",
    "scale_decoder_outputs",
    "dense_act_fn",
    "is_gated_act",
)


def read_config(raw: dict[str, Any], tensors: Tensors) -> T5Config:
    """Returns the description of the network in config.json.

    Args:
      raw: config.json, with a model_type of the family.
      tensors: the checkpoint's, or none. transformers 5 writes tie_word_embeddings true for every
        T5, so only the tensors show whether the head is a separate matrix.
    Raises:
      ValueError: if a value is not implemented here, or has another type than its key.
    """
    raw = {_SYNONYMS.get(key, key): value for key, value in raw.items()}
    defaults = _DEFAULTS_OF[raw["model_type"]]
    warn_unknown(raw, (*defaults, *_REQUIRED, *_HARMLESS, *_OPTIONAL))
    given = {key: value for key, value in raw.items() if value is not None}
    if any(name in _ENCODERS for name in raw.get("architectures") or ()):
        # Regardless of what it says about a decoder.
        given |= {"is_encoder_decoder": True, "num_decoder_layers": 0}
        given |= {"tie_word_embeddings": False, "scale_decoder_outputs": False}
    elif given.get("num_decoder_layers") == 0:
        raise ValueError(
            "config.json: num_decoder_layers is 0; expected 1 or more, or T5EncoderModel in "
            "architectures for the encoder alone"
        )
    check_required(given, _REQUIRED)
    values: dict[str, Any] = defaults | {
        key: given[key] for key in (*defaults, *_OPTIONAL) if key in given
    }
    ends = values["eos_token_id"]
    ends = ends if isinstance(ends, list) and ends else [ends]
    values["eos_token_id"] = ends[0]
    values.setdefault("num_decoder_layers", values["num_layers"])
    values.setdefault("decoder_start_token_id", values["pad_token_id"])
    tied = values["tie_word_embeddings"]
    # transformers 4 scales if embeddings are tied. mT5 and UMT5 were trained without scaling;
    # transformers 5.23 still scales UMT5, regardless of config.json.
    values.setdefault("scale_decoder_outputs", tied and raw["model_type"] == "t5")
    _check_types(values, defaults)

    names = [name for name in (_EMBEDDING, *_EMBEDDING_ALIASES) if name in tensors]
    if tied and names and _HEAD in tensors:
        tied = same_values(tensors[names[0]], tensors[_HEAD])

    return T5Config(
        vocab_size=values["vocab_size"],
        d_model=values["d_model"],
        d_kv=values["d_kv"],
        d_ff=values["d_ff"],
        num_heads=values["num_heads"],
        num_encoder_layers=values["num_layers"],
        num_decoder_layers=values["num_decoder_layers"],
        mlp_activation=_read_activation(values),
        tie_word_embeddings=tied,
        scale_decoder_outputs=values["scale_decoder_outputs"],
        relative_attention_num_buckets=values["relative_attention_num_buckets"],
        relative_attention_max_distance=values["relative_attention_max_distance"],
        per_layer_relative_bias=raw["model_type"] == "umt5",
        layer_norm_epsilon=float(values["layer_norm_epsilon"]),
        dropout_rate=float(values["dropout_rate"]),
        initializer_factor=float(values["initializer_factor"]),
        pad_token_id=values["pad_token_id"],
        eos_token_id=ends[0],
        more_eos_token_ids=tuple(ends[1:]),
        decoder_start_token_id=values["decoder_start_token_id"],
    )


def _check_types(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    kinds = {key: type(value) for key, value in defaults.items()} | {
        "num_decoder_layers": int,
        "decoder_start_token_id": int,
        "scale_decoder_outputs": bool,
    }
    for key, kind in kinds.items():
        got = type(values[key])
        if got is not kind and not (kind is float and got is int):
            raise ValueError(
                f"config.json: {key} is {values[key]!r}; expected a value of type {kind.__name__}"
            )


def _read_activation(values: dict[str, Any]) -> MlpActivation:
    name = values["feed_forward_proj"]
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"config.json: feed_forward_proj is {name!r}, which is not implemented; expected one "
            f"of {', '.join(_ACTIVATIONS)}"
        )
    ours, functions = _ACTIVATIONS[name]
    # transformers derives these two, and lets config.json override them.
    for key, allowed in (("dense_act_fn", functions), ("is_gated_act", (name != "relu",))):
        if key in values and values[key] not in allowed:
            raise ValueError(
                f"config.json: {key} is {values[key]!r} with feed_forward_proj {name!r}, which is "
                f"not implemented; expected {' or '.join(map(repr, allowed))}"
            )
    return ours


def write_config(config: T5Config) -> dict[str, Any]:
    """Returns config.json, without the dtype of the weights.

    mT5 is written as T5, which is the same network. Warns if other readers compute something
    different.
    """
    if config.scale_decoder_outputs and not config.tie_word_embeddings:
        warnings.warn(
            "scale_decoder_outputs with a head of its own is read by transformers 5 and t5jax; "
            "transformers 4 and CTranslate2 do not scale such a model's logits",
            stacklevel=2,
        )
    umt5, is_encoder = config.per_layer_relative_bias, config.kind == "encoder"
    functions = _ACTIVATIONS[config.mlp_activation][1]
    # `rows` writes a tied head that is not scaled as a separate one. An encoder's embedding is tied
    # to the model's.
    tied = is_encoder or (config.tie_word_embeddings and config.scale_decoder_outputs)
    kind = "EncoderModel" if is_encoder else "ForConditionalGeneration"
    ends = config.end_token_ids
    return {
        "architectures": [f"{'UMT5' if umt5 else 'T5'}{kind}"],
        "model_type": "umt5" if umt5 else "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "dropout_rate": config.dropout_rate,
        "classifier_dropout": 0.0,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_factor": config.initializer_factor,
        "feed_forward_proj": config.mlp_activation,
        "dense_act_fn": functions[0],
        "is_gated_act": config.gated,
        "tie_word_embeddings": tied,
        "scale_decoder_outputs": config.scale_decoder_outputs,
        "is_encoder_decoder": not is_encoder,
        "is_decoder": False,
        "use_cache": not is_encoder,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0],
        "decoder_start_token_id": config.decoder_start_token_id,
    }


TABLE = Table(
    model_types=tuple(_DEFAULTS_OF),
    architectures=(
        "T5ForConditionalGeneration",
        "MT5ForConditionalGeneration",
        "UMT5ForConditionalGeneration",
        "T5WithLMHeadModel",  # The name of T5ForConditionalGeneration in 2019.
        *_ENCODERS,
    ),
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    # T5 1.0's published files have a position bias for cross-attention, which is not used.
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    needs_tokenizer_json=("umt5",),
)
