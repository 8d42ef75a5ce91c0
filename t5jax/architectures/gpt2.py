"""GPT-2: its restrictions of `GPTConfig`, and its published sizes.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from t5jax.architectures.gpt import GPTConfig, check_allowed

_ALLOWED = {
    "position": ("learned",),
    "norm": ("layernorm",),
    "mlp_activation": ("gelu", "gelu-exact", "relu"),
    "attention_bias": (True,),
    "mlp_bias": (True,),
    "post_norms": (False,),
    "scale_embedding": (False,),
    "query_pre_attention_scalar": (None,),
    "attention_softcap": (None,),
    "final_softcap": (None,),
    "layer_pattern": (("global",),),
}


def check(config: GPTConfig) -> None:
    """Raises ValueError for values that GPT-2 checkpoints cannot represent."""
    check_allowed(config, _ALLOWED)
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    if (heads * head_dim, kv_heads) != (config.d_model, heads):
        raise ValueError(
            f"model.num_heads {heads}, model.num_kv_heads {kv_heads} and model.head_dim {head_dim} "
            "do not fit gpt2: as many heads of keys as of queries, together model.d_model "
            f"{config.d_model} wide"
        )


def _gpt2(d_model: int, layers: int, heads: int) -> GPTConfig:
    return GPTConfig(
        family="gpt2",
        d_model=d_model,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=64,
        d_ff=4 * d_model,
    )


SIZES = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2_medium": _gpt2(1024, 24, 16),
    "gpt2_large": _gpt2(1280, 36, 20),
    "gpt2_xl": _gpt2(1600, 48, 25),
}
