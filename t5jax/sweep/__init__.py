"""Sweeps: many runs of one config with other values, by Optuna."""

from t5jax.sweep.space import Space, parse_space
from t5jax.sweep.sweep import SweepOptions, sweep

__all__ = ["Space", "SweepOptions", "parse_space", "sweep"]
