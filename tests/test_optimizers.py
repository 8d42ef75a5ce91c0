"""The optimizers against NumPy written out layer by layer, against optax, and by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5jax.architectures import published
from t5jax.config import AxisRules, MeshConfig, OptimizerConfig
from t5jax.models import api
from t5jax.optimizers import (
    averages,
    gradient_point,
    make_optimizer,
    make_schedule,
    state_axes,
)
from t5jax.optimizers.precision import round_randomly
from t5jax.sharding import make_mesh, param_shardings

STEPS = 100

# One parameter of every kind that a T5 has; "small" is too small to be factored.
AXES = {
    "embedding": ("vocab", "embed"),
    "norm": {"scale": ("embed",)},
    "table": ("heads", "buckets"),
    "layers": {
        "query": ("layers", "embed", "heads", "head_dim"),
        "out": ("layers", "heads", "head_dim", "embed"),
        "wi": ("layers", "embed", "mlp"),
        "small": ("layers", "embed", "mlp"),
        "scale": ("layers", "embed"),
        "bias": ("layers", "heads", "buckets"),
    },
}
SHAPES = {
    "embedding": (160, 128),
    "norm": {"scale": (128,)},
    "table": (4, 32),
    "layers": {
        "query": (3, 128, 4, 32),
        "out": (3, 4, 32, 128),
        "wi": (3, 128, 144),
        "small": (3, 32, 144),
        "scale": (3, 128),
        "bias": (3, 4, 32),
    },
}
# Layers of a stack differ this much in scale, so that a mean over layers would show.
LAYER_SCALES = np.array([1e-2, 1.0, 30.0])

OPTIMIZERS = {
    "adafactor": {"name": "adafactor"},
    "adafactor_full": {"name": "adafactor", "b1": 0.5, "weight_decay": 0.1, "clip_norm": 50.0},
    "adamw": {"name": "adamw", "weight_decay": 0.1},
    "adamw_scaled": {"name": "adamw_scaled", "weight_decay": 0.1},
    "muon": {"name": "muon", "weight_decay": 0.1},
    "schedule_free": {"name": "schedule_free", "weight_decay": 0.1},
    "adamw_ema": {"name": "adamw", "ema": 0.9},
}
DTYPES = ("float32", "bfloat16")

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def is_leaf(x):
    return isinstance(x, tuple)


def config(optimizer="adafactor", **changes):
    return OptimizerConfig(**{**OPTIMIZERS[optimizer], **changes})


def random_tree(seed, dtype="float32", scale=1.0, mean=0.0, layer_scales=LAYER_SCALES):
    """Random arrays of SHAPES; the layers of a stack differ in scale."""
    rng = np.random.default_rng(seed)

    def one(axes, shape):
        x = mean + scale * rng.standard_normal(shape)
        if axes[0] == "layers":
            x *= layer_scales.reshape(-1, *[1] * (len(shape) - 1))
        return jnp.asarray(x, dtype)

    return jax.tree.map(one, AXES, SHAPES, is_leaf=is_leaf)


def optimizer_of(optimizer_config, steps=STEPS):
    return make_optimizer(optimizer_config, steps, AXES)


def jitted(tx):
    # Where it is worth its compilation; one operation at a time is faster for most tests.
    return tx._replace(update=jax.jit(tx.update))


def run(tx, params, grads, state=None):
    """Applies one update for each gradient; returns parameters and state."""
    state = tx.init(params) if state is None else state
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def last_update(tx, params, grads):
    """The update after gradients that the parameters did not follow."""
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
    return updates


# --- Schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "rates"),
    [
        ({"schedule": "constant"}, {0: 2.0, 9: 2.0, 50: 2.0}),
        ({"schedule": "constant", "warmup_steps": 4}, {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 9: 2.0}),
        ({"schedule": "inverse_sqrt", "warmup_steps": 4}, {0: 1.0, 4: 1.0, 9: 2 / 3, 16: 0.5}),
        ({"schedule": "linear"}, {0: 2.0, 5: 1.0, 9: 0.2, 10: 0.0, 20: 0.0}),
        (
            {"schedule": "linear", "warmup_steps": 2, "final_fraction": 0.5},
            {0: 1.0, 1: 2.0, 2: 2.0, 6: 1.5, 10: 1.0, 20: 1.0},
        ),
        (
            {"schedule": "cosine", "warmup_steps": 2},
            {0: 1.0, 2: 2.0, 4: 1 + math.sqrt(0.5), 6: 1.0, 10: 0.0},
        ),
        ({"schedule": "cosine", "final_fraction": 0.1}, {0: 2.0, 5: 1.1, 10: 0.2, 11: 0.2}),
        ({"schedule": "wsd"}, {0: 2.0, 9: 2.0, 10: 0.0, 11: 0.0}),
        (
            {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 4, "final_fraction": 0.5},
            {0: 1.0, 1: 2.0, 6: 2.0, 7: 1.5, 10: 1.0, 99: 1.0},
        ),
    ],
)
def test_schedule_against_hand_computed_rates(fields, rates):
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **fields), steps=10)
    for step, rate in rates.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6), f"step {step}"
    at_once = jax.jit(schedule)(jnp.asarray(list(rates), jnp.int32))
    np.testing.assert_allclose(at_once, list(rates.values()), atol=1e-6)


def test_t5_pretraining_rate():
    t5 = OptimizerConfig(learning_rate=1.0, schedule="inverse_sqrt", warmup_steps=10000)
    # A trial of ten steps has the rates of the real run.
    for steps in (10, 524288):
        schedule = make_schedule(t5, steps)
        assert float(schedule(0)) == pytest.approx(0.01)
        assert float(schedule(9999)) == pytest.approx(0.01)
        assert float(schedule(40000)) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("fields", "most"),
    [({}, 10), ({"schedule": "linear"}, 9), ({"schedule": "cosine"}, 9)],
)
def test_warmup_that_does_not_end_is_refused(fields, most):
    make_schedule(OptimizerConfig(warmup_steps=most, **fields), steps=10)
    message = rf"warmup_steps is 11, but train.steps is 10; set .* to {most} or less, or raise"
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(warmup_steps=11, **fields), 10, AXES)


def test_warmup_that_leaves_nothing_to_fall_is_refused():
    linear = OptimizerConfig(warmup_steps=10, schedule="linear")
    with pytest.raises(ValueError, match=r"steps is 10; lower it, or use schedule constant"):
        make_schedule(linear, steps=10)


def test_a_decay_that_begins_before_the_warmup_ends_is_refused():
    wsd = OptimizerConfig(schedule="wsd", warmup_steps=7, decay_steps=4)
    with pytest.raises(
        ValueError, match=r"7 and decay_steps 4 are 11 steps, but train.steps is 10"
    ):
        make_schedule(wsd, steps=10)


# --- Adafactor against NumPy ---------------------------------------------------------------------


class NumpyAdafactor:
    """Adafactor of one matrix [rows, columns] or vector, float64, as the paper has it.

    `p` is the exact result of the last step, before it is rounded to the parameter's dtype.
    """

    def __init__(self, factored, b1=None, weight_decay=0.0):
        self.factored, self.b1, self.weight_decay = factored, b1, weight_decay
        self.n, self.row, self.column, self.v, self.m = 0, 0.0, 0.0, 0.0, 0.0

    def step(self, p, g, rate):
        self.n += 1
        keep = 1 - self.n**-0.8
        g2 = g * g + 1e-30
        if self.factored:
            self.row = keep * self.row + (1 - keep) * g2.mean(axis=1)
            self.column = keep * self.column + (1 - keep) * g2.mean(axis=0)
            v = np.outer(self.row, self.column) / self.row.mean()
        else:
            v = self.v = keep * self.v + (1 - keep) * g2
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt(np.mean(u * u)))
        u = rate * max(1e-3, np.sqrt(np.mean(p * p))) * u
        if self.b1:
            u = self.m = self.b1 * self.m + (1 - self.b1) * u
        return p - u - rate * self.weight_decay * p


def matrices(tree):
    """Every parameter as a list of float64 matrices [embed, rest], or vectors, one a layer."""

    def one(axes, x):
        x = np.asarray(x, np.float64)
        layers = list(x) if axes[0] == "layers" else [x]
        own = [axis for axis in axes if axis != "layers"]
        if "embed" in own and len(own) > 1:
            layers = [
                np.moveaxis(y, own.index("embed"), 0).reshape(y.shape[own.index("embed")], -1)
                for y in layers
            ]
        return layers

    flat = jax.tree.map(one, AXES, tree, is_leaf=is_leaf)
    names = jax.tree_util.tree_leaves_with_path(AXES, is_leaf=is_leaf)
    leaves = jax.tree.leaves(flat, is_leaf=lambda x: isinstance(x, list))
    return {jax.tree_util.keystr(path): x for (path, _), x in zip(names, leaves, strict=True)}


FACTORED = ("['embedding']", "['layers']['query']", "['layers']['out']", "['layers']['wi']")
MATRICES = (*FACTORED, "['layers']['small']")


@pytest.mark.parametrize("fields", [{}, {"b1": 0.9}, {"weight_decay": 0.1}], ids=str)
@every_dtype
def test_adafactor_equals_numpy_layer_by_layer(fields, dtype):
    # A rate that changes, and is large enough for bfloat16 to show the update in every step.
    optimizer_config = config(learning_rate=0.1, schedule="linear", **fields)
    tx = optimizer_of(optimizer_config, 10)
    params = random_tree(0, dtype)
    state = tx.init(params)
    references = {
        name: [
            NumpyAdafactor(
                name in FACTORED,
                fields.get("b1"),
                fields.get("weight_decay", 0.0) if name in MATRICES else 0.0,
            )
            for _ in layers
        ]
        for name, layers in matrices(params).items()
    }
    # Gradients that grow and shrink, so that updates are clipped in some steps alone.
    for n, size in enumerate((1.0, 3.0, 0.3, 2.0, 1.0)):
        grads = random_tree(n + 1, dtype, scale=size)
        before, g = matrices(params), matrices(grads)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        after = matrices(params)
        for name, layers in references.items():
            for i, reference in enumerate(layers):
                exact = reference.step(before[name][i], g[name][i], 0.1 * (1 - n / 10))
                moved = np.abs(exact - before[name][i]).mean()
                error = np.abs(after[name][i] - exact)
                where = f"{name}, layer {i}, step {n}"
                if dtype == "float32":
                    assert error.max() < 1e-5 * np.abs(exact).max(), where
                    assert error.mean() < 1e-5 * moved, where
                else:
                    # One of the two neighbours: less than a unit in the last place away.
                    ulp = np.maximum(np.abs(exact), np.abs(after[name][i])) * 2.0**-7
                    assert np.all(error < ulp + 1e-6 * np.abs(exact).max()), where
                # In float32 what moved is far above what was rounded, or this would show nothing.
                assert moved > 1e-3 * np.abs(exact).mean(), where


def test_adafactor_equals_optax_on_what_is_not_stacked():
    axes = {"matrix": ("embed", "mlp"), "vector": ("embed",), "table": ("heads", "buckets")}
    rng = np.random.default_rng(0)

    def draw():
        shapes = {"matrix": (256, 512), "vector": (300,), "table": (8, 32)}
        return {k: jnp.asarray(rng.standard_normal(v), jnp.float32) for k, v in shapes.items()}

    params, grads = draw(), [draw() for _ in range(5)]
    tx = make_optimizer(OptimizerConfig(learning_rate=0.01), STEPS, axes)
    ours, _ = run(jitted(tx), params, grads)
    theirs, _ = run(jitted(optax.adafactor(0.01)), params, grads)
    for name in params:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=4e-7, err_msg=name)
        assert np.abs(ours[name] - params[name]).mean() > 1e-3


def test_which_parameters_of_a_t5_are_factored():
    model = published("t5_1_1_small")
    tx = make_optimizer(OptimizerConfig(), STEPS, api.param_axes(model))
    shapes = api.param_shapes(model)
    state = jax.eval_shape(tx.init, shapes).inner[1]
    layer = state.v_row["encoder"]["layers"], state.v_col["encoder"]["layers"]
    assert [x["attention"]["query"]["kernel"].shape for x in layer] == [(8, 512), (8, 6, 64)]
    assert [x["attention"]["out"]["kernel"].shape for x in layer] == [(8, 512), (8, 6, 64)]
    assert [x["mlp"]["wo"]["kernel"].shape for x in layer] == [(8, 512), (8, 1024)]
    embedding = [x["token_embedder"]["embedding"].shape for x in (state.v_row, state.v_col)]
    assert embedding == [(512,), (32128,)]

    unfactored = jax.tree.map(lambda v, p: v.shape == p.shape, state.v, shapes)
    for path, whole in jax.tree_util.tree_leaves_with_path(unfactored):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert whole == ("norm" in name or "relative_bias" in name), name

    # Which is the point of it: hundreds of times smaller than the parameters.
    count = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (state, shapes)]
    assert count[0] < count[1] / 300


def test_a_matrix_is_factored_from_128_entries_a_side():
    axes = {"matrix": ("embed", "heads", "head_dim")}
    tx = make_optimizer(OptimizerConfig(), STEPS, axes)

    def is_factored(*shape):
        state = jax.eval_shape(tx.init, {"matrix": jax.ShapeDtypeStruct(shape, "float32")})
        return state.inner[1].v["matrix"].shape != shape

    assert is_factored(128, 4, 32)
    assert not is_factored(127, 4, 32)
    assert not is_factored(512, 1, 127)


def test_a_large_table_of_position_biases_is_not_factored():
    axes = {"table": ("heads", "buckets")}
    tx = make_optimizer(OptimizerConfig(), STEPS, axes)
    state = tx.init({"table": jnp.ones((256, 256))}).inner[1]
    assert state.v["table"].shape == (256, 256)


def test_the_smallest_gradients_count():
    # Their squares are far below float32's resolution beside 1, and far above what is added.
    axes, params = {"w": ("embed",)}, {"w": jnp.ones(4)}
    tx = make_optimizer(OptimizerConfig(learning_rate=0.1), STEPS, axes)
    update = last_update(tx, params, [{"w": jnp.full(4, 1e-12)}])["w"]
    np.testing.assert_allclose(update, -0.1, rtol=1e-4)


def test_a_zero_gradient_gives_a_zero_update():
    params = random_tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for leaf in jax.tree.leaves(last_update(optimizer_of(config()), params, [zeros])):
        np.testing.assert_array_equal(leaf, 0.0)


# --- AdamW --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adamw_scaled"])
def test_adamw_equals_numpy(name):
    p, g = random_tree(0), [random_tree(n + 1) for n in range(5)]
    fields = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1}
    tx = optimizer_of(OptimizerConfig(name, learning_rate=0.01, **fields))
    ours = matrices(run(tx, p, g)[0])
    gradients = [matrices(x) for x in g]
    for key, layers in matrices(p).items():
        for i, x in enumerate(layers):
            m = v = 0.0
            for n, grads in enumerate(gradients, start=1):
                m = 0.8 * m + 0.2 * grads[key][i]
                v = 0.95 * v + 0.05 * grads[key][i] ** 2
                u = (m / (1 - 0.8**n)) / (np.sqrt(v / (1 - 0.95**n)) + 1e-3)
                scale = np.sqrt(np.mean(x * x)) if name == "adamw_scaled" else 1.0
                decay = 0.1 if key in MATRICES else 0.0
                x = x - 0.01 * (scale * u + decay * x)
            # Relative to the layer: 0.01 of its entries is near the zero that they pass through.
            np.testing.assert_allclose(
                ours[key][i], x, rtol=0, atol=2e-6 * np.abs(x).max(), err_msg=f"{key} {i}"
            )


def test_adamw_without_numbers_has_the_usual_ones():
    # Gradients as small as eps, and unequal, so that each of the three shows.
    m = v = p = 0.0
    grads = (1e-8, -3e-8, 2e-8)
    for n, g in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p -= 0.5 * (m / (1 - 0.9**n)) / (math.sqrt(v / (1 - 0.999**n)) + 1e-8)
    tx = make_optimizer(OptimizerConfig("adamw", learning_rate=0.5), STEPS, {"w": ("embed",)})
    after, _ = run(tx, {"w": jnp.zeros(1)}, [{"w": jnp.array([g])} for g in grads])
    np.testing.assert_allclose(after["w"], p, rtol=1e-5)


def test_a_parameter_of_zeros_still_moves():
    axes, params = {"w": ("embed", "mlp")}, {"w": jnp.zeros((128, 128))}
    grads = {"w": jnp.ones((128, 128))}
    for name in ("adafactor", "adamw_scaled"):
        tx = make_optimizer(OptimizerConfig(name, learning_rate=0.1), STEPS, axes)
        update = last_update(tx, params, [grads])["w"]
        np.testing.assert_allclose(update, -0.1 * 1e-3, rtol=1e-5)


# --- Muon, schedule-free, averages ----------------------------------------------------------------


def orthogonalized(x):
    """Five Newton-Schulz iterations of a matrix, as Jordan's code has them; float64."""
    transposed = x.shape[0] > x.shape[1]
    x = (x.T if transposed else x) / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if transposed else x


