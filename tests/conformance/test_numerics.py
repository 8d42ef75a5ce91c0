"""What every network computes: the outputs of another implementation, of tokens that it may see and
of no others, and the same however it is compiled.
"""

import functools
import importlib.util
import json

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.version import Version

import hashed
from conformance.cases import (
    ALONE,
    HIDDEN,
    LOGITS,
    TOGETHER,
    assert_trees_close,
    equations,
    is_real,
    loss_and_grads,
    loss_of,
    output_sample,
    pack,
    path_of,
    random_examples,
    random_params,
    sides,
    without_segments,
)
from conformance.families import FAST, NETWORKS, VARIANTS, change, family_of
from golden import FOLDER, assert_golden
from t5jax import batch as features
from t5jax.models import api

every_fast = pytest.mark.parametrize("variant", FAST)
every_network = pytest.mark.parametrize("variant", NETWORKS)


def inputs_for(model, rows=ALONE):
    return random_params(model), pack(model, random_examples(model), rows)


def outputs(model, params, batch) -> np.ndarray:
    return np.asarray((LOGITS if model.num_outputs else HIDDEN)(model, params, batch))


# --- The outputs of another implementation --------------------------------------------------------


# Where there is torch, test_parity.py compares every variant with transformers itself, and what
# that gives with the same file.
@pytest.mark.parametrize("variant", FAST if importlib.util.find_spec("torch") else VARIANTS)
def test_outputs_are_those_of_transformers(variant):
    """As test_parity.py wrote them down, for where there is no torch."""
    model = VARIANTS[variant]
    params, batch = inputs_for(model)
    got = output_sample(model, outputs(model, params, without_segments(batch)), batch)
    expected = json.loads((FOLDER / "outputs.json").read_text())[variant]
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=1e-4)


# --- What sees what -------------------------------------------------------------------------------


