"""Decoding: from prompts to tokens and texts."""

from t5jax.decoding.generator import Generator, padded_batches
from t5jax.decoding.greedy import greedy

__all__ = ["Generator", "greedy", "padded_batches"]
