"""Layers that the networks share: linear maps, norms, embedding, MLP, and the stack of layers.

Parameters carry logical axes (`t5jax.config.AxisRules`).

B batch, T length, D model, F mlp, V vocab.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t5jax.architectures import Architecture
from t5jax.models.adapted import adapted
from t5jax.quantize import leaf as quantized
from t5jax.quantize.leaf import Quantized
from t5jax.sharding import constrain, platform

# Names of results that policies of rematerialization keep (`remat_policy`).
ATTENTION_OUT, ATTENTION_LOG_SUM_EXP = "attention_out", "attention_log_sum_exp"
MLP_HIDDEN = "mlp_hidden"
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),  # Hugging Face's gelu_new.
    "gelu-exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}


def normal(stddev: float, axes: Sequence[str]):
    """Returns an initializer N(0, stddev^2) of a parameter with logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(stddev), tuple(axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x, kernel):
    """Returns `jnp.einsum(equation, x, kernel)`, "...A,AB->...B"; its gradient likewise.

    In the kernel's gradient the narrower of the input and the output's gradient is the first
    operand: XLA on CPU transposes the first one, together with its computation. With JAX's own
    gradient a training step of T5 1.1 small took 1.2 times as long.
    It has the dtype of the operands; its effect on a loss is measured in docs/performance.md.
    """
    return jnp.einsum(equation, x, kernel)


def _product_forward(equation, x, kernel):
    return jnp.einsum(equation, x, kernel), (x, kernel)


def _product_backward(equation, saved, grad):
    x, kernel = saved
    x_dims, kernel_dims, out_dims = re.split(",|->", equation)
    x_grad = jnp.einsum(f"{out_dims},{kernel_dims}->{x_dims}", grad, kernel)
    read = x_dims.removeprefix("...")
    written = kernel_dims.removeprefix(read)
    rows = "XYZ"[: x.ndim - len(read)]
    if x.size <= grad.size:
        return x_grad, jnp.einsum(f"{rows}{read},{rows}{written}->{kernel_dims}", x, grad)
    transposed = jnp.einsum(f"{rows}{written},{rows}{read}->{written}{read}", grad, x)
    return x_grad, jnp.einsum(f"{written}{read}->{kernel_dims}", transposed)


_product.defvjp(_product_forward, _product_backward)


def _matrix(module: nn.Module, name: str, *args):
    """Returns a parameter that may be quantized, and then has other shapes than `args` say."""
    if module.has_variable("params", name):
        given = module.get_variable("params", name)
        if isinstance(given, Quantized | Transposed):
            return given
    return module.param(name, *args)


class Transposed(flax.struct.PyTreeNode):
    """A kernel with its outputs first, as it is kept for decoding on a CPU.

    In a product with a few rows XLA reads a kernel in strips of 64 outputs, whose entries lie far
    apart in memory. This way it reads whole rows: with 8 to 32 rows 1.1 to 1.5 times as fast.
    """

    values: jax.Array
    """[*outputs, *inputs]."""
    num_inputs: int = flax.struct.field(pytree_node=False)

    @staticmethod
    def is_faster(config: Architecture) -> bool:
        """Whether the kernels of a step of decoding should be transposed."""
        # XLA on CPU has no product of a transposed bfloat16 matrix for one row.
        return platform() == "cpu" and config.dtype == "float32"

    @classmethod
    def of(cls, kernel, num_inputs: int) -> "Transposed":
        """Takes a kernel [*inputs, *outputs]."""
        return cls(jnp.moveaxis(kernel, range(num_inputs), range(-num_inputs, 0)), num_inputs)

    def kernel(self):
        """Returns [*inputs, *outputs]."""
        return jnp.moveaxis(self.values, range(-self.num_inputs, 0), range(self.num_inputs))

    def product(self, x):
        """Returns float32 [..., *outputs] for [..., *inputs]."""
        read = "ABC"[: self.num_inputs]
        written = "DEF"[: self.values.ndim - self.num_inputs]
        rows = "XYZ"[: x.ndim - self.num_inputs]
        y = jnp.einsum(f"{written}{read},{rows}{read}->{written}{rows}", self.values, x)
        return jnp.moveaxis(y, range(len(written)), range(-len(written), 0))


