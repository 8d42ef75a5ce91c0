"""What BERT must be, beside equal to transformers' (test_hf_bert.py): blind to padding and to other
texts, the same however it is compiled, named as always; and how its heads are changed.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from golden import assert_golden
from small import SMALL as SMALL_T5
from small import assert_trees_close
from small_bert import SMALL, VARIANTS, WITH_LOGITS, batch_of, pack, random_params, texts
from t5jax import sharding
from t5jax.architectures import BertConfig, published
from t5jax.architectures.bert import SIZES
from t5jax.config import (
    AxisRules,
    Config,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    from_json,
    to_json,
)
from t5jax.losses import batch_loss
from t5jax.models import api
from t5jax.optimizers import make_optimizer
from t5jax.train_state import create_train_state
from t5jax.train_step import make_train_step

LOSS = LossConfig(z_loss=0.01)
LOGITS = jax.jit(api.logits, static_argnums=0)
HIDDEN = jax.jit(api.hidden, static_argnums=0)

every_variant = pytest.mark.parametrize("variant", VARIANTS)
with_logits = pytest.mark.parametrize("variant", WITH_LOGITS)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(model, params, batch, dropout_rng=None):
    return jax.value_and_grad(
        lambda p: batch_loss(model, p, batch, LOSS, dropout_rng=dropout_rng), has_aux=True
    )(params)


# --- What sees what -----------------------------------------------------------------------------


def embedding_influence(model, batch):
    """Returns [S, V]: how strongly output s of the first row depends on each id's embedding."""
    params = random_params(model)

    def mixed_S(table):
        x_BSD = api.hidden(model, params | {"token_embedder": {"embedding": table}}, batch)
        return x_BSD[0] @ jnp.cos(jnp.arange(x_BSD.shape[-1], dtype=jnp.float32))

    jacobian_SVD = jax.jit(jax.jacrev(mixed_S))(params["token_embedder"]["embedding"])
    return np.abs(jacobian_SVD).max(axis=-1)


@pytest.mark.parametrize("variant", ["none", "sequence_classification"])
def test_every_token_of_a_text_sees_every_other_and_nothing_else(variant):
    tokens = np.arange(20, 32, dtype="int32")[None]
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3], "int32")
    positions = np.array([[*range(5), *range(4), 0, 0, 0]], "int32")
    batch = {
        "encoder_input_tokens": np.where(segments, tokens, 0),
        "encoder_segment_ids": segments,
        "encoder_positions": positions,
    }
    influence = embedding_influence(VARIANTS[variant], batch)
    together = (segments[0][:, None] == segments[0]) & (segments[0] > 0)
    np.testing.assert_array_equal(influence[:9, tokens[0]] > 0, together[:9])
    assert not influence[:9, 0].any()

    padded = {"encoder_input_tokens": np.where(np.arange(12) < 8, tokens, 0)}
    influence = embedding_influence(VARIANTS[variant], padded)
    assert (influence[:8, tokens[0, :8]] > 0).all()
    assert not influence[:8, 0].any()


def test_padding_changes_nothing_and_alone_is_finite():
    params, (text, *_) = random_params(SMALL), texts(SMALL, (9,))
    alone = LOGITS(SMALL, params, {"encoder_input_tokens": text[None]})
    longer = {"encoder_input_tokens": np.pad(text[None], ((0, 1), (0, 11)))}
    logits = LOGITS(SMALL, params, longer)
    np.testing.assert_allclose(logits[0, :9], alone[0], atol=1e-4, rtol=1e-4)
    assert np.isfinite(logits).all()


