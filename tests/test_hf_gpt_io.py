"""Folders of decoder-only models: exact round trips, files as others wrote them, broken ones."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from small_gpt import GEMMA3, GPT2, LLAMA, QWEN3, VARIANTS, change, random_params
from t5jax.architectures import SIZES, GPTConfig, published
from t5jax.config import AxisRules, MeshConfig
from t5jax.hf import files, io
from t5jax.hf.mapping import Part, Rearrange
from t5jax.models import api
from t5jax.sharding import make_mesh, param_shardings

every_variant = pytest.mark.parametrize("variant", VARIANTS)
pytestmark = pytest.mark.filterwarnings("ignore:a Llama whose heads")


def assert_same(got, expected):
    """Same leaves, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


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


# --- Round trips --------------------------------------------------------------------------------


@every_variant
def test_round_trip_is_exact(variant, tmp_path, recwarn):
    config = VARIANTS[variant]
    folder, params = saved(tmp_path, config)
    assert io.read_config(folder) == config
    assert_same(io.load_params(folder, config), params)
    assert not [w for w in recwarn if "keys that are not known" in str(w.message)]


@pytest.mark.parametrize("variant", ["gpt2", "llama_biased"])
def test_round_trip_is_exact_when_sharded(variant, tmp_path):
    even = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_heads": 4, "num_kv_heads": 4}
    config = change(VARIANTS[variant], **even, head_dim=4)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    for rules in (AxisRules(), AxisRules(head_dim="model", heads=None, kv_heads=None)):
        shapes = api.param_shapes(config)
        shardings = param_shardings(api.param_axes(config), shapes, mesh, rules)
        params = random_params(config)
        sharded = jax.device_put(params, shardings)
        io.save_params(tmp_path / "out", config, sharded, max_shard_bytes=3000, overwrite=True)
        loaded = io.load_params(tmp_path / "out", config, shardings)
        assert_same(loaded, params)
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), loaded, shardings)
        assert all(jax.tree.leaves(same))


def test_a_host_reads_of_a_fused_tensor_only_its_slices(tmp_path, monkeypatch):
    config = change(GPT2, vocab_size=64, d_model=16, d_ff=32, num_heads=4, num_kv_heads=4)
    folder, params = saved(tmp_path, config)
    shapes, mesh = api.param_shapes(config), make_mesh(MeshConfig(model=4))
    shardings = param_shardings(api.param_axes(config), shapes, mesh, AxisRules())
    read = []
    original = files._SafeTensor.__getitem__

    def spy(self, index):
        x = original(self, index)
        read.append(x.nbytes)
        return x

    monkeypatch.setattr(files._SafeTensor, "__getitem__", spy)
    assert_same(io.load_params(folder, config, shardings), params)
    assert sum(read) == sum(x.size * 4 for x in jax.tree.leaves(shapes))


def test_bfloat16_round_trips(tmp_path):
    config = change(GPT2, param_dtype="bfloat16")
    params = random_params(config)
    io.save_params(tmp_path / "out", config, params, dtype="bfloat16")
    assert_same(io.load_params(tmp_path / "out", config), params)


def test_names_and_layouts_are_theirs(tmp_path):
    """The mapping in numbers, on tensors picked by hand."""
    folder, ours = saved(tmp_path / "gpt2", GPT2)
    theirs = safetensors.numpy.load_file(folder / "model.safetensors")
    attention = ours["decoder"]["layers"]["attention"]
    for place, part in enumerate(("query", "key", "value")):
        span = slice(12 * place, 12 * place + 12)
        np.testing.assert_array_equal(
            theirs["transformer.h.1.attn.c_attn.weight"][:, span],
            attention[part]["kernel"][1].reshape(12, 12),
        )
        np.testing.assert_array_equal(
            theirs["transformer.h.1.attn.c_attn.bias"][span], attention[part]["bias"][1].reshape(12)
        )
    np.testing.assert_array_equal(
        theirs["transformer.h.0.attn.c_proj.weight"], attention["out"]["kernel"][0].reshape(12, 12)
    )
    assert theirs["transformer.h.0.mlp.c_fc.weight"].shape == (12, 20)
    assert "lm_head.weight" not in theirs

    folder, ours = saved(tmp_path / "gemma3", GEMMA3)
    theirs = safetensors.numpy.load_file(folder / "model.safetensors")
    layers = ours["decoder"]["layers"]
    for name, leaf in (
        ("post_attention_layernorm", layers["post_attention_norm"]["scale"]),
        ("pre_feedforward_layernorm", layers["pre_mlp_norm"]["scale"]),
        ("self_attn.q_norm", layers["attention"]["query_norm"]["scale"]),
    ):
        np.testing.assert_array_equal(theirs[f"model.layers.2.{name}.weight"], leaf[2])
    np.testing.assert_array_equal(
        theirs["model.layers.3.self_attn.q_proj.weight"],
        layers["attention"]["query"]["kernel"][3].reshape(12, 18).T,
    )
    np.testing.assert_array_equal(
        theirs["model.layers.0.mlp.gate_proj.weight"], layers["mlp"]["wi_0"]["kernel"][0].T
    )