def test_muon_equals_numpy_layer_by_layer():
    p, g = random_tree(0), [random_tree(n + 1) for n in range(3)]
    fields = {"momentum": 0.9, "b1": 0.8, "b2": 0.95, "weight_decay": 0.1}
    ours = matrices(
        run(optimizer_of(OptimizerConfig("muon", learning_rate=0.01, **fields)), p, g)[0]
    )
    adam = OptimizerConfig("adamw", learning_rate=0.01, b1=0.8, b2=0.95, weight_decay=0.1)
    as_adam = matrices(run(optimizer_of(adam), p, g)[0])
    gradients = [matrices(x) for x in g]
    for key, layers in matrices(p).items():
        for i, x in enumerate(layers):
            if key not in MATRICES or key == "['embedding']":
                np.testing.assert_array_equal(ours[key][i], as_adam[key][i])
                continue
            m = 0.0
            for n, grads in enumerate(gradients, start=1):
                m = 0.9 * m + 0.1 * grads[key][i]
                u = 0.9 * m / (1 - 0.9 ** (n + 1)) + 0.1 * grads[key][i] / (1 - 0.9**n)
                u = orthogonalized(u) * 0.2 * np.sqrt(max(x.shape))
                x = x - 0.01 * (u + 0.1 * x)
            moved = np.abs(x - layers[i]).max()
            np.testing.assert_allclose(ours[key][i], x, rtol=0, atol=1e-3 * moved, err_msg=key)


