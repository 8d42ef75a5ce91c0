"""On every mesh a network computes and writes what it does on one device."""

import collections
import dataclasses
import re

import jax
import numpy as np
import pytest

from conformance.cases import (
    ALONE,
    LOGITS,
    assert_trees_close,
    equations,
    every_variant,
    loss_and_grads,
    pack,
    path_of,
    random_examples,
    random_params,
)
from conformance.families import FAST, VARIANTS, change, family_of
from golden import assert_golden
from t5jax import batch as features
from t5jax import decoding, sharding
from t5jax.config import AxisRules, MeshConfig
from t5jax.models import api

MESHES = {
    "data": (MeshConfig(data=8), AxisRules()),
    "fsdp": (MeshConfig(fsdp=4, data=2), AxisRules()),
    "model": (MeshConfig(model=4, data=2), AxisRules()),
    "mixed": (MeshConfig(data=2, fsdp=2, model=2), AxisRules()),
    "length": (MeshConfig(fsdp=4, model=2), AxisRules(length="model", heads=None, kv_heads=None)),
}


def even(variant):
    """The variant with dimensions that the meshes divide."""
    model = VARIANTS[variant]
    sizes = {name: size for name, size in family_of(model).even.items()}
    return change(model, **sizes)


def is_axes(x):
    return isinstance(x, tuple)


def placed(model, mesh, rules):
    shardings = sharding.param_shardings(
        api.param_axes(model), api.param_shapes(model), mesh, rules
    )
    return jax.device_put(random_params(model), shardings)


@pytest.mark.parametrize("variant", FAST)
def test_every_network_fits_every_mesh(variant):
    """Its parameters and, as it is traced, its activations are divided."""
    model = even(variant)
    shapes, axes = api.param_shapes(model), api.param_axes(model)
    batch = pack(model, random_examples(model), ALONE)
    for name, (config, rules) in MESHES.items():
        mesh = sharding.make_mesh(config)
        shardings = sharding.param_shardings(axes, shapes, mesh, rules)
        with sharding.use_mesh(mesh, rules):
            jax.eval_shape(lambda p, b: api.hidden(model, p, b), shapes, batch)
        if rules.embed and config.fsdp > 1:  # Nothing large is whole on every device.
            places = jax.tree_util.tree_leaves_with_path(shardings)
            for (path, place), shape in zip(places, jax.tree.leaves(shapes), strict=True):
                if np.prod(shape.shape) >= 256:
                    parts = place.shard_shape(shape.shape)
                    assert parts != shape.shape, (name, path_of(path))


# Every network on one mesh, and every mesh with two networks or more.
_ORDER = ("mixed", "fsdp", "model", "length", "data")


@pytest.mark.parametrize(
    ("variant", "mesh"), [(name, _ORDER[i % 5]) for i, name in enumerate(FAST)]
)
def test_loss_and_gradients_are_those_of_one_device(variant, mesh):
    model = even(variant)
    config, rules = MESHES[mesh]
    mesh = sharding.make_mesh(config)
    batch = pack(model, random_examples(model), ALONE)
    expected = loss_and_grads(model, random_params(model), batch)
    with sharding.use_mesh(mesh, rules):
        params = placed(model, mesh, rules)
        got = loss_and_grads(model, params, sharding.shard_batch(batch, mesh, rules))
        assert_trees_close(got, expected, atol=2e-3, rtol=1e-3)


def test_sizes_that_a_mesh_does_not_divide_stay_whole():
    """Those of a published model are as they are: one KV head, an odd vocabulary."""
    model, rules = VARIANTS["gemma3"], AxisRules()
    mesh = sharding.make_mesh(MESHES["mixed"][0])
    axes, shapes = api.param_axes(model), api.param_shapes(model)
    with pytest.warns(UserWarning, match="the mesh does not divide") as caught:
        rules = sharding.divisible_rules(axes, shapes, mesh, rules)
    (warning,) = caught
    assert "vocab (61) by the 2 devices of model" in str(warning.message)
    assert "kv_heads (1) by the 2 devices of model" in str(warning.message)
    assert rules == AxisRules(heads=None, kv_heads=None, vocab=None)
    assert sharding.divisible_rules(axes, shapes, mesh, rules) == rules  # Without a warning.
    batch = pack(model, random_examples(model), ALONE)
    expected = loss_and_grads(model, random_params(model), batch)
    with sharding.use_mesh(mesh, rules):
        params = placed(model, mesh, rules)
        got = loss_and_grads(model, params, sharding.shard_batch(batch, mesh, rules))
    assert_trees_close(got, expected, atol=2e-3, rtol=1e-3)


