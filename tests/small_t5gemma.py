"""Small T5Gemmas of every kind, and parameters for them; batches are those of `small`.

Encoder and decoder differ in width, depth and heads, and windows are shorter than the rows.
"""

import dataclasses

import jax
import numpy as np

from t5jax.architectures import T5GemmaConfig, published
from t5jax.models import api

SMALL = published(
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
VARIANTS: dict[str, T5GemmaConfig] = {
    "t5gemma": SMALL,
    "untied": dataclasses.replace(
        SMALL,
        num_heads=6,
        num_kv_heads=3,
        query_pre_attention_scalar=None,
        attention_softcap=None,
        final_softcap=3.0,
        tie_word_embeddings=False,
        sliding_window=5,
    ),
    "deep_decoder": dataclasses.replace(
        SMALL,
        num_encoder_layers=1,
        num_decoder_layers=4,
        decoder_d_model=15,
        decoder_num_heads=5,
        decoder_num_kv_heads=5,
        attention_softcap=2.0,
        tie_word_embeddings=False,
        layer_pattern=("global", "local", "local"),
    ),
    "global": dataclasses.replace(
        SMALL,
        num_encoder_layers=1,
        num_decoder_layers=1,
        decoder_num_heads=1,
        decoder_num_kv_heads=1,
        final_softcap=None,
        layer_pattern=("global",),
        sliding_window=None,
    ),
}
# Everything divisible by 2 and 4, for meshes.
EVEN = dataclasses.replace(
    SMALL,
    vocab_size=64,
    d_model=16,
    d_ff=32,
    num_heads=4,
    num_kv_heads=2,
    decoder_d_ff=16,
)


def random_params(model: T5GemmaConfig, seed=0):
    """Parameters all of which matter: norms away from where they begin."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jax.numpy.asarray(rng.standard_normal(x.shape) * 0.3, x.dtype),
        api.param_shapes(model),
    )
