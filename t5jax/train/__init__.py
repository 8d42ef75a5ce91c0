"""Training: the loop, what a run begins or goes on with, and what is reported of it.

Parameters are taken from the last checkpoint in `run_dir`, otherwise from `init.model`, otherwise
they are initialized from the seed. A run that was stopped for any reason resumes when it is started
again, with bitwise the same result.
"""

from t5jax.train.guard import Diverged, NonFiniteLoss
from t5jax.train.loop import train
from t5jax.train.state import LoopState

__all__ = ["Diverged", "LoopState", "NonFiniteLoss", "train"]