def test_golden_constraints():
    """What of each network's activations is split, and how; how often, in a layer once."""
    mesh, rules, text = sharding.make_mesh(MESHES["mixed"][0]), AxisRules(), ""
    for variant in FAST:
        model = even(variant)
        batch = pack(model, random_examples(model), ALONE)
        with sharding.use_mesh(mesh, rules):
            lowered = LOGITS.lower(model, api.param_shapes(model), batch).as_text()
            traced = jax.make_jaxpr(lambda p, b, m=model: api.logits(m, p, b))(
                api.param_shapes(model), batch
            )
        found = collections.Counter(
            f"{list(e.outvars[0].aval.shape)} {tuple(e.params['sharding'].spec)}"
            for e in equations(traced.jaxpr, "sharding_constraint")
        )
        assert len(re.findall("sharding_constraint|@Sharding", lowered)) >= found.total() > 5
        text += "".join(f"{variant} {count} x {what}\n" for what, count in sorted(found.items()))
    assert_golden("constraints.txt", text)


# --- Axes -----------------------------------------------------------------------------------------


def describe_params(model) -> str:
    """One line a parameter: path, shape, logical axes."""
    axes = jax.tree.leaves(api.param_axes(model), is_leaf=is_axes)
    leaves = jax.tree_util.tree_leaves_with_path(api.param_shapes(model))
    return "".join(
        sorted(
            f"{path_of(path)} {list(shape.shape)} ({', '.join(map(str, names))})\n"
            for (path, shape), names in zip(leaves, axes, strict=True)
        )
    )


NAMED = {*FAST, "t5_1_1", "byt5", "ul2", "bert_masked_lm_untied"}


@pytest.mark.parametrize("variant", sorted(NAMED))
def test_golden_parameter_names(variant):
    model = VARIANTS[variant]
    text = describe_params(model)
    assert_golden(f"params_{variant}.txt", text)
    assert describe_params(change(model, scan_layers=False, remat="full")) == text


# The sizes of a description that a dimension of each axis may have.
SIZES = {
    "layers": ("num_layers", "num_encoder_layers", "num_decoder_layers"),
    "embed": ("d_model", "decoder_d_model"),
    "activation_embed": ("d_model",),
    "heads": ("num_heads", "decoder_num_heads"),
    "kv_heads": ("num_kv_heads", "decoder_num_kv_heads"),
    "head_dim": ("head_dim", "d_kv", "decoder_head_dim"),
    "mlp": ("d_ff", "decoder_d_ff"),
    "vocab": ("vocab_size",),
    "length": ("max_positions",),
    "buckets": ("relative_attention_num_buckets",),
}


@every_variant
def test_every_parameter_has_the_axes_of_its_dimensions(variant):
    model = VARIANTS[variant]
    known = {field.name for field in dataclasses.fields(AxisRules)}
    assert set(SIZES) <= known

    def check(path, shape, names):
        assert len(shape.shape) == len(names), path_of(path)
        for size, name in zip(shape.shape, names, strict=True):
            # Classes of BERT, and kinds of text, are few: whole on every device.
            if name is None:
                assert path_of(path).split("/")[0] in ("classifier", "type_embedder"), path_of(path)
            else:
                sizes = [getattr(model, field, None) for field in SIZES[name]]
                assert size in sizes, (path_of(path), size, name)

    jax.tree_util.tree_map_with_path(check, api.param_shapes(model), api.param_axes(model))


# --- Decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "mesh"), [("t5_1_0", "fsdp"), ("gemma3", "mixed"), ("t5gemma", "model")]
)
def test_greedy_writes_the_same(variant, mesh):
    model = even(variant)
    config, rules = MESHES[mesh]
    prompts = [
        example[f"{'decoder' if model.kind == 'decoder' else 'encoder'}_input_tokens"][:7].tolist()
        for example in random_examples(model)
    ]
    batch = features.prompt_batch(prompts, model.kind, 8, 8)
    expected = decoding.greedy(model, random_params(model), batch, 5)
    assert len(np.unique(expected)) > 3
    mesh = sharding.make_mesh(config)
    with sharding.use_mesh(mesh, rules):
        params = placed(model, mesh, rules)
        got = decoding.greedy(model, params, sharding.shard_batch(batch, mesh, rules), 5)
    assert got.sharding.is_fully_replicated
    np.testing.assert_array_equal(got, expected)
