"""The families that the suite holds, as small variants of each.

A new family is one entry. Widths are odd where they can be, so that a mix-up of two dimensions is
an error of shapes; heads are odd in number or share keys; windows are shorter than the rows, and
buckets and scaled rotations change what they are to change within them.
"""

import dataclasses
from collections.abc import Callable

from t5jax.architectures import Architecture, BertConfig, T5Config, published


@dataclasses.dataclass(frozen=True)
class Family:
    """What the suite has to know of a family."""

    variants: dict[str, Architecture]
    fast: tuple[str, ...]
    """Variants that hold all of its code between them; checks that compile take these first."""
    even: dict[str, int]
    """Fields with which every dimension divides by 4, for meshes."""
    norms_begin_at: float = 1.0
    """0 where a norm multiplies by 1 + scale."""
    windows: Callable[[Architecture, str], list[int | None]] = lambda model, side: [None]
    """How many tokens each layer of "encoder" or "decoder" sees; None for all."""
    post_norm: bool = False
    """Whether norms follow the residual sums, as in BERT."""


def change(model: Architecture, **changes) -> Architecture:
    return dataclasses.replace(model, **changes)


# --- T5 -------------------------------------------------------------------------------------------

T5 = T5Config(
    vocab_size=61,
    d_model=12,
    d_kv=5,
    d_ff=20,
    num_heads=3,
    num_encoder_layers=2,
    num_decoder_layers=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=9,
    dropout_rate=0.0,
)
_T5 = Family(
    {
        "t5_1_1": T5,
        "t5_1_0": change(
            T5, mlp_activation="relu", tie_word_embeddings=True, scale_decoder_outputs=True
        ),
        "umt5": change(T5, per_layer_relative_bias=True),
        "byt5": change(T5, num_encoder_layers=3, num_decoder_layers=1),
        "ul2": change(T5, mlp_activation="gated-silu", num_encoder_layers=1, num_decoder_layers=3),
        "t5_tied": change(T5, tie_word_embeddings=True, num_heads=1, d_kv=7),
        "t5_other_tokens": change(T5, pad_token_id=3, eos_token_id=4, decoder_start_token_id=5),
        "t5_encoder": T5.encoder_alone(),
        "umt5_encoder": change(T5, per_layer_relative_bias=True).encoder_alone(),
    },
    fast=("t5_1_0", "umt5"),
    even={"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 4},
)
T5_EVEN = change(T5, **_T5.even)

# --- Decoders alone -------------------------------------------------------------------------------

_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
_SHAPE = {"vocab_size": 61, "d_model": 12, "d_ff": 20, "num_layers": 2, "dropout_rate": 0.0}
_SMALL = {**_SHAPE, **_TOKENS, "max_positions": 64}
_EVEN = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_heads": 4, "num_kv_heads": 4}
_EVEN |= {"head_dim": 4}


def _windows(model, side):
    return [model.sliding_window if local else None for local in model.local_layers]


GPT2 = published("gpt2", **_SMALL, num_heads=3, num_kv_heads=3, head_dim=4)
_GPT2 = Family(
    {
        "gpt2": GPT2,
        "gpt2_untied": change(
            GPT2, tie_word_embeddings=False, mlp_activation="gelu-exact", d_ff=37, eos_token_id=3
        ),
        "gpt2_one_head": change(
            GPT2, num_heads=1, num_kv_heads=1, head_dim=12, mlp_activation="relu", num_layers=3
        ),
    },
    fast=("gpt2",),
    even=_EVEN,
)

LLAMA = published("llama3_8b", **_SMALL, num_heads=3, num_kv_heads=1, head_dim=6, rope_theta=100.0)
_LLAMA = Family(
    {
        "llama": LLAMA,
        "llama_scaled": change(
            LLAMA,
            num_heads=4,
            num_kv_heads=2,
            rope_scaling="llama3",
            tie_word_embeddings=True,
            rope_scaling_factor=4.0,
            rope_low_frequency_factor=1.0,
            rope_high_frequency_factor=3.0,
            rope_original_max_positions=40,
        ),
        "llama_biased": change(
            LLAMA,
            d_model=15,
            num_heads=5,
            num_kv_heads=5,
            attention_bias=True,
            mlp_bias=True,
            rope_scaling="linear",
            rope_scaling_factor=3.0,
        ),
    },
    fast=("llama_scaled",),
    even=_EVEN,
)

QWEN3 = published("qwen3_8b", **_SMALL, num_heads=6, num_kv_heads=3, head_dim=4, rope_theta=100.0)
_QWEN3 = Family(
    {
        "qwen3": QWEN3,
        "qwen3_tied": change(
            QWEN3, num_heads=3, num_kv_heads=3, tie_word_embeddings=True, attention_bias=True
        ),
        "qwen3_local": change(
            QWEN3, num_layers=3, layer_pattern=("global", "local", "local"), sliding_window=5
        ),
    },
    fast=("qwen3_local",),
    even=_EVEN,
    windows=_windows,
)

MISTRAL = published(
    "mistral_7b_v0_1",
    **{**_SMALL, "sliding_window": 4, "rope_theta": 100.0},
    **{"num_heads": 6, "num_kv_heads": 3, "head_dim": 4},
)
_MISTRAL = Family(
    {
        "mistral": MISTRAL,
        "mistral_global": change(
            MISTRAL, layer_pattern=("global",), sliding_window=None, num_heads=3
        ),
    },
    fast=("mistral",),
    even=_EVEN,
    windows=_windows,
)

_GEMMA = {**_SMALL, "num_heads": 3, "num_kv_heads": 1, "head_dim": 6, "sliding_window": 4}
GEMMA2 = published("gemma2_2b", **(_GEMMA | {"num_layers": 3}), query_pre_attention_scalar=10)
_GEMMA2 = Family(
    {
        "gemma2": GEMMA2,
        "gemma2_untied": change(
            GEMMA2,
            num_heads=4,
            num_kv_heads=2,
            query_pre_attention_scalar=None,
            attention_softcap=3.0,
            final_softcap=None,
            tie_word_embeddings=False,
        ),
        "gemma2_local": change(
            GEMMA2,
            layer_pattern=("local",),
            attention_softcap=None,
            num_layers=2,
            sliding_window=3,
            more_eos_token_ids=(7,),
        ),
    },
    fast=("gemma2",),
    even=_EVEN,
    norms_begin_at=0.0,
    windows=_windows,
)

GEMMA3 = published(
    "gemma3_4b",
    **(_GEMMA | {"num_layers": 4, "rope_theta": 1000.0, "rope_local_theta": 10.0}),
    layer_pattern=("local", "local", "global"),
)
_GEMMA3 = Family(
    {
        "gemma3": GEMMA3,
        "gemma3_untied": change(
            GEMMA3,
            num_heads=2,
            num_kv_heads=2,
            num_layers=2,
            layer_pattern=("local", "global"),
            rope_scaling="none",
            rope_scaling_factor=None,
            tie_word_embeddings=False,
            final_softcap=20.0,
        ),
        "gemma3_global": change(
            GEMMA3,
            num_layers=2,
            layer_pattern=("global",),
            sliding_window=None,
            rope_local_theta=None,
            query_pre_attention_scalar=10,
        ),
    },
    fast=("gemma3",),
    even=_EVEN,
    norms_begin_at=0.0,
    windows=_windows,
)

# --- T5Gemma --------------------------------------------------------------------------------------

T5GEMMA = published(
    "t5gemma_b_b",
    vocab_size=61,
    d_model=12,
    d_ff=20,
    num_encoder_layers=3,
    num_heads=3,
    num_kv_heads=1,
    head_dim=6,
    decoder_d_model=8,
    decoder_d_ff=14,
    num_decoder_layers=2,
    decoder_num_heads=4,
    decoder_num_kv_heads=2,
    decoder_head_dim=4,
    max_positions=64,
    rope_theta=100.0,
    query_pre_attention_scalar=10,
    sliding_window=3,
)


def _t5gemma_windows(model, side):
    if side == "decoder":
        return _windows(model.decoder, side)
    # The encoder looks both ways, one token further than the decoder.
    return [window and window + 1 for window in _windows(model.encoder, side)]


_T5GEMMA = Family(
    {
        "t5gemma": T5GEMMA,
        "t5gemma_untied": change(
            T5GEMMA,
            num_heads=6,
            num_kv_heads=3,
            query_pre_attention_scalar=None,
            attention_softcap=None,
            final_softcap=3.0,
            tie_word_embeddings=False,
            sliding_window=5,
        ),
        "t5gemma_deep_decoder": change(
            T5GEMMA,
            num_encoder_layers=1,
            num_decoder_layers=4,
            decoder_d_model=15,
            decoder_num_heads=5,
            decoder_num_kv_heads=5,
            attention_softcap=2.0,
            tie_word_embeddings=False,
            layer_pattern=("global", "local", "local"),
        ),
        "t5gemma_local": change(
            T5GEMMA, num_encoder_layers=2, layer_pattern=("local",), more_eos_token_ids=(7,)
        ),
        "t5gemma_global": change(
            T5GEMMA,
            num_encoder_layers=1,
            num_decoder_layers=1,
            decoder_num_heads=1,
            decoder_num_kv_heads=1,
            final_softcap=None,
            layer_pattern=("global",),
            sliding_window=None,
        ),
    },
    fast=("t5gemma",),
    even={
        **_EVEN,
        "decoder_d_model": 8,
        "decoder_d_ff": 16,
        "decoder_num_heads": 4,
        "decoder_num_kv_heads": 4,
    },
    norms_begin_at=0.0,
    windows=_t5gemma_windows,
)

# --- BERT -----------------------------------------------------------------------------------------

BERT = BertConfig(
    vocab_size=67,
    d_model=21,
    d_ff=34,
    num_layers=3,
    num_heads=3,
    max_positions=29,
    cls_token_id=2,
    eos_token_id=3,
    dropout_rate=0.0,
)
_BERT = Family(
    {
        "bert_masked_lm": BERT,
        "bert_masked_lm_untied": change(
            BERT, activation="gelu", num_heads=1, d_model=16, tie_word_embeddings=False
        ),
        "bert_sequence_classification": change(
            BERT,
            activation="relu",
            head="sequence_classification",
            labels=("bad", "so so", "good"),
        ),
        "bert_token_classification": change(
            BERT,
            num_heads=5,
            d_model=20,
            layer_norm_epsilon=1e-3,
            type_vocab_size=1,
            head="token_classification",
            labels=("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
        ),
        "bert_pooler": change(BERT, num_layers=1, activation="gelu", head="pooler"),
        "bert_none": change(BERT, num_layers=2, head="none"),
    },
    fast=("bert_masked_lm", "bert_sequence_classification"),
    even={"vocab_size": 72, "d_model": 16, "d_ff": 32, "num_heads": 4, "max_positions": 32},
    post_norm=True,
)

# --- All of them ----------------------------------------------------------------------------------

FAMILIES: dict[str, Family] = {
    "t5": _T5,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "qwen3": _QWEN3,
    "mistral": _MISTRAL,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "t5gemma": _T5GEMMA,
    "bert": _BERT,
}
VARIANTS: dict[str, Architecture] = {
    name: model for family in FAMILIES.values() for name, model in family.variants.items()
}
FAST: tuple[str, ...] = tuple(name for family in FAMILIES.values() for name in family.fast)
# One of each network, and of each way its layers are stacked, for what families have in common.
NETWORKS: tuple[str, ...] = (
    *("t5_1_0", "umt5", "llama_scaled", "gemma3", "t5gemma", "bert_masked_lm"),
)
# One of each kind of batch.
KINDS: tuple[str, ...] = ("t5_1_0", "gpt2", "bert_sequence_classification")


def family_of(model: Architecture) -> Family:
    return FAMILIES[model.family]
