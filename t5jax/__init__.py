"""t5jax: T5, GPT and BERT in JAX, from a prompted task to a trained, evaluated, exported model.

import t5jax
model = t5jax.load("google/flan-t5-small")
model.generate(["A step by step recipe to make bolognese pasta:"])
"""

import os

__version__ = "0.1.0"
__all__ = ["load"]

if os.environ.get("T5JAX_KEEP_MEMORY") == "1":
    from t5jax.host_memory import keep_freed_memory

    keep_freed_memory()


def __getattr__(name: str):
    # On first use, so that `import t5jax` and the command line's help cost nothing.
    if name == "load":
        from t5jax.pretrained import load

        return load
    raise AttributeError(f"module 't5jax' has no attribute {name!r}")