class Linear(nn.Module):
    """A matrix `kernel` from the last dimensions of its input to those of its output.

    Both map logical axes to sizes, as in {"heads": H, "head_dim": K}; the kernel has all of them,
    in this order.
    """

    config: Architecture
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    stddev: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        """Takes [..., *inputs] and returns [..., *outputs], in the description's dtype."""
        dtype, param_dtype = self.config.dtype, self.config.param_dtype
        axes, shape = (*self.inputs, *self.outputs), (*self.inputs.values(), *self.outputs.values())
        kernel = _matrix(self, "kernel", normal(self.stddev, axes), shape, param_dtype)
        read = "ABC"[: len(self.inputs)]
        written = "DEF"[: len(self.outputs)]
        equation = f"...{read},{read}{written}->...{written}"
        if isinstance(kernel, Quantized):
            y = quantized.product(equation, x, kernel, dtype)
        elif isinstance(kernel, Transposed):
            y, kernel = kernel.product(x), kernel.kernel()
        else:
            y = _product(equation, x, kernel.astype(dtype))
        x = adapted(self, x, kernel, y, len(self.inputs))
        if not self.use_bias:
            return x
        init = nn.with_logical_partitioning(nn.initializers.zeros, tuple(self.outputs))
        bias = self.param("bias", init, tuple(self.outputs.values()), param_dtype)
        # Added in float32, so that its gradient is summed in float32.
        return (x.astype(jnp.float32) + float32_for(x, bias)).astype(dtype)


def float32_for(x, param):
    """Returns a parameter of the last dimensions of `x` as float32 that broadcasts with it."""
    return jnp.expand_dims(param.astype(jnp.float32), range(x.ndim - param.ndim))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, without mean or bias (arXiv:1910.07467).

    Statistics are always float32. With `plus_one` the factor is 1 + scale, and scale is initialized
    to 0 (Gemma).
    """

    config: Architecture
    epsilon: float
    plus_one: bool = False
    axis: str = "embed"

    @nn.compact
    def __call__(self, x):
        """Takes and returns [..., D]."""
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        init = nn.with_logical_partitioning(init, (self.axis,))
        scale_D = self.param("scale", init, x.shape[-1:], self.config.param_dtype)
        x = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(variance + self.epsilon)
        scale = float32_for(x, scale_D)
        return (x * (1 + scale if self.plus_one else scale)).astype(self.config.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias (arXiv:1607.06450).

    Statistics are float32 whatever the dtype.
    """

    config: Architecture
    epsilon: float

    @nn.compact
    def __call__(self, x):
        """Takes and returns [..., D]."""

        def param(name, init):
            init = nn.with_logical_partitioning(init, ("embed",))
            return float32_for(x, self.param(name, init, x.shape[-1:], self.config.param_dtype))

        scale, bias = param("scale", nn.initializers.ones), param("bias", nn.initializers.zeros)
        y = x.astype(jnp.float32)
        y -= jnp.mean(y, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
        return (y * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.config.dtype)


@jax.custom_vjp
def _lookup(table_VD, tokens_BT):
    """Returns rows of a table [B, T, D]; its gradient is summed in float32.

    In bfloat16 the sum over the occurrences of a token would not change after the 256th.
    """
    return jnp.take(table_VD, tokens_BT, axis=0)


def _lookup_forward(table_VD, tokens_BT):
    return _lookup(table_VD, tokens_BT), (table_VD, tokens_BT)


def _lookup_backward(saved, grad_BTD):
    table_VD, tokens_BT = saved
    zeros_VD = jnp.zeros(table_VD.shape, jnp.float32)
    grad_VD = zeros_VD.at[tokens_BT].add(grad_BTD.astype(jnp.float32))
    return grad_VD.astype(table_VD.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


class Embedding(nn.Module):
    """An embedding table; `attend` uses it as an output matrix."""

    config: Architecture
    num_embeddings: int
    features: int
    stddev: float
    axis: str | None = "vocab"

    def setup(self):
        init = normal(self.stddev, (self.axis, "embed"))
        shape = (self.num_embeddings, self.features)
        self.embedding = _matrix(self, "embedding", init, shape, self.config.param_dtype)

    def __call__(self, tokens_BT):
        if isinstance(self.embedding, Quantized):
            return quantized.rows(self.embedding, tokens_BT, self.config.dtype)
        return _lookup(self.embedding, tokens_BT).astype(self.config.dtype)

    def attend(self, x_BTD):
        """Returns float32 logits [B, T, V]."""
        table = self.embedding
        is_step = x_BTD.shape[1:-1] == (1,)
        if is_step and Transposed.is_faster(self.config) and not isinstance(table, Quantized):
            table = Transposed(table, num_inputs=1)
        return _logits("...D,VD->...V", x_BTD, table, self.config.dtype)


class Unembedding(nn.Module):
    """A separate output matrix; returns float32 logits [..., V]."""

    config: Architecture
    features: int
    num_embeddings: int
    stddev: float
    use_bias: bool = False
    axis: str | None = "vocab"

    @nn.compact
    def __call__(self, x_BTD):
        dtype, param_dtype = self.config.dtype, self.config.param_dtype
        shape, axes = (self.features, self.num_embeddings), ("embed", self.axis)
        kernel = _matrix(self, "kernel", normal(self.stddev, axes), shape, param_dtype)
        logits_BTV = _logits("...D,DV->...V", x_BTD, kernel, dtype)
        kernel = kernel.kernel() if isinstance(kernel, Transposed) else kernel
        logits_BTV = adapted(self, x_BTD, kernel, logits_BTV, 1)
        if not self.use_bias:
            return logits_BTV
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes[1:])
        bias_V = self.param("bias", init, shape[1:], param_dtype)
        return logits_BTV + float32_for(logits_BTV, bias_V)


def _logits(equation: str, x_BTD, matrix, dtype):
    """Returns the product with an output matrix, as float32."""
    if isinstance(matrix, Quantized):
        return quantized.product(equation, x_BTD, matrix, jnp.float32)
    if isinstance(matrix, Transposed):
        return matrix.product(x_BTD)
    return jnp.einsum(equation, x_BTD, matrix.astype(dtype), preferred_element_type=jnp.float32)


def Dropout(rate: float) -> nn.Module:
    """Returns T5's dropout: one mask for all positions of a row (the second-to-last dimension).

    With a rate of 0 it is the identity and needs no rng. Source: T5X, which draws a mask [B, 1, D];
    this is cheap, and all positions of a row drop the same units.
    """
    return nn.Dropout(rate, broadcast_dims=(-2,), deterministic=False)


class MLP(nn.Module):
    """activation(x wi) wo, or gated: (activation(x wi_0) * x wi_1) wo (arXiv:2002.05202)."""

    config: Architecture
    """Its d_model and d_ff are used."""
    activation: str
    """A key of ACTIVATIONS, with the prefix "gated-" if it is gated."""
    wi_stddev: float
    wo_stddev: float
    dropout_rate: float = 0.0
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BTD):
        model, hidden = {"embed": self.config.d_model}, {"mlp": self.config.d_ff}

        def wi(name):
            linear = Linear(self.config, model, hidden, self.wi_stddev, self.use_bias, name=name)
            return checkpoint_name(linear(x_BTD), MLP_HIDDEN)

        activation = ACTIVATIONS[self.activation.removeprefix("gated-")]
        gated = self.activation.startswith("gated-")
        h_BTF = activation(wi("wi_0")) * wi("wi_1") if gated else activation(wi("wi"))
        h_BTF = constrain(h_BTF, "batch", *("length",) * (h_BTF.ndim - 2), "mlp")
        h_BTF = Dropout(self.dropout_rate)(h_BTF)
        wo = Linear(self.config, hidden, model, self.wo_stddev, self.use_bias, name="wo")
        return wo(h_BTF)