@with_logits
def test_packing_changes_neither_loss_nor_gradients_and_all_parameters_have_some(variant):
    model = VARIANTS[variant]
    params, rows = random_params(model), texts(model, (14, 10, 25))
    single = pack(model, rows, [[0], [1], [2]])
    packed = pack(model, rows, [[1, 0], [2], []])
    assert packed["encoder_segment_ids"].max() == 2
    (_, sums), grads = loss_and_grads(model, params, single)
    (_, packed_sums), packed_grads = loss_and_grads(model, params, packed)
    assert_trees_close(packed_sums, sums, atol=0, rtol=1e-5)
    assert_trees_close(packed_grads, grads, atol=2e-3, rtol=1e-3)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        # A key's bias moves all scores of a query alike.
        silent = path[-2].key == "key" and path[-1].key == "bias"
        assert (np.abs(grad).max() > 1e-3) != silent, jax.tree_util.keystr(path)

    # Were texts to see each other, or positions to run on, it would show.
    for name, changed in (
        ("encoder_segment_ids", np.minimum(packed["encoder_segment_ids"], 1)),
        ("encoder_positions", np.tile(np.arange(27, dtype="int32"), (3, 1))),
    ):
        loss = loss_and_grads(model, params, packed | {name: changed})[0][0]
        assert abs(loss - sums["loss"]) > 1e-2


def test_a_row_that_is_too_long_is_refused():
    batch = {"encoder_input_tokens": np.ones((1, 30), "int32")}
    message = r"a row of 30 tokens has no positions in this model; bert learned 29 \(model.max_pos"
    with pytest.raises(ValueError, match=message):
        api.encode(SMALL, random_params(SMALL), batch)


# --- The same, however it is compiled -----------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    """Loss and gradients with and without dropout, scanned, nothing recomputed."""
    model = dataclasses.replace(VARIANTS["sequence_classification"], dropout_rate=0.3)
    params, batch = random_params(model), batch_of(model)
    rngs = (None, jax.random.key(5))
    return model, params, batch, [(r, loss_and_grads(model, params, batch, r)) for r in rngs]


@pytest.mark.parametrize(
    "changes",
    [{"scan_layers": False}, {"remat": "minimal"}, {"remat": "full", "scan_layers": False}],
    ids=str,
)
def test_same_loss_and_gradients(reference, changes):
    model, params, batch, expected = reference
    model = dataclasses.replace(model, **changes)
    for rng, (value, grads) in expected:
        got_value, got_grads = loss_and_grads(model, params, batch, rng)
        assert_trees_close(got_value, value, atol=0, rtol=1e-5)
        assert_trees_close(got_grads, grads, atol=1e-4, rtol=1e-4)
    assert abs(expected[0][1][0][0] - expected[1][1][0][0]) > 0.1  # Dropout was on.


@pytest.mark.parametrize("variant", ["masked_lm", "token_classification"])
def test_bfloat16_is_close_to_float32(variant):
    model = VARIANTS[variant]
    params, batch = random_params(model), batch_of(model)
    expected = np.asarray(LOGITS(model, params, batch))
    got = LOGITS(dataclasses.replace(model, dtype="bfloat16"), params, batch)
    assert got.dtype == jnp.float32
    error = np.abs(got - expected).max() / expected.std()
    assert 1e-4 < error < 0.2


def test_a_step_on_a_mesh_is_that_of_one_device():
    model = dataclasses.replace(
        VARIANTS["sequence_classification"],
        vocab_size=68,
        d_model=16,
        num_heads=4,
        max_positions=28,
    )
    batch = {k: np.concatenate([v, v[:1]]) for k, v in batch_of(model).items()}
    tx = make_optimizer(OptimizerConfig("adamw"), 10, api.param_axes(model))
    step = make_train_step(model, tx, LOSS)
    state = jax.jit(lambda: create_train_state(model, tx, jax.random.key(0)))()
    expected = jax.jit(step)(state, batch)
    rules, mesh = AxisRules(), sharding.make_mesh(MeshConfig(2, 2, 2))
    shardings = sharding.param_shardings(
        api.param_axes(model), api.param_shapes(model), mesh, rules
    )
    # The 3 classes and the 2 kinds of text divide by no mesh, and are whole everywhere.
    assert shardings["classifier"]["kernel"].spec == PartitionSpec("fsdp", None)
    with sharding.use_mesh(mesh, rules):
        params = jax.device_put(state.params, shardings)
        got = jax.jit(step)(state.replace(params=params), sharding.shard_batch(batch, mesh, rules))
    assert_trees_close(got[1], expected[1], atol=1e-4, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected[0].params, state.params)
    for path, distance in jax.tree_util.tree_leaves_with_path(moved):
        assert distance > 0, jax.tree_util.keystr(path)


