"""Mistral: its restrictions of `GPTConfig`, and its published sizes (arXiv:2310.06825)."""

from t5jax.architectures.gpt import GPTConfig, check_allowed, rope_config
from t5jax.architectures.llama import PLAIN

_ALLOWED = PLAIN | {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "layer_pattern": (("global",), ("local",)),
}


def check(config: GPTConfig) -> None:
    """Raises ValueError for values that Mistral checkpoints cannot represent."""
    check_allowed(config, _ALLOWED)


def _mistral_7b(vocab_size: int, theta: float, window: int | None) -> GPTConfig:
    return rope_config(
        *(4096, 14336, 32, 32, 8, 128),
        family="mistral",
        mlp_activation="gated-silu",
        vocab_size=vocab_size,
        max_positions=32768,
        rope_theta=theta,
        layer_pattern=("local",) if window else ("global",),
        sliding_window=window,
        tie_word_embeddings=False,
        pad_token_id=2,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


SIZES = {
    "mistral_7b_v0_1": _mistral_7b(32000, 10_000.0, window=4096),
    "mistral_7b_v0_3": _mistral_7b(32768, 1_000_000.0, window=None),
}
