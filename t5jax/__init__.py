"""t5jax: T5, GPT and BERT in JAX, from a prompted task to a trained, evaluated, exported model.

import t5jax
model = t5jax.load("google/flan-t5-small")
model.generate(["A step by step recipe to make bolognese pasta:"])
"""

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str):
    # On first use, so that `import t5jax` and the command line's help cost nothing.
    if name == "load":
        from t5jax.pretrained import load

        return load
    raise AttributeError(f"module 't5jax' has no attribute {name!r}")
