"""Gemma 2: its restrictions of `GPTConfig`, and its published sizes (arXiv:2408.00118)."""

from typing import Any

from t5jax.architectures.gpt import GPTConfig, check_allowed, check_even_width, rope_config

GEMMA: dict[str, tuple[Any, ...]] = {
    "position": ("rope",),
    "norm": ("rmsnorm",),
    "norm_plus_one": (True,),
    "mlp_activation": ("gated-gelu",),
    "mlp_bias": (False,),
    "post_norms": (True,),
    "scale_embedding": (True,),
}
"""Restrictions that all Gemmas share."""


def check(config: GPTConfig) -> None:
    """Raises ValueError for values that Gemma 2 checkpoints cannot represent."""
    check_allowed(config, GEMMA | {"qk_norm": (False,), "rope_local_theta": (None,)})
    check_even_width(config)


def gemma(*shape: int, **rest: Any) -> GPTConfig:
    """Returns a Gemma of these sizes."""
    return rope_config(
        *shape,
        mlp_activation="gated-gelu",
        norm_epsilon=1e-6,
        norm_plus_one=True,
        post_norms=True,
        scale_embedding=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=2,
        **rest,
    )


def _gemma2(*shape: int, scalar: int | None = None) -> GPTConfig:
    return gemma(
        *shape,
        family="gemma2",
        vocab_size=256_000,
        max_positions=8192,
        rope_theta=10_000.0,
        query_pre_attention_scalar=scalar,
        attention_softcap=50.0,
        final_softcap=30.0,
        layer_pattern=("local", "global"),
        sliding_window=4096,
    )


SIZES = {
    "gemma2_2b": _gemma2(2304, 9216, 26, 8, 4, 256),
    "gemma2_9b": _gemma2(3584, 14336, 42, 16, 8, 256),
    "gemma2_27b": _gemma2(4608, 36864, 46, 32, 16, 128, scalar=144),
}