def test_full_size_lowers():
    for size, changes in (
        ("bert_large_uncased", {}),
        ("bert_base_cased", {"head": "token_classification", "labels": ("O", "B", "I")}),
    ):
        model = published(size, dtype="bfloat16", remat="full", **changes)
        tx = make_optimizer(OptimizerConfig("adamw"), 10, api.param_axes(model))
        state = jax.eval_shape(
            lambda model=model, tx=tx: create_train_state(model, tx, jax.random.key(0))
        )
        names = ("input_tokens", "target_tokens", "segment_ids", "positions")
        batch = {f"encoder_{name}": jax.ShapeDtypeStruct((8, 512), "int32") for name in names}
        batch["encoder_loss_weights"] = jax.ShapeDtypeStruct((8, 512), "float32")
        lowered = jax.jit(make_train_step(model, tx, LOSS)).lower(state, batch)
        assert "stablehlo.while" in lowered.as_text()


# --- Parameters ---------------------------------------------------------------------------------


def describe_params(model) -> str:
    """One line a parameter: path, shape, logical axes."""
    shapes, axes = api.param_shapes(model), api.param_axes(model)
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    lines = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(shape.shape)} "
        f"({', '.join(map(str, name))})"
        for (path, shape), name in zip(
            jax.tree_util.tree_leaves_with_path(shapes), names, strict=True
        )
    ]
    return "\n".join(sorted(lines)) + "\n"


@pytest.mark.parametrize("variant", ["masked_lm_untied", "sequence_classification"])
def test_golden_parameter_names(variant):
    assert_golden(f"params_bert_{variant}.txt", describe_params(VARIANTS[variant]))


def test_initial_parameters_have_their_spread():
    model = dataclasses.replace(
        SMALL, vocab_size=300, d_model=64, d_ff=90, num_heads=4, initializer_range=0.5
    )
    params = jax.jit(api.init_params, static_argnums=0)(model, jax.random.key(0))
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name, x = path[-1].key, np.asarray(x)
        if name in ("scale", "bias"):
            np.testing.assert_array_equal(x, name == "scale")
        else:
            tolerance = 4 / np.sqrt(2 * x.size)  # Four standard errors of a standard deviation.
            np.testing.assert_allclose(x.std() / 0.5, 1, atol=tolerance)


def count(model) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(api.param_shapes(model)))


def test_published_sizes():
    # As Hugging Face counts them: with the pooler (BertModel), with the tied masked-LM head.
    exact = {
        "bert_base_uncased": (109_482_240, 109_514_298),
        "bert_large_uncased": (335_141_888, 335_174_458),
        "bert_base_cased": (108_310_272, 108_340_804),
        "bert_large_cased": (333_579_264, 333_610_308),
    }
    for name, expected in exact.items():
        assert (count(published(name, head="pooler")), count(published(name))) == expected, name
    # Turc et al., table 1, in millions: of pretraining, with the pooler and the next sentence.
    small = {"tiny": 4.4, "mini": 11.3, "small": 29.1, "medium": 41.7, "base_uncased": 110.1}
    for name, millions in small.items():
        model = published(f"bert_{name}")
        both = count(model) + model.d_model * (model.d_model + 1) + 2 * (model.d_model + 1)
        assert round(both / 1e6, 1) == millions, name
    assert set(SIZES) == {*exact, *(f"bert_{name}" for name in small)}


# --- Descriptions -------------------------------------------------------------------------------

