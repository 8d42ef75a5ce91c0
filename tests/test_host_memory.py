import platform
import subprocess
import sys

import pytest

from t5jax import host_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are glibc's settings")

# Page faults of touching 256 MiB again, in a thread, after they were freed.
FAULTS = """
import ctypes, resource, threading
import t5jax
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def touch():
    pointer = libc.malloc(2**28)
    ctypes.memset(pointer, 1, 2**28)
    libc.free(pointer)
def measure():
    touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""


@glibc
@pytest.mark.parametrize(
    ("variable", "keeps"), [({"T5JAX_KEEP_MEMORY": "1"}, True), ({}, False)], ids=["asked", "not"]
)
def test_freed_memory_is_there_for_the_next_step(variable, keeps):
    run = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path), **variable},
        capture_output=True,
        text=True,
        check=True,
    )
    pages = int(run.stdout)
    assert pages < 100 if keeps else pages > 10_000


@glibc
@pytest.mark.parametrize(
    ("environment", "changed"),
    [
        ({"JAX_PLATFORMS": "cpu"}, True),
        ({"JAX_PLATFORMS": "cpu,tpu"}, True),
        ({"JAX_PLATFORMS": "tpu,cpu"}, False),
        ({"JAX_PLATFORMS": "cpu", "T5JAX_KEEP_MEMORY": "0"}, False),
    ],
)
def test_only_on_a_cpu_and_unless_switched_off(monkeypatch, environment, changed):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert host_memory.keep_freed_memory() is changed


def test_not_where_jax_would_take_an_accelerator(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert not host_memory.keep_freed_memory()
