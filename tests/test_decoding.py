"""Decoding step by step against the logits of whole rows, and greedy search against its meaning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from small import EVEN, PREFILL, SMALL, STEP, VARIANTS, random_batch, random_params
from t5jax import decoding, sharding
from t5jax.batch import DECODER_INPUT_TOKENS, ENCODER_INPUT_TOKENS
from t5jax.config import AxisRules, MeshConfig
from t5jax.models import api

LOGITS = jax.jit(api.logits, static_argnums=0)
MODELS = VARIANTS | {
    "unrolled": dataclasses.replace(SMALL, scan_layers=False),
    "one_head": dataclasses.replace(SMALL, num_heads=1, d_kv=7),
}


@functools.cache
def greedy(rows=4, max_tokens=8):
    """A model of which greedy search writes different tokens for different rows."""
    params = random_params(SMALL, seed=1)
    inputs = random_batch(SMALL, rows=rows, seed=3)[ENCODER_INPUT_TOKENS]
    tokens = np.asarray(decoding.greedy(SMALL, params, {ENCODER_INPUT_TOKENS: inputs}, max_tokens))
    return params, inputs, tokens


@pytest.mark.parametrize(
    ("name", "arranged"), [(name, True) for name in MODELS] + [("t5_1_1", False), ("umt5", False)]
)
def test_chain_of_steps_gives_the_logits_of_the_row(name, arranged):
    model = MODELS[name]
    params, batch = random_params(model), random_batch(model, target=7)
    expected = LOGITS(model, params, batch)
    if arranged:
        params = api.arrange_for_decoding(model, params)
    assert np.std(expected) > 0.1
    tokens_BT = batch[DECODER_INPUT_TOKENS]
    # Room for more tokens than are decoded: what was not written yet must not be seen.
    logits, cache = PREFILL(model, params, {ENCODER_INPUT_TOKENS: batch[ENCODER_INPUT_TOKENS]}, 10)
    for t in range(7):
        np.testing.assert_allclose(logits, expected[:, t], atol=1e-4, rtol=1e-4, err_msg=f"{t=}")
        assert (cache.positions == t + 1).all()
        if t < 6:
            logits, cache = STEP(model, params, cache, tokens_BT[:, t + 1])


def test_bfloat16_steps_agree_with_the_row():
    model = dataclasses.replace(SMALL, dtype="bfloat16")
    params, batch = random_params(model), random_batch(model)
    expected = np.asarray(LOGITS(model, params, batch))
    inputs = {ENCODER_INPUT_TOKENS: batch[ENCODER_INPUT_TOKENS]}
    logits, cache = PREFILL(model, params, inputs, 7)
    assert logits.dtype == jnp.float32
    for t in range(1, 7):
        logits, cache = STEP(model, params, cache, batch[DECODER_INPUT_TOKENS][:, t])
        # Rounded at 8 bits in another order.
        np.testing.assert_allclose(logits, expected[:, t], atol=0.05 * expected.std(), rtol=0.05)


def test_greedy_takes_the_largest_logit_of_every_step():
    params, inputs, tokens = greedy()
    batch = {
        ENCODER_INPUT_TOKENS: inputs,
        DECODER_INPUT_TOKENS: np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
    }
    logits = np.asarray(LOGITS(SMALL, params, batch))
    assert SMALL.eos_token_id not in tokens
    assert len(np.unique(tokens)) > 3  # Not one token over and over.
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_greedy_ends_a_row_at_eos_and_pads_after_it():
    params, inputs, tokens = greedy()
    # Whatever row 0 writes at its third position now ends a row.
    eos, pad = int(tokens[0, 2]), 57
    assert pad not in tokens
    model = dataclasses.replace(SMALL, eos_token_id=eos, pad_token_id=pad)
    # The encoder's padding is told apart by its id too.
    inputs = np.where(inputs == 0, pad, inputs)
    got = np.asarray(decoding.greedy(model, params, {ENCODER_INPUT_TOKENS: inputs}, 8))
    expected = tokens.copy()
    for row in expected:
        ends = np.flatnonzero(row == eos)
        if len(ends):
            row[ends[0] + 1 :] = pad
    assert (expected[0, 3:] == pad).all()
    assert not (expected == pad).all(axis=0).all()
    np.testing.assert_array_equal(got, expected)


def test_greedy_stops_when_all_rows_have_ended():
    params, inputs, tokens = greedy()
    model = dataclasses.replace(SMALL, eos_token_id=int(tokens[0, 0]))
    batch = {ENCODER_INPUT_TOKENS: inputs[:1]}
    # Room for so many tokens that to fill it would take minutes.
    got = np.asarray(decoding.greedy(model, params, batch, 200_000))
    assert got.shape == (1, 200_000)
    assert got[0, 0] == tokens[0, 0]
    assert not got[0, 1:].any()


def test_a_row_does_not_depend_on_the_others():
    params, inputs, tokens = greedy()
    alone = decoding.greedy(SMALL, params, {ENCODER_INPUT_TOKENS: inputs[2:3]}, 8)
    np.testing.assert_array_equal(alone, tokens[2:3])


def test_padding_behind_the_inputs_changes_nothing():
    params, inputs, tokens = greedy()
    longer = np.pad(inputs, ((0, 0), (0, 6)))
    got = decoding.greedy(SMALL, params, {ENCODER_INPUT_TOKENS: longer}, 8)
    np.testing.assert_array_equal(got, tokens)


def test_fewer_tokens_are_the_first_of_more():
    params, inputs, tokens = greedy()
    got = decoding.greedy(SMALL, params, {ENCODER_INPUT_TOKENS: inputs}, 3)
    np.testing.assert_array_equal(got, tokens[:, :3])


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(fsdp=2, model=2)], ids=str)
def test_greedy_on_a_mesh_writes_the_same(mesh):
    params = random_params(EVEN, seed=1)
    batch = {ENCODER_INPUT_TOKENS: random_batch(EVEN, rows=8)[ENCODER_INPUT_TOKENS]}
    expected = decoding.greedy(EVEN, params, batch, 5)
    assert len(np.unique(expected)) > 3
    mesh, rules = sharding.make_mesh(mesh), AxisRules()
    shardings = sharding.param_shardings(api.param_axes(EVEN), params, mesh, rules)
    with sharding.use_mesh(mesh, rules):
        got = decoding.greedy(
            EVEN, jax.device_put(params, shardings), sharding.shard_batch(batch, mesh, rules), 5
        )
    assert got.sharding.is_fully_replicated
    np.testing.assert_array_equal(got, expected)
