"""The mapping between our parameters and a Hugging Face checkpoint: one table for both directions.

Each family has a file in this folder, with a table of `Row`s and a translation of config.json. A
row pairs one leaf of our tree with one tensor of theirs, or with one tensor per layer, since our
layers are stacked on a leading axis. Conversions only move numbers, so that a round trip is exact.
A leaf or tensor that no row covers is an error.

Layouts are written as in the einops library.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from t5jax.architectures import Architecture


class Tensor(Protocol):
    """A tensor of a checkpoint, which stays on disk until it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """In the notation of safetensors: F32, BF16, I8."""

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


Tensors = Mapping[str, Tensor]
Index = tuple[slice, ...]


class View(Protocol):
    """The layout of one tensor of theirs in ours. Both directions are exact."""

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of theirs for the shape of ours."""

    def read(self, tensor: Tensor, index: Index, shape: tuple[int, ...]) -> np.ndarray:
        """Returns ours[index], where ours has `shape`, and reads as little as possible."""

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Returns theirs, contiguous, or the part of theirs that corresponds to ours."""


@dataclasses.dataclass(frozen=True)
class Rearrange:
    """Splits and reorders axes: "(h k) d -> d h k" has theirs on the left and ours on the right.

    Sizes are those of ours, in which all axes are separate.
    """

    pattern: str

    @property
    def their_groups(self) -> list[list[str]]:
        """The axes of ours that make up each axis of theirs."""
        theirs = self.pattern.split("->")[0]
        return [
            (merged or single).split() for merged, single in re.findall(r"\((.*?)\)|(\w+)", theirs)
        ]

    @property
    def our_axes(self) -> list[str]:
        """The axes of ours."""
        return self.pattern.split("->")[1].split()

    def _order(self) -> list[int]:
        """For each axis of ours, its index among the axes of theirs after splitting."""
        split = [name for group in self.their_groups for name in group]
        assert sorted(split) == sorted(self.our_axes), self.pattern
        return [split.index(name) for name in self.our_axes]

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        size = dict(zip(self.our_axes, shape, strict=True))
        return tuple(math.prod(size[name] for name in group) for group in self.their_groups)

    def read(self, tensor: Tensor, index: Index, shape: tuple[int, ...]) -> np.ndarray:
        size = dict(zip(self.our_axes, shape, strict=True))
        span = dict(zip(self.our_axes, index, strict=True))
        # A slice of a merged axis is contiguous in its first part; other parts are read completely
        # and sliced afterwards. Heads come first, so sharding by heads reads nothing twice.
        theirs, split, rest = [], [], []
        for first, *others in self.their_groups:
            width = math.prod(size[name] for name in others)
            theirs.append(slice(span[first].start * width, span[first].stop * width))
            split += [span[first].stop - span[first].start, *(size[name] for name in others)]
            rest += [slice(None), *(span[name] for name in others)]
        return tensor[tuple(theirs)].reshape(split)[tuple(rest)].transpose(self._order())

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        split = ours.transpose(np.argsort(self._order()))
        return np.ascontiguousarray(split.reshape(self.their_shape(ours.shape)))


@dataclasses.dataclass(frozen=True)
class Part:
    """One of several equal parts of a tensor along an axis, such as queries joined with keys.

    The rows of all parts name the same tensor and are consecutive and in order in the table.
    """

    view: Rearrange
    """The layout of this part."""
    axis: int
    """The axis along which theirs is divided."""
    place: int
    """The index of this part, from 0."""
    count: int
    """The number of parts."""

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        theirs = list(self.view.their_shape(shape))
        theirs[self.axis] *= self.count
        return tuple(theirs)

    def read(self, tensor: Tensor, index: Index, shape: tuple[int, ...]) -> np.ndarray:
        start = self.place * self.view.their_shape(shape)[self.axis]
        return self.view.read(_Moved(tensor, self.axis, start), index, shape)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        return self.view.to_theirs(ours)


