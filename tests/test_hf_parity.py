"""The network against transformers', from random weights of small configs of every family.

Both ways: a folder that transformers wrote gives the same logits, loss and greedy tokens here, and
a folder written here loads there without a missing or unexpected key.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5jax import decoding
from t5jax.architectures import T5Config
from t5jax.batch import DECODER_INPUT_TOKENS, ENCODER_INPUT_TOKENS, shift_right
from t5jax.hf import io
from t5jax.models import api

torch = pytest.importorskip("torch", reason="transformers' T5 runs on torch")
transformers = pytest.importorskip("transformers", reason="what is compared with")
pytestmark = pytest.mark.hf
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)  # For models this small a second thread only waits.

# Heads times width is never d_model, the stacks differ in depth, and few buckets that end early
# make far distances occur in short rows.
SMALL = T5Config(
    vocab_size=67,
    d_model=24,
    d_kv=5,
    d_ff=40,
    num_heads=3,
    num_encoder_layers=2,
    num_decoder_layers=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=11,
)
FAMILIES = {
    "t5_1_0": dataclasses.replace(
        SMALL, mlp_activation="relu", tie_word_embeddings=True, scale_decoder_outputs=True
    ),
    "t5_1_1": SMALL,
    "t5_1_1_tied": dataclasses.replace(SMALL, tie_word_embeddings=True),
    "mt5": dataclasses.replace(SMALL, vocab_size=131, num_decoder_layers=2, num_heads=2),
    "umt5": dataclasses.replace(SMALL, per_layer_relative_bias=True),
    "byt5": dataclasses.replace(
        SMALL, vocab_size=384, num_encoder_layers=4, num_decoder_layers=1, d_model=23, d_ff=37
    ),
    "ul2": dataclasses.replace(SMALL, mlp_activation="gated-silu", d_kv=16, num_heads=1),
}
CLASSES = {"mt5": "MT5", "umt5": "UMT5"}
SOURCE, TARGET = 23, 14
LOGITS = jax.jit(api.logits, static_argnums=0)


def random_params(config):
    """Parameters all of which matter: norm scales away from 1, biases as large as the scores."""
    rng = np.random.default_rng(0)

    def one(path, x):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return (1 + 0.3 * rng.standard_normal(x.shape)).astype("float32")
        return (rng.standard_normal(x.shape) * (2 if "bias" in name else 0.2)).astype("float32")

    return jax.tree_util.tree_map_with_path(one, api.param_shapes(config))


def their_model(family):
    """transformers' model of a family, with random weights."""
    config = FAMILIES[family]
    prefix = CLASSES.get(family, "T5")
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(
        getattr(transformers, f"{prefix}Config")(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.relative_attention_num_buckets,
            relative_attention_max_distance=config.relative_attention_max_distance,
            feed_forward_proj=config.mlp_activation,
            tie_word_embeddings=config.scale_decoder_outputs,
            decoder_start_token_id=0,
        )
    )
    if not config.tie_word_embeddings:
        # Since version 5 a new model's head is tied, whatever its config says.
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.copy_(torch.randn(x.shape, generator=generator))
            if "norm" in name:
                x.mul_(0.3).add_(1)
            else:
                x.mul_(2 if "bias" in name else 0.2)
    return as_trained(model.eval())


def as_trained(model):
    """UMT5 was trained without scaled outputs; transformers scales where its config says tied,
    which since version 5 it always does."""
    if model.config.model_type == "umt5":
        model.config.tie_word_embeddings = False
    return model


def batch_for(config):
    """Two rows of tokens, padded differently: ids [2, S] and targets [2, T], pad 0 at the end."""
    rng = np.random.default_rng(1)
    inputs = rng.integers(2, config.vocab_size, (2, SOURCE)).astype("int32")
    targets = rng.integers(2, config.vocab_size, (2, TARGET)).astype("int32")
    inputs[1, 17:] = 0
    targets[1, 9:] = 0
    return inputs, targets


def our_logits(config, params, inputs, targets):
    batch = {
        ENCODER_INPUT_TOKENS: inputs,
        DECODER_INPUT_TOKENS: shift_right(targets, config.decoder_start_token_id),
    }
    return np.asarray(LOGITS(config, params, batch))


def their_output(model, inputs, targets):
    labels = torch.tensor(targets).long()
    ids = torch.tensor(inputs).long()
    with torch.no_grad():
        return model(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            labels=labels.masked_fill(labels == 0, -100),
        )


def their_greedy(model, inputs, steps):
    ids = torch.tensor(inputs).long()
    tokens = model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=steps,
        do_sample=False,
        num_beams=1,
        # With its cache, transformers fails where the decoder is deeper than the encoder.
        use_cache=False,
    ).numpy()[:, 1:]
    return np.pad(tokens, ((0, 0), (0, steps - tokens.shape[1])))


