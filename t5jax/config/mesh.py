"""The mesh of devices, and how arrays are sharded over it."""

import dataclasses
import typing
from typing import Literal

from t5jax.checks import check_at_least, check_choice

MESH_AXES = ("data", "fsdp", "sequence", "model")
"""From the axis whose devices may lie furthest apart to the one that communicates most."""
SliceAxis = Literal["data", "fsdp"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh, over all slices. One of them may be -1: all
    that the others leave."""

    data: int = -1
    """Data parallelism: each copy of the model takes a part of the batch."""
    fsdp: int = 1
    """Data parallelism that also shards parameters and optimizer state."""
    sequence: int = 1
    """Sequence parallelism: shards the tokens of each row, for long inputs."""
    model: int = 1
    """Tensor parallelism: shards the matrices of every layer."""
    dcn: SliceAxis = "data"
    """Of several TPU slices: the axis that spans them, over the data center network. The other axes
    stay within a slice."""

    def __post_init__(self) -> None:
        check_choice(self.dcn, typing.get_args(SliceAxis), "mesh.dcn")
        rest = [name for name in MESH_AXES if getattr(self, name) == -1]
        if len(rest) > 1:
            others = " and ".join(f"mesh.{name}" for name in rest)
            raise ValueError(
                f"{others} are -1, all that the other axes leave; only one can be: set "
                f"mesh.{rest[0]} to 1"
            )
        for name in MESH_AXES:
            if getattr(self, name) != -1:
                check_at_least(getattr(self, name), 1, f"mesh.{name}")


MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """The mesh axis (data, fsdp, sequence, model) over which each logical axis of an array is
    sharded.

    A field is a logical axis; its value is a mesh axis, several of them, or None to replicate.
    """

    batch: MeshAxes = ("data", "fsdp")
    """Rows of a batch."""
    length: MeshAxes = "sequence"
    """Tokens of a row, in batches and activations. Keys and values are whole in attention, and a
    length that the mesh does not divide, such as the one token of a decoding step, stays whole."""
    activation_embed: MeshAxes = None
    """d_model in activations: the residual stream."""
    embed: MeshAxes = "fsdp"
    """d_model in parameters."""
    heads: MeshAxes = "model"
    """Attention heads, in parameters and activations."""
    kv_heads: MeshAxes = "model"
    """Key and value heads in grouped-query attention; None if there are too few to shard."""
    head_dim: MeshAxes = None
    """Dimension of a head."""
    mlp: MeshAxes = "model"
    """Hidden units of the MLP, in parameters and activations."""
    vocab: MeshAxes = "model"
    """Vocabulary, in parameters and logits."""
    positions: MeshAxes = None
    """Learned positions of GPT-2 and BERT, in parameters."""
    rank: MeshAxes = None
    """The rank of adapters."""
    buckets: MeshAxes = None
    """Buckets of the relative-position bias."""
    layers: MeshAxes = None
    """Stacked layers, which a scan iterates over."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for axis in (value,) if isinstance(value, str) else value or ():
                check_choice(axis, MESH_AXES, f"axes.{field.name}")
