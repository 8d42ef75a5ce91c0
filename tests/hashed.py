"""Random keys whose bits are a hash of a few operations.

The rounds of JAX's own take most of the time in which dropout and the initialization of parameters
are compiled. Where tests only need bits that are random, and the same on every mesh, these do.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax import random as jax_random
from jax.extend import random as extend

ASKED = "T5JAX_TESTS_HASHED"
"""A variable, set for processes of `forks` that are to have these keys too."""
jax_key = jax_random.key


def key(seed, *, impl=None):
    """As `jax.random.key`, which it stands for."""
    return jax_key(seed, impl=impl or _HASH)


def _mix(x):
    """Returns uint32s of which every bit depends on all bits of x's (Wellons' lowbias32)."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _numbered(shape):
    index = jnp.zeros(shape, np.uint32)
    for axis, size in enumerate(shape):
        index = index * np.uint32(size) + lax.broadcasted_iota(np.uint32, shape, axis)
    return index


def _child(key, number):
    number = _mix(number + np.uint32(0x9E3779B9))
    return jnp.stack([_mix(key[0] ^ number), _mix(key[1] + number)], axis=-1)


def _seed(seed):
    return _child(np.zeros(2, np.uint32), lax.convert_element_type(seed, np.uint32))


def _fold_in(key, data):
    return _child(key, lax.convert_element_type(data, np.uint32))


def _bits(key, width, shape):
    bits = _mix(_numbered(shape) * np.uint32(0x9E3779B9) + key[0]) ^ key[1]
    return lax.convert_element_type(bits, f"uint{width}")


_HASH = extend.define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=lambda key, shape: _child(key, _numbered(shape)),
    random_bits=_bits,
    fold_in=_fold_in,
    name="hash",
    tag="hash",
)
