"""TensorFlow and SeqIO, imported quietly and kept off the accelerators, which are JAX's.

Every module of `t5jax.data` that needs them takes them from here, so that this comes first.
"""

import contextlib
import os
import sys


@contextlib.contextmanager
def _nothing_on_stderr():
    """Drops what native code writes to file descriptor 2; Python's exceptions pass."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


# 3 leaves out what TensorFlow reports of errors that reach the user anyway. Its start-up lines
# (oneDNN, no CUDA) come before it reads this setting.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with _nothing_on_stderr():
    import seqio
    import tensorflow as tf

# A program that has used TensorFlow before may have placed it on purpose, and cannot move it.
with contextlib.suppress(RuntimeError):
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)

__all__ = ["seqio", "tf"]
