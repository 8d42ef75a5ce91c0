"""TPU slices: what a name such as v6e-16 or tpu7x:2x2x2 stands for."""

import dataclasses
import math
import re

# fmt: off
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
    "16x16x16",
)
# fmt: on
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs."""

    name: str
    accelerator: str
    """How the Cloud TPU API begins its names; empty: it has none of these."""
    per_chip: int
    """What the number in those names counts, for each chip."""
    shapes: tuple[str, ...]
    machine: str
    """Machine type of Compute Engine, with the number of chips to fill in."""
    runtime: str
    """Software of a TPU VM."""


# Machine types and shapes: as XPK 1.16 lists them. Runtimes: as Google's pages on TPU VMs do.
GENERATIONS = {
    g.name: g
    for g in (
        Generation("v4", "v4", 2, _CUBES, "", "tpu-ubuntu2204-base"),
        Generation("v5e", "v5litepod", 1, _SQUARES, "ct5lp-hightpu-{}t", "v2-alpha-tpuv5-lite"),
        Generation("v5p", "v5p", 2, _CUBES, "ct5p-hightpu-{}t", "v2-alpha-tpuv5"),
        Generation("v6e", "v6e", 1, _SQUARES, "ct6e-standard-{}t", "v2-alpha-tpuv6e"),
        Generation("tpu7x", "", 2, ("1x1x1", *_CUBES), "tpu7x-standard-{}t", ""),
    )
}
_ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x", "7x": "tpu7x"}
EXAMPLES = "v5litepod-8, v5p-128, v6e-16 or tpu7x:2x2x2"


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are connected to one another, and the hosts that they are in."""

    generation: Generation
    shape: str
    """Chips along each dimension, such as 4x4x4."""

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def chips_per_host(self) -> int:
        squares = len(self.generation.shapes[0].split("x")) == 2
        return min(self.chips, 8 if squares and self.chips == 8 else 4)

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def accelerator_type(self) -> str:
        """The name in the Cloud TPU API, such as v5p-128."""
        return f"{self.generation.accelerator}-{self.chips * self.generation.per_chip}"

    @property
    def machine_type(self) -> str:
        return self.generation.machine.format(self.chips_per_host)

    def __str__(self) -> str:
        hosts = f"{self.hosts} host{'s' if self.hosts > 1 else ''}"
        chips = f"{self.chips} chip{'s' if self.chips > 1 else ''}"
        return f"{self.generation.name}:{self.shape}, {chips} in {hosts}"


def parse(name: str) -> Slice:
    """Returns the slice of a name of the Cloud TPU API, or of a generation and a shape.

    Raises:
      ValueError: if there is no such slice.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)+))", name.lower())
    if match is None:
        raise ValueError(f"accelerator is {name!r}; expected a slice such as {EXAMPLES}")
    prefix, number, shape = match.groups()
    generation = GENERATIONS.get(_ALIASES.get(prefix, prefix))
    if generation is None:
        raise ValueError(
            f"accelerator is {name!r}; {prefix} is none of {', '.join(GENERATIONS)} "
            f"(slices are called {EXAMPLES})"
        )
    known = [Slice(generation, shape) for shape in generation.shapes]
    if shape:
        found = [s for s in known if s.shape == shape]
        names = ", ".join(f"{prefix}:{s.shape}" for s in known)
    elif not generation.accelerator:
        raise ValueError(
            f"accelerator is {name!r}; say the shape of the slice, such as {prefix}:2x2x2"
        )
    else:
        found = [s for s in known if s.accelerator_type.split("-")[1] == number]
        names = ", ".join(s.accelerator_type for s in known)
    if not found:
        raise ValueError(f"accelerator is {name!r}; {generation.name} has {names}")
    return found[0]


def find(name: str) -> Slice:
    """Returns the slice of a name, or the chips in a machine of Compute Engine's type.

    Raises:
      ValueError: if it has no TPU.
    """
    for generation in GENERATIONS.values():
        for shape in generation.shapes:
            one = Slice(generation, shape)
            if one.hosts == 1 and one.machine_type == name:
                return one
    return parse(name)
