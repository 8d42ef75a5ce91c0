"""What is trained, at which rate: frozen parameters, rates by pattern, adapters, soft prompts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5jax import sharding
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
    from_json,
    to_json,
)
from t5jax.program import program
from t5jax.quantized import Quantized

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
)


def one_step(config, mesh=None):
    """Returns the parameters by path before and after a step, and the state."""
    run = program(config, mesh or sharding.make_mesh(config.mesh, devices=jax.devices()[:1]))
    tokens = jnp.arange(1, 33).reshape(8, 4) % 31
    batch = {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": jnp.ones((8, 4)),
    }
    with run.use():
        state = run.create(jax.random.key(0))
        before = jax.device_get(lora.flatten(state.params))
        after, _ = run.step(state, batch)
    return before, jax.device_get(lora.flatten(after.params)), after


def moved(before, after):
    return {path for path, x in before.items() if np.any(x != after[path])}


def change(**fields):
    return dataclasses.replace(CONFIG, **fields)


def test_a_step_moves_the_adapter_alone_on_eight_devices_as_on_one():
    adapter = LoraConfig(rank=2, targets=("query", "wo"))
    config = change(adapter=adapter, mesh=MeshConfig(data=2, fsdp=2, model=2))
    before, after, state = one_step(config, sharding.make_mesh(config.mesh))
    assert moved(before, after) == {p for p in lora.leaves(adapter, MODEL) if p.endswith("lora_b")}
    _, one, _ = one_step(change(adapter=adapter))
    for path, x in one.items():
        np.testing.assert_allclose(after[path], x, atol=1e-5, err_msg=path)
    trained = sum(after[p].nbytes for p in after if p.rpartition("/")[2] in lora.TRAINED)
    assert sum(x.nbytes for x in jax.tree.leaves(state.opt_state)) <= 2 * trained + 64


def test_the_base_may_be_bfloat16_and_the_rate_of_adafactor_is_the_adapters_own():
    model = dataclasses.replace(MODEL, param_dtype="bfloat16", dtype="bfloat16")
    optimizer = OptimizerConfig(name="adafactor", learning_rate=1e-2)
    adapter = LoraConfig(rank=2, targets=("wo",))
    before, after, _ = one_step(change(model=model, adapter=adapter, optimizer=optimizer))
    path = "decoder/layers/mlp/wo"
    assert after[f"{path}/kernel"].dtype == jnp.bfloat16
    assert after[f"{path}/lora_a"].dtype == np.float32
    step = np.sqrt(np.mean(np.square(after[f"{path}/lora_b"] - before[f"{path}/lora_b"])))
    assert 5e-3 < step < 2e-2  # B is 0; a rate relative to its size would be 1e-5.


def test_a_base_in_four_bits():
    adapter = LoraConfig(rank=2, targets=("query", "wo"), base="nf4")
    before, after, _ = one_step(change(adapter=adapter))
    path = "decoder/layers/mlp/wo/kernel"
    assert isinstance(after[path], Quantized)
    assert after[path].nbytes < 0.2 * 4 * after[path].size
    for path, x in before.items():
        same = jax.tree.all(jax.tree.map(np.array_equal, x, after[path]))
        assert same == (not path.endswith("lora_b")), path


def test_a_soft_prompt_is_all_that_moves():
    before, after, _ = one_step(change(adapter=PromptConfig(3)))
    assert moved(before, after) == {prompt.PATH}
    rows = before["token_embedder/embedding"]
    for vector in before[prompt.PATH]:
        assert np.any(np.all(rows == vector, axis=1))


def test_the_rank_may_be_sharded():
    axes = AxisRules(rank="model", mlp=None, heads=None)
    config = change(adapter=LoraConfig(rank=2, targets=("wo",)), axes=axes)
    run = program(config, sharding.make_mesh(MeshConfig(data=2, fsdp=2, model=2)))
    specs = {path: x.spec for path, x in lora.flatten(run.shardings.params).items()}
    assert specs["encoder/layers/mlp/wo/lora_a"][-1] == "model"
    assert specs["encoder/layers/mlp/wo/lora_b"][1:] == ("model", "fsdp")


def test_rates_by_pattern():
    rates = ("decoder/*:1e-3", "*/mlp/*:1e-4")
    optimizer = dataclasses.replace(CONFIG.optimizer, learning_rates=rates, freeze=("lm_head/*",))
    before, after, _ = one_step(change(optimizer=optimizer))
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
