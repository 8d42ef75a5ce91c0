"""T5Gemma against transformers', from random weights of small configs; both ways.

A folder that transformers wrote gives the same logits, loss and greedy tokens here, for padded and
packed rows; one written here loads there without a word about keys.
"""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest

from small import random_batch
from small_t5gemma import SMALL, VARIANTS, random_params
from t5jax import batch as features
from t5jax import decoding
from t5jax.architectures import SIZES
from t5jax.hf import io, t5gemma
from t5jax.models import api
from test_models import pack

torch = pytest.importorskip("torch", reason="transformers' T5Gemma runs on torch")
transformers = pytest.importorskip("transformers", reason="what is compared with")
pytestmark = pytest.mark.hf
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)  # For models this small a second thread only waits.

LOGITS = jax.jit(api.logits, static_argnums=0)
SOURCE, TARGET = 17, 13

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def their_config(config):
    """transformers' description of the same network."""

    def side(gemma2):
        kinds = ["sliding_attention" if one else "full_attention" for one in gemma2.local_layers]
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": gemma2.d_model,
            "intermediate_size": gemma2.d_ff,
            "num_hidden_layers": gemma2.num_layers,
            "num_attention_heads": gemma2.num_heads,
            "num_key_value_heads": gemma2.num_kv_heads,
            "head_dim": gemma2.head_dim,
            "max_position_embeddings": config.max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "query_pre_attn_scalar": config.query_pre_attention_scalar or gemma2.head_dim,
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.final_softcap,
            "sliding_window": config.sliding_window or 4096,
            "layer_types": kinds,
        }

    return transformers.T5GemmaConfig(
        encoder=side(config.encoder),
        decoder=side(config.decoder),
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def their_model(config):
    """transformers' model with random weights, all of which matter."""
    model = transformers.T5GemmaForConditionalGeneration(their_config(config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn(x.shape, generator=generator) * 0.3)
    return model.eval()


def their_output(model, batch):
    """Output for a padded batch."""
    ids, targets, decoder_ids = (
        torch.tensor(batch[name]).long()
        for name in (
            features.ENCODER_INPUT_TOKENS,
            features.DECODER_TARGET_TOKENS,
            features.DECODER_INPUT_TOKENS,
        )
    )
    with torch.no_grad():
        return model(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            decoder_input_ids=decoder_ids,
            labels=targets.masked_fill(targets == 0, -100),
        )


def their_greedy(model, inputs, steps):
    ids = torch.tensor(inputs).long()
    tokens = model.generate(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=steps,
        do_sample=False,
        num_beams=1,
    ).numpy()[:, 1:]
    return np.pad(tokens, ((0, 0), (0, steps - tokens.shape[1])))


def assert_same_logits(ours, theirs, batch):
    real = batch[features.DECODER_TARGET_TOKENS] != 0
    assert theirs[real].std() > 0.05  # The comparison can fail.
    np.testing.assert_allclose(ours[real], theirs[real], atol=1e-4, rtol=1e-4)


@every_variant
def test_their_folder_computes_the_same_here(variant, tmp_path):
    model = their_model(VARIANTS[variant])
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = io.read_config(tmp_path)
    assert config == VARIANTS[variant]
    params = io.load_params(tmp_path, config)

    batch = random_batch(config, source=SOURCE, target=TARGET)
    theirs = their_output(model, batch)
    ours = np.asarray(LOGITS(config, params, batch))
    assert_same_logits(ours, theirs.logits.numpy(), batch)

    targets = batch[features.DECODER_TARGET_TOKENS]
    log_probs = np.asarray(jax.nn.log_softmax(ours))
    nll = -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll[targets != 0].mean(), theirs.loss.item(), rtol=1e-5)

    packed = pack(batch, [[0, 1], [3, 2]], source=2 * SOURCE, target=2 * TARGET)
    ours = np.asarray(LOGITS(config, params, packed))
    for row, members in enumerate([[0, 1], [3, 2]]):
        start = 0
        for example in members:
            length = int((targets[example] != 0).sum())
            got, expected = ours[row, start : start + length], theirs.logits[example, :length]
            np.testing.assert_allclose(got, expected.numpy(), atol=1e-4, rtol=1e-4)
            start += length

    inputs = batch[features.ENCODER_INPUT_TOKENS]
    tokens = decoding.greedy(config, params, {features.ENCODER_INPUT_TOKENS: inputs}, 10)
    assert len(np.unique(tokens)) > 3
    np.testing.assert_array_equal(tokens, their_greedy(model, inputs, 10))


@every_variant
def test_our_folder_computes_the_same_there_and_comes_back_bit_for_bit(variant, tmp_path):
    config = VARIANTS[variant]
    params = random_params(config)
    io.save_params(tmp_path / "out", config, params, max_shard_bytes=20_000)
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    assert model.dtype == torch.float32
    batch = random_batch(config, source=SOURCE, target=TARGET)
    theirs = their_output(model.eval(), batch).logits.numpy()
    assert_same_logits(np.asarray(LOGITS(config, params, batch)), theirs, batch)

    ids = torch.tensor(batch[features.DECODER_TARGET_TOKENS]).long()
    shifted = model.prepare_decoder_input_ids_from_labels(ids).numpy()
    np.testing.assert_array_equal(shifted, batch[features.DECODER_INPUT_TOKENS])

    assert io.read_config(tmp_path / "out") == config
    again = io.load_params(tmp_path / "out", config)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_theirs_comes_back_to_them_bit_for_bit(tmp_path):
    model = their_model(SMALL)
    model.save_pretrained(tmp_path / "theirs")
    params = io.load_params(tmp_path / "theirs", SMALL)
    io.save_params(tmp_path / "ours", SMALL, params)
    again = transformers.T5GemmaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    expected = model.state_dict()
    assert set(again.state_dict()) == set(expected)
    for name, x in again.state_dict().items():
        assert torch.equal(x, expected[name]), name


# --- config.json ----------------------------------------------------------------------------------


def test_published_sizes_survive_config_json():
    for name, config in SIZES.items():
        if config.family == "t5gemma":
            raw = json.loads(json.dumps(t5gemma.write_config(config)))
            assert t5gemma.read_config(raw, {}) == config, name


def version_4(config) -> dict:
    """config.json as version 4 of transformers wrote it."""
    raw = t5gemma.write_config(config)
    for key in ("attention_dropout", "bos_token_id", "vocab_size"):
        del raw[key]
    raw["classifier_dropout_rate"] = 0.0
    for side in ("encoder", "decoder"):
        del raw[side]["rope_parameters"], raw[side]["rope_scaling"]
        raw[side]["torch_dtype"] = "bfloat16"
    return raw


def test_version_4():
    config = dataclasses.replace(SMALL, dropout_rate=0.1)
    raw = version_4(config)
    assert raw["encoder"]["rope_theta"] == 100.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert t5gemma.read_config(raw, {}) == config
    # A chat model has a second end, which stands outside alone.
    raw["eos_token_id"] = [1, 7]
    chat = dataclasses.replace(config, more_eos_token_ids=(7,))
    assert t5gemma.read_config(raw, {}) == chat
    assert t5gemma.read_config(t5gemma.write_config(chat), {}) == chat


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        ("", {"is_encoder_decoder": False}, "is_encoder_decoder is False, which is not"),
        ("", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("", {"encoder": None}, "encoder is None; expected an object"),
        ("", {"dropout_rate": "0.1"}, "dropout_rate is '0.1'; expected a value of type float"),
        ("", {"decoder_start_token_id": 0}, "bos_token_id is 2 in one place and 0 in another"),
        ("", {"pad_token_id": 3}, "pad_token_id is 0 in one place and 3 in another"),
        ("encoder", {"hidden_activation": "relu"}, "encoder: .*hidden_activation is 'relu'"),
        ("decoder", {"attention_bias": True}, "decoder: .*attention_bias is True, which is not"),
        ("encoder", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (
            "decoder",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "decoder: .*rope_parameters is of type 'yarn'",
        ),
        (
            "decoder",
            {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "decoder: .*rope_scaling is 'linear', which is not implemented",
        ),
        ("decoder", {"vocab_size": 99}, "vocab_size is 61 in encoder and 99 in decoder"),
        ("decoder", {"sliding_window": 9}, "sliding_window is 3 in encoder and 9 in decoder"),
        ("decoder", {"attn_logit_softcapping": None}, "attn_logit_softcapping is 50.0 in encoder"),
        ("encoder", {"query_pre_attn_scalar": 6}, "query_pre_attn_scalar is 6 in encoder and 10"),
        ("encoder", {"layer_types": ["full_attention"] * 3}, "layer_types are"),
        ("encoder", {"layer_types": ["chunked_attention"] * 3}, "encoder: .*chunked_attention"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_named(where, changes, message):
    raw = t5gemma.write_config(SMALL)
    raw = raw | {where: raw[where] | changes} if where else raw | changes
    with pytest.raises(ValueError, match=message):
        t5gemma.read_config(raw, {})


def test_what_the_folder_holds_is_checked(tmp_path):
    io.save_params(tmp_path / "out", SMALL, random_params(SMALL))
    path = tmp_path / "out" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"model_type": "t5gemma2"}))
    with pytest.raises(ValueError, match=r"model_type is 't5gemma2'; expected one of .*t5gemma"):
        io.read_config(tmp_path / "out")
    path.write_text(json.dumps(raw | {"architectures": ["T5GemmaEncoderModel"]}))
    with pytest.raises(ValueError, match=r"architectures is \['T5GemmaEncoderModel'\]; expected"):
        io.read_config(tmp_path / "out")
    with pytest.raises(ValueError, match=r"missing: lm_head\.out_proj\.weight \[61, 8\]"):
        io.load_params(tmp_path / "out", dataclasses.replace(SMALL, tie_word_embeddings=False))
    other = dataclasses.replace(SMALL, num_encoder_layers=2)
    with pytest.raises(ValueError, match=r"unexpected: model\.encoder\.layers\.\{2\}"):
        io.load_params(tmp_path / "out", other)
