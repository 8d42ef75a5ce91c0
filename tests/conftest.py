"""Eight emulated CPU devices, no silent broadcasting of ranks, and programs that are compiled once.

Compiling takes most of the time here. So programs are not optimized, which computes the same, and
what one test has compiled is there for the others, and for the processes that they start.
"""

import atexit
import gc
import itertools
import os
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path

# What is imported stays. To look through it for garbage, again and again, takes a third of the time
# of collecting tests, and much of that of the tests.
gc.disable()

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_parallel_codegen_split_count=1",
    # The older emitters compile in a quarter of the time. A jaxlib without them ignores this.
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *_FLAGS))
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Nobody looks up which line an operation comes from.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # The processes of pytest-xdist have that of all.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="t5jax-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# No test may reach for the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

from t5jax.host_memory import keep_freed_memory

keep_freed_memory()

import jax
import pytest

import forks

_MEMORY_OF_A_PROCESS = 6 * 2**30
"""Bytes, with those of the programs that its tests start."""

forks.make_folder()
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One process more than there are cores, since many tests wait for processes of their own."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # It decides.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min((os.cpu_count() or 1) + 1, memory // _MEMORY_OF_A_PROCESS))


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
    """Few of those of a file are of use to the next, and they fill a small machine's memory."""
    yield
    if _is_full():
        jax.clear_caches()
        gc.unfreeze()
    _keep_what_is_there()


def _is_full() -> bool:
    """Whether half of the memory is taken, or of the 65,530 regions that Linux gives a process."""
    memory, regions = Path("/proc/meminfo"), Path("/proc/self/maps")
    if not memory.exists():
        return True
    found = dict(re.findall(r"(\w+): +(\d+) kB", memory.read_text()))
    is_short = 2 * int(found["MemAvailable"]) < int(found["MemTotal"])
    return is_short or regions.read_text().count("\n") > 30_000


def _keep_what_is_there():
    """Whatever is no garbage by now is not looked through again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def clean_registries(monkeypatch):
    """Begins with no task registered, and leaves the registries as they were before the test."""
    from t5jax.data import registry
    from t5jax.data.bridge.tf import seqio

    def take_out() -> list:
        """Empties SeqIO's registries; returns what was in them."""
        entries = []
        for found in (seqio.TaskRegistry, seqio.MixtureRegistry):
            for name in list(found.names()):
                entries.append((found, name, found.get(name)))
                found.remove(name)
        return entries

    monkeypatch.setattr(registry, "_loaded", set())
    others = take_out()
    yield
    take_out()
    for found, name, entry in others:
        found.add_provider(name, entry)


@pytest.fixture
def bucket(monkeypatch, tmp_path_factory):
    """An empty gs://bucket on this machine, with an empty cache; see `gcs.Bucket`."""
    import gcs

    yield from gcs.served(monkeypatch, tmp_path_factory.mktemp("cache"))


_cpu = [0.0]


def _cpu_seconds() -> float:
    """Returns the CPU time of this process, and of those of its tests that have ended."""
    return sum(os.times()[:4]) + forks.cpu_seconds()


def pytest_collection_finish():
    _keep_what_is_there()
    gc.set_threshold(50_000, 10, 10)
    gc.enable()
    _cpu[0] = _cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Adds the CPU time of a phase of a test: other programs beside the tests change it little."""
    report, now = (yield), _cpu_seconds()
    report.cpu, _cpu[0] = now - _cpu[0], now
    return report


def pytest_terminal_summary(terminalreporter):
    """Says where the time went, file by file: pytest's own list is of single tests."""
    seconds = Counter()
    for report in itertools.chain(*terminalreporter.stats.values()):
        if hasattr(report, "cpu"):
            seconds[report.nodeid.split("::")[0]] += report.cpu
    terminalreporter.section("CPU time of the slowest files")
    for path, duration in seconds.most_common(15):
        terminalreporter.write_line(f"{duration:6.1f}s {path}")
    terminalreporter.write_line(f"{seconds.total():6.1f}s in all {len(seconds)} files")


def pytest_collection_modifyitems(items):
    """Puts the files that take long first, so that no core is left alone with one at the end."""
    weight = Counter()
    for item in items:
        slow = item.get_closest_marker("slow")
        weight[item.path] += slow.kwargs.get("seconds", 10) if slow else 1
    items.sort(key=lambda item: -weight[item.path])
