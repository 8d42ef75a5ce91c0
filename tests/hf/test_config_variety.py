"""One key of config.json at a time, in the spellings in which published configs have it."""

import json

import pytest

from t5jax.hf import io

_DECODER = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = _DECODER | {"head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 8}
_T5 = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 3,
    "vocab_size": 40,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
BASES = {
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "gpt2": {
        "vocab_size": 40,
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 32,
        "bos_token_id": 39,
        "eos_token_id": 39,
    },
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen3": _DECODER | {"head_dim": 4},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "bert": {
        "architectures": ["BertForMaskedLM"],
        "vocab_size": 200,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    },
}

_SAME: dict = {}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_STRETCHED = {
    "rope_scaling": "llama3",
    "rope_scaling_factor": 8.0,
    "rope_low_frequency_factor": 1.0,
    "rope_high_frequency_factor": 4.0,
    "rope_original_max_positions": 16,
}

ROWS = [
    # T5: the activation decides the form of the MLP; the head's tie decides the scale.
    ("t5", {"feed_forward_proj": "relu"}, {"mlp_activation": "relu"}),
    (
        "t5",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {
            "mlp_activation": "gated-gelu",
            "tie_word_embeddings": False,
            "scale_decoder_outputs": False,
        },
    ),
    ("t5", {"feed_forward_proj": "gated-silu"}, {"mlp_activation": "gated-silu"}),
    ("t5", {"feed_forward_proj": "gated-swish"}, {"mlp_activation": "gated-silu"}),
    (
        "t5",
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": False, "scale_decoder_outputs": False},
    ),
    ("t5", {"scale_decoder_outputs": False}, {"scale_decoder_outputs": False}),
    ("t5", {"num_decoder_layers": 3}, {"num_decoder_layers": 3}),
    ("t5", {"num_decoder_layers": None}, _SAME),
    ("t5", {"num_heads": 5}, {"num_heads": 5}),
    ("t5", {"d_kv": 7}, {"d_kv": 7}),
    ("t5", {"relative_attention_num_buckets": 8}, {"relative_attention_num_buckets": 8}),
    ("t5", {"relative_attention_max_distance": 20}, {"relative_attention_max_distance": 20}),
    ("t5", {"layer_norm_epsilon": 1e-3}, {"layer_norm_epsilon": 1e-3}),
    ("t5", {"dropout_rate": 0.25}, {"dropout_rate": 0.25}),
    ("t5", {"dropout_rate": 0}, {"dropout_rate": 0.0}),
    ("t5", {"pad_token_id": 1, "eos_token_id": 2}, {"pad_token_id": 1, "eos_token_id": 2}),
    ("t5", {"decoder_start_token_id": 5}, {"decoder_start_token_id": 5}),
    ("t5", {"n_positions": 512, "output_past": True, "use_cache": False}, _SAME),
    ("t5", {"task_specific_params": {"summarization": {"num_beams": 4}}}, _SAME),
    ("mt5", {"tokenizer_class": "T5Tokenizer", "is_encoder_decoder": True}, _SAME),
    ("mt5", {"feed_forward_proj": "relu"}, {"mlp_activation": "relu"}),
    ("mt5", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ("umt5", {"num_decoder_layers": 1}, {"num_decoder_layers": 1}),
    ("umt5", {"pad_token_id": 1, "eos_token_id": 2}, {"pad_token_id": 1, "eos_token_id": 2}),
    # GPT-2.
    ("gpt2", {"activation_function": "gelu_new"}, _SAME),
    ("gpt2", {"activation_function": "gelu_pytorch_tanh"}, _SAME),
    ("gpt2", {"activation_function": "gelu"}, {"mlp_activation": "gelu-exact"}),
    ("gpt2", {"activation_function": "relu"}, {"mlp_activation": "relu"}),
    ("gpt2", {"n_inner": 20}, {"d_ff": 20}),
    ("gpt2", {"n_inner": None}, {"d_ff": 48}),
    ("gpt2", {"n_ctx": 32, "n_special": 0, "predict_special_tokens": True}, _SAME),
    ("gpt2", {"layer_norm_epsilon": 1e-2}, {"norm_epsilon": 1e-2}),
    ("gpt2", {"tie_word_embeddings": False}, {"tie_word_embeddings": False}),
    ("gpt2", {"reorder_and_upcast_attn": True}, _SAME),
    ("gpt2", {"summary_type": "cls_index", "summary_use_proj": True}, _SAME),
    ("gpt2", {"n_positions": 96}, {"max_positions": 96}),
    ("gpt2", {"n_head": 4}, {"num_heads": 4, "num_kv_heads": 4, "head_dim": 3}),
    # Decoders with rotary embeddings.
    ("llama", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
    ("llama", {"num_key_value_heads": 1}, {"num_kv_heads": 1}),
    ("llama", {"head_dim": 6}, {"head_dim": 6}),
    ("llama", {"head_dim": None}, _SAME),
    ("llama", {"hidden_act": "silu"}, _SAME),
    (
        "llama",
        {"attention_bias": True, "mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True},
    ),
    ("llama", {"rms_norm_eps": 1e-2}, {"norm_epsilon": 1e-2}),
    ("llama", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ("llama", {"rope_theta": 100.0}, {"rope_theta": 100.0}),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100}},
        {"rope_theta": 100},
    ),
    ("llama", {"rope_scaling": None}, _SAME),
    ("llama", {"rope_scaling": {"rope_type": "llama3", **_LLAMA3}}, _STRETCHED),
    (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 9.0, **_LLAMA3}},
        {"rope_theta": 9.0, **_STRETCHED},
    ),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": "linear", "rope_scaling_factor": 4.0},
    ),
    ("llama", {"pretraining_tp": 2}, _SAME),
    ("llama", {"torch_dtype": "bfloat16"}, _SAME),
    ("llama", {"dtype": "float16"}, _SAME),
    ("llama", {"max_position_embeddings": 128}, {"max_positions": 128}),
    ("mistral", {"sliding_window": 4}, {"sliding_window": 4, "layer_pattern": ("local",)}),
    ("mistral", {"sliding_window": None}, {"sliding_window": None, "layer_pattern": ("global",)}),
    (
        "mistral",
        {"sliding_window": 4, "layer_types": ["full_attention"] * 2},
        {"sliding_window": None, "layer_pattern": ("global",)},
    ),
    ("mistral", {"head_dim": 6}, {"head_dim": 6}),
    ("mistral", {"rope_theta": 1e6}, {"rope_theta": 1e6}),
    ("qwen3", {"attention_bias": False}, _SAME),
    ("qwen3", {"head_dim": 6}, {"head_dim": 6}),
    ("qwen3", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    ("qwen3", {"sliding_window": 4, "use_sliding_window": False}, _SAME),
    (
        "qwen3",
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
        {"sliding_window": 4, "layer_pattern": ("global", "local")},
    ),
    ("gemma2", {"query_pre_attn_scalar": 9}, {"query_pre_attention_scalar": 9}),
    ("gemma2", {"attn_logit_softcapping": None}, {"attention_softcap": None}),
    ("gemma2", {"attn_logit_softcapping": 2.0}, {"attention_softcap": 2.0}),
    ("gemma2", {"final_logit_softcapping": None}, {"final_softcap": None}),
    ("gemma2", {"final_logit_softcapping": 3.0}, {"final_softcap": 3.0}),
    ("gemma2", {"sliding_window": 3}, {"sliding_window": 3}),
    ("gemma2", {"hidden_activation": "gelu_pytorch_tanh"}, _SAME),
    ("gemma2", {"num_key_value_heads": 1}, {"num_kv_heads": 1}),
    ("gemma2", {"cache_implementation": "hybrid"}, _SAME),
    (
        "gemma2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_pattern": ("global", "local")},
    ),
    ("gemma3_text", {"sliding_window": 3}, {"sliding_window": 3}),
    ("gemma3_text", {"rope_theta": 5e5}, {"rope_theta": 5e5}),
    ("gemma3_text", {"rope_local_base_freq": 500}, {"rope_local_theta": 500}),
    ("gemma3_text", {"query_pre_attn_scalar": 16}, {"query_pre_attention_scalar": 16}),
    ("gemma3_text", {"final_logit_softcapping": 3.0}, {"final_softcap": 3.0}),
    (
        "gemma3_text",
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_scaling": "linear", "rope_scaling_factor": 8.0},
    ),
    # BERT.
    ("bert", {"hidden_act": "gelu"}, _SAME),
    ("bert", {"hidden_act": "gelu_python"}, _SAME),
    ("bert", {"hidden_act": "gelu_new"}, {"activation": "gelu"}),
    ("bert", {"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu"}),
    ("bert", {"hidden_act": "relu"}, {"activation": "relu"}),
    ("bert", {"layer_norm_eps": 1e-3}, {"layer_norm_epsilon": 1e-3}),
    ("bert", {"type_vocab_size": 1}, {"type_vocab_size": 1}),
    ("bert", {"num_attention_heads": 2}, {"num_heads": 2}),
    ("bert", {"position_embedding_type": "absolute", "gradient_checkpointing": False}, _SAME),
    ("bert", {"max_position_embeddings": 48}, {"max_positions": 48}),
    ("bert", {"pad_token_id": 3}, {"pad_token_id": 3}),
]


def read(folder, model_type: str, changes: dict):
    raw = BASES[model_type] | {"model_type": model_type} | changes
    (folder / "config.json").write_text(json.dumps(raw))
    return io.read_config(folder)


@pytest.mark.parametrize(
    ("model_type", "changes", "fields"),
    ROWS,
    ids=[
        f"{model_type}-{'-'.join(changes)}-{i}" for i, (model_type, changes, _) in enumerate(ROWS)
    ],
)
def test_key(model_type, changes, fields, tmp_path, recwarn):
    base = read(tmp_path, model_type, {})
    changed = read(tmp_path, model_type, changes)
    names = base.__dataclass_fields__
    differing = {n for n in names if getattr(base, n) != getattr(changed, n)}
    assert {name: getattr(changed, name) for name in fields} == fields
    assert differing <= fields.keys()
    assert not recwarn.list


def test_layers_of_a_mistral_that_differ_are_refused(tmp_path):
    types = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    with pytest.raises(ValueError, match=r"layer_types is .* not implemented for Mistral"):
        read(tmp_path, "mistral", types)
