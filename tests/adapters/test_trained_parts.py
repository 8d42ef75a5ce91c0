"""What is trained, at which rate: frozen parameters, rates by pattern, adapters, soft prompts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import hashed
from t5jax import sharding, trees
from t5jax.adapters import lora, prompt
from t5jax.architectures import BertConfig, T5Config
from t5jax.commands.train import with_sections
from t5jax.config import (
    AxisRules,
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    PromptConfig,
    WatchConfig,
    from_json,
    to_json,
)
from t5jax.program import program
from t5jax.quantize.leaf import Quantized

MODEL = T5Config(
    vocab_size=32,
    d_model=16,
    d_kv=4,
    d_ff=32,
    num_heads=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,
)
CONFIG = Config(
    model=MODEL,
    data=DataConfig(batch_size=8, inputs_length=4, targets_length=4),
    optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2),
    # Less to compile.
    watch=WatchConfig(norms=False),
)


def steps(config, number, mesh=None, params=None):
    """Returns the parameters by path before and after each step, and the last state.

    Args:
      params: what the base has in place of its random parameters, by path.
    """
    run = program(config, mesh or sharding.make_mesh(config.mesh, devices=jax.devices()[:1]))
    tokens = jnp.arange(1, 33).reshape(8, 4) % 31
    batch = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": jnp.ones((8, 4)),
    }
    with run.use():
        state = run.create(hashed.key(0))
        if params:
            whole = trees.flatten(state.params) | jax.device_put(params, run.mesh.devices.flat[0])
            state = state.replace(params=trees.unflatten(whole))
        params = [jax.device_get(trees.flatten(state.params))]
        for _ in range(number):
            state, _ = run.step(state, batch)
            params.append(jax.device_get(trees.flatten(state.params)))
    return params, state


def one_step(config):
    """Returns the parameters by path before and after a step."""
    return steps(config, 1)[0]


def moved(before, after):
    return {path for path, x in before.items() if np.any(x != after[path])}


def change(**fields):
    return dataclasses.replace(CONFIG, **fields)


@pytest.mark.parametrize("dora", [False, True])
def test_steps_move_all_of_the_adapter_and_nothing_else_on_eight_devices_as_on_one(dora):
    adapter = LoraConfig(rank=2, targets=("all-linear", "lm_head"), dora=dora)
    config = change(adapter=adapter, mesh=MeshConfig(data=2, fsdp=2, model=2))
    # DoRA's program has the products of LoRA, and divides by norms besides.
    mesh = sharding.make_mesh(config.mesh) if dora else None
    (start, first, second), state = steps(config if dora else change(adapter=adapter), 2, mesh)
    leaves = lora.leaves(adapter, MODEL)
    assert len({path.rpartition("/")[0] for path in leaves}) == len(lora.matrices(MODEL))
    # A moves once B, which begins at 0, does not stop its gradient.
    assert moved(start, first) == {
        path for path in leaves if path.endswith(("lora_b", "dora_magnitude"))
    }
    trained = {path for path in leaves if path.rpartition("/")[2] in lora.TRAINED}
    assert moved(first, second) == trained
    for path in trained:  # Of every layer, too.
        layers = second[path] != first[path]
        assert np.all(np.any(layers.reshape(len(layers), -1), axis=1)), path
    if dora:
        for path, x in steps(change(adapter=adapter), 2)[0][2].items():
            np.testing.assert_allclose(second[path], x, atol=1e-4, err_msg=path)
    size = sum(second[path].nbytes for path in trained)
    assert sum(x.nbytes for x in jax.tree.leaves(state.opt_state)) <= 2 * size + 64


def test_the_base_may_be_bfloat16_and_the_rate_of_adafactor_is_the_adapters_own():
    model = dataclasses.replace(MODEL, param_dtype="bfloat16", dtype="bfloat16")
    optimizer = OptimizerConfig(name="adafactor", learning_rate=1e-2)
    adapter = LoraConfig(rank=2, targets=("wo",))
    before, after = one_step(change(model=model, adapter=adapter, optimizer=optimizer))
    path = "decoder/layers/mlp/wo"
    assert after[f"{path}/kernel"].dtype == jnp.bfloat16
    assert after[f"{path}/lora_a"].dtype == np.float32
    step = np.sqrt(np.mean(np.square(after[f"{path}/lora_b"] - before[f"{path}/lora_b"])))
    assert 5e-3 < step < 2e-2  # B is 0; a rate relative to its size would be 1e-5.


def nf4_by_hand(x, axis):
    """bitsandbytes' NF4: quantiles of a normal distribution, of which the largest in a group is 1.

    create_normal_map in bitsandbytes/functional.py; Dettmers et al. 2023, appendix E.
    """
    up, down = (norm.ppf(np.linspace(0.9677083, 0.5, n)[:-1]) for n in (9, 8))
    codes = np.sort([*up, 0, *-down]) / up.max()
    scales = np.abs(x).max(axis, keepdims=True)
    return codes[np.abs((x / scales)[..., None] - codes).argmin(-1)] * scales


IN_FOUR_BITS = LoraConfig(rank=2, targets=("query", "wo"), base="nf4")


@functools.cache
def step_in_four_bits():
    return one_step(change(adapter=IN_FOUR_BITS, watch=WatchConfig(norms=True)))


def test_a_step_over_a_base_in_four_bits_is_that_over_the_same_numbers_in_floats():
    in_floats = change(adapter=dataclasses.replace(IN_FOUR_BITS, base=None))
    (rounded, found), (start, _) = step_in_four_bits(), one_step(in_floats)
    by_hand = {}
    for path, x in rounded.items():
        if isinstance(x, Quantized):
            # Groups along the last axis of inputs, which has fewer than 64.
            axis = 2 if path.endswith("out/kernel") else 1
            by_hand[path] = nf4_by_hand(start[path], axis).astype(np.float32)
    assert len(by_hand) == 18
    (_, expected), _ = steps(in_floats, 1, params=by_hand)
    for path, x in expected.items():
        if path in by_hand:
            np.testing.assert_allclose(rounded[path].dequantized(), x, atol=1e-6, err_msg=path)
        else:
            np.testing.assert_allclose(found[path], x, atol=2e-4, err_msg=path)


def test_a_base_in_four_bits():
    before, after = step_in_four_bits()
    path = "decoder/layers/mlp/wo/kernel"
    assert isinstance(after[path], Quantized)
    assert after[path].nbytes < 0.2 * 4 * after[path].size
    for path, x in before.items():
        same = jax.tree.all(jax.tree.map(np.array_equal, x, after[path]))
        assert same == (not path.endswith("lora_b")), path


def test_a_soft_prompt_is_all_that_moves():
    (start, _, after), _ = steps(change(adapter=PromptConfig(3)), 2)
    assert moved(start, after) == {prompt.PATH}
    assert np.all(after[prompt.PATH] != start[prompt.PATH])
    rows = start["token_embedder/embedding"]
    for vector in start[prompt.PATH]:
        assert np.any(np.all(rows == vector, axis=1))


def test_the_rank_may_be_sharded():
    axes = AxisRules(rank="model", mlp=None, heads=None)
    config = change(adapter=LoraConfig(rank=2, targets=("wo",)), axes=axes)
    run = program(config, sharding.make_mesh(MeshConfig(data=2, fsdp=2, model=2)))
    specs = {path: x.spec for path, x in trees.flatten(run.shardings.params).items()}
    assert specs["encoder/layers/mlp/wo/lora_a"][-1] == "model"
    assert specs["encoder/layers/mlp/wo/lora_b"][1:] == ("model", "fsdp")


def test_rates_by_pattern():
    rates = ("decoder/*:1e-3", "*/mlp/*:1e-4")
    optimizer = dataclasses.replace(CONFIG.optimizer, learning_rates=rates, freeze=("lm_head/*",))
    before, after = one_step(change(optimizer=optimizer))
    # Adam's first step is the rate, wherever the gradient is not 0.
    steps = {path: np.abs(after[path] - x).max() for path, x in before.items()}
    for path, step in steps.items():
        expected = 1e-2
        if path.startswith("decoder/"):
            expected = 1e-3
        if "/mlp/" in path:
            expected = 1e-4
        expected *= not path.startswith("lm_head")
        np.testing.assert_allclose(step, expected, rtol=1e-2, err_msg=path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"optimizer": OptimizerConfig(learning_rates=("encoder/mlp/*:1e-3",))},
            r"learning_rates has 'encoder/mlp/\*', which matches no parameter; did you mean",
        ),
        (
            {"adapter": LoraConfig(rank=2, train=("*/norm",))},
            r"adapter.train has '\*/norm', which matches no parameter",
        ),
        (
            {"adapter": PromptConfig(), "model": BertConfig()},
            "adapter.prompt_length is set, but bert takes no soft prompt",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        program(change(**fields), sharding.make_mesh(devices=jax.devices()[:1]))


def test_what_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.freeze is \('encoder/\*',\), but with an ad"):
        change(adapter=LoraConfig(), optimizer=OptimizerConfig(freeze=("encoder/*",)))
    with pytest.raises(ValueError, match="data.pack is True, but a soft prompt is before each row"):
        change(adapter=PromptConfig(), data=DataConfig(pack=True))


@pytest.mark.parametrize("adapter", [None, LoraConfig(rank=3, ranks=("wo:4",)), PromptConfig(5)])
def test_as_json(adapter):
    config = change(adapter=adapter)
    assert from_json(to_json(config)) == config


def test_options_begin_a_section():
    assert with_sections(CONFIG, ["--adapter.rank", "4"]).adapter == LoraConfig()
    assert with_sections(CONFIG, ["--adapter.prompt-length", "4"]).adapter == PromptConfig()
    assert with_sections(CONFIG, ["--train.steps", "4"]).adapter is None
