"""Masks against NumPy's sort, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance.cases import random_params
from conformance.families import T5_EVEN as EVEN
from t5jax.config import AxisRules, MeshConfig
from t5jax.models import api
from t5jax.prune import magnitude_masks, prunable, sparsity_of
from t5jax.prune.masks import _count, apply_masks, check_pattern
from t5jax.sharding import make_mesh, param_shardings

AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {
        "query": ("layers", "embed", "heads", "head_dim"),
        "out": ("layers", "heads", "head_dim", "embed"),
        "norm": ("layers", "embed"),
        "bias": ("layers", "heads", "head_dim"),
    },
}
SHAPES = {
    "embedding": (6, 8),
    "layers": {"query": (2, 8, 3, 4), "out": (2, 3, 4, 8), "norm": (2, 8), "bias": (2, 3, 4)},
}
PATHS = frozenset({"layers/query", "layers/out"})


def is_leaf(x):
    return isinstance(x, tuple)


def draw(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    scales = np.asarray([1.0, 10.0])  # Layers of one stack differ.

    def one(shape):
        x = rng.standard_normal(shape)
        if shape[0] == 2:
            x *= scales.reshape(-1, *[1] * (len(shape) - 1))
        return jnp.asarray(x, dtype)

    return jax.tree.map(one, SHAPES, is_leaf=is_leaf)


def test_what_is_pruned_are_the_matrices_of_the_layers():
    assert prunable(AXES) == PATHS
    assert prunable(AXES, ["*/out"]) == {"layers/query"}
    with pytest.raises(
        ValueError, match=r"'layers/ot', which matches none .* did you mean layers/o"
    ):
        prunable(AXES, ["layers/ot"])
    with pytest.raises(ValueError, match="matches all 2 matrices"):
        prunable(AXES, ["layers/*"])
    names = prunable(api.param_axes(EVEN))
    assert all(name.endswith("/kernel") and "lm_head" not in name for name in names)
    assert len(names) == 12 + 6


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_each_layers_smallest_weights_go(share):
    params = draw()
    masks = magnitude_masks(params, AXES, PATHS, share)
    assert masks.keys() == PATHS
    for path in PATHS:
        for x, mask in zip(params["layers"][path.split("/")[1]], masks[path], strict=True):
            order = np.argsort(np.abs(np.asarray(x)).ravel())
            expected = np.ones(x.size, bool)
            expected[order[: round(share * x.size)]] = False
            np.testing.assert_array_equal(mask, expected.reshape(x.shape))


def test_the_smallest_weights_of_all_go():
    params = draw()
    masks = magnitude_masks(params, AXES, PATHS, 0.4, scope="global")
    names = sorted(PATHS)
    flat = np.concatenate([np.abs(params["layers"][n.split("/")[1]]).ravel() for n in names])
    expected = np.ones(flat.size, bool)
    expected[np.argsort(flat)[: round(0.4 * flat.size)]] = False
    np.testing.assert_array_equal(np.concatenate([masks[n].ravel() for n in names]), expected)
    # The first layer, whose weights are a tenth, loses most of them.
    assert not masks["layers/out"][0].mean() > 0.4


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_of_equals_the_first_go_and_as_many_as_asked(scope):
    """Bfloat16 has many equal weights: counts would be wrong by all that are at the limit."""
    params = jax.tree.map(lambda s: jnp.ones(s, jnp.bfloat16), SHAPES, is_leaf=is_leaf)
    masks = magnitude_masks(params, AXES, PATHS, 0.25, scope=scope)
    assert sum(int((~m).sum()) for m in masks.values()) == round(0.25 * 4 * 96)
    if scope == "layer":
        assert masks["layers/out"].reshape(2, -1)[:, :24].sum() == 0
    else:  # In the order of their paths.
        assert masks["layers/out"].reshape(-1)[:96].sum() == 0
        assert masks["layers/query"].all()


def test_weights_are_counted_exactly():
    # Of 2^24 + 1 a product in float32 would lose the last.
    assert int(_count(0.75, 2**24 + 1)) == 12582913
    assert int(_count(0.999, 2**31 - 1)) == 2145336163
    assert int(_count(jnp.float32(0.1), 1000)) == 100


def test_two_of_four_inputs_stay():
    params = draw()
    masks = magnitude_masks(params, AXES, PATHS, 0.5, pattern="2:4")
    # As torch has them, [outputs, inputs], with the inputs of the output matrix heads by dimension.
    query = np.asarray(params["layers"]["query"]).reshape(2, 8, 12).transpose(0, 2, 1)
    out = np.asarray(params["layers"]["out"]).reshape(2, 12, 8).transpose(0, 2, 1)
    kept = {
        "layers/query": np.asarray(masks["layers/query"]).reshape(2, 8, 12).transpose(0, 2, 1),
        "layers/out": np.asarray(masks["layers/out"]).reshape(2, 12, 8).transpose(0, 2, 1),
    }
    for path, weight in (("layers/query", query), ("layers/out", out)):
        groups, mask = np.abs(weight).reshape(-1, 4), kept[path].reshape(-1, 4)
        assert (mask.sum(axis=1) == 2).all()
        np.testing.assert_array_equal(mask, groups >= np.sort(groups, axis=1)[:, 2:3])


def test_two_of_four_of_a_size_that_four_does_not_divide_is_refused():
    shapes = {"layers": {"query": jnp.zeros((2, 6, 3, 4)), "out": jnp.zeros((2, 3, 4, 6))}}
    axes = {"layers": {name: AXES["layers"][name] for name in ("query", "out")}}
    with pytest.raises(ValueError, match=r"layers/query has 6; leave it out with keep"):
        check_pattern(shapes, axes, PATHS, "2:4", "layer")
    check_pattern(shapes, axes, frozenset({"layers/out"}), "2:4", "layer")


def test_masked_weights_are_zero_and_counted():
    params = draw(dtype="bfloat16")
    masks = magnitude_masks(params, AXES, PATHS, 0.5)
    masked = apply_masks(params, masks)
    found = sparsity_of(masked, PATHS)
    assert (found.zeros, found.weights, found.share) == (192, 384, 0.5)
    assert masked["layers"]["norm"] is params["layers"]["norm"]
    assert masked["layers"]["out"].dtype == jnp.bfloat16


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_eight_devices_choose_as_one(scope):
    params, axes = random_params(EVEN), api.param_axes(EVEN)
    paths = prunable(axes)

    @jax.jit
    def masks(params, share):
        return magnitude_masks(params, axes, paths, share, scope=scope)

    places = param_shardings(
        axes, params, make_mesh(MeshConfig(data=1, fsdp=4, model=2)), AxisRules()
    )
    on_one, on_eight = masks(params, 0.6), masks(jax.device_put(params, places), 0.6)
    for path, mask in on_one.items():
        np.testing.assert_array_equal(mask, on_eight[path], err_msg=path)
