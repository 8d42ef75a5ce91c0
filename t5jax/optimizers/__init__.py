"""Optimizers: T5X's Adafactor, AdamW and its relatives, Muon, schedule-free; and their schedules.

`make_optimizer` puts one together. Each transformation that optax does not have is a file here.
"""

from t5jax.optimizers.average import averages
from t5jax.optimizers.make import gradient_point, make_optimizer
from t5jax.optimizers.schedules import make_schedule
from t5jax.optimizers.state_axes import state_axes

__all__ = ["averages", "gradient_point", "make_optimizer", "make_schedule", "state_axes"]