def test_parts_of_a_tensor_are_read_in_any_slice():
    rng = np.random.default_rng(0)
    theirs = rng.standard_normal((5, 3 * 12))
    for place in range(3):
        view = Part(Rearrange("d (h k) -> d h k"), axis=1, place=place, count=3)
        ours = theirs[:, 12 * place : 12 * place + 12].reshape(5, 3, 4)
        assert view.their_shape((5, 3, 4)) == theirs.shape
        np.testing.assert_array_equal(view.to_theirs(ours), ours.reshape(5, 12))
        for _ in range(20):
            ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in (5, 3, 4)]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            np.testing.assert_array_equal(view.read(theirs, index, (5, 3, 4)), ours[index])


@pytest.mark.parametrize("size", [n for n, m in SIZES.items() if isinstance(m, GPTConfig)])
def test_every_published_size_has_a_row_for_each_leaf(size):
    config = published(size)
    shapes = io._flatten(api.param_shapes(config))
    rows = io._table(config).rows(config)
    assert sorted(row.ours for row in rows) == sorted(shapes)
    count = sum(np.prod(shape.shape, dtype=int) for shape in shapes.values())
    theirs = {
        name: shape
        for row in rows
        for name, shape in row.their_shapes(shapes[row.ours].shape).items()
    }
    assert sum(np.prod(shape, dtype=int) for shape in theirs.values()) == count


# --- config.json as published -------------------------------------------------------------------

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
    assert described(tmp_path, _LLAMA | {"pad_token_id": -1}).pad_token_id == 128001
    with pytest.warns(UserWarning, match="names no eos_token_id; 0 is taken"):
        assert described(tmp_path, _LLAMA | {"eos_token_id": None}).eos_token_id == 0
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


# --- Checkpoints as others wrote them -----------------------------------------------------------


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


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
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
            r"quantization_config .* plain float weights",
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
    ],
)
def test_config_that_is_not_implemented(config, changes, message, tmp_path):
    folder, _ = saved(tmp_path, config)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        io.read_config(folder)


def test_dropout_rates_that_differ_are_told(tmp_path):
    folder, _ = saved(tmp_path, GPT2)
    edit_config(folder, attn_pdrop=0.3)
    with pytest.warns(UserWarning, match=r"attn_pdrop differ \(0\.0, 0\.0, 0\.3\)"):
        assert io.read_config(folder) == GPT2


def test_every_problem_is_listed_once(tmp_path):
    folder, _ = saved(tmp_path, GPT2)

    def change(tensors):
        for layer in (0, 1):
            del tensors[f"transformer.h.{layer}.attn.c_attn.weight"]
        tensors["transformer.h.1.attn.c_attn.bias"] = np.zeros(12, "float32")
        tensors["transformer.h.0.crossattention.q_attn.weight"] = np.zeros((2, 2), "float32")
        return tensors

    edit_tensors(folder, change)
    with pytest.raises(ValueError, match="does not hold the model that was described") as error:
        io.load_params(folder, GPT2)
    for part in (
        "tensors missing: transformer.h.{0-1}.attn.c_attn.weight [12, 36];",
        "tensors unexpected: transformer.h.{0}.crossattention.q_attn.weight [2, 2];",
        "of another shape: transformer.h.{1}.attn.c_attn.bias [12], expected [36]",
    ):
        assert part in str(error.value)


def test_an_untied_head_that_is_missing(tmp_path):
    folder, _ = saved(tmp_path, LLAMA)
    edit_tensors(folder, lambda t: {name: x for name, x in t.items() if "lm_head" not in name})
    with pytest.raises(ValueError, match=r"tensors missing: lm_head.weight \[61, 12\]"):
        io.load_params(folder, LLAMA)