def influences(model):
    """Returns a function of a batch: how strongly each place of the first row's outputs depends on
    each id's embedding, "encoder" (of the encoding) and "decoder" to [T, V]."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(random_params(model))
    tables = [
        i
        for i, (path, x) in enumerate(leaves)
        if path_of(path).endswith("embedder/embedding") and len(x) == model.vocab_size
    ]
    functions = {"encoder": api.encode, "decoder": api.hidden}

    def mixed(embeddings, batch):
        new = dict(zip(tables, embeddings, strict=True))
        params = structure.unflatten([new.get(i, x) for i, (_, x) in enumerate(leaves)])
        rows = {side: functions[side](model, params, batch)[0] for side in sides(model)}
        return {side: x @ jnp.cos(jnp.arange(x.shape[-1]) * 1.0) for side, x in rows.items()}

    jacobian = jax.jit(jax.jacrev(mixed))

    def find(batch):
        found = jacobian([leaves[i][1] for i in tables], batch)
        return {side: sum(np.abs(x).max(axis=-1) for x in each) for side, each in found.items()}

    return find


def seen_through_layers(windows, mask_TT):
    """Returns bool [T, T]: what a token depends on after all layers, by way of others too."""
    index_T = np.arange(len(mask_TT))
    distance_TT = np.abs(index_T[:, None] - index_T)
    seen_TT = np.eye(len(mask_TT), dtype=bool)
    for window in windows:
        seen_TT = (mask_TT & (distance_TT < (window or len(mask_TT)))) @ seen_TT
    return seen_TT


ONE_TEXT = {"encoder": (16,), "decoder": (14,), "inputs": (0,)}
TWO_TEXTS = {"encoder": (9, 5), "decoder": (6, 7), "inputs": (0, 0)}
PREFIX_LM = {"decoder": (6, 7), "inputs": (4, 5)}


@pytest.mark.parametrize(
    "variant", ["t5_1_0", "gpt2", "qwen3_local", "gemma3", "t5gemma_local", "bert_none"]
)
def test_every_token_depends_on_those_it_may_see_and_on_no_other(variant):
    model = VARIANTS[variant]
    find, windows = influences(model), family_of(model).windows
    ids = {"encoder": np.arange(10, 26), "decoder": np.arange(40, 54)}
    for texts in (ONE_TEXT, TWO_TEXTS, *((PREFIX_LM,) if model.kind == "decoder" else ())):
        batch, segments, seen = {}, {}, {}
        for side in sides(model):
            row = np.repeat(np.arange(1, len(texts[side]) + 1), texts[side])
            segments[side] = row = np.pad(row, (0, len(ids[side]) - len(row)))
            batch[f"{side}_input_tokens"] = np.where(row, ids[side], model.pad_token_id)
            batch[f"{side}_segment_ids"] = row
            positions = np.concatenate([np.arange(n) for n in texts[side]])
            batch[f"{side}_positions"] = np.pad(positions, (0, len(row) - len(positions)))
            mask = np.ones((len(row), len(row)), bool)
            if side == "decoder":
                inputs = positions < np.repeat(texts["inputs"], texts[side])
                inputs = np.pad(inputs, (0, len(row) - len(positions)))
                mask = np.tril(mask) | (inputs[:, None] & inputs)
                if model.kind == "decoder":
                    batch[features.DECODER_CAUSAL_ATTENTION] = inputs
            mask &= (row[:, None] == row) & (row > 0)
            seen[side] = seen_through_layers(windows(model, side), mask)
        if len(seen) == 2:
            across = segments["decoder"][:, None] == segments["encoder"]
            seen["across"] = seen["decoder"] @ across @ seen["encoder"]
        found = find({name: x[None].astype("int32") for name, x in batch.items()})
        for side in sides(model):
            real = segments[side] > 0
            got = found[side][real]
            np.testing.assert_array_equal(got[:, ids[side][real]] > 0, seen[side][real][:, real])
            if side == "decoder" and "across" in seen:
                sources = segments["encoder"] > 0
                expected = seen["across"][real][:, sources]
                np.testing.assert_array_equal(got[:, ids["encoder"][sources]] > 0, expected)
            if not real.all():
                assert not got[:, model.pad_token_id].any()


def test_windows_end_where_they_should():
    """The picture above, by hand: two layers of a window of 3, to one side and to both."""
    seen = seen_through_layers([3, 3], np.tril(np.ones((16, 16), bool)))
    assert np.flatnonzero(seen[15]).tolist() == [11, 12, 13, 14, 15]
    windows = family_of(VARIANTS["t5gemma_local"]).windows(VARIANTS["t5gemma_local"], "encoder")
    seen = seen_through_layers(windows, np.ones((14, 14), bool))
    assert np.flatnonzero(seen[7]).tolist() == list(range(1, 14))


@every_fast
def test_padding_needs_no_segments_and_changes_nothing(variant):
    model = VARIANTS[variant]
    params, batch = inputs_for(model)
    real, plain = is_real(model, batch), without_segments(batch)
    expected = outputs(model, params, plain)
    got = outputs(model, params, batch)
    np.testing.assert_allclose(got[real], expected[real], atol=1e-4, rtol=1e-4)
    assert np.isfinite(got).all()
    # Of rows that are all padding, too.
    empty = pack(model, random_examples(model), [[] for _ in ALONE])
    assert np.isfinite(outputs(model, params, without_segments(empty))).all()
    assert np.isfinite(outputs(model, params, empty)).all()


@every_fast
def test_packing_changes_neither_loss_nor_gradients_and_all_parameters_have_some(variant):
    model = VARIANTS[variant]
    params, single = inputs_for(model)
    packed = pack(model, random_examples(model), TOGETHER)
    (_, sums), grads = loss_and_grads(model, params, single)
    (_, packed_sums), packed_grads = loss_and_grads(model, params, packed)
    assert sums["tokens"] == sum(x.sum() for name, x in single.items() if "weights" in name)
    assert_trees_close(packed_sums, sums, atol=0, rtol=1e-5)
    assert_trees_close(packed_grads, grads, atol=2e-3, rtol=1e-3)
    # Were texts to see each other, or positions to run on, it would show.
    for side in sides(model):
        ids, positions = packed[f"{side}_segment_ids"], packed[f"{side}_positions"]
        changes = {f"{side}_segment_ids": np.where(ids == 2, 1, ids)}
        if model.family != "t5":  # It counts tokens of a row: inside one text they are the same.
            changes[f"{side}_positions"] = positions // 2
        for name, changed in changes.items():
            loss = loss_and_grads(model, params, packed | {name: changed})[0][0]
            assert abs(loss - sums["loss"]) > 1e-5 * abs(loss), name  # More than rounding gives.
    rotates = getattr(model, "position", "learned") == "rope"
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        # A key's bias adds the same to all scores of a query, but for rotations.
        silent = path_of(path).endswith("key/bias") and not rotates
        assert (np.mean(np.abs(grad) > 1e-6) > 0.1) != silent, path_of(path)


@pytest.mark.parametrize("variant", ["umt5", "gpt2", "gemma2", "t5gemma", "bert_masked_lm"])
def test_gradients_are_the_slopes_of_the_loss(variant):
    """Of every parameter: moved a little along its gradient's signs, and against them."""
    model = VARIANTS[variant]
    params, batch = inputs_for(model)
    _, grads = loss_and_grads(model, params, batch)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    for i, grad in enumerate(jax.tree.leaves(grads)):
        path, x = leaves[i]
        total = float(np.abs(grad).sum())
        if path_of(path).endswith("key/bias") and total < 0.1:
            continue  # It moves all scores of a query alike.
        losses = []
        for step in (0.2 / total, -0.2 / total):
            moved = [y for _, y in leaves]
            moved[i] = x + step * np.sign(grad)
            losses.append(loss_and_grads(model, structure.unflatten(moved), batch)[0][0])
        slope = (losses[0] - losses[1]) / (0.4 / total)
        np.testing.assert_allclose(slope, total, rtol=0.03, err_msg=path_of(path))


