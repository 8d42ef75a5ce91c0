"""Small decoder-only networks of every kind, parameters and batches for them.

Heads are odd in number or share keys, widths differ, windows are shorter than the rows, and the
scaled rotations change what they are to change within them.
"""

import dataclasses

import jax
import numpy as np

from t5jax import batch as features
from t5jax.architectures import GPTConfig, published
from t5jax.models import api

_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
_SHAPE = {"vocab_size": 61, "d_model": 12, "d_ff": 20, "num_layers": 2, "dropout_rate": 0.0}
_SMALL = {**_SHAPE, **_TOKENS, "max_positions": 64}
_LLAMA3 = {
    "rope_scaling_factor": 4.0,
    "rope_low_frequency_factor": 1.0,
    "rope_high_frequency_factor": 3.0,
    "rope_original_max_positions": 20,
}

GPT2 = published("gpt2", **_SMALL, num_heads=3, num_kv_heads=3, head_dim=4)
LLAMA = published("llama3_8b", **_SMALL, num_heads=3, num_kv_heads=1, head_dim=6, rope_theta=100.0)
QWEN3 = published("qwen3_8b", **_SMALL, num_heads=6, num_kv_heads=3, head_dim=4, rope_theta=100.0)
MISTRAL = published(
    "mistral_7b_v0_1",
    **_SMALL,
    **{"num_heads": 6, "num_kv_heads": 3, "head_dim": 4, "rope_theta": 100.0, "sliding_window": 4},
)
_GEMMA = {**_SMALL, "num_heads": 3, "num_kv_heads": 1, "head_dim": 6, "sliding_window": 4}
GEMMA2 = published("gemma2_2b", **(_GEMMA | {"num_layers": 3}), query_pre_attention_scalar=10)
GEMMA3 = published(
    "gemma3_4b",
    **(_GEMMA | {"num_layers": 4, "rope_theta": 1000.0, "rope_local_theta": 10.0}),
    layer_pattern=("local", "local", "global"),
)


def change(model: GPTConfig, **changes) -> GPTConfig:
    return dataclasses.replace(model, **changes)


VARIANTS: dict[str, GPTConfig] = {
    "gpt2": GPT2,
    "gpt2_untied": change(
        GPT2, tie_word_embeddings=False, mlp_activation="gelu-exact", d_ff=37, eos_token_id=3
    ),
    "gpt2_one_head": change(
        GPT2, num_heads=1, num_kv_heads=1, head_dim=12, mlp_activation="relu", num_layers=3
    ),
    "llama": LLAMA,
    "llama_scaled": change(
        LLAMA,
        num_heads=4,
        num_kv_heads=2,
        rope_scaling="llama3",
        tie_word_embeddings=True,
        **_LLAMA3,
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
    "mistral": MISTRAL,
    "mistral_global": change(MISTRAL, layer_pattern=("global",), sliding_window=None, num_heads=3),
    "qwen3": QWEN3,
    "qwen3_tied": change(
        QWEN3, num_heads=3, num_kv_heads=3, tie_word_embeddings=True, attention_bias=True
    ),
    "qwen3_local": change(
        QWEN3, num_layers=3, layer_pattern=("global", "local", "local"), sliding_window=5
    ),
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
        GEMMA2, layer_pattern=("local",), attention_softcap=None, num_layers=2, sliding_window=3
    ),
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
}
ONE_A_FAMILY = ("gpt2", "llama_scaled", "qwen3_local", "gemma2", "gemma3")


def random_params(model: GPTConfig, seed=0):
    """Parameters all of which matter: norms away from where they begin, biases that shift."""
    rng = np.random.default_rng(seed)

    def one(path, x):
        name = jax.tree_util.keystr(path)
        values = rng.standard_normal(x.shape) * 0.3
        if name.endswith("'scale']") and not model.norm_plus_one:
            values += 1
        return jax.numpy.asarray(values, x.dtype)

    return jax.tree_util.tree_map_with_path(one, api.param_shapes(model))


def random_texts(model: GPTConfig, lengths=(15, 11, 26), seed=0) -> list[np.ndarray]:
    """Texts that begin with the start token; their ids are any, padding's and eos among them."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, model.vocab_size, n).astype("int32") for n in lengths]
    for text in texts:
        text[0] = model.decoder_start_token_id
    return texts


def pack(texts: list[np.ndarray], rows: list[list[int]], length: int) -> dict[str, np.ndarray]:
    """Returns a batch whose rows hold the texts that `rows` names, one behind the other.

    A text's token is an input, and the target of the one before it; the last is a target only.
    """
    shape = (len(rows), length)
    names = (
        features.DECODER_INPUT_TOKENS,
        features.DECODER_TARGET_TOKENS,
        features.DECODER_SEGMENT_IDS,
        features.DECODER_POSITIONS,
    )
    batch = {name: np.zeros(shape, "int32") for name in names}
    batch[features.DECODER_LOSS_WEIGHTS] = np.zeros(shape, "float32")
    for row, members in enumerate(rows):
        start = 0
        for segment, text in enumerate(members, 1):
            tokens = texts[text]
            span = slice(start, start + len(tokens) - 1)
            batch[features.DECODER_INPUT_TOKENS][row, span] = tokens[:-1]
            batch[features.DECODER_TARGET_TOKENS][row, span] = tokens[1:]
            batch[features.DECODER_SEGMENT_IDS][row, span] = segment
            batch[features.DECODER_POSITIONS][row, span] = np.arange(len(tokens) - 1)
            batch[features.DECODER_LOSS_WEIGHTS][row, span] = 1
            start = span.stop
    return batch
