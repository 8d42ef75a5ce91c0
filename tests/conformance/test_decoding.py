"""Decoding step by step gives what whole rows give; greedy search, what it means."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conformance.cases import (
    ALONE,
    LOGITS,
    WRITERS,
    pack,
    random_examples,
    random_params,
    without_segments,
)
from conformance.families import FAST, VARIANTS, change, family_of
from t5jax import batch as features
from t5jax import decoding
from t5jax.models import api

every_fast_writer = pytest.mark.parametrize("variant", [v for v in FAST if v in WRITERS])
LENGTHS = (9, 1, 4, 2, 12, 3, 1, 6)  # Of prompts: shorter and longer than windows.
STEPS, ROOM = 11, 14  # Room for more tokens than are written: those must not be seen.


@functools.partial(jax.jit, static_argnums=(0, 4))
def chain(model, params, batch, tokens_TB, room):
    """Returns the logits after the prompts and after each of the tokens, [1 + T, B, V]."""
    params = api.arrange_for_decoding(model, params)
    logits_BV, rows = api.prefill(model, params, batch)
    num_rows, length = next(iter(batch.values())).shape
    cache = api.init_cache(model, num_rows, length, room)
    cache = api.insert(model, cache, rows, jnp.arange(num_rows))

    def body(cache, tokens_B):
        logits_BV, cache = api.decode_step(model, params, cache, tokens_B)
        return cache, logits_BV

    _, logits_TBV = jax.lax.scan(body, cache, tokens_TB)
    return jnp.concatenate([logits_BV[None], logits_TBV])


def prompt_batch(model, prompts, length=12, kind=None):
    return features.prompt_batch(prompts, kind or model.kind, len(prompts), length)


def prompts_of(model, examples) -> list[list[int]]:
    """What a model reads before it writes: an encoder's inputs, or the beginnings of texts."""
    if model.kind == "decoder":
        name = features.DECODER_INPUT_TOKENS
        return [x[name][:n].tolist() for x, n in zip(examples, LENGTHS, strict=True)]
    return [x[features.ENCODER_INPUT_TOKENS].tolist() for x in examples]


def whole_and_chained(model, kind=None):
    """Returns the logits of whole rows, [B, T, V], and at the same places those of the chain."""
    params, examples = random_params(model), random_examples(model)
    prompts = prompts_of(model, examples)
    batch = pack(model, examples, ALONE)
    if kind == "prefix_lm":
        causal = np.arange(26) < np.array(LENGTHS)[:, None]
        batch[features.DECODER_CAUSAL_ATTENTION] = causal.astype("int32")
    whole = np.asarray(LOGITS(model, params, batch))
    tokens = batch[features.DECODER_INPUT_TOKENS]
    if model.kind == "decoder":
        start, read = np.array(LENGTHS) - 1, prompt_batch(model, prompts, kind=kind)
    else:
        start = np.zeros(8, int)
        read = {features.ENCODER_INPUT_TOKENS: batch[features.ENCODER_INPUT_TOKENS]}
    places = start + np.arange(STEPS + 1)[:, None]
    rows = np.arange(8)
    got = chain(model, params, read, tokens[rows, places[1:].clip(max=25)], ROOM)
    real = places < (batch[features.DECODER_SEGMENT_IDS] > 0).sum(axis=1)
    expected = whole[np.broadcast_to(rows, places.shape), places.clip(max=25)]
    return expected[real], np.asarray(got)[real]


@every_fast_writer
def test_chain_of_steps_gives_the_logits_of_the_row(variant):
    expected, got = whole_and_chained(VARIANTS[variant])
    assert expected.std() > 0.1
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("variant", ["umt5", "gemma2", "t5gemma"])
def test_bfloat16_steps_agree_with_the_row(variant):
    model = VARIANTS[variant]
    expected, got = whole_and_chained(change(model, dtype="bfloat16"))
    assert got.dtype == np.float32
    # Rounded at 8 bits in another order.
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.1 * expected.std()


def test_a_prefix_lm_reads_its_prompt_in_both_directions():
    expected, got = whole_and_chained(VARIANTS["qwen3_local"], "prefix_lm")
    np.testing.assert_allclose(got, expected, atol=2e-4, rtol=1e-3)
    causal, _ = whole_and_chained(VARIANTS["qwen3_local"])
    assert np.abs(causal - expected).max() > 0.1