# --- The same, however it is compiled -------------------------------------------------------------


@every_network
def test_scanned_unrolled_and_recomputed_are_the_same_with_dropout(variant):
    model = change(VARIANTS[variant], dropout_rate=0.3)
    inputs = *inputs_for(model), hashed.key(5)
    value, grads = loss_and_grads(change(model, remat="minimal"), *inputs)
    got_value, got_grads = loss_and_grads(change(model, scan_layers=False, remat="full"), *inputs)
    assert_trees_close(got_value, value, atol=0, rtol=1e-5)
    assert_trees_close(got_grads, grads, atol=2e-3, rtol=1e-3)
    for other in (model, change(model, scan_layers=False)):
        assert_trees_close(loss_of(other, *inputs), value, atol=0, rtol=1e-5)
    # The program of the test of packing.
    assert abs(value[0] - loss_and_grads(VARIANTS[variant], *inputs[:2])[0][0]) > 0.1


@every_fast
def test_nothing_is_dropped_at_a_rate_of_0_or_without_a_key(variant):
    model, key = VARIANTS[variant], jax.random.key(0)
    for rate, given in ((0.0, key), (0.3, None)):
        other = change(model, dropout_rate=rate)
        traced = jax.make_jaxpr(functools.partial(api.hidden, other, dropout_rng=given))(
            *inputs_for(model)
        )
        assert not list(equations(traced.jaxpr, "random_bits"))


@every_network
def test_bfloat16_is_close_to_float32(variant):
    model = VARIANTS[variant]
    params, batch = inputs_for(model)
    batch = without_segments(batch)
    real = is_real(model, inputs_for(model)[1])
    expected = outputs(model, params, batch)[real]
    got = LOGITS(change(model, dtype="bfloat16"), params, batch)
    assert got.dtype == jnp.float32
    error = np.sqrt(np.mean((np.asarray(got)[real] - expected) ** 2)) / expected.std()
    assert 1e-4 < error < 0.1


# --- Dropout --------------------------------------------------------------------------------------


def test_golden_dropouts():
    """One line a network: the masks that it draws, in order; a scanned layer's once.

    Of each, its entries, and the last dimension.
    """
    lines = []
    for variant in (*FAST, "t5_encoder", "bert_token_classification", "bert_none"):
        model = change(VARIANTS[variant], dropout_rate=0.3)
        batch = jax.tree.map(lambda x: x[:2], inputs_for(model)[1])
        traced = jax.make_jaxpr(lambda p, b, k, m=model: api.hidden(m, p, b, dropout_rng=k))(
            api.param_shapes(model), batch, jax.random.key(0)
        )
        shapes = [e.params["shape"] for e in equations(traced.jaxpr, "random_bits")]
        masks = [f"{np.prod(shape)}:{shape[-1]}" for shape in shapes]
        lines.append(f"{variant} {' '.join(masks)}\n")
    assert_golden("dropouts.txt", "".join(lines))


@pytest.mark.skipif(
    Version(flax.__version__) >= Version("0.12.12"),
    reason="this Flax's scan refuses a callback in its body; test_golden_dropouts runs everywhere",
)
@every_network
def test_layers_that_add_nothing_change_nothing_with_dropout_and_no_two_masks_are_alike(variant):
    """So nothing is dropped of the residual stream itself, and no layer repeats another's masks."""
    model = change(VARIANTS[variant], dropout_rate=0.5)
    params, batch = inputs_for(model)
    post_norm = family_of(model).post_norm

    def silence(path, x):
        *_, module, leaf = path_of(path).split("/")
        if module in ("out", "wo") or (post_norm and leaf == "bias"):
            return jnp.zeros_like(x)
        return jnp.ones_like(x) if post_norm and leaf == "scale" else x

    layers, masks = [], []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            mask = call(jnp.ones_like(args[0]))
            jax.debug.callback(lambda x: masks.append(np.asarray(x) > 0), mask)
            return args[0] * mask
        result = call(*args, **kwargs)
        if type(context.module).__name__.endswith("Layer") and context.method_name == "__call__":
            jax.debug.callback(lambda *xs: layers.append(xs), args[0], result[0])
        return result

    with nn.intercept_methods(watch):
        params = jax.tree_util.tree_map_with_path(silence, params)
        jax.jit(lambda p: api.hidden(model, p, batch, dropout_rng=hashed.key(0)))(params)
        jax.effects_barrier()
    assert len(layers) >= 2
    for before, after in layers:
        if post_norm:
            x = np.asarray(before, "float64")
            expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
            np.testing.assert_allclose(after, expected, atol=1e-4)
        else:
            np.testing.assert_array_equal(after, before)
    # As many as are drawn; Flax runs a part of the first layer twice.
    run = jax.make_jaxpr(lambda k: api.hidden(model, params, batch, dropout_rng=k))
    drawn = equations(run(jax.random.key(0)).jaxpr, "random_bits", repeated=True)
    assert len({mask.tobytes() for mask in masks}) >= len(list(drawn)) > 4
