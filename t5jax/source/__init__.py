"""Where a model is, and what it is: a Hub name, a Hugging Face folder, a run or one checkpoint of a
run, a compressed model, or an adapter over any of these."""

from t5jax.source.adapted import AdaptedSource
from t5jax.source.finding import find, find_base
from t5jax.source.several import read_adapters
from t5jax.source.whole import Source, adopt

__all__ = ["AdaptedSource", "Source", "adopt", "find", "find_base", "read_adapters"]
