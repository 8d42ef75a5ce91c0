"""Llama 3: its restrictions of `GPTConfig`, and its published sizes (arXiv:2407.21783)."""

from typing import Any

from t5jax.architectures.gpt import GPTConfig, check_allowed, check_even_width, rope_config

PLAIN: dict[str, tuple[Any, ...]] = {
    "position": ("rope",),
    "norm": ("rmsnorm",),
    "norm_plus_one": (False,),
    "mlp_activation": ("gated-silu",),
    "qk_norm": (False,),
    "post_norms": (False,),
    "scale_embedding": (False,),
    "query_pre_attention_scalar": (None,),
    "attention_softcap": (None,),
    "final_softcap": (None,),
    "rope_local_theta": (None,),
}
"""Restrictions that other families share."""


def check(config: GPTConfig) -> None:
    """Raises ValueError for values that Llama checkpoints cannot represent."""
    check_allowed(config, PLAIN | {"layer_pattern": (("global",),)})
    check_even_width(config)


def _llama(*shape: int, stretched: float | None = None, tied: bool = False) -> GPTConfig:
    stretch: dict[str, Any] = {
        "rope_scaling": "llama3",
        "rope_scaling_factor": stretched,
        "rope_low_frequency_factor": 1.0,
        "rope_high_frequency_factor": 4.0,
        "rope_original_max_positions": 8192,
    }
    return rope_config(
        *shape,
        family="llama",
        mlp_activation="gated-silu",
        vocab_size=128256,
        max_positions=131072 if stretched else 8192,
        rope_theta=500_000.0,
        tie_word_embeddings=tied,
        pad_token_id=128001,
        eos_token_id=128001,
        decoder_start_token_id=128000,
        **(stretch if stretched else {}),
    )


SIZES = {
    "llama3_8b": _llama(4096, 14336, 32, 32, 8, 128),
    "llama3_70b": _llama(8192, 28672, 80, 64, 8, 128),
    "llama3_1_8b": _llama(4096, 14336, 32, 32, 8, 128, stretched=8.0),
    "llama3_1_70b": _llama(8192, 28672, 80, 64, 8, 128, stretched=8.0),
    "llama3_2_1b": _llama(2048, 8192, 16, 32, 8, 64, stretched=32.0, tied=True),
    "llama3_2_3b": _llama(3072, 8192, 28, 24, 8, 128, stretched=32.0, tied=True),
}
