"""One step: the mean gradient, however the batch is cut; every parameter moves; one program."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax

from conformance.cases import assert_trees_close, random_batch, random_params
from conformance.families import T5 as SMALL
from conformance.families import T5_EVEN as EVEN
from t5jax import batch as features
from t5jax import sharding
from t5jax.config import AxisRules, LossConfig, MeshConfig, OptimizerConfig
from t5jax.losses import batch_loss
from t5jax.models import api
from t5jax.optimizers import make_optimizer
from t5jax.train_state import TrainState, create_train_state, train_state_shardings
from t5jax.train_step import make_train_step

LOSS = LossConfig(z_loss=0.01, label_smoothing=0.1)
# One layer of each kind: what is shown here is the step, which takes long to compile.
MODEL = dataclasses.replace(SMALL, num_encoder_layers=1, num_decoder_layers=1, scan_layers=False)
DROPOUT = dataclasses.replace(MODEL, dropout_rate=0.3)
TX = optax.sgd(0.1)


def begin(model):
    params = random_params(model)
    return TrainState(jnp.int32(0), params, TX.init(params))


@functools.cache
def sgd_step(model=MODEL, **options):
    """A step whose update is the gradient itself, so that every error in it shows."""
    return jax.jit(make_train_step(model, TX, LOSS, **options))


@functools.cache
def sgd_result():
    """A batch of 8 rows of unequal lengths, and what one step makes of it."""
    batch = random_batch(MODEL, rows=8)
    return batch, sgd_step()(begin(MODEL), batch)


def test_update_is_the_mean_gradient_over_target_tokens():
    batch, (state, metrics) = sgd_result()
    params = random_params(MODEL)
    grad = jax.jit(jax.grad(lambda p: batch_loss(MODEL, p, batch, LOSS), has_aux=True))
    grads, sums = grad(params)
    tokens = np.count_nonzero(batch[features.DECODER_TARGET_TOKENS])
    assert 8 < tokens < 8 * 7
    grads = jax.tree.map(lambda g: g / tokens, grads)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert_trees_close(state.params, expected, atol=1e-6)
    assert state.step == 1
    assert metrics["tokens"] == tokens
    np.testing.assert_allclose(metrics["loss"], sums["loss"], rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_norms_by_group_and_a_loss_above_the_limit():
    batch, (state, metrics) = sgd_result()
    step, mean = sgd_step(norms=True, skips=True), metrics["loss"] / metrics["tokens"]
    kept, skipped = step(begin(MODEL), batch, None, mean * 0.99)
    assert_trees_close(kept, begin(MODEL), atol=0)
    assert (kept.step, skipped["skipped"]) == (0, 1)

    moved, found = step(begin(MODEL), batch, None, mean * 1.01)
    assert_trees_close(moved.params, state.params, atol=1e-6)
    assert (moved.step, found["skipped"]) == (1, 0)
    norms, params = found["norms"], random_params(MODEL)
    attention = jax.tree.leaves(params["encoder"]["layers"]["attention"])
    expected = np.sqrt(sum(np.sum(np.square(x)) for x in attention))
    np.testing.assert_allclose(norms["parameter"]["encoder/attention"], expected, rtol=1e-5)
    for group, gradient in norms["gradient"].items():  # The update is a tenth of it.
        np.testing.assert_allclose(norms["update"][group], 0.1 * gradient, rtol=1e-4)
    total = np.sqrt(sum(np.square(x) for x in norms["gradient"].values()))
    np.testing.assert_allclose(total, metrics["grad_norm"], rtol=1e-5)
    assert set(norms["gradient"]) == {
        "token_embedder",
        "lm_head",
        "encoder/attention",
        "encoder/mlp",
        "encoder/norms",
        "encoder/relative_bias",
        "decoder/self_attention",
        "decoder/cross_attention",
        "decoder/mlp",
        "decoder/norms",
        "decoder/relative_bias",
    }


def test_microbatches_of_bfloat16_parameters_add_up_in_float32():
    # A sum of equal terms in bfloat16 stands still after the 256th, so the mean would be half.
    model = dataclasses.replace(MODEL, param_dtype="bfloat16")
    row = random_batch(MODEL, rows=1)
    batch = jax.tree.map(lambda x: np.repeat(x, 512, 0), row)
    start = begin(model)
    expected = sgd_step(model)(start, row)[1]["grad_norm"]
    got = sgd_step(model, microbatches=512)(start, batch)[1]["grad_norm"]
    np.testing.assert_allclose(got, expected, rtol=1e-2)


def test_padded_rows_and_targets_count_nowhere():
    batch, (expected, metrics) = sgd_result()
    padded = features.pad_rows(batch, 12)
    # What stands in a target of weight 0 is nobody's business.
    out = padded[features.DECODER_LOSS_WEIGHTS] == 0
    padded[features.DECODER_TARGET_TOKENS] = np.where(
        out, 7, padded[features.DECODER_TARGET_TOKENS]
    )
    state, got = sgd_step()(begin(MODEL), padded)
    assert_trees_close(got, metrics, atol=1e-4)
    assert_trees_close(state.params, expected.params, atol=1e-6)


def test_a_batch_of_padding_alone_changes_nothing():
    batch = jax.tree.map(np.zeros_like, sgd_result()[0])
    start = begin(MODEL)
    state, metrics = sgd_step()(start, batch)
    assert_trees_close(state.params, start.params, atol=0, rtol=0)
    assert {name: float(x) for name, x in metrics.items()} == dict.fromkeys(metrics, 0.0)


# --- Dropout ------------------------------------------------------------------------------------


def loss_at(step_number, step, model):
    state = begin(model).replace(step=jnp.int32(step_number))
    return float(step(state, sgd_result()[0])[1]["loss"])


def test_masks_are_a_function_of_seed_and_step():
    step = sgd_step(DROPOUT)
    losses = [loss_at(n, step, DROPOUT) for n in (0, 1, 2, 0)]
    assert losses[0] == losses[3]  # What a resumed run depends on.
    assert len(set(losses)) == 3
    plain = float(sgd_result()[1][1]["loss"])
    assert all(abs(loss - plain) > 1e-2 for loss in losses)


def test_microbatches_have_masks_of_their_own():
    # Two microbatches of the same rows: with the same masks their losses would be the same, and
    # so would be their sum and twice the loss of the first half.
    batch = jax.tree.map(lambda x: np.repeat(x, 2, 0), random_batch(MODEL, rows=4))
    first = jax.tree.map(lambda x: np.concatenate([x[::2], 0 * x[::2]]), batch)
    interleaved = jax.tree.map(
        lambda x: x.reshape(2, 4, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape), first
    )
    step = sgd_step(DROPOUT, microbatches=2)
    state = begin(DROPOUT)
    both = float(step(state, batch)[1]["loss"])
    one = float(step(state, interleaved)[1]["loss"])
    assert one > 0
    assert abs(both - 2 * one) > 1e-2


# --- Dispatch -----------------------------------------------------------------------------------


def test_five_steps_are_one_trace_and_one_compilation_and_read_nothing():
    mesh, rules = sharding.make_mesh(MeshConfig(fsdp=4)), AxisRules()
    model = dataclasses.replace(EVEN, dropout_rate=0.1)
    tx = make_optimizer(OptimizerConfig(warmup_steps=3), 10, api.param_axes(model))
    shardings = train_state_shardings(model, tx, mesh, rules)
    traces, compilations = [], []
    train_step = make_train_step(model, tx, LOSS)

    def counted(state, batch):
        traces.append(1)
        return train_step(state, batch)

    def on_event(name, *_, **__):
        is_ours = threading.current_thread() is threading.main_thread()
        if is_ours and name == "/jax/core/compile/backend_compile_duration":
            compilations.append(name)

    step = jax.jit(counted, donate_argnums=0, out_shardings=(shardings, None))
    with sharding.use_mesh(mesh, rules):
        create = jax.jit(lambda key: create_train_state(model, tx, key), out_shardings=shardings)
        state = create(jax.random.key(0))
        batches = [
            sharding.shard_batch(random_batch(model, rows=8, seed=i), mesh, rules) for i in range(5)
        ]
        jax.monitoring.register_event_duration_secs_listener(on_event)
        try:
            for batch in batches:
                before, all_metrics = state, []
                with jax.transfer_guard("disallow"):
                    state, metrics = step(state, batch)
                    all_metrics.append(metrics)
                # The memory of the old state is the new one's.
                assert all(x.is_deleted() for x in jax.tree.leaves(before))
        finally:
            jax.monitoring.unregister_event_duration_listener(on_event)
    assert len(traces) == 1
    assert len(compilations) == 1
    assert state.step == 5
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
