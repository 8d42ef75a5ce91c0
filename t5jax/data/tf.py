"""TensorFlow and SeqIO, imported quietly and kept off the accelerators, which are JAX's.

Every module of `t5jax.data` that needs them takes them from here, so that this comes first.
"""

import contextlib
import os
import sys


@contextlib.contextmanager
def _quietly():
    """Drops what native code logs: start-up lines (oneDNN, no CUDA) now, and later its warnings,
    which repeat every error of a data set that reaches the user anyway."""
    level = os.environ.get("TF_CPP_MIN_LOG_LEVEL")
    if level in (None, "1"):  # JAX sets 1.
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


with _quietly():
    import seqio
    import tensorflow as tf

    # Looks for devices, and reports each kind that it does not find. A program that has used
    # TensorFlow before may have placed it on purpose, and cannot move it.
    with contextlib.suppress(RuntimeError):
        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)

__all__ = ["seqio", "tf"]
