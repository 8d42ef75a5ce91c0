"""The mesh, and which array is split over which of its axes: the only file that knows it.

Parameters and activations name logical axes; `AxisRules` (in `t5jax.config`) maps these to the
mesh axes data, fsdp and model. A logical axis that does not exist is an error, never a silent
replication.
"""

import contextlib
import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5jax.batch import Batch
from t5jax.checks import did_you_mean
from t5jax.config import AxisRules, MeshConfig

MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))

# Part of jit's cache key: a program that was traced under other rules is not used again.
_rules = jax.make_user_context(None)


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> Mesh:
    """Returns a mesh with axes (data, fsdp, model) over the devices.

    Args:
      config: devices along each axis; data = -1 takes what the others leave.
      devices: jax devices; all of them by default.
    Raises:
      ValueError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    rest = config.fsdp * config.model
    data = len(devices) // rest if config.data == -1 else config.data
    if data * rest != len(devices):
        raise ValueError(
            f"mesh data x fsdp x model = {config.data} x {config.fsdp} x {config.model} does not "
            f"fit {len(devices)} devices; their product must be {len(devices)}, and data = -1 "
            "takes what the others leave"
        )
    # Auto axes: the compiler propagates shardings from the constraints. make_mesh orders devices
    # by the topology, so that neighbours on the mesh are neighbours on the wires.
    return jax.make_mesh(
        (data, config.fsdp, config.model),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: AxisRules = AxisRules()):
    """Sets the mesh and the rules together, for everything traced inside."""
    with _rules(rules), jax.set_mesh(mesh):
        yield mesh


def partition_spec(axes: tuple[str | None, ...], rules: AxisRules) -> PartitionSpec:
    """Returns the mesh axes for logical axes, one for each dimension of an array.

    Where two dimensions of one array map to the same mesh axis, the first one has it.

    Raises:
      ValueError: for a logical axis that AxisRules does not have.
    """
    spec, taken = [], set()
    for axis in axes:
        if axis is not None and not hasattr(rules, axis):
            names = [field.name for field in dataclasses.fields(rules)]
            raise ValueError(
                f"there is no logical axis {axis!r}; {did_you_mean(axis, names)}known are "
                f"{', '.join(names)}"
            )
        value = None if axis is None else getattr(rules, axis)
        wanted = (value,) if isinstance(value, str) else tuple(value or ())
        free = tuple(a for a in wanted if a not in taken)
        taken.update(free)
        spec.append(free[0] if len(free) == 1 else free or None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation's sharding by logical axes; the identity outside of `use_mesh`."""
    rules = _rules.value
    if rules is None:
        return x
    assert x.ndim == len(axes), f"{x.ndim} dimensions, axes {axes}"
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, rules))


def local_size(shape: tuple[int, ...], *axes: str | None) -> float:
    """Returns how many entries of an activation one device holds, under `use_mesh` or without."""
    rules = _rules.value
    if rules is None:
        return math.prod(shape)
    mesh = jax.sharding.get_abstract_mesh()
    parts = [_num_devices(mesh, mesh_axes) for mesh_axes in partition_spec(axes, rules)]
    return math.prod(shape) / math.prod(parts)


def param_shardings(axes, shapes, mesh: Mesh, rules: AxisRules):
    """Returns the NamedSharding of every parameter.

    Args:
      axes: tree of tuples of logical axes, as `models.api.param_axes` returns it.
      shapes: the same tree of arrays or ShapeDtypeStructs.
    Raises:
      ValueError: where the mesh does not divide a dimension evenly.
    """

    def one(path, shape, names):
        spec = partition_spec(names, rules)
        for dim, (size, name, mesh_axes) in enumerate(zip(shape.shape, names, spec, strict=True)):
            parts = _num_devices(mesh, mesh_axes)
            if size % parts:
                raise ValueError(
                    f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')}: "
                    f"dimension {dim} ({name}, {size}) is not divisible by the {parts} devices of "
                    f"mesh axis {mesh_axes}; choose a mesh that divides it, or set "
                    f"axes.{name} to None"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def state_shardings(state, params_shardings, mesh: Mesh):
    """Returns shardings for any tree that holds parts shaped and placed like the parameters.

    A leaf whose path ends in a parameter's path and whose shape is that parameter's has its
    sharding (Adam's moments, say); everything else is replicated (counts, factored moments).

    Args:
      state: tree of arrays or ShapeDtypeStructs, such as an optimizer's state.
      params_shardings: tree of (shape, NamedSharding) leaves made by `zip_shapes`.
    """
    by_path = {
        tuple(str(key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            params_shardings, is_leaf=lambda x: isinstance(x, tuple)
        )
    }

    def one(path, leaf):
        keys = tuple(str(key) for key in path)
        for start in range(len(keys)):
            if keys[start:] in by_path:
                shape, sharding = by_path[keys[start:]]
                if shape == leaf.shape:
                    return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, state)


def zip_shapes(shapes, shardings):
    """Returns the tree of (shape, sharding) that `state_shardings` matches against."""
    return jax.tree.map(lambda x, s: (x.shape, s), shapes, shardings)


def batch_sharding(mesh: Mesh, rules: AxisRules) -> NamedSharding:
    """Returns the sharding of a batch's features [B, length]."""
    return NamedSharding(mesh, partition_spec(("batch", None), rules))


def batch_parts(mesh: Mesh, rules: AxisRules) -> int:
    """Returns the number of parts that a batch is split into."""
    return _num_devices(mesh, partition_spec(("batch",), rules)[0])


def check_batch_size(batch_size: int, mesh: Mesh, rules: AxisRules, name="data.batch_size"):
    """Raises ValueError where the devices do not divide a batch, with sizes that they do."""
    axes = partition_spec(("batch",), rules)[0]
    parts = batch_parts(mesh, rules)
    if batch_size % parts:
        below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
        sizes = f"{below} or {above}" if below else f"{above}"
        axes = (axes,) if isinstance(axes, str) else axes
        raise ValueError(
            f"{name} {batch_size} is not divisible by {' x '.join(axes)} = {parts} devices; "
            f"use {sizes}, or set {' or '.join(f'mesh.{axis}' for axis in axes)}"
        )


def process_rows(batch_size: int, mesh: Mesh, rules: AxisRules) -> list[int]:
    """Returns the rows of a global batch that are on this process's devices, rising."""
    places = batch_sharding(mesh, rules).addressable_devices_indices_map((batch_size, 1))
    return sorted({row for index in places.values() for row in range(batch_size)[index[0]]})


def shard_batch(
    batch: Batch, mesh: Mesh, rules: AxisRules, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Makes global arrays of a global batch, or of this process's rows of it.

    Args:
      batch: all rows, or those of `process_rows`.
      mesh, rules: what splits the batch.
      batch_size: rows of the global batch, where `batch` has those of this process alone.
    """
    sharding = batch_sharding(mesh, rules)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    rows = process_rows(batch_size, mesh, rules) if batch_size else None

    def part(x, index):
        if rows is not None:  # Rows of a device lie side by side among those of its process.
            first = rows.index(index[0].start or 0)
            index = (slice(first, first + len(range(batch_size)[index[0]])), *index[1:])
        return x[index]

    return {
        name: jax.make_array_from_callback(
            (batch_size or len(x), *x.shape[1:]), sharding, lambda index, x=x: part(x, index)
        )
        for name, x in batch.items()
    }


def _num_devices(mesh, axes: str | tuple[str, ...] | None) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return int(np.prod([mesh.shape[axis] for axis in axes]))
