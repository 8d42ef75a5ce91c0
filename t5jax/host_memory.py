"""Memory of a process that computes on a CPU: kept after a step, for the next one.

XLA's CPU client allocates a program's buffers anew at every call. By default glibc maps large
blocks from the operating system and returns them when they are freed, so that each step has every
page mapped and zeroed by the kernel again: up to half of its time, more where the machine is busy.
"""

import ctypes
import importlib.util
import os
import platform

VARIABLE = "T5JAX_KEEP_MEMORY"
"""Environment variable: "0" leaves the C library's settings as they are; "1" makes `import t5jax`
call `keep_freed_memory`, which without it only the command line does."""

# The options of mallopt(3) and their numbers in malloc.h. Together they leave no page fault in a
# step: no block has a mapping of its own, nothing is returned, and there is one arena, since a
# thread's own arena maps what exceeds 64 MiB in spite of the first.
_OPTIONS = {
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, -1),
    "M_TOP_PAD": (-2, 64 * 2**20),
    "M_ARENA_MAX": (-8, 1),
}

_ACCELERATORS = ("libtpu", "jax_plugins", "jax_cuda12_plugin", "jax_cuda13_plugin")


def keep_freed_memory() -> bool:
    """Makes glibc keep what is freed. Call it before jax is imported.

    Has an effect only where jax is to compute on the CPU, with glibc, and `T5JAX_KEEP_MEMORY` is
    not "0". The process keeps the most memory that it has needed until it ends.

    Returns:
      Whether the settings were changed.
    """
    if os.environ.get(VARIABLE) == "0" or platform.libc_ver()[0] != "glibc":
        return False
    if not _computes_on_cpu():
        return False
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(*option) == 1 for option in _OPTIONS.values()])


def _computes_on_cpu() -> bool:
    """Whether jax would choose the CPU, found without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in _ACCELERATORS)
