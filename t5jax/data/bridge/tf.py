"""TensorFlow and SeqIO, imported quietly and kept off the accelerators, which are JAX's.

Every module of `t5jax.data` that needs them takes them from here, so that this comes first.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any


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

__all__ = ["from_generator", "read", "seqio", "tf"]

# An exception cannot pass through TensorFlow, a number in a message can.
_errors: list[Exception] = []
_ERROR_KEY = "t5jax source error {}!"


def from_generator(generate: Callable[[], Iterable[Any]], signature: Any) -> tf.data.Dataset:
    """Returns the data set of what `generate()` yields, whose errors pass through `read`."""

    def remembering_errors():
        try:
            yield from generate()
        except Exception as error:
            _errors.append(error)
            raise RuntimeError(_ERROR_KEY.format(len(_errors) - 1)) from None

    return tf.data.Dataset.from_generator(remembering_errors, output_signature=signature)


def read(function: Callable[[], Any]) -> Any:
    """Returns `function()`, which reads a data set.

    What a generator under `from_generator` has raised is raised as it was, not as TensorFlow
    wraps it.
    """
    try:
        return function()
    except tf.errors.OpError as error:
        found = re.search(_ERROR_KEY.format(r"(\d+)"), str(error))
        if found is None:
            raise
    # Not within `except`: the wrapping's traceback would keep the data set alive, and reading.
    raise _errors[int(found[1])]