CLASSES = {"head": "sequence_classification", "labels": ("a", "b")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "brt"}, "model.family is 'brt'; expected one of bert; did you mean bert"),
        (
            {"activation": "silu"},
            "model.activation is 'silu'; expected one of gelu-exact, gelu, re",
        ),
        ({"head": "mlm"}, "model.head is 'mlm'; expected one of masked_lm, sequence_"),
        (
            {"d_model": 100},
            "model.d_model 100 is not divisible by model.num_heads 12; a head is d_m",
        ),
        ({"num_layers": 0}, "model.num_layers is 0; it must be at least 1"),
        ({"layer_norm_epsilon": 0.0}, "model.layer_norm_epsilon is 0.0; it must be above 0"),
        ({"initializer_range": -1.0}, "model.initializer_range is -1.0; it must be above 0"),
        ({"dropout_rate": 1.0}, r"model.dropout_rate is 1.0; it must be in \[0, 1\)"),
        ({"cls_token_id": 99999}, r"model.cls_token_id is 99999; it must be in \[0, 30522\)"),
        ({"dtype": "float16"}, "model.dtype is float16"),
        (
            {"labels": ("a", "b")},
            r"model.labels are \('a', 'b'\), but model.head masked_lm has no c",
        ),
        (
            CLASSES | {"labels": ()},
            r"model.labels are \(\); model.head sequence_classification nee",
        ),
        (CLASSES | {"labels": ("a",)}, "needs two or more: the names of the classes"),
        (
            CLASSES | {"labels": ("a", "b", "a")},
            "model.labels has 'a' twice; every class needs its",
        ),
        (
            CLASSES | {"labels": ("a ", "b")},
            "model.labels has 'a '; expected a printable name with",
        ),
        (CLASSES | {"labels": ("", "b")}, "model.labels has ''; expected a printable name"),
        (CLASSES | {"labels": ("a\0", "b")}, "expected a printable name with single spaces"),
        (
            {"head": "token_classification", "labels": ("a b", "c")},
            "model.labels has 'a b'; expected a printable name without spaces",
        ),
        (
            CLASSES | {"tie_word_embeddings": False},
            "tie_word_embeddings is False, but model.head s",
        ),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**fields)


@every_variant
def test_json_gives_the_same_description_back(variant):
    config = Config(model=VARIANTS[variant])
    assert from_json(to_json(config)) == config


def observe_shapes(model):
    return describe_params(model) + str(jax.tree.leaves(api.param_shapes(model))[0].dtype)


@functools.cache
def observe_init(model):
    params = jax.jit(api.init_params, static_argnums=0)(model, jax.random.key(0))
    return np.asarray(params["token_embedder"]["embedding"]).tobytes()


@functools.cache
def observe_logits(model):
    # Id 9 is among the tokens, and more than a padding's.
    batch = batch_of(SMALL)
    batch["encoder_input_tokens"][:, 3] = 9
    return np.asarray(LOGITS(model, random_params(SMALL), batch)).tobytes()


@functools.cache
def observe_loss(model):
    params, batch = random_params(SMALL), batch_of(SMALL)
    return float(loss_and_grads(model, params, batch, jax.random.key(0))[0][0])


@functools.cache
def observe_program(model):
    params, batch = random_params(SMALL), batch_of(SMALL)
    return str(jax.make_jaxpr(jax.grad(lambda p: api.logits(model, p, batch).sum()))(params))


def observe_options(model):
    from t5jax.batch import ExampleFormat

    return str((ExampleFormat.of(model), model.prompt([7])))


