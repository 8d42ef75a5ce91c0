"""Compiled programs on disk: a config that has been started once compiles nothing again."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from t5jax import storage

VARIABLE = "T5JAX_KEEP_PROGRAMS"
"""Environment variable: "0" compiles anew at every start."""


def keep_programs() -> None:
    """Makes jax keep what it compiles, in `programs` of the folder of `storage.cache_dir`.

    jax's own settings count where they are given, such as JAX_COMPILATION_CACHE_DIR. Several hosts
    can share the folder: the first process writes, all read.
    """
    if os.environ.get(VARIABLE) == "0":
        return
    if not jax.config.jax_compilation_cache_dir:
        folder = storage.cache_dir() / "programs"
        if jax.default_backend() == "cpu":  # Its programs are for one kind of processor.
            folder /= _processor()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    elif storage.is_remote(jax.config.jax_compilation_cache_dir):
        storage.path(jax.config.jax_compilation_cache_dir, "JAX_COMPILATION_CACHE_DIR")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _processor() -> str:
    """Returns a name for the instructions that this machine's processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
