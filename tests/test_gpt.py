"""What decoder-only networks must be, beside equal to transformers' (test_hf_gpt.py): causal, blind
to other texts and to what lies beyond a window, the same however they are compiled or decoded.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import assert_golden
from small import PREFILL, STEP, assert_trees_close
from small_gpt import (
    GEMMA3,
    GPT2,
    LLAMA,
    ONE_A_FAMILY,
    QWEN3,
    VARIANTS,
    change,
    pack,
    random_params,
    random_texts,
)
from t5jax import batch as features
from t5jax import decoding, sharding
from t5jax.architectures import SIZES, GPTConfig, published
from t5jax.config import AxisRules, LossConfig, MeshConfig
from t5jax.losses import batch_loss
from t5jax.models import api
from t5jax.models.attention import rope_frequencies, rope_table, rotate, soft_cap
from t5jax.models.layers import LayerNorm, Linear

LOSS = LossConfig(z_loss=0.01)
LOGITS = jax.jit(api.logits, static_argnums=0)

every_family = pytest.mark.parametrize("variant", ONE_A_FAMILY)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(model, params, batch, dropout_rng=None):
    return jax.value_and_grad(
        lambda p: batch_loss(model, p, batch, LOSS, dropout_rng=dropout_rng), has_aux=True
    )(params)


# --- What sees what -----------------------------------------------------------------------------


def embedding_influence(model, batch):
    """Returns [T, V]: how strongly logit t of the first row depends on the embedding of each id."""
    params = random_params(model)

    def mixed_logits_T(table):
        with_table = params | {"token_embedder": {"embedding": table}}
        logits_BTV = api.logits(model, with_table, batch)
        return logits_BTV[0] @ jnp.cos(jnp.arange(model.vocab_size, dtype=jnp.float32))

    jacobian_TVD = jax.jit(jax.jacrev(mixed_logits_T))(params["token_embedder"]["embedding"])
    return np.abs(jacobian_TVD).max(axis=-1)


def seen_through_layers(model, mask_TT):
    """Returns bool [T, T]: what a token depends on after all layers, by way of others too."""
    index_T = np.arange(len(mask_TT))
    near_TT = np.abs(index_T[:, None] - index_T) < (model.sliding_window or len(mask_TT))
    seen_TT = np.eye(len(mask_TT), dtype=bool)
    for is_local in model.local_layers:
        seen_TT = (mask_TT & (near_TT | (not is_local))) @ seen_TT
    return seen_TT


@pytest.mark.parametrize("variant", [*ONE_A_FAMILY, "gemma2_local"])
def test_logits_depend_on_no_later_token_and_on_none_beyond_the_windows(variant):
    # An embedding that is the output matrix too would influence every logit.
    model = change(VARIANTS[variant], tie_word_embeddings=False)
    tokens = np.arange(20, 36, dtype="int32")
    influence_TV = embedding_influence(model, {features.DECODER_INPUT_TOKENS: tokens[None]})
    expected = seen_through_layers(model, np.tril(np.ones((16, 16), bool)))
    np.testing.assert_array_equal(influence_TV[:, tokens] > 0, expected)
    if variant == "gemma2_local":
        assert not expected[15, :11].any()
        assert expected[15, 11:].all()


@pytest.mark.parametrize("variant", ["gpt2", "qwen3_local"])
def test_inputs_of_a_prefix_lm_see_one_another(variant):
    model = change(VARIANTS[variant], tie_word_embeddings=False)
    tokens = np.arange(20, 32, dtype="int32")
    # Two texts in one row, of which the first 4 and the first 5 tokens are inputs.
    segments = np.array([[1] * 6 + [2] * 6], "int32")
    inputs = np.array([[1] * 4 + [0] * 2 + [1] * 5 + [0]], "int32")
    batch = {
        features.DECODER_INPUT_TOKENS: tokens[None],
        features.DECODER_SEGMENT_IDS: segments,
        features.DECODER_POSITIONS: np.array([[*range(6), *range(6)]], "int32"),
        features.DECODER_CAUSAL_ATTENTION: inputs,
    }
    mask = np.tril(np.ones((12, 12), bool)) | (inputs[0][:, None] & inputs[0]).astype(bool)
    expected = seen_through_layers(model, mask & (segments[0][:, None] == segments[0]))
    assert expected[0, 3]
    assert not expected[0, 4]
    np.testing.assert_array_equal(embedding_influence(model, batch)[:, tokens] > 0, expected)


def test_a_row_of_padding_alone_gives_finite_logits():
    batch = {
        name: np.zeros((1, 8), "int32")
        for name in (
            features.DECODER_INPUT_TOKENS,
            features.DECODER_SEGMENT_IDS,
            features.DECODER_POSITIONS,
        )
    }
    model = VARIANTS["gemma2"]
    assert np.isfinite(LOGITS(model, random_params(model), batch)).all()
    logits, cache = PREFILL(model, random_params(model), batch, 3)
    assert np.isfinite(logits).all()
    assert np.isfinite(STEP(model, random_params(model), cache, np.zeros(1, "int32"))[0]).all()


@every_family
def test_packing_changes_neither_loss_nor_gradients_and_all_parameters_have_some(variant):
    model = VARIANTS[variant]
    params, texts = random_params(model), random_texts(model)
    single = pack(texts, [[0], [1], [2]], length=25)
    packed = pack(texts, [[1, 0], [2], []], length=25)
    assert packed[features.DECODER_SEGMENT_IDS].max() == 2
    (_, sums), grads = loss_and_grads(model, params, single)
    (_, packed_sums), packed_grads = loss_and_grads(model, params, packed)
    assert sums["tokens"] == 14 + 10 + 25
    assert_trees_close(packed_sums, sums, atol=0, rtol=1e-5)
    assert_trees_close(packed_grads, grads, atol=1e-3, rtol=1e-3)

    # Were texts to see each other, or positions to run on, it would show.
    for name, changed in (
        (features.DECODER_SEGMENT_IDS, np.minimum(packed["decoder_segment_ids"], 1)),
        (features.DECODER_POSITIONS, packed["decoder_positions"] // 2),
    ):
        loss = loss_and_grads(model, params, packed | {name: changed})[0][0]
        assert abs(loss - sums["loss"]) > 1e-2

    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        if name.endswith("['key']['bias']"):
            continue  # Without rotations it adds the same to all scores of a query.
        assert (np.abs(np.asarray(grad)) > 0).mean() > 0.2, name


@pytest.mark.parametrize("variant", ["gpt2", "gemma3"])
def test_padding_behind_a_text_needs_no_segments(variant):
    model = VARIANTS[variant]
    params, batch = inputs_for(model)
    tokens = {features.DECODER_INPUT_TOKENS: batch[features.DECODER_INPUT_TOKENS]}
    expected, got = LOGITS(model, params, batch), LOGITS(model, params, tokens)
    for row, length in enumerate((14, 10, 25)):
        np.testing.assert_allclose(got[row, :length], expected[row, :length], atol=1e-4, rtol=1e-4)


# --- The same, however it is compiled -----------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("gpt2", {"scan_layers": False}),
        ("gemma3", {"scan_layers": False}),
        ("gemma3", {"remat": "minimal"}),
        ("gemma3", {"remat": "full", "scan_layers": False}),
    ],
    ids=str,
)
def test_same_loss_and_gradients_and_dropout(variant, changes):
    value, grads = with_dropout(variant)
    got_value, got_grads = with_dropout(variant, **changes)
    assert_trees_close(got_value, value, atol=0, rtol=1e-5)
    assert_trees_close(got_grads, grads, atol=1e-3, rtol=1e-3)  # They are as large as 10.


@functools.cache
def with_dropout(variant, **changes):
    """Loss and gradients; by default scanned, nothing recomputed."""
    model = change(VARIANTS[variant], dropout_rate=0.3, **changes)
    return loss_and_grads(model, *inputs_for(model), jax.random.key(5))


def inputs_for(model):
    return random_params(model), pack(random_texts(model), [[0], [1], [2]], length=25)


@pytest.mark.parametrize("variant", ["gpt2", "gemma3"])
def test_dropout_changes_the_loss(variant):
    model = VARIANTS[variant]
    (loss, _), _ = loss_and_grads(model, *inputs_for(model))
    assert abs(loss - with_dropout(variant)[0][0]) > 0.1


@every_family
def test_bfloat16_is_close_to_float32(variant):
    model = VARIANTS[variant]
    params, batch = inputs_for(model)
    expected = np.asarray(LOGITS(model, params, batch))
    got = LOGITS(change(model, dtype="bfloat16"), params, batch)
    assert got.dtype == jnp.float32
    assert 1e-4 < spread(got - expected) / spread(expected) < 0.1


def spread(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        (MeshConfig(fsdp=4, model=2), AxisRules(kv_heads=None)),
        (MeshConfig(data=2, fsdp=2, model=2), AxisRules(kv_heads=None, length="model")),
    ],
    ids=["fsdp", "length"],
)
def test_on_a_mesh_it_computes_and_writes_the_same(mesh, rules):
    even = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_heads": 4}
    model = change(GEMMA3, **even, num_layers=3)
    params = random_params(model, seed=1)
    texts = random_texts(model, lengths=(9, 25, 7, 17) * 2)
    batch = pack(texts, [[i] for i in range(8)], length=24)
    prompts = [text[:5].tolist() for text in texts]
    prompt_batch = features.prompt_batch(prompts, "decoder", 8, 8)
    expected = LOGITS(model, params, batch)
    tokens = decoding.greedy(model, params, prompt_batch, 5)
    assert len(np.unique(tokens)) > 3
    mesh = sharding.make_mesh(mesh)
    shardings = sharding.param_shardings(api.param_axes(model), params, mesh, rules)
    with sharding.use_mesh(mesh, rules):
        placed = jax.device_put(params, shardings)
        got = LOGITS(model, placed, sharding.shard_batch(batch, mesh, rules))
        np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
        prompt_batch = sharding.shard_batch(prompt_batch, mesh, rules)
        np.testing.assert_array_equal(decoding.greedy(model, placed, prompt_batch, 5), tokens)


# --- Decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "arranged", "dtype"),
    [(name, True, "float32") for name in VARIANTS]
    + [("gpt2", False, "float32"), ("gemma3", False, "float32"), ("gemma2", True, "bfloat16")],
)
def test_chain_of_steps_gives_the_logits_of_the_row(variant, arranged, dtype):
    model = change(VARIANTS[variant], dtype=dtype)
    params, texts = random_params(model), random_texts(model, lengths=(20, 12, 15))
    expected = np.asarray(LOGITS(model, params, pack(texts, [[0], [1], [2]], length=25)))
    if arranged:
        params = api.arrange_for_decoding(model, params)
    # Prompts shorter and longer than the windows; room for more tokens than are written: what was
    # not written yet must not be seen.
    prompts = [text[:n].tolist() for text, n in zip(texts, (9, 1, 4), strict=True)]
    logits, cache = PREFILL(model, params, features.prompt_batch(prompts, "decoder", 3, 9), 12)
    window = model.sliding_window
    sizes = [window if is_local else 9 + 12 for is_local in model.local_layers]
    assert [keys.shape[2] for keys in cache.keys] == sizes
    # In bfloat16 it is rounded at 8 bits in another order.
    tolerance = 1e-4 if dtype == "float32" else 0.1
    for step in range(11):
        for row, prompt in enumerate(prompts):
            error = spread(logits[row] - expected[row, len(prompt) - 1 + step])
            assert error < tolerance * spread(expected), (row, step)
        assert cache.positions.tolist() == [len(prompt) + step for prompt in prompts]
        tokens = [text[len(p) + step] for text, p in zip(texts, prompts, strict=True)]
        logits, cache = STEP(model, params, cache, np.array(tokens, "int32"))


def test_a_prompt_without_padding_needs_no_segments_and_fits_the_window():
    model = VARIANTS["gemma3"]
    params, texts = random_params(model), random_texts(model, lengths=(9, 9))
    tokens = np.stack(texts)
    expected = LOGITS(model, params, {features.DECODER_INPUT_TOKENS: tokens})
    # Fewer tokens than the window has places, in all.
    logits, cache = PREFILL(model, params, {features.DECODER_INPUT_TOKENS: tokens[:, :2]}, 1)
    assert {keys.shape[2] for keys in cache.keys} == {3}
    np.testing.assert_allclose(logits, expected[:, 1], atol=1e-4, rtol=1e-4)
    logits, _ = STEP(model, params, cache, tokens[:, 2])
    np.testing.assert_allclose(logits, expected[:, 2], atol=1e-4, rtol=1e-4)


def test_a_prefix_lm_reads_its_prompt_in_both_directions():
    model = VARIANTS["qwen3_local"]
    params, texts = random_params(model), random_texts(model, lengths=(13, 13))
    tokens = np.stack(texts)
    prompts = [tokens[0, :8].tolist(), tokens[1, :5].tolist()]
    causal = np.zeros((2, 13), "int32")
    causal[0, :8] = causal[1, :5] = 1
    batch = {features.DECODER_INPUT_TOKENS: tokens, features.DECODER_CAUSAL_ATTENTION: causal}
    expected = LOGITS(model, params, batch)
    logits, cache = PREFILL(model, params, features.prompt_batch(prompts, "prefix_lm", 2, 8), 9)
    for step in range(4):
        for row, prompt in enumerate(prompts):
            place = len(prompt) - 1 + step
            np.testing.assert_allclose(logits[row], expected[row, place], atol=1e-4, rtol=1e-4)
        tokens_B = np.array([tokens[0, 8 + step], tokens[1, 5 + step]])
        logits, cache = STEP(model, params, cache, tokens_B)


def test_greedy_ends_a_row_at_any_of_the_ids_that_end_it():
    params = random_params(LLAMA, seed=1)
    prompts = [text.tolist() for text in random_texts(LLAMA, lengths=(5, 8), seed=3)]
    batch = features.prompt_batch(prompts, "decoder", 2, 8)
    tokens = np.asarray(decoding.greedy(LLAMA, params, batch, 8))
    assert len(np.unique(tokens)) > 3
    ends = (int(tokens[0, 2]), int(tokens[1, 4]))
    model = change(LLAMA, eos_token_id=ends[0], more_eos_token_ids=ends[1:], pad_token_id=60)
    expected = tokens.copy()
    for row in expected:
        row[np.flatnonzero(np.isin(row, ends))[0] + 1 :] = 60
    got = decoding.greedy(model, params, batch, 8)
    np.testing.assert_array_equal(got, expected)


def test_learned_positions_end():
    params = random_params(GPT2)
    long = {features.DECODER_INPUT_TOKENS: np.zeros((1, 65), "int32")}
    with pytest.raises(ValueError, match="65 tokens has no positions in this model; gpt2 learned"):
        api.logits(GPT2, params, long)
    # Rotations do not.
    assert api.logits(LLAMA, random_params(LLAMA), long).shape == (1, 65, 61)


# --- Rotations, norms, biases ---------------------------------------------------------------------


def test_rotations_turn_pairs_by_position_and_leave_distances():
    frequencies = rope_frequencies(6, 100.0)
    np.testing.assert_allclose(frequencies, [1, 100 ** (-1 / 3), 100 ** (-2 / 3)], rtol=1e-6)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 6)), "float32") for _ in range(2))

    def turned(x, position):
        return np.asarray(rotate(x, rope_table(jnp.array([[position]]), frequencies)))[0, 0, 0]

    for pair in range(3):
        angle = 5 * frequencies[pair]
        real, imaginary = float(q[..., pair].squeeze()), float(q[..., pair + 3].squeeze())
        expected = (real + 1j * imaginary) * np.exp(1j * angle)
        got = turned(q, 5)
        np.testing.assert_allclose([got[pair], got[pair + 3]], [expected.real, expected.imag], 1e-5)
    scores = [turned(q, 3 + shift) @ turned(k, 1 + shift) for shift in (0, 40, 900)]
    np.testing.assert_allclose(scores, scores[0], atol=1e-4)
    assert abs(turned(q, 3) @ turned(k, 2) - scores[0]) > 1e-2
    assert rotate(q, None) is q


def test_stretched_rotations():
    plain = rope_frequencies(128, 500_000.0)
    linear = rope_frequencies(128, 500_000.0, scaling="linear", factor=8.0)
    np.testing.assert_allclose(linear, plain / 8, rtol=1e-6)
    llama = rope_frequencies(
        128,
        500_000.0,
        scaling="llama3",
        factor=8.0,
        low_factor=1.0,
        high_factor=4.0,
        original_length=8192,
    )
    wavelengths = 2 * np.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    np.testing.assert_allclose(llama[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(llama[long], plain[long] / 8, rtol=1e-6)
    between = (llama / plain)[~short & ~long]
    assert len(between) > 2
    assert (np.diff(between) < 0).all()
    assert between.max() < 1
    assert between.min() > 1 / 8


def test_caps_squeeze():
    x = jnp.array([-1e6, -1.0, 0.0, 0.01, 2.0, 1e6])
    np.testing.assert_allclose(soft_cap(x, 30.0), 30 * np.tanh(np.asarray(x) / 30), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_biases_are_summed_in_float32(dtype):
    # 600 ones: a sum in bfloat16 stands still at 256.
    x = jnp.ones((2, 300, 3), dtype)
    model = change(GPT2, dtype=dtype, param_dtype=dtype)
    linear = Linear(model, {"embed": 3}, {"mlp": 4}, 1.0, use_bias=True)
    norm = LayerNorm(model, 1e-5)
    for layer in (linear, norm):
        params = layer.init(jax.random.key(0), x)["params"]

        def total(params, layer=layer):
            return jnp.sum(layer.apply({"params": params}, x).astype(jnp.float32))

        grads = jax.grad(total)(jax.tree.map(lambda p: p.unbox(), params, is_leaf=_is_box))
        np.testing.assert_array_equal(np.asarray(grads["bias"], "float32"), 600)


def _is_box(x):
    return hasattr(x, "unbox")


# --- Parameters ---------------------------------------------------------------------------------


def describe_params(model) -> str:
    """One line a parameter: path, shape, logical axes."""
    axes = dict(jax.tree_util.tree_leaves_with_path(api.param_axes(model), is_leaf=_is_axes))
    return "".join(
        sorted(
            f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(shape.shape)} "
            f"({', '.join(axes[path])})\n"
            for path, shape in jax.tree_util.tree_leaves_with_path(api.param_shapes(model))
        )
    )


def _is_axes(x):
    return isinstance(x, tuple)


@every_family
def test_golden_parameter_names(variant):
    assert_golden(f"params_{variant}.txt", describe_params(VARIANTS[variant]))


@pytest.mark.parametrize("variant", [*ONE_A_FAMILY, "llama_biased"])
def test_every_parameter_has_logical_axes(variant):
    model = VARIANTS[variant]
    sizes = {
        "layers": model.num_layers,
        "embed": model.d_model,
        "heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "mlp": model.d_ff,
        "vocab": model.vocab_size,
        "length": model.max_positions,
    }
    assert set(sizes) <= {field.name for field in dataclasses.fields(AxisRules)}
    jax.tree.map(
        lambda shape, names: _assert_equal(shape.shape, tuple(sizes[name] for name in names)),
        api.param_shapes(model),
        api.param_axes(model),
    )
    unrolled = change(model, scan_layers=False)
    assert describe_params(unrolled) == describe_params(model)


def _assert_equal(got, expected):
    assert got == expected


def test_initial_parameters_have_their_spread():
    shape = {"num_layers": 2, "vocab_size": 300, "d_model": 64, "d_ff": 90}
    for name in ("gpt2", "gemma2_2b"):
        heads = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
        tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
        model = published(name, **shape, **heads, **tokens, initializer_range=0.05)
        params = jax.jit(api.init_params, static_argnums=0)(model, jax.random.key(0))
        for path, x in jax.tree_util.tree_leaves_with_path(params):
            x, module, leaf = np.asarray(x), path[-2].key, path[-1].key
            if leaf in ("scale", "bias"):
                is_one = leaf == "scale" and not model.norm_plus_one
                np.testing.assert_array_equal(x, float(is_one))
                continue
            stddev = 0.05 / (2 if module in ("out", "wo") else 1)  # (2 layers * 2)^-0.5.
            np.testing.assert_allclose(x.std() / stddev, 1, atol=4 / np.sqrt(2 * x.size) + 0.01)
            if "layers" in [key.key for key in path]:
                assert (x[0] != x[1]).any()


PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b_v0_1": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    # The published counts, less their image encoder's 416,866,032 and what joins the two.
    "gemma3_4b": 4_300_079_472 - 416_866_032 - 1153 * 2560 + 2560 - 1152,
    "gemma3_12b": 12_187_325_040 - 416_866_032 - 1153 * 3840 + 3840 - 1152,
    "gemma3_27b": 27_432_406_640 - 416_866_032 - 1153 * 5376 + 5376 - 1152,
}


def test_published_patterns():
    gemma2, gemma3 = published("gemma2_2b"), published("gemma3_4b")
    assert gemma2.local_layers == (True, False) * 13
    full = [i for i, is_local in enumerate(gemma3.local_layers) if not is_local]
    assert full == [5, 11, 17, 23, 29]
    assert len(gemma3.local_layers) == 34
    assert not any(published("qwen3_8b").local_layers)


def test_published_sizes():
    assert set(PUBLISHED) == {n for n, size in SIZES.items() if isinstance(size, GPTConfig)}
    for name, expected in PUBLISHED.items():
        shapes = api.param_shapes(published(name))
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == expected, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "size", ["gpt2_xl", "llama3_1_8b", "qwen3_32b", "gemma2_27b", "gemma3_27b"]
)
def test_a_full_size_lowers(size):
    model = published(size, dtype="bfloat16", remat="full")
    tokens = jax.ShapeDtypeStruct((2, 1024), "int32")
    names = ("input_tokens", "target_tokens", "segment_ids", "positions")
    batch = {f"decoder_{name}": tokens for name in names}
    batch["decoder_loss_weights"] = jax.ShapeDtypeStruct((2, 1024), "float32")
    params = api.param_shapes(model)
    text = loss_and_grads.lower(model, params, batch).as_text()
    assert f"tensor<{model.num_layers}x{model.d_model}x{model.d_ff}xf32>" in text


# --- Descriptions that cannot be ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (GPT2, {"family": "gpt3"}, r"model\.family is 'gpt3'; expected one of gpt2, llama.*gpt2\?"),
        (GPT2, {"d_model": 0}, r"model\.d_model is 0; it must be at least 1"),
        (GPT2, {"eos_token_id": 61}, r"model\.eos_token_id is 61; .* \[0, 61\)"),
        (GPT2, {"more_eos_token_ids": (1,)}, r"more_eos_token_ids is \(1,\); expected different"),
        (GPT2, {"more_eos_token_ids": (61,)}, r"more_eos_token_ids is \(61,\)"),
        (GPT2, {"head_dim": 5}, r"head_dim 5 do not fit gpt2"),
        (GPT2, {"norm_epsilon": 0.0}, r"model\.norm_epsilon is 0\.0; it must be above 0"),
        (GPT2, {"position": "rope"}, r"model\.rope_theta is None; model\.position rope"),
        (GPT2, {"rope_theta": 1e4}, r"rope_theta is 10000\.0, but model\.position learned"),
        (GPT2, {"rope_scaling": "linear"}, r"rope_scaling is 'linear', but model\.position is"),
        (GPT2, {"attention_bias": False}, r"attention_bias is False, which no checkpoint of gpt2"),
        (GPT2, {"qk_norm": True}, r"model\.qk_norm are of rmsnorm"),
        (GPT2, {"mlp_activation": "gated-silu"}, r"'gated-silu', which no .* of gpt2 can say"),
        (LLAMA, {"mlp_activation": "gated-gelu"}, r"'gated-gelu', which no checkpoint of llama"),
        (LLAMA, {"num_kv_heads": 2}, r"num_heads 3 is not divisible by model\.num_kv_heads 2"),
        (LLAMA, {"head_dim": 5}, r"head_dim is 5; rope turns pairs"),
        (
            LLAMA,
            {"d_model": 13},
            r"d_model 13 is not divisible .* transformers refuses such a llama",
        ),
        (LLAMA, {"rope_theta": None}, r"rope_theta is None; .* needs it"),
        (LLAMA, {"rope_theta": -1.0}, r"rope_theta is -1\.0; it must be above 0"),
        (LLAMA, {"rope_local_theta": 1.0}, r"rope_local_theta is 1\.0, but .* no local layer"),
        (LLAMA, {"rope_scaling": "yarn"}, r"rope_scaling is 'yarn'; expected one of none, linear"),
        (LLAMA, {"rope_scaling": "linear"}, r"rope_scaling_factor is None; .* linear needs it"),
        (LLAMA, {"rope_scaling_factor": 2.0}, r"rope_scaling_factor is 2\.0, but .* none has no"),
        (LLAMA, {"attention_softcap": 5.0}, r"attention_softcap is 5\.0, which no .* of llama"),
        (LLAMA, {"sliding_window": 5}, r"sliding_window is 5 with .*; a window needs local layers"),
        (LLAMA, {"layer_pattern": ("local",)}, r"sliding_window is None with .*'local'"),
        (
            LLAMA,
            {"layer_pattern": ("local",), "sliding_window": 5},
            r"layer_pattern is \('local',\), which no checkpoint of llama can say",
        ),
        (QWEN3, {"layer_pattern": ("near",)}, r"layer_pattern is 'near'; expected one of global"),
        (QWEN3, {"layer_pattern": ()}, r"layer_pattern has 0 entries; expected 1 to 2"),
        (QWEN3, {"layer_pattern": ("global",) * 3}, r"has 3 entries; expected 1 to 2"),
        (QWEN3, {"qk_norm": False}, r"qk_norm is False, which no checkpoint of qwen3"),
        (GEMMA3, {"rope_local_theta": None}, r"rope_local_theta is None; local layers of gemma3"),
        (VARIANTS["mistral"], {"mlp_bias": True}, r"mlp_bias is True, which no .* of mistral"),
        (
            VARIANTS["mistral"],
            {"layer_pattern": ("local", "global")},
            r"\('local', 'global'\), which no checkpoint of mistral can say",
        ),
        (GEMMA3, {"attention_softcap": 9.0}, r"attention_softcap is 9\.0, which no .* of gemma3"),
        (GEMMA3, {"final_softcap": 0.0}, r"final_softcap is 0\.0; it must be above 0"),
        (GEMMA3, {"sliding_window": 0}, r"sliding_window is 0; it must be at least 1"),
        (VARIANTS["gemma2"], {"rope_local_theta": 9.0}, r"rope_local_theta is 9\.0, which no"),
        (
            VARIANTS["llama_scaled"],
            {"rope_low_frequency_factor": 3.0},
            r"rope_low_frequency_factor 3\.0 must be below model\.rope_high_frequency_factor 3\.0",
        ),
    ],
)
def test_a_description_that_cannot_be(model, changes, message):
    with pytest.raises(ValueError, match=message):
        change(model, **changes)
