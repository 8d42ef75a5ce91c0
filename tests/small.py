"""Small networks of every kind that the T5 family has, parameters and batches for them.

Widths are odd where that can be, so that a mix-up of two dimensions is an error of shapes. Few
buckets that end early make far distances occur in short rows.
"""

import dataclasses

import jax
import numpy as np

from t5jax import batch as features
from t5jax.architectures import T5Config
from t5jax.models import api

SMALL = T5Config(
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
VARIANTS = {
    "t5_1_1": SMALL,
    "t5_1_0": dataclasses.replace(
        SMALL, mlp_activation="relu", tie_word_embeddings=True, scale_decoder_outputs=True
    ),
    "umt5": dataclasses.replace(SMALL, per_layer_relative_bias=True),
    "byt5": dataclasses.replace(SMALL, num_encoder_layers=3, num_decoder_layers=1),
    "ul2": dataclasses.replace(
        SMALL, mlp_activation="gated-silu", num_encoder_layers=1, num_decoder_layers=3
    ),
}
# Everything divisible by 2, 4 and 8, for meshes.
EVEN = dataclasses.replace(SMALL, vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_heads=4)


def prefill(model, params, batch, max_length: int):
    """Returns the logits after the inputs, and a cache with room for `max_length` tokens more."""
    params = api.arrange_for_decoding(model, params)
    logits_BV, rows = api.prefill(model, params, batch)
    num_rows, length = next(iter(batch.values())).shape
    cache = api.init_cache(model, num_rows, length, max_length)
    return logits_BV, api.insert(model, cache, rows, np.arange(num_rows))


def decode_step(model, params, cache, tokens_N):
    return api.decode_step(model, api.arrange_for_decoding(model, params), cache, tokens_N)


PREFILL = jax.jit(prefill, static_argnums=(0, 3))
STEP = jax.jit(decode_step, static_argnums=0)


def random_params(model: T5Config, seed=0, dtype=None):
    """Parameters all of which matter: norm scales away from 1, biases as large as the scores."""
    rng = np.random.default_rng(seed)

    def one(path, x):
        name = jax.tree_util.keystr(path)
        values = rng.standard_normal(x.shape)
        values = 1 + 0.3 * values if "norm" in name else values * (1.5 if "bias" in name else 0.3)
        return jax.numpy.asarray(values, dtype or x.dtype)

    return jax.tree_util.tree_map_with_path(one, api.param_shapes(model))


def random_batch(model: T5Config, rows=4, source=9, target=7, seed=0):
    """Rows of different lengths, padded at the end; their loss weights are 1 on target tokens."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(2, model.vocab_size, (rows, source)).astype("int32")
    targets = rng.integers(2, model.vocab_size, (rows, target)).astype("int32")
    for row in range(1, rows):  # The first row is full.
        inputs[row, rng.integers(2, source) :] = 0
        targets[row, rng.integers(2, target) :] = 0
    return {
        features.ENCODER_INPUT_TOKENS: inputs,
        features.DECODER_INPUT_TOKENS: features.shift_right(targets, model.decoder_start_token_id),
        features.DECODER_TARGET_TOKENS: targets,
        features.DECODER_LOSS_WEIGHTS: (targets != 0).astype("float32"),
    }


def assert_trees_close(got, expected, *, atol, rtol=1e-5):
    """Compares two trees leaf by leaf, naming the leaf that differs."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        np.testing.assert_allclose(
            np.asarray(a, "float32"),
            np.asarray(b, "float32"),
            atol=atol,
            rtol=rtol,
            err_msg=jax.tree_util.keystr(path),
        )