@pytest.mark.parametrize("variant", WRITERS)
def test_local_layers_keep_no_more_than_their_window(variant):
    model = VARIANTS[variant]

    def size(room):
        cache = jax.eval_shape(lambda: api.init_cache(model, 2, 3, room))
        return sum(x.size for x in jax.tree.leaves(cache))

    stack = getattr(model, "decoder", model)
    layers = getattr(stack, "num_layers", None) or stack.num_decoder_layers
    heads = getattr(stack, "num_kv_heads", stack.num_heads)
    width = getattr(stack, "head_dim", None) or stack.d_kv
    windows = family_of(model).windows(model, "decoder")
    unlimited = sum(windows[i % len(windows)] is None for i in range(layers))
    assert size(30) - size(20) == 10 * unlimited * 2 * 2 * heads * width


def test_learned_positions_end():
    long = {features.DECODER_INPUT_TOKENS: np.zeros((1, 65), "int32")}
    for function in (api.logits, api.prefill):
        with pytest.raises(ValueError, match="65 tokens has no positions in this model; gpt2"):
            run(function, VARIANTS["gpt2"], long)
        run(function, VARIANTS["llama"], long)  # Rotations do not.


def run(function, model, batch):
    """Traces a function of a model's parameters and a batch."""

    def call(params):
        return function(model, api.arrange_for_decoding(model, params), batch)

    plain = function is api.logits
    shapes = api.param_shapes(model)
    jax.eval_shape((lambda params: function(model, params, batch)) if plain else call, shapes)


@pytest.mark.parametrize("variant", ["umt5", "gemma3", "t5gemma"])
def test_rows_join_leave_and_change_places(variant):
    model = VARIANTS[variant]
    params, examples = random_params(model), random_examples(model)
    batch = pack(model, examples, ALONE)
    whole, inputs = np.asarray(LOGITS(model, params, batch)), batch[features.DECODER_INPUT_TOKENS]
    params = api.arrange_for_decoding(model, params)
    prompts = prompts_of(model, examples)
    step = jax.jit(api.decode_step, static_argnums=0)
    insert = jax.jit(api.insert, static_argnums=0)
    # Of each slot, the example that stands there and the place of its next token; None: it is free.
    slots: list[tuple[int, int] | None] = [None] * 5

    def join(cache, members, places):
        read = prompt_batch(model, [prompts[i] for i in members], 26)
        logits, rows = jax.jit(api.prefill, static_argnums=0)(model, params, read)
        for row, (member, slot) in enumerate(zip(members, places, strict=True)):
            last = len(prompts[member]) - 1 if model.kind == "decoder" else 0
            compare(logits[row], whole[member, last])
            slots[slot] = (member, last + 1)
        return insert(model, cache, rows, np.array(places))

    def compare(got, expected):
        np.testing.assert_allclose(got, expected, atol=2e-4, rtol=1e-3)

    def advance(cache):
        tokens = [0 if slot is None else inputs[slot] for slot in slots]
        logits, cache = step(model, params, cache, np.array(tokens, "int32"))
        for n, slot in enumerate(slots):
            if slot is not None:
                compare(logits[n], whole[slot])
                slots[n] = (slot[0], slot[1] + 1)
        return cache

    cache = api.init_cache(model, 5, 26, 9)
    cache = advance(join(cache, (0, 4), (3, 1)))
    cache = advance(join(advance(cache), (2, 1), (0, 3)))  # One of them in place of another.
    order = [3, 0, 1, 1, 4]  # And one twice, as two beams go on from one.
    cache, slots = api.take(cache, np.array(order)), [slots[i] for i in order]
    advance(advance(cache))


# --- Greedy search --------------------------------------------------------------------------------


@functools.cache
def greedy(variant, max_tokens=8, first=0, last=8, length=26, **changes):
    """Returns tokens for prompts of different lengths; the model may be changed."""
    model = VARIANTS[variant]
    prompts = prompts_of(model, random_examples(model))[first:last]
    batch = prompt_batch(model, prompts, length)
    params = random_params(model, seed=1)
    return np.asarray(decoding.greedy(change(model, **changes), params, batch, max_tokens))


