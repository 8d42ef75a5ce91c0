"""Decoding: from prompts to tokens and texts."""

from t5jax.decoding.answers import Answer
from t5jax.decoding.batches import padded_batches, power_of_two
from t5jax.decoding.choice import Choice, History, choose
from t5jax.decoding.constraints import Constraint
from t5jax.decoding.generator import Generator
from t5jax.decoding.greedy import greedy
from t5jax.decoding.options import GenerationOptions, options_of
from t5jax.decoding.rows import EVERY_PART, Parts, RowOptions, allowed_bits, row_options
from t5jax.decoding.scoring import Score, log_probs

__all__ = [
    "EVERY_PART",
    "Answer",
    "Choice",
    "Constraint",
    "GenerationOptions",
    "Generator",
    "History",
    "Parts",
    "RowOptions",
    "Score",
    "allowed_bits",
    "choose",
    "greedy",
    "log_probs",
    "options_of",
    "padded_batches",
    "power_of_two",
    "row_options",
]
