"""Decoding: tokens from a model, a step at a time."""

from t5jax.decoding.greedy import greedy

__all__ = ["greedy"]