@pytest.mark.parametrize("variant", ["t5_1_0", "gemma3", "t5gemma"])
def test_greedy_takes_the_largest_logit_of_every_step(variant):
    model, tokens = VARIANTS[variant], greedy(variant)
    assert len(np.unique(tokens)) > 3  # Not one token over and over.
    params, examples = random_params(model, seed=1), random_examples(model)
    for example, prompt, written in zip(examples, prompts_of(model, examples), tokens, strict=True):
        begin = prompt if model.kind == "decoder" else [model.decoder_start_token_id]
        example[features.DECODER_INPUT_TOKENS] = np.array([*begin, *written[:-1]], "int32")
        for name in (features.DECODER_TARGET_TOKENS, features.DECODER_LOSS_WEIGHTS):
            del example[name]
    batch = without_segments(pack(model, examples, ALONE))
    logits = np.asarray(LOGITS(model, params, batch))
    for row, (example, written) in enumerate(zip(examples, tokens, strict=True)):
        end = len(example[features.DECODER_INPUT_TOKENS])
        ends = np.flatnonzero(np.isin(written, model.end_token_ids))
        count = ends[0] + 1 if len(ends) else 8
        expected = logits[row, end - 8 : end].argmax(-1)
        np.testing.assert_array_equal(written[:count], expected[:count])


@pytest.mark.parametrize("variant", ["t5_1_0", "llama", "t5gemma"])
def test_greedy_ends_a_row_at_any_of_the_ids_that_end_it_and_pads_after_it(variant):
    tokens, pad = greedy(variant), 0
    model = VARIANTS[variant]
    assert not np.isin(tokens, model.end_token_ids).any()
    ends = {"eos_token_id": int(tokens[0, 2])}
    if variant != "t5_1_0":
        other = next(int(x) for x in tokens[2, 3:] if x not in (tokens[0, 2], pad))
        ends["more_eos_token_ids"] = (other,)
    if model.kind == "decoder":  # Padding among an encoder's inputs is told by its id.
        pad = ends["pad_token_id"] = 60
    expected = tokens.copy()
    for row in expected:
        found = np.flatnonzero(np.isin(row, change(model, **ends).end_token_ids))
        if len(found):
            row[found[0] + 1 :] = pad
    assert (expected[0, 3:] == pad).all()
    assert (expected[:, -1] != pad).any()
    np.testing.assert_array_equal(greedy(variant, **ends), expected)


@pytest.mark.parametrize("variant", ["t5_1_0", "llama"])
def test_greedy_stops_when_all_rows_have_ended(variant):
    alone = greedy(variant, last=1)
    # Room for so many tokens that to fill it would take minutes.
    many = 200_000
    got = greedy(variant, many, last=1, eos_token_id=int(alone[0, 0]))
    assert got.shape == (1, many)
    assert got[0, 0] == alone[0, 0]
    assert not got[0, 1:].any()


@pytest.mark.parametrize("variant", ["t5_1_0", "gemma3"])
def test_a_row_depends_neither_on_others_nor_on_padding_nor_on_how_many_tokens_are_asked(variant):
    tokens = greedy(variant)
    np.testing.assert_array_equal(greedy(variant, length=31), tokens)
    np.testing.assert_array_equal(greedy(variant, 3, first=2, last=3), tokens[2:3, :3])


@pytest.mark.parametrize("variant", ["t5_1_0", "llama"])
def test_nothing_is_written_after_no_prompt(variant):
    """Rows that fill a batch are padding, and so is what is written after them."""
    model = VARIANTS[variant]
    params, prompt = random_params(model, seed=1), prompts_of(model, random_examples(model))[0]
    batch = features.prompt_batch([prompt], model.kind, 2, 26)
    got = np.asarray(decoding.greedy(model, params, batch, 8))
    np.testing.assert_array_equal(got[0], greedy(variant)[0])
    assert (got[1] == model.pad_token_id).all()
    assert (greedy(variant)[0] != model.pad_token_id).any()


def test_descriptions_tell_what_ends_a_text():
    for variant in WRITERS:
        model = VARIANTS[variant]
        more = getattr(model, "more_eos_token_ids", ())
        assert model.end_token_ids == (model.eos_token_id, *more)
    assert dataclasses.replace(VARIANTS["gemma2_local"]).end_token_ids == (1, 7)
