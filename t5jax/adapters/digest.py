"""Digests of parameters, by which an adapter knows its base, and answers their teacher."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5jax import bits


def digests(params: Mapping[str, jax.Array], *, exact: bool = False) -> dict[str, str]:
    """Returns 16 hexadecimal digits for each array, by path, however it is sharded.

    Args:
      params: arrays of bfloat16 or float32.
      exact: of all bits. Otherwise of the values in bfloat16, so that a base in float32 and the
        same one in bfloat16 have the same.
    """
    sums = jax.device_get({path: _sums(x, exact) for path, x in params.items()})
    return {path: "".join(f"{int(x):08x}" for x in pair) for path, pair in sums.items()}


def check(found: Mapping[str, str], expected: Mapping[str, str], adapter: str, base: str) -> None:
    """Raises ValueError if a base is not the one that an adapter was trained over."""
    other = [path for path in expected if found.get(path) != expected[path]]
    if other:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise ValueError(
            f"the adapter in {adapter} was trained over another base: {other[0]}{more} in {base} "
            f"has changed since; give the base as it was"
        )


@functools.partial(jax.jit, static_argnames="exact")
def _sums(x: jax.Array, exact: bool) -> jax.Array:
    """Returns two sums of hashed values, uint32 [2]; sums, so that no order is involved."""
    x = x if exact else x.astype(jnp.bfloat16)
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    mixed = bits.scramble(bits.scramble(bits.numbers(x.shape)) ^ words)
    total = functools.partial(jnp.sum, dtype=jnp.uint32)
    return jnp.stack([total(mixed), total(bits.scramble(mixed + jnp.uint32(1)))])
