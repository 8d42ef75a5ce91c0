"""Qwen 3: its restrictions of `GPTConfig`, and its published sizes (arXiv:2505.09388)."""

from t5jax.architectures.gpt import GPTConfig, check_allowed, rope_config
from t5jax.architectures.llama import PLAIN


def check(config: GPTConfig) -> None:
    """Raises ValueError for values that Qwen 3 checkpoints cannot represent."""
    check_allowed(config, PLAIN | {"qk_norm": (True,), "mlp_bias": (False,)})


def _qwen3(d_model: int, d_ff: int, layers: int, heads: int, tied: bool = True) -> GPTConfig:
    return rope_config(
        *(d_model, d_ff, layers, heads, 8, 128),
        family="qwen3",
        mlp_activation="gated-silu",
        vocab_size=151936,
        max_positions=40960,
        rope_theta=1_000_000.0,
        norm_epsilon=1e-6,
        qk_norm=True,
        tie_word_embeddings=tied,
        pad_token_id=151645,
        eos_token_id=151645,
        decoder_start_token_id=151643,
    )


SIZES = {
    "qwen3_0_6b": _qwen3(1024, 3072, 28, 16),
    "qwen3_1_7b": _qwen3(2048, 6144, 28, 16),
    "qwen3_4b": _qwen3(2560, 9728, 36, 32),
    "qwen3_8b": _qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3_14b": _qwen3(5120, 17408, 40, 40, tied=False),
    "qwen3_32b": _qwen3(5120, 25600, 64, 64, tied=False),
}