@pytest.mark.parametrize("name", ["adafactor", "adamw_scaled"])
def test_the_rate_of_an_adapter_is_not_relative_to_it(name):
    """Otherwise the matrix that is 0 at first would take a thousandth of each step."""
    axes = {"lora_b": ("rank", "mlp"), "wi": ("embed", "mlp")}
    params = dict.fromkeys(axes, np.zeros((3, 5), np.float32))
    tx = make_optimizer(OptimizerConfig(name, learning_rate=0.01), STEPS, axes)
    ones = jax.tree.map(np.ones_like, params)
    updates = tx.update(ones, tx.init(params), params)[0]
    np.testing.assert_allclose(updates["lora_b"], -0.01, rtol=1e-3)
    np.testing.assert_allclose(updates["wi"], -1e-5, rtol=1e-3)


def test_muon_takes_both_matrices_of_an_adapter_and_no_soft_prompt():
    axes = {
        "lora_a": ("layers", "embed", "rank"),
        "lora_b": ("layers", "rank", "heads", "head_dim"),
        "head": ("embed", "rank"),
        "soft_prompt": ("rank", "embed"),
    }
    shapes = {"lora_a": (2, 24, 3), "lora_b": (2, 3, 4, 5), "head": (24, 3), "soft_prompt": (3, 24)}
    rng = np.random.default_rng(0)
    grads = {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    tx = make_optimizer(OptimizerConfig("muon", learning_rate=0.01), STEPS, axes)
    updates = tx.update(grads, tx.init(params), params)[0]
    for name in ("lora_a", "lora_b"):  # Orthogonal, each layer by itself.
        for layer in np.asarray(updates[name]):
            sides = layer.reshape(3, -1) if name == "lora_b" else layer
            singular = np.linalg.svd(sides, compute_uv=False) / np.sqrt(max(sides.shape))
            np.testing.assert_allclose(singular, 0.2 * 0.01, rtol=0.35)
    for name in ("head", "soft_prompt"):  # AdamW's first step.
        np.testing.assert_allclose(np.abs(updates[name]), 0.01, rtol=1e-3)


def test_muon_takes_every_matrix_of_a_published_model_and_nothing_else():
    for name in ("t5_1_1_small", "gpt2", "bert_base_uncased"):
        model = published(name)
        tx = make_optimizer(OptimizerConfig("muon"), STEPS, api.param_axes(model))
        state = jax.eval_shape(tx.init, api.param_shapes(model)).inner[1].inner_states["muon"]
        paths = jax.tree_util.tree_leaves_with_path(state.inner_state[0].mu)
        found = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths}
        shapes = jax.tree_util.tree_leaves_with_path(api.param_shapes(model))
        names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in shapes}
        kernels = {n for n in names if n.endswith("/kernel") and "lm_head" not in n}
        assert found == kernels


