"""The mesh and the shardings of arrays over it; no other module knows about the mesh.

Parameters and activations have logical axes, which `AxisRules` (in `t5jax.config`) maps to the mesh
axes data, fsdp, sequence and model. An unknown logical axis is an error, never silently replicated.
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5jax.batch import Batch, BatchSpec
from t5jax.checks import did_you_mean
from t5jax.config import MESH_AXES, AxisRules, MeshConfig

# Part of jit's cache key, so that a function is traced again under other rules.
_rules = jax.make_user_context(None)
_platform = jax.make_user_context(None)


def make_mesh(
    config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh with axes (data, fsdp, sequence, model) over the devices.

    Neighbours on the mesh are physical neighbours. Over several TPU slices, only the axis
    `config.dcn` spans them; devices know their slice.

    Args:
      config: the number of devices along each axis.
      devices: the devices to use; all by default.
    Raises:
      ValueError: if the axes do not multiply to the number of devices, or slices do not divide one.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    rest = [axis for axis in MESH_AXES if sizes[axis] == -1]
    for axis in rest:
        sizes[axis] = max(len(devices) // math.prod(n for n in sizes.values() if n > 0), 1)
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(str(getattr(config, axis)) for axis in MESH_AXES)
        hint = "" if rest else ", and -1 for an axis takes all that remain"
        raise ValueError(
            f"mesh {' x '.join(MESH_AXES)} = {asked} does not fit {len(devices)} devices; their "
            f"product must {'divide' if rest else 'be'} {len(devices)}{hint}"
        )
    # Auto axes: the compiler propagates shardings from the constraints.
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        shape = tuple(sizes.values())
        try:
            return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
        except NotImplementedError:  # 8 x 8 of 4 x 4 x 4 chips: half a row of them for an axis.
            placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(placed, MESH_AXES, axis_types=types)
    if sizes[config.dcn] % slices:
        other = {"data": "fsdp", "fsdp": "data"}[config.dcn]
        raise ValueError(
            f"mesh.{config.dcn} {sizes[config.dcn]} is not divisible by the {slices} slices that "
            f"it spans (mesh.dcn); make it a multiple of {slices}, or set mesh.dcn to {other}"
        )
    inside = sizes | {config.dcn: sizes[config.dcn] // slices}
    across = dict.fromkeys(MESH_AXES, 1) | {config.dcn: slices}
    placed = mesh_utils.create_hybrid_device_mesh(
        tuple(inside.values()),
        tuple(across.values()),
        devices,
        allow_split_physical_axes=True,
    )
    return Mesh(placed, MESH_AXES, axis_types=types)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: AxisRules = AxisRules()) -> Iterator[Mesh]:
    """Sets the mesh and the rules for everything traced inside."""
    with _rules(rules), _platform(mesh.devices.flat[0].platform), jax.set_mesh(mesh):
        yield mesh


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": that of the mesh, which may be of another machine."""
    return _platform.value or jax.default_backend()


def partition_spec(axes: tuple[str | None, ...], rules: AxisRules) -> PartitionSpec:
    """Returns the mesh axes of an array, given the logical axis of each dimension.

    If two dimensions map to the same mesh axis, the first one gets it.

    Raises:
      ValueError: for a logical axis that is not a field of AxisRules.
    """
    spec: list[str | tuple[str, ...] | None] = []
    taken: set[str] = set()
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
    """Constrains the sharding of an activation by logical axes; does nothing outside `use_mesh`.

    A length that the mesh does not divide stays whole; `check_lengths` refuses those of a run.
    """
    rules = _rules.value
    if rules is None:
        return x
    assert x.ndim == len(axes), f"{x.ndim} dimensions, axes {axes}"
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, _activation_spec(x.shape, axes, mesh, rules))


def _activation_spec(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Any, rules: AxisRules
) -> PartitionSpec:
    spec = partition_spec(axes, rules)
    return PartitionSpec(
        *(
            None if axis == "length" and size % _num_devices(mesh, mesh_axes) else mesh_axes
            for size, axis, mesh_axes in zip(shape, axes, spec, strict=True)
        )
    )


