"""TPUs that are not there, for tests of what libtpu compiles; it comes with the extra `plan`."""

import collections
import functools
import importlib.util
import re

import pytest

from t5jax.plan import hlo
from t5jax.plan.chips import Topology, find_topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="without the extra `plan`"
)


@functools.cache
def topology(name: str) -> Topology:
    return find_topology(name)


def squares(module: hlo.Module, *lengths: int) -> set[str]:
    """Returns the arrays that have a query's length and a key's, as scores and masks do."""
    lengths = [n for n in lengths if n]
    pairs = [collections.Counter((n, m)) for n in lengths for m in lengths]
    found = set()
    for instruction in module.instructions():
        for array in re.findall(r"\w+\[[\d,]+\]", instruction.shape):
            dims = collections.Counter(map(int, re.findall(r"\d+", array.split("[")[1])))
            if any(pair <= dims for pair in pairs):
                found.add(array)
    return found
