"""The output of a matrix with its adapter: LoRA (arXiv:2106.09685), DoRA (arXiv:2402.09353).

An adapter is further parameters beside a matrix's `kernel`, which `t5jax.adapters` makes:

    lora_a [*inputs, R], lora_b [R, *outputs], lora_scale []
    lora_dropout []            optional, the rate of dropout of its input
    dora_magnitude [*outputs]  optional
    lora_rows int32 [B]        with it, several adapters are stacked on a leading axis of the
                               others; row b of the input has adapter lora_rows[b]
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp


def adapted(module: nn.Module, x, kernel, y, num_inputs: int):
    """Returns the output of a module's matrix with its adapter, if its parameters have one.

    Args:
      module: the module that has the kernel.
      x: [..., *inputs], the matrix's input.
      kernel: [*inputs, *outputs].
      y: [..., *outputs], its output, without a bias.
      num_inputs: the number of dimensions of the inputs.
    Returns:
      Like y.
    """
    if not module.has_variable("params", "lora_a"):
        return y
    adapter = module.variables["params"]
    row = "Z" if "lora_rows" in adapter else ""

    def leaf(name):
        return adapter[name][adapter["lora_rows"]] if row else adapter[name]

    if "lora_dropout" in adapter and module.has_rng("dropout"):
        keep = 1 - adapter["lora_dropout"]
        kept = jax.random.bernoulli(module.make_rng("dropout"), keep, x.shape)
        x = jnp.where(kept, x / keep.astype(x.dtype), 0)
    read, written = "ABC"[:num_inputs], "DEF"[: y.ndim - x.ndim + num_inputs]
    a, b = leaf("lora_a").astype(x.dtype), leaf("lora_b").astype(x.dtype)
    h = jnp.einsum(f"{row}...{read},{row}{read}R->{row}...R", x, a)
    delta = jnp.einsum(f"{row}...R,{row}R{written}->{row}...{written}", h, b)
    # In float32, as a bias is added.
    scale = _broadcast(leaf("lora_scale"), y, 0)
    y_float = y.astype(jnp.float32) + scale * delta.astype(jnp.float32)
    if "dora_magnitude" in adapter:
        factor = _dora_factor(_product_added(kernel, adapter, num_inputs), adapter, num_inputs)
        factor = factor[adapter["lora_rows"]] if row else factor
        y_float *= _broadcast(factor, y, len(written))
    return y_float.astype(y.dtype)


def merged_kernel(kernel, adapter: Mapping, num_inputs: int):
    """Returns a matrix with its adapter in it, or a stack of them: float32 of the kernel's shape.

    Args:
      kernel: [..., *inputs, *outputs].
      adapter: its parameters, with the same leading dimensions.
      num_inputs: the number of dimensions of the inputs.
    """
    whole = _product_added(kernel, adapter, num_inputs)
    if "dora_magnitude" not in adapter:
        return whole
    factor = _dora_factor(whole, adapter, num_inputs)
    start = adapter["lora_scale"].ndim
    return whole * jnp.expand_dims(factor, range(start, start + num_inputs))


def column_norms(kernel, num_inputs: int, stacked: int = 0):
    """Returns the norms of a matrix's columns, over its inputs: float32 [..., *outputs].

    Args:
      kernel: [..., *inputs, *outputs].
      num_inputs: the number of dimensions of the inputs.
      stacked: the number of leading dimensions.
    """
    dims = tuple(range(stacked, stacked + num_inputs))
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), dims))


def _product_added(kernel, adapter: Mapping, num_inputs: int):
    """Returns W + scale A B, float32 [..., *inputs, *outputs]."""
    a, b, scale = (adapter[name].astype(jnp.float32) for name in ("lora_a", "lora_b", "lora_scale"))
    read, written = "ABC"[:num_inputs], "DEF"[: b.ndim - 1 - scale.ndim]
    product = jnp.einsum(
        f"...{read}R,...R{written}->...{read}{written}",
        a,
        b,
        precision=jax.lax.Precision.HIGHEST,  # It is compared with a float32 kernel, or added.
    )
    added = jnp.expand_dims(scale, range(scale.ndim, product.ndim)) * product
    kernel = kernel.astype(jnp.float32)
    return jnp.expand_dims(kernel, range(added.ndim - kernel.ndim)) + added


def _dora_factor(whole, adapter: Mapping, num_inputs: int):
    """Returns a column's magnitude over its norm, float32 [..., *outputs]; the norm has no
    gradient (section 4.3)."""
    norms = column_norms(whole, num_inputs, adapter["lora_scale"].ndim)
    norms = jax.lax.stop_gradient(norms)
    factor = adapter["dora_magnitude"].astype(jnp.float32) / norms
    # NaN stands in a stack where a layer, or an adapter, has no magnitude.
    return jnp.where(jnp.isnan(factor), 1, factor)


def _broadcast(x, y, num_outputs: int):
    """Returns `x` [..., *outputs] with dimensions of 1 inserted before its outputs, as float32 that
    broadcasts with y."""
    place = x.ndim - num_outputs
    return jnp.expand_dims(x.astype(jnp.float32), range(place, place + y.ndim - x.ndim))
