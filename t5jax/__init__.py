"""t5jax: T5 models in JAX, from a prompted task to a trained, evaluated, exported model."""

__version__ = "0.1.0"