def test_schedule_free_holds_the_mean_of_optaxs():
    """optax's parameters are y, ours x; its rate in the mean's weights is one step ahead."""
    axes, params = {"w": ("embed", "mlp")}, {"w": jnp.asarray([[1.0, -2.0], [0.5, 3.0]])}
    rng = np.random.default_rng(0)
    grads = [{"w": jnp.asarray(rng.standard_normal((2, 2)), jnp.float32)} for _ in range(6)]
    fields = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
    theirs = optax.contrib.schedule_free_adamw(0.1, **fields)
    y, state = run(theirs, params, grads)
    config = OptimizerConfig("schedule_free", learning_rate=0.1, **fields)
    ours, our_state = run(make_optimizer(config, STEPS, axes), params, grads)
    x = optax.contrib.schedule_free_eval_params(state, y)
    np.testing.assert_allclose(ours["w"], x["w"], rtol=1e-5)
    point = gradient_point(config, ours, our_state)
    np.testing.assert_allclose(point["w"], y["w"], rtol=1e-5)
    assert np.abs(x["w"] - y["w"]).max() > 1e-3


def test_schedule_free_weighs_with_the_largest_rate():
    # Adam's first steps are rates: z is 1 after the first step, 3 after the second; the weights of
    # the mean are 1 and 4.
    config = OptimizerConfig("schedule_free", learning_rate=2.0, warmup_steps=2, b2=0.0)
    ones = {"w": -jnp.ones(1)}
    tx = make_optimizer(config, STEPS, {"w": ("embed",)})
    after, _ = run(tx, {"w": jnp.zeros(1)}, [ones, ones])
    np.testing.assert_allclose(after["w"], (1 * 1 + 4 * 3) / 5, rtol=1e-5)


