"""config.json and tensors as others wrote them: published, older, or not implemented."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import safetensors.numpy

from command_line import fails
from conformance.cases import assert_same, random_params
from conformance.families import (
    BERT,
    GEMMA3,
    GPT2,
    LLAMA,
    QWEN3,
    T5,
    T5GEMMA,
    VARIANTS,
    change,
)
from t5jax.architectures import published
from t5jax.hf import io, t5, t5gemma
from t5jax.tokenizers import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:a Llama whose heads")


def saved(folder, config):
    """Writes a model; returns its folder and parameters."""
    params = random_params(config)
    io.save_params(folder / "model", config, params)
    return folder / "model", params


def edit_config(folder, **changes):
    """Changes keys of config.json; ... removes one."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw))


def edit_tensors(folder, change):
    """Replaces the dict of tensors by what `change` returns."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(change(tensors), folder / "model.safetensors")


# --- T5 -------------------------------------------------------------------------------------------


def test_duplicates_of_a_tied_embedding(tmp_path):
    config = VARIANTS["t5_1_0"]
    folder, params = saved(tmp_path, config)
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")

    def duplicate(tensors):
        tensors |= {name: tensors["shared.weight"] for name in names}
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones(
            (3, 8), "float32"
        )
        return tensors

    edit_tensors(folder, duplicate)
    assert io.read_config(folder) == config
    assert_same(io.load_params(folder, config), params)

    def without(tensors):
        return {name: x for name, x in tensors.items() if name not in ("shared.weight", names[0])}

    # Some files keep the embedding under one of its other names alone.
    edit_tensors(folder, without)
    assert io.read_config(folder) == config
    assert_same(io.load_params(folder, config), params)

    edit_tensors(folder, lambda t: t | {names[1]: t[names[1]] + 1})
    with pytest.raises(ValueError, match=r"duplicate, with other values: lm_head\.weight differs"):
        io.load_params(folder, config)


def test_a_head_of_its_own_is_found_though_the_config_says_tied(tmp_path):
    folder, params = saved(tmp_path, T5)
    # What transformers 5 writes for T5 1.1, mT5 and UMT5.
    edit_config(folder, tie_word_embeddings=True, scale_decoder_outputs=False)
    assert io.read_config(folder) == T5
    assert_same(io.load_params(folder, io.read_config(folder)), params)


def test_config_json_of_transformers_4():
    # T5 1.0: the newer keys are absent, the head is tied and so its input is scaled.
    raw = {
        "architectures": ["T5WithLMHeadModel"],
        "d_ff": 2048,
        "d_kv": 64,
        "d_model": 512,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512,
        "num_heads": 8,
        "num_layers": 6,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "task_specific_params": {"summarization": {"prefix": "summarize: "}},
        "vocab_size": 32128,
    }
    assert t5.read_config(raw, {}) == published("t5_small")
    # T5 1.1 and FLAN: an untied head says that nothing is scaled.
    newer = raw | {
        "d_ff": 1024,
        "num_heads": 6,
        "num_layers": 8,
        "num_decoder_layers": None,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "eos_token_id": [1],
    }
    assert t5.read_config(newer, {}) == published("flan_t5_small")
    synonym = {key: value for key, value in newer.items() if key != "d_model"} | {"hidden_size": 16}
    assert t5.read_config(synonym, {}).d_model == 16
    # mT5 and UMT5 are never scaled.
    for model_type, size in (("mt5", "mt5_small"), ("umt5", "umt5_small")):
        multilingual = {
            "model_type": model_type,
            "vocab_size": published(size).vocab_size,
            "tie_word_embeddings": False,
        }
        assert t5.read_config(multilingual, {}) == published(size)
        tied = t5.read_config(multilingual | {"tie_word_embeddings": True}, {})
        assert (tied.tie_word_embeddings, tied.scale_decoder_outputs) == (True, False)


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({"dense_act_fn": "gelu_pytorch_tanh"}, "gated-gelu"),
        ({"dense_act_fn": "gelu_fast"}, "gated-gelu"),
        ({"feed_forward_proj": "gated-gelu_pytorch_tanh"}, "gated-gelu"),
        ({"feed_forward_proj": "gated-swish", "dense_act_fn": "silu"}, "gated-silu"),
    ],
)
def test_other_names_of_the_same_function(changes, activation):
    """As encoders for diffusion have them; ACT2FN of transformers says that they are the same."""
    raw = {**t5.write_config(T5), "architectures": ["T5EncoderModel"], "dense_act_fn": None}
    assert t5.read_config(raw | changes, {}).mlp_activation == activation
    exact = raw | {"dense_act_fn": "gelu"}
    with pytest.raises(ValueError, match=r"dense_act_fn is 'gelu' with .* not implemented"):
        t5.read_config(exact, {})


def test_a_scaled_head_of_its_own_warns(tmp_path):
    config = dataclasses.replace(T5, scale_decoder_outputs=True)
    with pytest.warns(UserWarning, match="transformers 4 and CTranslate2 do not scale"):
        io.save_params(tmp_path / "out", config, random_params(config))
    assert io.read_config(tmp_path / "out") == config


@pytest.mark.parametrize("variant", ["t5_1_0", "umt5"])
def test_an_encoder_in_a_folder_with_the_whole_models_config(variant, tmp_path):
    whole = VARIANTS[variant]
    model = whole.encoder_alone()
    folder, params = saved(tmp_path, model)
    edit_config(folder, is_encoder_decoder=True, num_decoder_layers=2, scale_decoder_outputs=True)
    assert io.read_config(folder) == model
    assert_same(io.load_params(folder, model), params)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_tied_head_is_right_for_readers_that_scale_what_is_tied(scaled):
    """transformers 4 and CTranslate2 do; they know no scale_decoder_outputs."""
    model = change(T5, tie_word_embeddings=True, scale_decoder_outputs=scaled)
    assert t5.write_config(model)["tie_word_embeddings"] is scaled
    (embedding,) = (row for row in t5.rows(model) if row.ours == "token_embedder/embedding")
    assert embedding.copies == (() if scaled else ("lm_head.weight",))


# --- Decoders alone -------------------------------------------------------------------------------

# Of transformers 4, but for what only generation reads.
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
_LLAMA3_2 = _LLAMA | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_hidden_layers": 16,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
}
_GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}
PUBLISHED = {
    "gpt2": {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "llama3_8b": _LLAMA,
    "llama3_2_1b": _LLAMA3_2,
    "mistral_7b_v0_1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "qwen3_0_6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma2_27b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "initializer_range": 0.02,
        "intermediate_size": 36864,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma3_1b": _GEMMA3 | {"eos_token_id": 1},
}


def described(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    return io.read_config(folder)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_config(size, tmp_path, recwarn):
    assert described(tmp_path, PUBLISHED[size]) == published(size)
    assert not recwarn.list


def test_config_of_transformers_5(tmp_path):
    old = {"rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern"}
    llama = {key: value for key, value in _LLAMA3_2.items() if key not in old}
    rope = _LLAMA3_2["rope_scaling"] | {"rope_theta": 500000.0}
    assert described(tmp_path, llama | {"rope_parameters": rope}) == published("llama3_2_1b")
    gemma = {key: value for key, value in _GEMMA3.items() if key not in old}
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
    layers = ["sliding_attention", "full_attention"] * 13
    config = described(tmp_path, gemma | {"rope_parameters": rope, "layer_types": layers})
    assert (config.rope_theta, config.rope_local_theta) == (3e5, 500.0)
    assert (config.rope_scaling, config.rope_scaling_factor) == ("linear", 8.0)
    assert config.layer_pattern == ("local", "global")


def test_defaults_of_absent_keys(tmp_path):
    assert described(tmp_path, {"model_type": "gpt2"}) == published("gpt2")
    gemma2 = described(tmp_path, {"model_type": "gemma2"})
    assert gemma2 == published("gemma2_2b")
    # null is a value of its own: no cap.
    raw = {"model_type": "gemma2", "attn_logit_softcapping": None}
    assert described(tmp_path, raw) == change(gemma2, attention_softcap=None)
    llama = {"model_type": "llama", "num_key_value_heads": None, "head_dim": None}
    config = described(tmp_path, llama)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (32, 128, 1e4)
    old = described(tmp_path, llama | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert old == change(config, rope_scaling="linear", rope_scaling_factor=2.0)


def test_windows_of_qwen(tmp_path):
    raw = PUBLISHED["qwen3_0_6b"] | {"num_hidden_layers": 4, "sliding_window": 7}
    assert described(tmp_path, raw).sliding_window is None
    config = described(tmp_path, raw | {"use_sliding_window": True, "max_window_layers": 3})
    assert config.local_layers == (False, False, False, True)
    assert config.sliding_window == 7
    folder, _ = saved(tmp_path, VARIANTS["qwen3_local"])
    raw = json.loads((folder / "config.json").read_text())
    assert (raw["max_window_layers"], raw["use_sliding_window"]) == (1, True)
    edit_config(folder, layer_types=...)  # Readers that do not know it find the same.
    assert io.read_config(folder).local_layers == (False, True, True)


def test_special_tokens(tmp_path):
    config = described(tmp_path, _GEMMA3)
    assert config.end_token_ids == (1, 106)
    assert described(tmp_path, _LLAMA | {"bos_token_id": None}).decoder_start_token_id == 128001
    assert described(tmp_path, _LLAMA | {"bos_token_id": 0}).decoder_start_token_id == 0
    assert described(tmp_path, _LLAMA | {"pad_token_id": -1}).pad_token_id == 128001
    with pytest.warns(UserWarning, match="names no eos_token_id; 0 is taken"):
        assert described(tmp_path, _LLAMA | {"eos_token_id": None}).eos_token_id == 0
    with pytest.warns(UserWarning, match="names no eos_token_id"):  # Nor the published one.
        small = described(tmp_path, {"model_type": "gpt2", "vocab_size": 61})
    assert (small.eos_token_id, small.decoder_start_token_id) == (0, 0)
    with pytest.raises(ValueError, match=r"eos_token_id is \['x'\]; expected whole numbers"):
        described(tmp_path, _LLAMA | {"eos_token_id": ["x"]})

    config = change(LLAMA, eos_token_id=7, more_eos_token_ids=(9,), pad_token_id=7)
    folder, _ = saved(tmp_path, config)
    raw, generation = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("config", "generation_config")
    )
    tokens = {"bos_token_id": 2, "eos_token_id": [7, 9]}
    # A row that pads is never trained in torch, so that eos does not in the model's config.
    assert {key: raw[key] for key in (*tokens, "pad_token_id")} == tokens | {"pad_token_id": None}
    assert generation == tokens | {"pad_token_id": 7}
    assert io.read_config(folder) == config


def test_gpt2_without_a_prefix_and_with_buffers(tmp_path):
    folder, params = saved(tmp_path, GPT2)

    def as_published(tensors):
        tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        mask = {
            f"h.{layer}.attn.{name}": np.ones((1, 1, 64, 64), "float32")
            for layer in (0, 1)
            for name in ("bias", "masked_bias")
        }
        return tensors | mask | {"lm_head.weight": tensors["wte.weight"].copy()}

    edit_tensors(folder, as_published)
    assert_same(io.load_params(folder, io.read_config(folder)), params)
    edit_tensors(folder, lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(
        ValueError, match=r"other values: lm_head.weight differs from transformer.wte.weight"
    ):
        io.load_params(folder, GPT2)


def test_a_name_twice_is_not_dropped(tmp_path):
    folder, _ = saved(tmp_path, GPT2)
    edit_tensors(folder, lambda t: t | {"wte.weight": t["transformer.wte.weight"] + 1})
    with pytest.raises(ValueError, match=r"tensors unexpected: wte.weight \[61, 12\]"):
        io.load_params(folder, GPT2)


def test_llama_with_frequencies_and_a_copy_of_its_tied_head(tmp_path):
    config = VARIANTS["llama_scaled"]
    folder, params = saved(tmp_path, config)
    extra = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(3, "float32")
        for layer in (0, 1)
    }
    edit_tensors(folder, lambda t: t | extra | {"lm_head.weight": t["model.embed_tokens.weight"]})
    assert_same(io.load_params(folder, config), params)
    edit_tensors(folder, lambda t: t | {"lm_head.weight": t["lm_head.weight"] * 2})
    with pytest.raises(ValueError, match=r"duplicate, with other values: lm_head\.weight differs"):
        io.load_params(folder, config)


@pytest.mark.parametrize("style", ["transformers 4", "transformers 5"])
def test_the_text_model_of_a_gemma_with_images(style, tmp_path):
    config = change(GEMMA3, more_eos_token_ids=(5,))
    folder, params = saved(tmp_path, config)
    text = json.loads((folder / "config.json").read_text())
    around = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": text.pop("eos_token_id"),
        "image_token_index": 60,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "text_config": text,
        "vision_config": {"hidden_size": 4},
    }
    (folder / "config.json").write_text(json.dumps(around))

    def as_theirs(tensors):
        old = style == "transformers 4"
        text, image = ("language_model.model.", "") if old else ("model.language_model.", "model.")
        named = {name.replace("model.", text, 1): x for name, x in tensors.items()}
        images = ("vision_tower.x.weight", "multi_modal_projector.mm_soft_emb_norm.weight")
        return named | {image + name: np.ones((2, 3), "float32") for name in images}

    edit_tensors(folder, as_theirs)
    with pytest.warns(UserWarning, match="its text model is taken, the rest left") as caught:
        assert io.read_config(folder) == config
    assert len(caught) == 1
    assert_same(io.load_params(folder, config), params)


def test_dropout_rates_that_differ_are_told(tmp_path):
    folder, _ = saved(tmp_path, GPT2)
    edit_config(folder, attn_pdrop=0.3)
    with pytest.warns(UserWarning, match=r"attn_pdrop differ \(0\.0, 0\.0, 0\.3\)"):
        assert io.read_config(folder) == GPT2


# --- Whatever a published folder may hold ---------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama", "qwen3", "mistral", "gemma2", "gemma3"])
def test_names_without_the_prefix_of_a_head(variant, tmp_path):
    """As Qwen3-Embedding has them."""
    config = change(VARIANTS[variant], tie_word_embeddings=True)
    folder, params = saved(tmp_path, config)
    edit_tensors(folder, lambda t: {name.removeprefix("model."): x for name, x in t.items()})
    assert_same(io.load_params(folder, io.read_config(folder)), params)


@pytest.mark.parametrize("variant", ["llama", "qwen3", "mistral"])
def test_null_for_the_number_of_key_and_value_heads_means_as_many_as_queries(variant, tmp_path):
    folder, _ = saved(tmp_path, VARIANTS[variant])
    edit_config(folder, num_key_value_heads=None)
    assert io.read_config(folder).num_kv_heads == VARIANTS[variant].num_heads


def test_an_adapter_is_named(tmp_path):
    folder, _ = saved(tmp_path, T5)
    adapter = {"base_model_name_or_path": "google/flan-t5-small", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    message = (
        r"also holds an adapter \(adapter_config.json, of google/flan-t5-small\), which is not"
    )
    with pytest.warns(UserWarning, match=message):
        assert io.read_config(folder) == T5


# What publishers' tools and libraries write beside the network's own keys.
_BESIDE = {
    "_attn_implementation": "sdpa",
    "_num_labels": 2,
    "cache_implementation": "hybrid",
    "license": "mit",
    "max_sequence_length": 2048,
    "min_p": 0.1,
    "model_max_length": 512,
    "tf_legacy_loss": False,
    "tokenizer_padding_side": "left",
    "transformers.js_config": {"dtype": "q8"},
    "unsloth_fixed": True,
    "unsloth_version": "2025.1",
    "use_return_dict": True,
}


@pytest.mark.parametrize("config", [T5, GPT2, LLAMA, QWEN3, GEMMA3, BERT], ids=lambda c: c.family)
def test_harmless_keys_are_not_told(config, tmp_path):
    folder, _ = saved(tmp_path, config)
    own = {
        "t5": {"scalable_attention": True},
        "llama": {"is_llama_config": True, "rope_interleaved": False},
    }
    edit_config(folder, **_BESIDE, **own.get(config.family, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert io.read_config(folder) == config
    if config.family == "llama":
        edit_config(folder, rope_interleaved=True)
        with pytest.raises(ValueError, match="rope_interleaved is True, which is not implemented"):
            io.read_config(folder)


# --- T5Gemma --------------------------------------------------------------------------------------


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
    config = dataclasses.replace(T5GEMMA, dropout_rate=0.1)
    raw = version_4(config)
    assert raw["encoder"]["rope_theta"] == 100.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert t5gemma.read_config(raw, {}) == config
    with pytest.warns(UserWarning, match=r"attention_dropout differ \(0\.1, 0\.3\)"):
        assert t5gemma.read_config(raw | {"attention_dropout": 0.3}, {}) == config
    # A chat model has a second end, which stands outside alone.
    raw["eos_token_id"] = [1, 7]
    chat = dataclasses.replace(config, more_eos_token_ids=(7,))
    assert t5gemma.read_config(raw, {}) == chat
    assert t5gemma.read_config(t5gemma.write_config(chat), {}) == chat


def test_ids_of_a_t5gemma_that_are_left_out():
    raw = t5gemma.write_config(dataclasses.replace(T5GEMMA, eos_token_id=7, pad_token_id=5))
    for section in (raw, raw["encoder"], raw["decoder"]):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            del section[key]
    found = t5gemma.read_config(raw, {})
    assert (found.decoder_start_token_id, found.eos_token_id, found.pad_token_id) == (2, 1, 0)


# --- BERT -----------------------------------------------------------------------------------------


def test_the_first_files_with_both_heads_gamma_and_beta(tmp_path):
    folder, params = saved(tmp_path, BERT)

    def as_published(tensors):
        words = tensors["bert.embeddings.word_embeddings.weight"]
        for old, new in ((".weight", ".gamma"), (".bias", ".beta")):
            tensors = {
                n.replace(f"LayerNorm{old}", f"LayerNorm{new}"): x for n, x in tensors.items()
            }
        square, two = np.ones((21, 21), "float32"), np.ones((2, 21), "float32")
        return tensors | {
            "bert.embeddings.position_ids": np.arange(29)[None],
            "bert.pooler.dense.weight": square,
            "bert.pooler.dense.bias": square[0],
            "cls.seq_relationship.weight": two,
            "cls.seq_relationship.bias": two[:, 0],
            "cls.predictions.decoder.weight": words,
        }

    edit_tensors(folder, as_published)
    edit_config(folder, architectures=["BertForPreTraining"])
    assert io.read_config(folder) == BERT
    assert_same(io.load_params(folder, BERT), params)
    # Where a name stands for two tensors, neither is dropped.
    norm = "bert.embeddings.LayerNorm"
    edit_tensors(folder, lambda t: t | {f"{norm}.weight": np.ones(21, "float32")})
    with pytest.raises(ValueError, match=rf"unexpected: {norm}\.gamma \[21\]"):
        io.load_params(folder, BERT)
    name = "cls.predictions.decoder.weight"
    edit_tensors(folder, lambda t: t | {name: t[name] + 1})
    with pytest.raises(ValueError, match=f"{name} differs from bert.embeddings.word_embeddings"):
        io.load_params(folder, BERT)


def test_a_bare_encoder_has_no_prefix(tmp_path):
    model = VARIANTS["bert_pooler"]
    folder, params = saved(tmp_path, model)
    edit_tensors(folder, lambda t: {name.removeprefix("bert."): x for name, x in t.items()})
    assert io.read_config(folder) == model
    assert_same(io.load_params(folder, model), params)


@pytest.mark.parametrize("head", ["masked_lm", "pooler", "none"])
def test_without_architectures_the_weights_tell(head, tmp_path):
    folder, _ = saved(tmp_path, VARIANTS[f"bert_{head}"])
    edit_config(folder, architectures=...)
    assert io.read_config(folder).head == head


def test_ids_of_cls_and_sep_come_from_the_tokenizer_where_config_has_none(tmp_path):
    folder, _ = saved(tmp_path, BERT)
    edit_config(folder, bos_token_id=..., eos_token_id=None)
    with pytest.raises(ValueError, match="names no bos_token_id, and there is no tokenizer that"):
        io.read_config(folder)
    words = ["[PAD]", "[UNK]", "[MASK]", "a", "[SEP]", "[CLS]"]
    (folder / "vocab.txt").write_text("\n".join(words))
    config = io.read_config(folder, load_tokenizer(folder))
    assert (config.cls_token_id, config.eos_token_id, config.pad_token_id) == (5, 4, 0)


def test_labels_without_names(tmp_path):
    folder, _ = saved(tmp_path, VARIANTS["bert_sequence_classification"])
    edit_config(folder, id2label=..., label2id=..., num_labels=3)
    assert io.read_config(folder).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_dropouts_of_bert_that_differ_are_said(tmp_path):
    folder, _ = saved(tmp_path, BERT)
    edit_config(folder, hidden_dropout_prob=0.1)
    with pytest.warns(UserWarning, match=r"differ \(0.1, 0.0\); training uses the first"):
        assert io.read_config(folder).dropout_rate == 0.1
    edit_config(folder, attention_probs_dropout_prob=0.1, directionality="bidi")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        io.read_config(folder)


# --- What is refused ------------------------------------------------------------------------------

TEXTS = VARIANTS["bert_sequence_classification"]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (T5, {"architectures": ["T5Model"]}, r"\['T5Model'\]; expected one of T5For"),
        (T5, {"feed_forward_proj": "gelu"}, r"feed_forward_proj is 'gelu'.*gated-gelu"),
        (T5, {"dense_act_fn": "gelu"}, r"dense_act_fn is 'gelu'.*expected 'gelu_new'"),
        (T5, {"is_gated_act": False}, r"is_gated_act is False.*expected True"),
        (T5, {"is_encoder_decoder": False}, r"is_encoder_decoder is False.*expected True"),
        (T5, {"is_decoder": True}, r"is_decoder is True.*expected False"),
        (T5, {"tie_encoder_decoder": True}, r"tie_encoder_decoder is True.*expected False"),
        (
            T5,
            {"quantization_config": {"bits": 8}},
            "quantization_config says that the weights are quantized",
        ),
        (T5, {"eos_token_id": [1, "2"]}, r"eos_token_id is \[1, '2'\]; expected whole numbers"),
        (T5, {"d_model": "8"}, r"d_model is '8'; expected a value of type int"),
        (T5, {"d_model": 8.0}, r"d_model is 8\.0; expected a value of type int"),
        (
            T5,
            {"tie_word_embeddings": 1},
            r"tie_word_embeddings is 1; expected a value of type bool",
        ),
        (T5, {"num_decoder_layers": 0}, r"num_decoder_layers is 0"),
        (T5, {"relative_attention_num_buckets": 6}, r"relative_attention_num_buckets is 6"),
        (GPT2, {"model_type": "gpt_neox"}, r"'gpt_neox'; expected one of .*gpt2, llama, .*qwen3"),
        (GPT2, {"architectures": ["GPT2DoubleHeadsModel"]}, r"expected one of GPT2LMHeadModel"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, r"inverse_layer_idx is True.*False"),
        (GPT2, {"scale_attn_weights": False}, r"scale_attn_weights is False.*expected True"),
        (GPT2, {"add_cross_attention": True}, r"add_cross_attention is True"),
        (GPT2, {"activation_function": "swish"}, r"activation_function is 'swish'.*gelu_new"),
        (GPT2, {"n_head": 5}, r"n_embd 12 is not divisible by n_head 5"),
        (GPT2, {"n_embd": "12"}, r"n_embd is '12'; expected a value of type int"),
        (LLAMA, {"hidden_act": "gelu"}, r"hidden_act is 'gelu'.*expected 'silu'"),
        (
            LLAMA,
            {"quantization_config": {"bits": 4}},
            "quantization_config says that the weights are quantized",
        ),
        (LLAMA, {"tie_word_embeddings": 0}, r"tie_word_embeddings is 0; expected .* type bool"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"type 'yarn', which is"),
        (
            LLAMA,
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            r"'dynamic'.*default, linear",
        ),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, r"'linear' .* lacks factor"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": "2"}}, r"expected numbers, not '2'"),
        (LLAMA, {"rope_scaling": "linear"}, r"rope_scaling is 'linear'; expected an object"),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope_scaling .* and rope_parameters .* disagree",
        ),
        (
            LLAMA,
            {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}},
            r"'default' has \{'partial_rotary_factor': 0\.5\}",
        ),
        (
            QWEN3,
            {"layer_types": ["full_attention"]},
            r"layer_types has 1 entries.*expected 2, each",
        ),
        (QWEN3, {"layer_types": ["chunked"] * 2}, r"among them chunked; expected 2, each full_at"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 2}, r"sliding_window is null, but there"),
        (GEMMA3, {"use_bidirectional_attention": True}, r"use_bidirectional_attention is True"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0"),
        (GEMMA3, {"hidden_activation": "gelu"}, r"hidden_activation is 'gelu'"),
        (GEMMA3, {"model_type": "gemma3"}, r"model_type is 'gemma3', but there is no text_config"),
        (
            GEMMA3,
            {
                "rope_scaling": None,
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                },
            },
            r"sliding_attention is .*expected local layers without scaling",
        ),
        (
            VARIANTS["qwen3_local"],
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 7.0}}},
            r"rope_parameters differ between layers",
        ),
        (
            TEXTS,
            {"position_embedding_type": "relative_key"},
            "is 'relative_key', which is not impleme",
        ),
        (
            TEXTS,
            {"hidden_act": "silu"},
            "hidden_act is 'silu', which is not implemented; expected one of",
        ),
        (
            TEXTS,
            {"is_decoder": True},
            "is_decoder is True, which is not implemented; expected False",
        ),
        (
            TEXTS,
            {"add_cross_attention": True},
            "add_cross_attention is True, which is not implemented",
        ),
        (
            TEXTS,
            {"quantization_config": {"a": 1}},
            "quantization_config says that the weights are quantized",
        ),
        (
            TEXTS,
            {"problem_type": "regression"},
            "problem_type is 'regression', which is not implemented",
        ),
        (
            TEXTS,
            {"problem_type": "multi_label_classification"},
            "problem_type is 'multi_label_class",
        ),
        (TEXTS, {"id2label": {"0": "a"}}, r"model.labels are \('a',\); .* needs two or more"),
        (
            TEXTS,
            {"id2label": {"0": "a", "2": "b"}},
            "id2label is .*; expected a name for each of the",
        ),
        (TEXTS, {"id2label": {"0": "a", "1": "a"}}, "model.labels has 'a' twice"),
        (
            TEXTS,
            {"num_attention_heads": 4},
            "model.d_model 21 is not divisible by model.num_heads 4",
        ),
        (TEXTS, {"hidden_size": "21"}, "hidden_size is '21'; expected a value of type int"),
        (
            TEXTS,
            {"architectures": ["BertForQuestionAnswering"]},
            "architectures is .*; expected one of B",
        ),
        (
            TEXTS,
            {"architectures": ...},
            "the weights hold a classifier: of texts or of words",
        ),
    ],
)
def test_config_that_is_not_implemented(config, changes, message, tmp_path):
    folder, _ = saved(tmp_path, config)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        io.read_config(folder)


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
def test_config_of_t5gemma_that_is_not_implemented(where, changes, message):
    raw = t5gemma.write_config(T5GEMMA)
    raw = raw | {where: raw[where] | changes} if where else raw | changes
    with pytest.raises(ValueError, match=message):
        t5gemma.read_config(raw, {})


# As they are published: by transformers (bitsandbytes, fp8), llm-compressor, GPTQModel and AutoAWQ,
# and in files of their own by AutoGPTQ and an older AutoAWQ.
QUANTIZED = {
    "bitsandbytes": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
}


@pytest.mark.parametrize("place", [*QUANTIZED, "quantize_config.json", "quant_config.json"])
def test_models_quantized_elsewhere_are_refused_by_name(tmp_path, capsys, place):
    folder, _ = saved(tmp_path / "model", LLAMA)
    edit_config(folder, quantization_config=QUANTIZED.get(place))
    method = {"quantize_config.json": "gptq", "quant_config.json": "awq"}.get(place, place)
    if place not in QUANTIZED:
        (folder / place).write_text(json.dumps({"bits": 4, "w_bit": 4}))
    message = f"says that the weights are quantized ({method}), which is not read here; give"
    out = tmp_path / "out"
    commands = [
        ("train", "quickstart", "--init.model", folder, "--run-dir", out),
        ("eval", folder, "--tasks", "numbers_en_fr"),
        ("infer", folder, "--prompt", "x"),
        ("serve", folder, "--port", "0"),
        ("export", folder, out),
        ("import", folder, out),
        ("compress", folder, out),
        ("prune", folder, out),
    ]
    for command in commands if place == "gptq" else commands[4:5]:
        assert message in fails(capsys, *command), command
    assert not (out / "checkpoints").exists()