def local_size(shape: tuple[int, ...], *axes: str | None) -> float:
    """Returns how many entries of an activation one device holds; all of them outside
    `use_mesh`."""
    rules = _rules.value
    if rules is None:
        return math.prod(shape)
    mesh = jax.sharding.get_abstract_mesh()
    spec = _activation_spec(shape, axes, mesh, rules)
    parts = [_num_devices(mesh, mesh_axes) for mesh_axes in spec]
    return math.prod(shape) / math.prod(parts)


def mesh_axes(
    shape: tuple[int, ...], *axes: str | None
) -> tuple[str | tuple[str, ...] | None, ...]:
    """Returns the mesh axes of each dimension of an activation; None where they do not divide it,
    and outside `use_mesh`."""
    rules = _rules.value
    if rules is None:
        return (None,) * len(axes)
    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec(axes, rules)
    return tuple(
        found if size % _num_devices(mesh, found) == 0 else None
        for size, found in zip(shape, spec, strict=True)
    )


def map_shards(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns a function that calls `function` on each device, with its parts of the arguments.

    Args:
      function: returns parts of the results.
      in_specs: PartitionSpecs of the arguments, of axes from `mesh_axes`.
      out_specs: those of the results.
    """
    if _rules.value is None or jax.sharding.get_abstract_mesh().size == 1:
        return function
    # The values of a kernel are not tracked, so that sums over devices are ours to make.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def axis_index(axes: str | tuple[str, ...] | None) -> jax.Array | int:
    """In `map_shards`: returns the index of this device's part of a dimension; 0 if it is whole."""
    if not axes or jax.sharding.get_abstract_mesh().size == 1:
        return 0
    return jax.lax.axis_index(axes)


def sum_over(x: jax.Array, axes: Sequence[str | Sequence[str] | None] | str | None) -> jax.Array:
    """In `map_shards`: returns the sum over the parts of dimensions."""
    names = jax.tree.leaves(axes)
    if not names or jax.sharding.get_abstract_mesh().size == 1:
        return x
    return jax.lax.psum(x, tuple(names))


def param_shardings(axes: Any, shapes: Any, mesh: Mesh, rules: AxisRules) -> Any:
    """Returns the NamedSharding of every parameter.

    Args:
      axes: a tree of tuples of logical axes, as returned by `models.api.param_axes`.
      shapes: the same tree with arrays or ShapeDtypeStructs.
    Raises:
      ValueError: if the mesh does not divide a dimension evenly.
    """

    def one(path: Any, shape: Any, names: tuple[str, ...]) -> NamedSharding:
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


def divided(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh, rules: AxisRules
) -> NamedSharding:
    """Returns the NamedSharding of an array whose dimensions stay whole if the mesh does not
    divide them."""
    spec = partition_spec(axes, rules)
    return NamedSharding(
        mesh,
        PartitionSpec(
            *(
                None if size % _num_devices(mesh, mesh_axes) else mesh_axes
                for size, mesh_axes in zip(shape, spec, strict=True)
            )
        ),
    )


def divisible_rules(axes: Any, shapes: Any, mesh: Mesh, rules: AxisRules) -> AxisRules:
    """Returns rules under which the mesh divides every parameter of a model as it is.

    A logical axis that the mesh does not divide evenly in some parameter, such as the vocabulary of
    a published model, is left whole in all parameters and activations, with a warning.

    Args:
      axes: as for `param_shardings`.
      shapes: likewise.
      mesh: the mesh.
      rules: the rules to begin with.
    """
    whole: dict[str, str] = {}

    def visit(path: Any, shape: Any, names: tuple[str, ...]) -> None:
        spec = partition_spec(names, rules)
        for size, name, mesh_axes in zip(shape.shape, names, spec, strict=True):
            if size % _num_devices(mesh, mesh_axes):
                axis = mesh_axes if isinstance(mesh_axes, str) else " x ".join(mesh_axes)
                sizes = f"{_num_devices(mesh, mesh_axes)} devices of {axis}"
                whole[name] = f"{name} ({size:,}) by the {sizes}"

    while True:
        known = len(whole)
        jax.tree_util.tree_map_with_path(visit, shapes, axes)
        if len(whole) == known:
            break
        # A mesh axis that one dimension gives up may be taken by the next one of its array.
        rules = dataclasses.replace(rules, **dict.fromkeys(whole, None))
    if whole:
        warnings.warn(
            f"the mesh does not divide {' and '.join(whole.values())} evenly; each device holds "
            "all of it",
            stacklevel=3,
        )
    return rules


def batch_sharding(mesh: Mesh, rules: AxisRules, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of a batch's feature of shape [B, length, ...]."""
    axes = ("batch", "length", *(None for _ in shape[2:]))
    return NamedSharding(mesh, _activation_spec(shape, axes, mesh, rules))


def batch_parts(mesh: Mesh, rules: AxisRules) -> int:
    """Returns the number of parts into which the rows of a batch are sharded."""
    return _num_devices(mesh, partition_spec(("batch",), rules)[0])


def check_batch_size(
    batch_size: int, mesh: Mesh, rules: AxisRules, name: str = "data.batch_size"
) -> None:
    """Raises ValueError, suggesting other sizes, if the devices do not divide a batch evenly."""
    _check_divides(batch_size, "batch", mesh, rules, name)


def check_lengths(spec: BatchSpec, mesh: Mesh, rules: AxisRules) -> None:
    """Raises ValueError, suggesting other lengths, if the devices do not divide rows evenly."""
    inputs, targets = "data.inputs_length", "data.targets_length"
    if spec.kind in ("encoder", "encoder_decoder"):
        _check_divides(spec.inputs_length, "length", mesh, rules, inputs)
    if spec.kind == "encoder_decoder" or not spec.inputs_length:
        _check_divides(spec.targets_length, "length", mesh, rules, targets)
    elif spec.kind != "encoder":
        parts = f"{spec.inputs_length} + {spec.targets_length}"
        name = f"{inputs} + {targets} = {parts} ="
        _check_divides(spec.decoder_length, "length", mesh, rules, name)


def _check_divides(size: int, axis: str, mesh: Mesh, rules: AxisRules, name: str) -> None:
    mesh_axes = partition_spec((axis,), rules)[0]
    parts = _num_devices(mesh, mesh_axes)
    if size % parts == 0:
        return
    below, above = size // parts * parts, -(-size // parts) * parts
    sizes = f"{below} or {above}" if below else f"{above}"
    mesh_axes = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    raise ValueError(
        f"{name} {size} is not divisible by {' x '.join(mesh_axes)} = {parts} devices; "
        f"use {sizes}, or set {' or '.join(f'mesh.{a}' for a in mesh_axes)}"
    )


def process_rows(batch_size: int, mesh: Mesh, rules: AxisRules) -> list[int]:
    """Returns the indices of the rows of a global batch that this process holds, in order."""
    sharding = batch_sharding(mesh, rules, (batch_size, 1))
    places = sharding.addressable_devices_indices_map((batch_size, 1))
    return sorted({row for index in places.values() for row in range(batch_size)[index[0]]})


def shard_batch(
    batch: Batch, mesh: Mesh, rules: AxisRules, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Creates global arrays from a global batch, or from this process's rows of it.

    Args:
      batch: all rows, or those of `process_rows`.
      mesh: the mesh.
      rules: how the batch is sharded over it.
      batch_size: the rows of the global batch, if `batch` only has those of this process.
    """
    shapes = {name: (batch_size or len(x), *x.shape[1:]) for name, x in batch.items()}
    shardings = {name: batch_sharding(mesh, rules, shape) for name, shape in shapes.items()}
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), shardings)
    rows = process_rows(batch_size, mesh, rules) if batch_size else []

    def part(x: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        if batch_size:  # The rows of a device are contiguous among those of its process.
            first = rows.index(index[0].start or 0)
            index = (slice(first, first + len(range(batch_size)[index[0]])), *index[1:])
        return x[index]

    return {
        name: jax.make_array_from_callback(
            shapes[name], shardings[name], lambda index, x=x: part(x, index)
        )
        for name, x in batch.items()
    }


def _num_devices(mesh: Any, axes: str | tuple[str, ...] | None) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return int(np.prod([mesh.shape[axis] for axis in axes]))