FIELDS = {
    "vocab_size": (68, observe_shapes),
    "d_model": (24, observe_shapes),
    "d_ff": (35, observe_shapes),
    "num_layers": (2, observe_shapes),
    "num_heads": (7, observe_shapes),
    "max_positions": (30, observe_shapes),
    "type_vocab_size": (1, observe_shapes),
    "activation": ("gelu", observe_logits),
    "layer_norm_epsilon": (0.1, observe_logits),
    "dropout_rate": (0.5, observe_loss),
    "initializer_range": (0.5, observe_init),
    "head": ("none", observe_shapes),
    "tie_word_embeddings": (False, observe_shapes),
    "pad_token_id": (9, observe_logits),
    "cls_token_id": (9, observe_options),
    "eos_token_id": (9, observe_options),
    "dtype": ("bfloat16", observe_logits),
    "param_dtype": ("bfloat16", observe_shapes),
    "scan_layers": (False, observe_program),
    "remat": ("full", observe_program),
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_has_an_effect(field):
    value, observe = FIELDS[field]
    assert value != getattr(SMALL, field)
    assert observe(dataclasses.replace(SMALL, **{field: value})) != observe(SMALL)


def test_no_field_is_forgotten():
    # `family` and `labels` are refused or needed, which is tested above.
    names = {field.name for field in dataclasses.fields(BertConfig)}
    assert names == set(FIELDS) | {"family", "labels"}


# --- Heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["pooler", "none"])
def test_without_a_head_there_are_no_logits_and_nothing_to_train(variant):
    model = VARIANTS[variant]
    params, batch = random_params(model), batch_of(model)
    message = "this bert is an encoder without a head: .* set model.head to masked_lm, sequence"
    for call in (
        lambda: api.logits(model, params, batch),
        lambda: batch_loss(model, params, batch, LOSS),
        lambda: model.check_head(),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    SMALL.check_head()
    alone = SMALL_T5.encoder_alone()
    with pytest.raises(ValueError, match="this t5 is an encoder .* take a model with a decoder"):
        alone.check_head()


def test_only_the_head_of_a_description_is_another_ones():
    classifier, labels = VARIANTS["sequence_classification"], ("x", "y")
    # Nothing asked for: the head stays.
    assert classifier.with_head_of(BertConfig()) == classifier
    assert SMALL.with_head_of(BertConfig()) == SMALL
    untied = VARIANTS["masked_lm_untied"]
    assert untied.with_head_of(BertConfig()) == untied
    # Another one: it comes without the old one's fields.
    asked = BertConfig(head="sequence_classification", labels=labels)
    expected = dataclasses.replace(SMALL, head="sequence_classification", labels=labels)
    assert SMALL.with_head_of(asked) == expected
    assert dataclasses.replace(SMALL, tie_word_embeddings=False).with_head_of(asked) == expected
    assert classifier.with_head_of(asked).labels == labels
    tagger = dataclasses.replace(asked, head="token_classification")
    assert classifier.with_head_of(tagger).head == "token_classification"
    # What has none gets the default one.
    assert dataclasses.replace(SMALL, head="none").with_head_of(BertConfig()) == SMALL


@pytest.mark.parametrize(
    ("ours", "theirs", "new"),
    [
        ("masked_lm", "masked_lm", set()),
        ("sequence_classification", "masked_lm", {"pooler", "classifier"}),
        ("sequence_classification", "pooler", {"classifier"}),
        ("token_classification", "sequence_classification", {"classifier"}),
        ("masked_lm", "none", {"masked_lm"}),
        ("masked_lm_untied", "masked_lm", {"lm_head"}),
        ("none", "masked_lm", set()),
    ],
)
def test_new_parameters_are_those_of_a_head_that_the_source_lacks(ours, theirs, new):
    found = api.new_params(VARIANTS[ours], VARIANTS[theirs])
    assert {name.split("/")[0] for name in found} == new
    all_names = describe_params(VARIANTS[ours])
    assert len(found) == sum(line.split("/")[0] in new for line in all_names.splitlines())


def test_classes_are_new_where_their_names_are():
    model = VARIANTS["sequence_classification"]
    other = dataclasses.replace(model, labels=model.labels[::-1])
    assert api.new_params(other, model) == ["classifier/bias", "classifier/kernel"]
    assert api.new_params(SMALL_T5, SMALL_T5) == []
