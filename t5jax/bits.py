"""A hash of the entries of arrays that does not depend on how they are sharded."""

import math

import jax
import jax.numpy as jnp


def numbers(shape: tuple[int, ...]) -> jax.Array:
    """Returns the number of each entry of an array in C order, uint32 of the shape, modulo 2^32."""
    found = jnp.zeros(shape, jnp.uint32)
    for dim in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[dim + 1 :]) % 2**32)
        found += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * stride
    return found


def scramble(x: jax.Array) -> jax.Array:
    """A bijective hash of uint32 in which every bit depends on every bit: MurmurHash3's
    finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