@every_dtype
def test_the_average_is_corrected_for_its_start(dtype):
    params = {"w": jnp.asarray([100.0], dtype)}
    tx = make_optimizer(
        OptimizerConfig("adamw", learning_rate=1.0, ema=0.5), STEPS, {"w": ("embed",)}
    )
    state, seen = tx.init(params), []
    np.testing.assert_array_equal(averages(state)["w"], 100.0)
    for _ in range(3):
        updates, state = tx.update({"w": jnp.ones(1, dtype)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["w"][0]))
    assert len(set(seen)) == 3
    # 1, 2 and 4 are proportional to 0.5 ** (n - k).
    expected = (seen[0] + 2 * seen[1] + 4 * seen[2]) / 7
    np.testing.assert_allclose(averages(state)["w"], expected, rtol=1e-6)
    assert averages(state)["w"].dtype == jnp.float32
    assert averages(tx.init(params).inner) is None


# --- What holds for every optimizer ---------------------------------------------------------------


@every_optimizer
@every_dtype
def test_one_step_moves_every_parameter(optimizer, dtype):
    # At T5's fine-tuning rate half of bfloat16's spacing is more than an update, so that only
    # rounding at random lets it move.
    params = random_tree(0, dtype, mean=1.0, scale=0.1, layer_scales=np.ones(3))
    grads = random_tree(1, dtype)
    tx = optimizer_of(config(optimizer, learning_rate=1e-3))
    after, _ = run(tx, params, [grads])
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for (path, p), q in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(after), strict=True
    ):
        layers = range(len(p)) if path[0].key == "layers" else [...]
        for layer in layers:
            assert np.any(p[layer] != q[layer]), f"{jax.tree_util.keystr(path)} {layer}"
        assert q.dtype == dtype
        assert np.all(np.isfinite(q))