@pytest.mark.parametrize("family", FAMILIES)
def test_their_folder_computes_the_same_here(family, tmp_path):
    model = their_model(family)
    model.save_pretrained(tmp_path)
    config = io.read_config(tmp_path)
    assert config == FAMILIES[family]
    params = io.load_params(tmp_path, config)

    inputs, targets = batch_for(config)
    theirs = their_output(model, inputs, targets)
    ours = our_logits(config, params, inputs, targets)
    real = targets != 0
    assert theirs.logits.numpy()[real].std() > 0.05  # The comparison can fail.
    np.testing.assert_allclose(ours[real], theirs.logits.numpy()[real], atol=1e-4, rtol=1e-4)

    log_probs = jax.nn.log_softmax(ours)
    nll = -np.take_along_axis(np.asarray(log_probs), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll[real].mean(), theirs.loss.item(), rtol=1e-5)

    tokens = decoding.greedy(config, params, {ENCODER_INPUT_TOKENS: inputs}, 8)
    np.testing.assert_array_equal(tokens, their_greedy(model, inputs, 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_our_folder_computes_the_same_there(family, tmp_path):
    config = FAMILIES[family]
    params = random_params(config)
    io.save_params(tmp_path / "out", config, params, max_shard_bytes=20_000)
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    assert model.dtype == torch.float32

    inputs, targets = batch_for(config)
    ours = our_logits(config, params, inputs, targets)
    theirs = their_output(as_trained(model.eval()), inputs, targets).logits.numpy()
    real = targets != 0
    assert ours[real].std() > 0.05
    np.testing.assert_allclose(ours[real], theirs[real], atol=1e-4, rtol=1e-4)


def test_bfloat16_folder_is_read_there_as_bfloat16(tmp_path):
    params = random_params(SMALL)
    io.save_params(tmp_path / "out", SMALL, params, dtype="bfloat16")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert model.shared.weight.dtype == torch.bfloat16
    expected = np.asarray(jnp.asarray(params["lm_head"]["kernel"], "bfloat16"), "float32")
    np.testing.assert_array_equal(model.lm_head.weight.detach().float().numpy().T, expected)


def test_export_sets_what_generate_reads(tmp_path):
    io.save_params(tmp_path / "out", SMALL, random_params(SMALL), generation={"num_beams": 3})
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    generation = model.generation_config
    got = (generation.decoder_start_token_id, generation.eos_token_id, generation.pad_token_id)
    assert got == (0, 1, 0)
    assert generation.num_beams == 3


def test_a_tied_head_that_is_not_scaled_is_right_for_older_readers_too(tmp_path):
    # transformers 4 and CTranslate2 know no scale_decoder_outputs: they scale what is tied.
    config = FAMILIES["t5_1_1_tied"]
    params = random_params(config)
    io.save_params(tmp_path / "out", config, params)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["tie_word_embeddings"] is False
    del raw["scale_decoder_outputs"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(raw))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    inputs, targets = batch_for(config)
    theirs = their_output(model, inputs, targets).logits.numpy()
    ours = our_logits(config, params, inputs, targets)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_model_bin(dtype, legacy, tmp_path):
    model = their_model("t5_1_0").to(getattr(torch, dtype))
    model.config.save_pretrained(tmp_path)
    # As T5 1.0's own files: the embedding four times, and a bias that nothing uses. Files from
    # before torch 1.6 are no zip files.
    tensors = dict(model.state_dict())
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unused] = torch.ones(8, 3)
    assert "lm_head.weight" in tensors
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    config = io.read_config(tmp_path)
    assert config == FAMILIES["t5_1_0"]
    params = io.load_params(tmp_path, config)
    wo = params["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    for layer in range(config.num_decoder_layers):
        expected = tensors[f"decoder.block.{layer}.layer.2.DenseReluDense.wo.weight"]
        np.testing.assert_array_equal(wo[layer], expected.float().numpy().T)
    np.testing.assert_array_equal(
        params["token_embedder"]["embedding"], tensors["shared.weight"].float().numpy()
    )


def test_damaged_pytorch_model_bin(tmp_path):
    their_model("t5_1_0").config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02not a pickle")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a whole file of torch"):
        io.load_params(tmp_path, FAMILIES["t5_1_0"])


def test_pytorch_model_bin_that_is_no_state_dict(tmp_path):
    model = their_model("t5_1_0")
    model.config.save_pretrained(tmp_path)
    torch.save(
        {"epoch": 3, "model": dict(model.named_parameters())}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=r"something else than name to tensor \(epoch, model\)"):
        io.load_params(tmp_path, FAMILIES["t5_1_0"])
    # Parameters instead of plain tensors are fine.
    torch.save(dict(model.named_parameters()), tmp_path / "pytorch_model.bin")
    params = io.load_params(tmp_path, FAMILIES["t5_1_0"])
    np.testing.assert_array_equal(
        params["token_embedder"]["embedding"], model.shared.weight.detach().numpy()
    )
