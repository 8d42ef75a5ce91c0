"""Parameters of several layers in one array, by their logical axes.

Logical axes (`t5jax.config.AxisRules`) say what a dimension is. The axis "layers" stacks separate
parameters, so no mean in an optimizer is taken over it.
"""

from typing import Any

import jax
import jax.numpy as jnp

Axes = Any
"""A tree of tuples of logical axes, one per parameter."""


def own_dims(axes: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the dimensions of a parameter without that of a stack of layers."""
    return tuple(dim for dim, axis in enumerate(axes) if axis != "layers")


def rms(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the root mean square of each layer, which broadcasts against x."""
    return jnp.sqrt(jnp.mean(jnp.square(x), own_dims(axes), keepdims=True))