@every_optimizer
def test_stacked_equals_layer_by_layer(optimizer):
    params, grads = random_tree(0), [random_tree(n + 1) for n in range(3)]
    # Clipping by the global norm alone looks at all layers together.
    optimizer_config = config(optimizer, learning_rate=0.1, clip_norm=None)

    stacked, _ = run(optimizer_of(optimizer_config), params, grads)
    axes = jax.tree.map(lambda a: a[1:], AXES["layers"], is_leaf=is_leaf)
    tx = make_optimizer(optimizer_config, STEPS, axes)

    def layer(tree, i):
        return jax.tree.map(lambda x: x[i], tree["layers"])

    for i in range(3):
        alone, _ = run(tx, layer(params, i), [layer(g, i) for g in grads])
        for key, x in alone.items():
            error = np.abs(layer(stacked, i)[key] - x).max() / LAYER_SCALES[i]
            # Newton-Schulz iterations enlarge what is rounded.
            assert error < (1e-4 if optimizer == "muon" else 2e-6), (key, i, error)


@every_optimizer
@every_dtype
def test_state_is_float32_and_keeps_its_types(optimizer, dtype):
    params, grads = random_tree(0, dtype), random_tree(1, dtype)
    tx = optimizer_of(config(optimizer, learning_rate=1e-3))
    state = tx.init(params)
    after = tx.update(grads, state, params)[1]
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        assert x.dtype in (jnp.float32, jnp.int32), jax.tree_util.keystr(path)
        assert x.size > 0, jax.tree_util.keystr(path)  # Orbax does not save empty arrays.
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.shape == b.shape, state, after)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_bfloat16_moments_are_those_of_float32(optimizer):
    params, grads = random_tree(0, "bfloat16"), [random_tree(n + 1, "bfloat16") for n in range(3)]
    as_float32 = [jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (params, *grads)]
    tx = optimizer_of(config(optimizer, learning_rate=1e-3))
    half, full = run(tx, params, grads)[1], run(tx, as_float32[0], as_float32[1:])[1]
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