@dataclasses.dataclass(frozen=True)
class _Moved:
    """A tensor whose indices along an axis begin at `start`."""

    tensor: Tensor
    axis: int
    start: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    def __getitem__(self, index: Index) -> np.ndarray:
        moved = list(index)
        span = moved[self.axis]
        moved[self.axis] = slice(span.start + self.start, span.stop + self.start)
        return self.tensor[tuple(moved)]


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of ours and its name in a checkpoint of theirs."""

    ours: str
    """The path, such as "encoder/layers/mlp/wo/kernel"."""
    theirs: str
    """The name; if it contains "{layer}", one tensor for each entry of our leading axis."""
    view: View
    aliases: tuple[str, ...] = ()
    """Other names of an unstacked tensor, which may occur instead or additionally; all must be
    equal."""
    copies: tuple[str, ...] = ()
    """Additional names under which it is written."""

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.theirs

    def their_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Returns the names and shapes of theirs for our leaf of `shape`, in the order of
        layers."""
        if not self.stacked:
            return {self.theirs: self.view.their_shape(shape)}
        each = self.view.their_shape(shape[1:])
        return {self.theirs.format(layer=layer): each for layer in range(shape[0])}

    def present(self, name: str, tensors: Tensors) -> list[str]:
        """Returns which of `name` and the aliases are present."""
        return [n for n in (name, *self.aliases) if n in tensors]

    def read(self, leaf: Any, index: Index, tensors: Tensors) -> np.ndarray:
        """Returns `index` of our leaf, in its dtype, with one layer of theirs in memory at a time.

        Args:
          leaf: the shape and dtype of the whole leaf.
          index: a slice for each of its dimensions.
        """
        spans = tuple(
            slice(*s.indices(size)[:2]) for s, size in zip(index, leaf.shape, strict=True)
        )
        if not self.stacked:
            tensor = tensors[self.present(self.theirs, tensors)[0]]
            ours = self.view.read(tensor, spans, leaf.shape)
            return ours.astype(leaf.dtype, order="C", copy=False)
        layers, *inner = spans
        out = np.empty([s.stop - s.start for s in spans], leaf.dtype)
        for place, layer in enumerate(range(layers.start, layers.stop)):
            tensor = tensors[self.theirs.format(layer=layer)]
            out[place] = self.view.read(tensor, tuple(inner), leaf.shape[1:])
        return out

    def write(self, ours: np.ndarray, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
        """Yields names and tensors of theirs, in `dtype`, one layer at a time."""
        layers = ours if self.stacked else [ours]
        for layer, x in enumerate(layers):
            theirs = self.view.to_theirs(x.astype(dtype, copy=False))
            for name in (self.theirs.format(layer=layer), *self.copies):
                yield name, theirs


@dataclasses.dataclass(frozen=True)
class Table:
    """Everything that is needed to read and write a family's checkpoints."""

    model_types: tuple[str, ...]
    """model_type in config.json."""
    architectures: tuple[str, ...]
    """The architectures in config.json whose checkpoints contain the whole network."""
    read_config: Callable[[dict[str, Any], Tensors], Architecture]
    """Takes config.json, and the tensors for what is not in it."""
    write_config: Callable[[Any], dict[str, Any]]
    """Takes the family's description and returns config.json."""
    rows: Callable[[Any], list[Row]]
    """Returns the rows for a description."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors in published checkpoints that the network does not use."""
    renames: tuple[tuple[str, str], ...] = ()
    """Patterns and replacements, for re.sub, from names in some files to those of the table."""
    classifier: str = ""
    """The tensor that has a row for each class, if a head of the family has classes."""
    token_ids: tuple[tuple[str, str], ...] = ()
    """Keys that config.json may omit, and their attributes of `t5jax.tokenizers.Tokenizer`."""
    needs_tokenizer_json: tuple[str, ...] = ()
    """Those of model_types for which transformers reads a tokenizer from tokenizer.json alone."""

    def rename(self, tensors: Tensors) -> Tensors:
        """Returns the tensors of a file under the names of the table."""
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            new = name
            for pattern, replacement in self.renames:
                new = re.sub(pattern, replacement, new)
            # A name that would replace another tensor is kept and reported as unexpected.
            renamed[name if new in tensors else new] = tensor
        return renamed


def write_rows(
    rows: Iterable[Row], leaf: Callable[[str], np.ndarray], dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and tensors of theirs, in `dtype`; the parts of a tensor are joined.

    Args:
      leaf: returns one of ours by path; called for one tensor or its parts at a time.
    """
    for _, group in itertools.groupby(rows, key=lambda row: row.theirs):
        parts = list(group)
        for tensors in zip(*(row.write(leaf(row.ours), dtype) for row in parts), strict=True):
            (name, theirs), *others = tensors
            if others:
                view = parts[0].view
                assert isinstance(view, Part), f"{name} is written more than once"
                theirs = np.concatenate([theirs, *(x for _, x in others)], view.axis)
            yield name, theirs


# --- Checks -------------------------------------------------------------------------------------

_FLOATS = ("F64", "F32", "F16", "BF16")


def check_leaves(rows: list[Row], shapes: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Raises ValueError unless rows, the network's leaves and `params` are the same set of leaves.

    Args:
      shapes: the network's leaves by path, with .shape.
      params: arrays by path.
    """
    covered = {row.ours for row in rows}
    assert covered == set(shapes), sorted(covered ^ set(shapes))
    problems: dict[str, list[tuple[str, Any]]] = {
        "missing": [(name, list(shapes[name].shape)) for name in shapes if name not in params],
        "that no row of the table covers": [
            (name, list(params[name].shape)) for name in params if name not in shapes
        ],
        "of another shape": [
            (name, f"{list(params[name].shape)}, expected {list(shapes[name].shape)}")
            for name in shapes
            if name in params and params[name].shape != shapes[name].shape
        ],
    }
    _raise_problems("the parameters do not fit the model's description", "parameters", problems)


def check_tensors(
    rows: list[Row],
    shapes: Mapping[str, Any],
    tensors: Tensors,
    where: str,
    ignored: Sequence[str] = (),
) -> None:
    """Raises ValueError unless the tensors are exactly those that the table expects.

    The error lists all tensors that are missing or unexpected or have other shapes or dtypes, and
    all aliases that differ from their tensor.

    Args:
      shapes: the network's leaves by path, with .shape.
      where: the origin of the tensors, for the message.
      ignored: patterns, for re.fullmatch, of additional tensors that are allowed.
    """
    covered = {row.ours for row in rows}
    assert covered == set(shapes), sorted(covered ^ set(shapes))
    known: set[str] = set()
    missing, misshaped, not_floats, different = [], [], [], []
    for row in rows:
        for name, shape in row.their_shapes(shapes[row.ours].shape).items():
            if name in known:  # Another part of it has been seen already.
                continue
            known.update((name, *row.aliases))
            present = row.present(name, tensors)
            if not present:
                missing.append((name, list(shape)))
            for other in present:
                tensor = tensors[other]
                if tuple(tensor.shape) != shape:
                    misshaped.append((other, f"{list(tensor.shape)}, expected {list(shape)}"))
                elif tensor.dtype not in _FLOATS:
                    not_floats.append((other, tensor.dtype))
                elif not same_values(tensors[present[0]], tensor):
                    different.append((other, f"differs from {present[0]}"))
    unexpected = [
        (name, list(tensors[name].shape))
        for name in tensors
        if name not in known and not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    problems: dict[str, list[tuple[str, Any]]] = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshaped,
        "quantized or not of floats": not_floats,
        "duplicate, with other values": different,
    }
    _raise_problems(f"{where} does not hold the model that was described", "tensors", problems)


def _raise_problems(what: str, noun: str, problems: Mapping[str, list[tuple[str, Any]]]) -> None:
    found = [
        f"{noun} {kind}: {', '.join(_merge_layers(listed))}"
        for kind, listed in problems.items()
        if listed
    ]
    if found:
        raise ValueError(
            f"{what}: {'; '.join(found)}. Use the description that belongs to these weights, or "
            "the weights that belong to this description"
        )


def _merge_layers(listed: Iterable[tuple[str, Any]]) -> list[str]:
    """Returns "name detail" lines; names that only differ in their layer share one."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name, detail in listed:
        match = re.search(r"(?<=\.)\d+(?=\.)|(?<=/layers_)\d+(?=/)", name)
        key = name[: match.start()] + "{}" + name[match.end() :] if match else name
        layers.setdefault((key, str(detail)), []).extend([int(match[0])] if match else [])
    return [
        f"{name.replace('{}', '{' + _ranges(numbers) + '}')} {detail}"
        for (name, detail), numbers in layers.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Returns "0-2,5" for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors are bitwise equal, with a few rows in memory at a time."""
    if a is b:
        return True
    if tuple(a.shape) != tuple(b.shape) or a.dtype != b.dtype:
        return False
    rows = max(1, 2**22 // max(1, math.prod(a.shape[1:])))
    inner = (slice(None),) * (len(a.shape) - 1)
    for start in range(0, a.shape[0], rows):
        index = (slice(start, min(start + rows, a.shape[0])), *inner)
        # As bytes, so that a NaN equals itself.
        if a[index].tobytes() != b[index].tobytes():
            return False
    return True
