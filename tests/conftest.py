"""Eight emulated CPU devices, and no silent broadcasting of ranks, for every test."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the time here, and unoptimised code computes the same.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
# No test may reach for the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
    """Those of one file are of no use to the next, and fill the memory of a small machine."""
    yield
    jax.clear_caches()
