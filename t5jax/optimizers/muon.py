"""Muon, optax's (https://kellerjordan.github.io/posts/muon), for the matrices of each layer.

Attention's [embed, heads, head_dim] is one matrix; updates are scaled to a constant RMS as in
arXiv:2502.16982.
"""

import math
from typing import Any

import jax
import optax
import optax.contrib

from t5jax.optimizers.layers import Axes, own_dims
from t5jax.prune.masks import is_layer_matrix

# The RMS of Muon's updates before the learning rate, which is about that of AdamW's.
_MUON_RMS = 0.2


def scale_by_muon(
    param_axes: Axes, others: optax.GradientTransformation, *, beta: float
) -> optax.GradientTransformation:
    """Orthogonalizes the momentum of each layer's matrices, to an RMS of 0.2.

    A matrix has the rows "embed" and the columns of all its other axes; both matrices of an adapter
    have a rank. Embeddings, soft prompts and the head are not matrices here, since a row of them is
    of one token.

    Args:
      param_axes: a tree of tuples of logical axes.
      others: the transformation of all other parameters.
      beta: decay of the mean of gradients, Nesterov's.
    """

    def is_axes(x: Any) -> bool:
        return isinstance(x, tuple)

    def is_matrix(axes: tuple[str, ...]) -> bool:
        return "layers" in axes if "rank" in axes else is_layer_matrix(axes)

    def dims(axes: tuple[str, ...]) -> Any:
        if not is_matrix(axes):
            return optax.MaskedNode()
        first = "rank" if "rank" in axes else "embed"
        rows = tuple(dim for dim in own_dims(axes) if axes[dim] == first)
        columns = tuple(dim for dim in own_dims(axes) if axes[dim] != first)
        return optax.contrib.MuonDimensionNumbers(rows, columns)

    def label(axes: tuple[str, ...]) -> str:
        return "muon" if is_matrix(axes) else "others"

    dimensions = jax.tree.map(dims, param_axes, is_leaf=is_axes)

    def to_rms(u: jax.Array, dims: Any) -> jax.Array:
        # An orthogonal matrix has an RMS of 1 / sqrt of its longer side.
        sides = [math.prod(u.shape[dim] for dim in part) for part in dims]
        return u * _MUON_RMS * math.sqrt(max(sides))

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=lambda _: dimensions),
        optax.stateless(lambda updates, _: jax.tree.map(to_rms, updates, dimensions)),
    )
    labels = jax.tree.map(label, param_axes, is_leaf=is_axes)
    return optax.partition({"muon": muon, "others": others}, labels)
