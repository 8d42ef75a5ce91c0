"""On every mesh a network computes and writes what it does on one device."""

import collections
import dataclasses
import functools
import itertools
import math
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
from t5jax.config import MESH_AXES, AxisRules, MeshConfig
from t5jax.models import api

# Of eight devices every set of axes; of two axes the second has four.
SHAPES = [
    dict(zip(MESH_AXES, sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(MESH_AXES))
    if math.prod(sizes) == 8 and [x for x in sizes if x > 1] == sorted(x for x in sizes if x > 1)
]
MESHES = {
    "".join(f"{axis}{size}" for axis, size in shape.items() if size > 1): MeshConfig(**shape)
    for shape in SHAPES
}
RULES = AxisRules()
MIXED = MESHES["fsdp2sequence2model2"]


def even(variant, mesh=MIXED):
    """The variant with dimensions that the mesh divides."""
    model = VARIANTS[variant]
    model = change(model, **family_of(model).even)
    if mesh.model < 8:
        return model
    # Twice as many heads of half the size: GPT-2's are together as wide as the network.
    names = [field.name for field in dataclasses.fields(model)]
    heads = {name: 8 for name in names if name.endswith("_heads")}
    return change(model, **heads, **{name: 2 for name in names if name == "head_dim"})


def is_axes(x):
    return isinstance(x, tuple)


def placed(model, mesh, rules):
    shardings = sharding.param_shardings(
        api.param_axes(model), api.param_shapes(model), mesh, rules
    )
    return jax.device_put(random_params(model), shardings)


@pytest.mark.parametrize("variant", FAST)
def test_every_network_fits_a_mesh(variant):
    """Its parameters and, as it is traced, its activations are divided."""
    for name in ("fsdp2sequence2model2", "data2model4", "fsdp8", "model8"):
        model, mesh = even(variant, MESHES[name]), sharding.make_mesh(MESHES[name])
        shapes, axes = api.param_shapes(model), api.param_axes(model)
        batch = pack(model, random_examples(model), ALONE, ROWS)
        shardings = sharding.param_shardings(axes, shapes, mesh, RULES)
        with sharding.use_mesh(mesh, RULES):
            jax.eval_shape(lambda p, b, m=model: api.hidden(m, p, b), shapes, batch)
        if mesh.shape["fsdp"] > 1:  # Nothing large is whole on every device.
            places = jax.tree_util.tree_leaves_with_path(shardings)
            for (path, place), shape in zip(places, jax.tree.leaves(shapes), strict=True):
                if np.prod(shape.shape) >= 256:
                    parts = place.shard_shape(shape.shape)
                    assert parts != shape.shape, (name, path_of(path))


ROWS = 32  # Tokens of a row, which every mesh divides.


@functools.cache
def on_one_device(model):
    batch = pack(model, random_examples(model), ALONE, ROWS)
    return batch, loss_and_grads(model, random_params(model), batch)


def check_mesh(variant, config):
    model, mesh = even(variant, config), sharding.make_mesh(config)
    batch, expected = on_one_device(model)
    with sharding.use_mesh(mesh, RULES):
        params, batch = placed(model, mesh, RULES), sharding.shard_batch(batch, mesh, RULES)
        parts = (config.data * config.fsdp, config.sequence)
        for x in batch.values():
            assert x.sharding.shard_shape(x.shape) == (8 // parts[0], ROWS // parts[1])
        got = loss_and_grads(model, params, batch)
    assert_trees_close(got, expected, atol=2e-3, rtol=1e-3)


# Every shape with one network, every network with one shape; those that compile soonest with two.
@pytest.mark.parametrize(
    ("variant", "mesh"),
    list(zip((*FAST, "gpt2", "mistral", "bert_masked_lm"), MESHES, strict=True)),
)
def test_loss_and_gradients_are_those_of_one_device(variant, mesh):
    check_mesh(variant, MESHES[mesh])


def test_sizes_that_a_mesh_does_not_divide_stay_whole():
    """Those of a published model are as they are: one KV head, an odd vocabulary."""
    model, rules = VARIANTS["gemma3"], AxisRules()
    mesh = sharding.make_mesh(MESHES["data2fsdp2model2"])
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
    mesh, rules, text = sharding.make_mesh(MIXED), AxisRules(), ""
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
    "positions": ("max_positions",),
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
    ("variant", "mesh"),
    [("t5_1_0", "data2fsdp4"), ("gemma3", "data2fsdp2model2"), ("t5gemma", "sequence2model4")],
)
def test_greedy_writes_the_same(variant, mesh):
    model, config, rules = even(variant), MESHES[mesh], RULES
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
