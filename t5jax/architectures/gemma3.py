"""Gemma 3's text models: their restrictions of `GPTConfig`, and their published sizes.

arXiv:2503.19786.
"""

from typing import Any

from t5jax.architectures.gemma2 import GEMMA, gemma
from t5jax.architectures.gpt import GPTConfig, check_allowed, check_even_width


def check(config: GPTConfig) -> None:
    """Raises ValueError for values that Gemma 3 checkpoints cannot represent."""
    check_allowed(config, GEMMA | {"qk_norm": (True,), "attention_softcap": (None,)})
    check_even_width(config)
    if "local" in config.layer_pattern and not config.rope_local_theta:
        raise ValueError("model.rope_local_theta is None; local layers of gemma3 need it")


def _gemma3(*shape: int, large: bool = True, scalar: int | None = None) -> GPTConfig:
    stretch: dict[str, Any] = {"rope_scaling": "linear", "rope_scaling_factor": 8.0}
    return gemma(
        *shape,
        family="gemma3",
        vocab_size=262_208 if large else 262_144,
        max_positions=131_072 if large else 32_768,
        rope_theta=1_000_000.0,
        rope_local_theta=10_000.0,
        qk_norm=True,
        query_pre_attention_scalar=scalar,
        layer_pattern=(*("local",) * 5, "global"),
        sliding_window=1024 if large else 512,
        **(stretch if large else {}),
    )


SIZES = {
    "gemma3_270m": _gemma3(640, 2048, 18, 4, 1, 256, large=False),
    "gemma3_1b": _gemma3(1152, 6912, 26, 4, 1, 256, large=False),
    "gemma3_4b": _gemma3(2560, 10240, 34, 8, 4, 256),
    "gemma3_12b": _gemma3(3840, 15360, 48, 16, 8, 256),
    "gemma3_27b": _gemma3(5376, 21504, 62, 32, 16, 128, scalar=168),
}