def remat_policy(name: str) -> Callable[..., bool] | None:
    """Returns what a layer keeps for the backward pass, besides its input.

    Of one layer and token, with a residual stream D, heads of HK entries in all and an MLP of F,
    in entries of the activations' dtype, and the FLOPs that are computed again, in parts of the
    forward pass's:

        none       every intermediate result: some 10 D + 8 HK + 8 F; nothing
        minimal    results of products with weights and attention's output, 5 HK + 2 D + 2 F of a
                   gated MLP; none of the products (norms and activations alone)
        mlp        the MLP's hidden products, 2 F of a gated one; attention, its products and scores
        attention  attention's output, HK; all products but the scores and the MLP's last one
        full       nothing; all products but the MLP's last one

    Attention's output (and a number per query) has a name only in the kernel that gives it back
    (`kernels/flash.py`); otherwise attention is computed again, and so are scores in memory.

    Args:
      name: of `Architecture.remat`, other than "none".
    """
    policies = jax.checkpoint_policies
    attention = policies.save_only_these_names(ATTENTION_OUT, ATTENTION_LOG_SUM_EXP)
    return {
        "minimal": policies.save_from_both_policies(
            policies.checkpoint_dots_with_no_batch_dims, attention
        ),
        "mlp": policies.save_only_these_names(MLP_HIDDEN),
        "attention": attention,
        "full": None,
    }[name]


def stack(layer: type[nn.Module], config, length: int, in_axes=nn.broadcast) -> type[nn.Module]:
    """Returns `length` layers as one: parameters stacked on a leading axis, "layers".

    Args:
      layer: takes the residual stream and further arguments; returns the stream and None.
      config: a description, of which `remat` and `scan_layers` are used.
      in_axes: for each further argument, 0 if it has an entry for each layer.
    """
    if config.remat != "none":
        policy = remat_policy(config.remat)
        # In a scan nothing can be merged across layers, so CSE need not be prevented.
        layer = nn.remat(layer, policy=policy, prevent_cse=not config.scan_layers)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        unroll=1 if config.scan_layers else length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def layers_apart(module: nn.Module) -> tuple | None:
    """Returns the parameters of each layer of a module's stack "layers", if they are apart: see
    `api.arrange_for_decoding`."""
    layers = module.variables.get("params", {}).get("layers")
    return layers if isinstance(layers, tuple) else None
