"""LoRA: which matrices it adapts, its parameters, and the base with it merged.

Hu et al. 2021 (arXiv:2106.09685); rank-stabilized scales, Kalajdzievski 2023 (arXiv:2312.03732);
DoRA, Liu et al. 2024 (arXiv:2402.09353). Names and initial values are those of the PEFT library.

The scale is a leaf, so that it is wherever A and B are. A stack of layers has one scale per layer;
a layer whose scale is 0 has no adapter, and stays without one.

L layers, R rank.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5jax import trees
from t5jax.architectures import Architecture, Dtype
from t5jax.checks import did_you_mean
from t5jax.config import LoraConfig, parse_patterns
from t5jax.models import api

LEAVES = ("lora_a", "lora_b", "lora_scale", "lora_dropout", "dora_magnitude")
TRAINED = ("lora_a", "lora_b", "dora_magnitude")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix that can be adapted."""

    shape: tuple[int, ...]
    """Of its kernel."""
    axes: tuple[str, ...]
    """Its logical axes."""

    @property
    def stacked(self) -> int:
        """The number of leading dimensions that stack layers, 0 or 1."""
        return int(self.axes[0] == "layers")

    @property
    def num_inputs(self) -> int:
        """The number of dimensions of the inputs: the residual stream has one, heads have two."""
        own = self.axes[self.stacked :]
        return 1 if own[0] == "embed" else len(own) - 1

    @property
    def max_rank(self) -> int:
        own = self.shape[self.stacked :]
        return min(math.prod(own[: self.num_inputs]), math.prod(own[self.num_inputs :]))

    def leaf(self, name: str, rank: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Returns the shape and the logical axes of one of LEAVES."""
        start, middle = self.stacked, self.stacked + self.num_inputs
        parts = []
        for dims, one in ((self.shape, rank), (self.axes, "rank")):
            layers, inputs, outputs = dims[:start], dims[start:middle], dims[middle:]
            parts.append(
                {
                    "lora_a": (*layers, *inputs, one),
                    "lora_b": (*layers, one, *outputs),
                    "dora_magnitude": (*layers, *outputs),
                }.get(name, layers)
            )
        shape, axes = parts
        return shape, axes


def matrices(model: Architecture) -> dict[str, Matrix]:
    """Returns the matrices of a network that can be adapted, by the paths of their modules."""
    axes = trees.flatten(api.param_axes(model))
    return {
        path.removesuffix("/kernel"): Matrix(x.shape, axes[path])
        for path, x in trees.flatten(api.param_shapes(model)).items()
        if path.endswith("/kernel")
    }


def targets(config: LoraConfig, model: Architecture) -> dict[str, tuple[Matrix, int, float]]:
    """Returns the matrices that a config adapts, each with its rank and scale, by path.

    Raises:
      ValueError: if a pattern matches no matrix, or a rank exceeds a matrix.
    """
    known = matrices(model)
    found: set[str] = set()
    for pattern in config.targets:
        if pattern == "all-linear":
            found |= {path for path in known if "/layers/" in path}
        else:
            found |= _matching(pattern, known, "adapter.targets", "matrix")
    paths = [path for path in known if path in found]
    ranks = dict.fromkeys(paths, config.rank)
    alphas = dict.fromkeys(paths, config.alpha)
    for pattern, rank in parse_patterns(config.ranks, int, "adapter.ranks"):
        ranks |= dict.fromkeys(_matching(pattern, paths, "adapter.ranks", "target"), int(rank))
    for pattern, alpha in parse_patterns(config.alphas, float, "adapter.alphas"):
        alphas |= dict.fromkeys(_matching(pattern, paths, "adapter.alphas", "target"), alpha)
    chosen = {}
    for path in paths:
        matrix, rank, alpha = known[path], ranks[path], alphas[path]
        if rank > matrix.max_rank:
            raise ValueError(
                f"adapter.rank {rank} exceeds the matrix {path}, whose rank is at most "
                f"{matrix.max_rank}; lower it, or leave {path} out of adapter.targets"
            )
        alpha = rank if alpha is None else alpha
        chosen[path] = matrix, rank, alpha / (math.sqrt(rank) if config.rslora else rank)
    return chosen


def _matching(pattern: str, paths: Iterable[str], option: str, what: str) -> set[str]:
    """Returns the paths that a pattern matches: whole ones, or their last part."""
    paths = list(paths)

    def one(path: str) -> bool:
        return fnmatchcase(path if "/" in pattern else path.rpartition("/")[2], pattern)

    found = {path for path in paths if one(path)}
    if not found:
        if "embed" in pattern and what == "matrix":
            raise ValueError(
                f"{option} has {pattern!r}, but LoRA is for the matrices of layers and the output "
                "here, not for tables of embeddings; train a table whole (adapter.train "
                "'token_embedder/*'), or leave it out"
            )
        names = [*dict.fromkeys(path.rpartition("/")[2] for path in paths)]
        hint = did_you_mean(pattern, paths if "/" in pattern else names, 3, likeness=0.2)
        raise ValueError(
            f"{option} has {pattern!r}, which matches no {what}; {hint}there are {', '.join(paths)}"
        )
    return found


# --- Parameters ---------------------------------------------------------------------------------


def leaves(config: LoraConfig, model: Architecture) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns the shape and the logical axes of every parameter of an adapter, by path."""
    names = [name for name in LEAVES if name != "lora_dropout" or config.dropout]
    names = [name for name in names if name != "dora_magnitude" or config.dora]
    return {
        f"{path}/{name}": matrix.leaf(name, rank)
        for path, (matrix, rank, _) in targets(config, model).items()
        for name in names
    }


def init(config: LoraConfig, model: Architecture, base: api.Params, key: jax.Array) -> api.Params:
    """Returns the base's parameters with an adapter that changes nothing yet, float32.

    A is uniform in +-1 / sqrt(inputs), B is 0, and DoRA's magnitude is the norm of each column.

    Args:
      key: of A.
    """
    flat = trees.flatten(base)
    for number, (path, (matrix, rank, scale)) in enumerate(targets(config, model).items()):
        shapes = {name: matrix.leaf(name, rank)[0] for name in LEAVES}
        bound = math.prod(matrix.shape[matrix.stacked :][: matrix.num_inputs]) ** -0.5
        values = {
            "lora_a": jax.random.uniform(
                jax.random.fold_in(key, number), shapes["lora_a"], jnp.float32, -bound, bound
            ),
            "lora_b": jnp.zeros(shapes["lora_b"], jnp.float32),
            "lora_scale": jnp.full(shapes["lora_scale"], scale, jnp.float32),
        }
        if config.dropout:
            values["lora_dropout"] = jnp.full(shapes["lora_dropout"], config.dropout, jnp.float32)
        if config.dora:
            values["dora_magnitude"] = norms(flat[f"{path}/kernel"], matrix)
        flat |= {f"{path}/{name}": value for name, value in values.items()}
    return trees.unflatten(flat)


def norms(kernel: jax.Array, matrix: Matrix) -> jax.Array:
    """Returns the norm of each column of a matrix, float32: DoRA's magnitude before training."""
    return api.column_norms(kernel, matrix.num_inputs, matrix.stacked)


def merge(model: Architecture, params: api.Params) -> api.Params:
    """Returns parameters of the base's tree, with every adapter in its matrix.

    The sum is computed in float32 and has the matrix's dtype.

    Args:
      params: the base's with an adapter; without one, they are returned as they are.
    """
    flat = trees.flatten(params)
    for path, matrix in matrices(model).items():
        adapter = {name: flat.pop(f"{path}/{name}") for name in LEAVES if f"{path}/{name}" in flat}
        if adapter:
            kernel = flat[f"{path}/kernel"]
            merged = api.merged_kernel(kernel, adapter, matrix.num_inputs)
            flat[f"{path}/kernel"] = merged.astype(kernel.dtype)
    return trees.unflatten(flat)


def merge_errors(model: Architecture, params: api.Params, dtype: Dtype) -> dict[str, jax.Array]:
    """Returns what rounding does to merged matrices, relative to what the adapter adds to them.

    Args:
      params: the base's with an adapter.
      dtype: what merged matrices are rounded to.
    Returns:
      For the path of each matrix, float32 [2]: the squared norm of the rounding error, and that of
      the adapter's part.
    """
    flat, errors = trees.flatten(params), {}
    for path, matrix in matrices(model).items():
        adapter = {name: flat[f"{path}/{name}"] for name in LEAVES if f"{path}/{name}" in flat}
        if adapter:
            kernel = flat[f"{path}/kernel"].astype(jnp.float32)
            merged = api.merged_kernel(kernel, adapter, matrix.num_inputs)
            parts = merged.astype(dtype).astype(jnp.float32) - merged, merged - kernel
            errors[path] = jnp.stack([jnp.sum(jnp.square(x)) for x in parts])
    return errors


def stack(
    model: Architecture, adapters: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns several adapters as one, whose leaves have an axis for them behind that of layers.

    Number 0 changes nothing; the given ones begin at 1. See `api.with_adapters`.

    Args:
      adapters: leaves by path.
    """
    stacked: dict[str, np.ndarray] = {}
    for path, matrix in matrices(model).items():
        there = [adapter for adapter in adapters if f"{path}/lora_a" in adapter]
        if not there:
            continue
        rank = max(adapter[f"{path}/lora_a"].shape[-1] for adapter in there)
        for name in LEAVES:
            if name == "lora_dropout" or not any(f"{path}/{name}" in a for a in there):
                continue
            shape = matrix.leaf(name, rank)[0]
            nothing = np.full(shape, np.nan if name == "dora_magnitude" else 0, np.float32)
            parts = [nothing]
            for adapter in adapters:
                x = adapter.get(f"{path}/{name}", nothing)
                padding = [(0, size - own) for size, own in zip(shape, x.shape, strict=True)]
                parts.append(np.pad(x, padding))
            stacked[f"{path}/{name}"] = np.stack(parts, matrix.stacked)
    return stacked


def kernel_of(path: str) -> str:
    """Returns the path of the matrix that a parameter of an adapter belongs to."""
    return f"{path.rpartition('/')[0]}/kernel"


def has_adapter(params: Mapping[str, Any]) -> bool:
    """Returns whether a tree of parameters has an adapter's."""
    return any(path.rpartition("/")[2] in LEAVES for path in trees.flatten(params))
