"""TensorFlow and SeqIO, imported without log messages and without access to accelerators.

All modules of `t5jax.data` import them from here, so that this is executed first.
"""

import contextlib
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any


@contextlib.contextmanager
def _quietly():
    """Silences native logging: start-up messages (oneDNN, no CUDA), and later warnings, which
    repeat errors of a dataset that the user sees anyway."""
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

    # Looks for devices, and reports each kind that it does not find. A program that has already
    # used TensorFlow may have configured devices, and can no longer change them.
    with contextlib.suppress(RuntimeError):
        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)

__all__ = ["elements", "from_generator", "remembering_errors", "seqio", "tf"]

# An exception cannot pass through TensorFlow, but a number in a message can.
_errors: list[Exception] = []
_ERROR_KEY = "t5jax source error {}!"


def from_generator(generate: Callable[[], Iterable[Any]], signature: Any) -> tf.data.Dataset:
    """Returns a dataset of what `generate()` yields; `elements` raises its errors."""

    def generating():
        try:
            yield from generate()
        except Exception as error:
            raise _remembered(error) from None

    return tf.data.Dataset.from_generator(generating, output_signature=signature)


def remembering_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function for `tf.numpy_function`; `elements` raises its errors."""

    def call(*args):
        try:
            return function(*args)
        except Exception as error:
            raise _remembered(error) from None

    return call


def _remembered(error: Exception) -> RuntimeError:
    _errors.append(error)
    return RuntimeError(_ERROR_KEY.format(len(_errors) - 1))


def elements(dataset: tf.data.Dataset) -> Iterator[Any]:
    """Yields the elements of a dataset as NumPy arrays.

    Exceptions of a generator of `from_generator`, or of a function of `remembering_errors`, are
    raised unchanged, not wrapped by TensorFlow.
    """
    # Whoever closes an iterator that is tuned waits until its tuner wakes up, which after some
    # minutes is once in 20 to 60 seconds.
    options = tf.data.Options()
    options.autotune.enabled = False
    opened = [dataset.with_options(options).as_numpy_iterator()]
    of_tensorflow = tf.errors.OpError
    # At the latest when Python exits: it would wait forever for threads that read on.
    close = weakref.finalize(dataset, opened.clear)
    try:
        while (element := next(opened[0], None)) is not None:
            yield element
        return
    except of_tensorflow as error:  # A local name: others may be gone when Python exits.
        found = re.search(_ERROR_KEY.format(r"(\d+)"), str(error))
        if found is None:
            raise
    finally:
        close()
    # Not within `except`: the wrapper's traceback would keep the dataset alive and reading.
    raise _errors[int(found[1])]