@every_optimizer
def test_global_norm_is_clipped_before_anything_else(optimizer):
    params, grads = random_tree(0), random_tree(1)
    norm = math.sqrt(sum(float(np.sum(np.float64(g) ** 2)) for g in jax.tree.leaves(grads)))
    clipped = jax.tree.map(lambda g: g * (2.0 / norm), grads)
    # A large eps, or the first step of Adam would not depend on the gradient's length. Adafactor's
    # does not: its second step does.
    eps = {} if config(optimizer).name == "adafactor" else {"eps": 1.0}

    # Of another direction: Muon's update does not depend on the length of a sum of parallel ones.
    second = jax.tree.map(lambda g: g * (1.0 / norm), random_tree(2))

    def update(clip_norm, first):
        tx = optimizer_of(config(optimizer, clip_norm=clip_norm, weight_decay=None, **eps))
        return last_update(tx, params, [first, second])

    got, expected, without = update(2.0, grads), update(None, clipped), update(None, grads)
    for a, b, c in zip(*map(jax.tree.leaves, (got, expected, without)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5 * np.abs(b).max())
        assert np.abs(c - b).max() > 0.1 * np.abs(b).max()


def test_adafactor_clips_each_layer_by_itself():
    axes, params = {"w": ("layers", "embed")}, {"w": jnp.ones((2, 4))}
    grads = [{"w": jnp.ones((2, 4))}, {"w": jnp.asarray([[9.0] * 4, [1.0] * 4])}]
    tx = make_optimizer(OptimizerConfig(learning_rate=0.1), STEPS, axes)
    update = last_update(tx, params, grads)["w"]
    # Layer 0: v = (1 - k) + 81 k with k = 2^-0.8, 9 / sqrt(v) = 1.2 above 1, so clipped to 1.
    np.testing.assert_allclose(update, -0.1, rtol=1e-5)


def test_weight_decay_spares_norms_and_position_biases():
    params = random_tree(0, mean=1.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for name in ("adafactor", "adamw", "adamw_scaled", "muon"):
        decay = OptimizerConfig(name, learning_rate=0.5, warmup_steps=5, weight_decay=0.25)
        update = last_update(optimizer_of(decay), params, [zeros, zeros])
        for (path, u), p in zip(
            jax.tree_util.tree_leaves_with_path(update), jax.tree.leaves(params), strict=True
        ):
            share = 0.25 * 0.5 * 2 / 5 if jax.tree_util.keystr(path) in MATRICES else 0.0
            np.testing.assert_allclose(u, -share * p, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_weight_decay_spares_the_biases_of_heads():
    axes = {
        "kernel": ("layers", "embed", "heads", "head_dim"),
        "bias": ("layers", "heads", "head_dim"),
        "classes": ("embed", None),
    }
    params = {name: jnp.ones([2] * len(names)) for name, names in axes.items()}
    optimizer = OptimizerConfig("adamw", learning_rate=0.5, weight_decay=0.25)
    tx = make_optimizer(optimizer, 10, axes)
    update = last_update(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    np.testing.assert_allclose(update["kernel"], -0.125)
    np.testing.assert_allclose(update["classes"], -0.125)
    np.testing.assert_array_equal(update["bias"], 0)


# Every field of OptimizerConfig: a value beside which another one changes the update.
FIELDS = {
    "name": ({}, {"name": "adamw_scaled"}),
    "learning_rate": ({}, {"learning_rate": 2e-3}),
    "schedule": ({}, {"schedule": "linear"}),
    "warmup_steps": ({}, {"warmup_steps": 4}),
    "final_fraction": ({"schedule": "linear"}, {"final_fraction": 0.5}),
    "clip_norm": ({}, {"clip_norm": 0.1}),
    "weight_decay": ({}, {"weight_decay": 0.1}),
    "b1": ({"name": "adamw"}, {"b1": 0.5}),
    "b2": ({"name": "adamw"}, {"b2": 0.5}),
    "eps": ({"name": "adamw"}, {"eps": 0.1}),
    "decay_rate": ({}, {"decay_rate": 0.5}),
    "clip_threshold": ({}, {"clip_threshold": 0.1}),
    "learning_rates": ({}, {"learning_rates": ("layers/*:1e-4",)}),
    "decay_steps": ({"schedule": "wsd"}, {"decay_steps": 10}),
    "momentum": ({"name": "muon"}, {"momentum": 0.5}),
}


# What optimizer.freeze does, tests/test_program.py says: make_optimizer is given the others alone.
# optimizer.ema changes what is evaluated, not what is trained.
@pytest.mark.parametrize(
    "field",
    [f.name for f in dataclasses.fields(OptimizerConfig) if f.name not in ("freeze", "ema")],
)
def test_every_field_changes_the_parameters(field):
    base, change = FIELDS[field]
    params = random_tree(0)
    grads = [random_tree(n + 1, scale=0.5**n) for n in range(3)]
    results = []
    for fields in (base, base | change):
        tx = optimizer_of(OptimizerConfig(**fields), 10)
        results.append(run(tx, params, grads)[0]["layers"]["query"])
    moved = np.abs(results[0] - params["layers"]["query"]).max()
    assert np.abs(results[0] - results[1]).max() > 1e-2 * moved


def test_b1_is_momentum_in_adafactor():
    params, grads = random_tree(0), random_tree(1)
    plain, momentum, off = (
        last_update(optimizer_of(config(b1=b1)), params, [grads]) for b1 in (None, 0.75, 0.0)
    )
    for u, m, o in zip(*map(jax.tree.leaves, (plain, momentum, off)), strict=True):
        np.testing.assert_allclose(m, 0.25 * u, rtol=1e-6)
        np.testing.assert_array_equal(o, u)


# --- Rounding -----------------------------------------------------------------------------------


def test_random_rounding_is_right_on_average():
    # 1 + 0.3 of a step upwards, of which bfloat16 makes 1 or 1 + 2^-7; and a negative number.
    for exact, low, high in [(1 + 0.3 * 2**-7, 1.0, 1 + 2**-7), (-2.5 - 2**-8, -2.515625, -2.5)]:
        x = round_randomly(jnp.full(100_000, exact, jnp.float32), jnp.uint32(0))
        assert set(np.unique(x)) == {np.float32(low), np.float32(high)}
        # Five standard deviations of the mean of 100,000 draws.
        assert float(np.mean(np.float64(x))) == pytest.approx(exact, abs=(high - low) * 0.5 * 0.016)


def test_random_rounding_keeps_what_bfloat16_holds():
    x = jnp.asarray([0.0, 1.0, -0.375, 3e38, jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16)
    x = x.astype(jnp.float32)
    np.testing.assert_array_equal(round_randomly(x, jnp.uint32(0)), x)
    # The largest NaN, from which noise would carry over to 0.
    all_ones = jax.lax.bitcast_convert_type(jnp.full(9, 0xFFFFFFFF, jnp.uint32), jnp.float32)
    assert np.isnan(round_randomly(all_ones, jnp.uint32(0))).all()


def test_many_small_bfloat16_steps_arrive():
    # Each of the 100 steps is an eighth of bfloat16's spacing at 1: to nearest, none would count.
    axes, ones = {"scale": ("embed",), "other": ("embed",)}, jnp.ones(4096, jnp.bfloat16)
    params, grads = dict.fromkeys(axes, ones), [dict.fromkeys(axes, -ones)] * 100
    tx = make_optimizer(OptimizerConfig("adamw", learning_rate=2**-10), STEPS, axes)
    tx = jitted(tx)
    (after, _), (again, _) = run(tx, params, grads), run(tx, params, grads)
    after = {name: np.asarray(x, np.float64) for name, x in after.items()}
    # Each step goes up one spacing with a chance of an eighth, by itself: 100 of them are binomial.
    taken = (after["scale"] - 1) / 2**-7
    assert taken.mean() == pytest.approx(100 / 8, abs=5 * math.sqrt(100 * 7 / 64 / 4096))
    assert taken.std() == pytest.approx(math.sqrt(100 * 7 / 64), rel=0.1)
    # Nor do parameters go together, though the same happens to them.
    assert abs(np.corrcoef(after["scale"], after["other"])[0, 1]) < 0.1
    # The rounding is a function of the step: a run can be repeated bit for bit.
    for name, x in after.items():
        np.testing.assert_array_equal(x, np.asarray(again[name], np.float64))


# --- Sharding -----------------------------------------------------------------------------------


def placements(tx, params, axes):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    shardings = param_shardings(axes, params, mesh, AxisRules())
    state = jax.eval_shape(tx.init, params)
    placed = param_shardings(state_axes(state, params, axes), state, mesh, AxisRules())
    return shardings, state, placed


@every_optimizer
def test_state_of_a_parameters_shape_has_its_sharding(optimizer):
    params = random_tree(0)
    shardings, shapes, placed = placements(optimizer_of(config(optimizer)), params, AXES)
    by_param = {
        tuple(map(str, path)): (p.shape, s)
        for (path, p), s in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }
    num_split = 0
    for (path, x), s in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(placed), strict=True
    ):
        path = tuple(map(str, path))
        of_param = next((v for k, v in by_param.items() if path[-len(k) :] == k), None)
        if of_param and of_param[0] == x.shape:
            assert s == of_param[1], path
            num_split += not s.is_fully_replicated
        elif not of_param or x.shape == (1,):
            assert s.is_fully_replicated, path
    # Adam: both moments of all 9, and their average; Muon: one moment of the 4 matrices. Adafactor:
    # what is not factored; with momentum its mean of all.
    counts = {"adafactor": 5, "adafactor_full": 14, "muon": 14, "adamw_ema": 27}
    assert num_split == counts.get(optimizer, 18)


def test_factored_statistics_are_split_along_the_dimensions_that_they_keep():
    axes = {
        "query": ("layers", "embed", "heads", "head_dim"),
        "out": ("layers", "heads", "head_dim", "embed"),
        "lm_head": ("embed", "vocab"),
        "scale": ("embed",),
    }
    shapes = {
        "query": (2, 128, 4, 32),
        "out": (2, 4, 32, 128),
        "lm_head": (128, 384),
        "scale": (128,),
    }
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    _, state, placed = placements(make_optimizer(config("adafactor"), STEPS, axes), params, axes)
    found = {
        jax.tree_util.keystr(path[-2:]): (x.shape, tuple(s.spec))
        for (path, x), s in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(placed), strict=True
        )
        if x.ndim
    }
    rows, columns = (None, "fsdp"), (None, "model", None)
    assert found == {
        ".v_row['query']": ((2, 128), rows),
        ".v_col['query']": ((2, 4, 32), columns),
        ".v['query']": ((1,), (None,)),
        ".v_row['out']": ((2, 128), rows),
        ".v_col['out']": ((2, 4, 32), columns),
        ".v['out']": ((1,), (None,)),
        ".v_row['lm_head']": ((128,), ("fsdp",)),
        ".v_col['lm_head']": ((384,), ("model",)),
        ".v['lm_head']": ((1,), (None,)),
        ".v_row['scale']": ((1,), (None,)),
        ".v_col['scale']": ((1,), (None,)),
        ".v['scale']": ((128,), ("fsdp",)),
    }


@pytest.mark.parametrize("optimizer", ["adafactor_full", "muon"])
def test_eight_devices_make_the_update_of_one(optimizer):
    axes = {"query": AXES["layers"]["query"], "wi": AXES["layers"]["wi"], "scale": ("embed",)}
    rng = np.random.default_rng(0)

    def draw():
        shapes = {"query": (2, 128, 4, 32), "wi": (2, 128, 144), "scale": (128,)}
        tree = {k: jnp.asarray(rng.standard_normal(v), jnp.float32) for k, v in shapes.items()}
        return tree | {"wi": tree["wi"].astype(jnp.bfloat16)}

    params, grads = draw(), [draw(), draw()]
    tx = jitted(make_optimizer(config(optimizer, learning_rate=1e-3), STEPS, axes))
    shardings, _, placed = placements(tx, params, axes)
    on_one, _ = run(tx, params, grads)
    on_eight, state = run(
        tx, *jax.device_put((params, grads, tx.init(params)), (shardings, [shardings] * 2, placed))
    )
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(state))
    for name, a in on_one.items():
        a, b = np.asarray(a, np.float64), np.asarray(on_eight[name], np.float64)
        if name == "wi":
            # The same noise; where a sum's last bits differ, a few entries round the other way.
            assert np.mean(a != b) < 1e-3
            assert np.mean(a != np.asarray(params[name], np.float64)) > 0.1
        else:
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
