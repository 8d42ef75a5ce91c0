"""TPU chips, and the topologies that libtpu compiles for without one.

A device is what `jax.devices()` lists: a chip, or half of one in TPU7x.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5jax.checks import check_at_least, did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """The rates of one device."""

    name: str
    clock: float
    """Cycles per second, in which the compiler counts."""
    peak_flops: float
    """bfloat16 FLOPs per second."""
    hbm: float
    """Bytes of memory that a program can use."""
    hbm_rate: float
    """Bytes of memory per second."""
    link_rate: float
    """Bytes per second over one ICI link in one direction."""
    dcn_rate: float
    """Bytes per second between slices, this device's share of its host's network."""
    vector_lanes: int
    """Exponentials (or other transcendental functions) per cycle."""
    dims: int
    """Dimensions of the torus."""
    config: str | None = None
    """libtpu's configuration of the cores, if not its default."""


_GIB = 2**30

# Peaks, memory and ICI: Google's pages on each chip (cloud.google.com/tpu/docs). Memory is what the
# compiler (libtpu 0.0.42) says that a program can use. Clocks: those at which the compiler's cycles
# for a bfloat16 product of 8192^3 come to 70 to 93 % of the peak; TPU7x's from four matrix units of
# 256 x 256 per device. DCN: the host's network, divided by its devices; v4's taken to be v5p's.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 1.05e9, 275e12, 30.75 * _GIB, 1.2e12, 50e9, 6.25e9, 2048, 3, "megacore"),
        Chip("v5e", 1.5e9, 197e12, 15.75 * _GIB, 819e9, 50e9, 3.125e9, 1024, 2),
        Chip("v5p", 1.75e9, 459e12, 95.74 * _GIB, 2.765e12, 100e9, 6.25e9, 2048, 3),
        Chip("v6e", 1.75e9, 918e12, 31.25 * _GIB, 1.64e12, 100e9, 12.5e9, 1024, 2),
        Chip("tpu7x", 2.2e9, 1153.5e12, 94.75 * _GIB, 3.69e12, 50e9, 6.25e9, 1024, 3),
    )
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "v7x": "tpu7x", "7x": "tpu7x"}
_EXAMPLES = "v5e:2x2, v5p:4x4x4, v6e:4x4 or tpu7x:2x2x1"

# What jax calls a device, and NVIDIA's peaks for bfloat16 without sparsity, from its data sheets.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
_GPUS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "L4": 121e12}


def peak_flops(device_kind: str) -> float | None:
    """Returns the bfloat16 FLOPs per second of a device; None where they are unknown."""
    if device_kind in _KINDS:
        return CHIPS[_KINDS[device_kind]].peak_flops
    words = device_kind.replace("-", " ").split()
    for name, peak in _GPUS.items():
        if "NVIDIA" in words and set(name.split()) <= set(words):
            return peak
    return None


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several slices of a TPU."""

    name: str
    """As in `v5p:4x4x4`."""
    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension of a slice."""
    slices: int
    devices: tuple[Any, ...]
    """JAX devices to compile for, which compute nothing."""

    @property
    def title(self) -> str:
        return f"{self.slices} x {self.name}" if self.slices > 1 else self.name


def find_topology(name: str, slices: int = 1, *, any_libtpu: bool = False) -> Topology:
    """Returns a topology, with devices that programs can be compiled for.

    Args:
      name: a chip and the shape of a slice in chips, such as `v5p:4x4x4`.
      slices: of this shape, connected by the data center's network.
      any_libtpu: take the libtpu that is installed, even if it is not the one for this jax.
    Raises:
      ValueError: if there is no such topology, or no libtpu for it.
    """
    check_at_least(slices, 1, "--slices")
    chip, shape = _parse(name)
    check_libtpu(any_libtpu)
    quieten()
    import jax
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if slices > 1:
        options["num_slices"] = slices
    if chip.config:
        options["chip_config_name"] = chip.config
    size = [*shape, 1][:3]
    if min(size[:2]) < 2:  # Less than a whole host, which has 2 x 2 chips.
        options["chips_per_host_bounds"] = (*(min(n, 2) for n in size[:2]), 1)
    title = f"{chip.name}:{'x'.join(map(str, shape))}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=title, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology {name} does not exist: {str(error).splitlines()[0]}; expected a shape of "
            f"whole hosts of 2 x 2 chips, such as {_EXAMPLES}"
        ) from error
    return Topology(title, chip, shape, slices, tuple(found.devices))


def _parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    parts = re.fullmatch(r"([A-Za-z0-9]+)[:=](\d+(?:x\d+)*)", name)
    if not parts:
        raise ValueError(
            f"--topology is {name!r}; expected a chip and the shape of a slice in chips, such as "
            f"{_EXAMPLES}"
        )
    kind = parts[1].lower()
    kind = _ALIASES.get(kind, kind)
    if kind not in CHIPS:
        hint = did_you_mean(kind, CHIPS)
        raise ValueError(
            f"--topology {name}: there is no chip {parts[1]!r}; {hint}known are {', '.join(CHIPS)}"
        )
    chip, shape = CHIPS[kind], tuple(map(int, parts[2].split("x")))
    if len(shape) != chip.dims or 0 in shape:
        example = f"{kind}:{'x'.join(['2', '2', '1'][: chip.dims])}"
        raise ValueError(
            f"--topology {name} has {len(shape)} dimensions; a slice of {kind} has {chip.dims}, "
            f"each at least 1, such as {example}"
        )
    return chip, shape


# --- libtpu ---------------------------------------------------------------------------------------


def libtpu_version() -> str | None:
    """Returns the version of libtpu, or None if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("libtpu")
    return None


def check_libtpu(any_version: bool = False) -> None:
    """Raises ValueError if libtpu is missing, or not the one that the installed jax asks for."""
    version, wanted = libtpu_version(), _wanted_libtpu()
    jax_version = importlib.metadata.version("jax")
    remedy = f'pip install "libtpu{wanted}"'
    if version is None:
        raise ValueError(
            "libtpu is not installed, which has the compiler for TPUs (no TPU is needed); jax "
            f"{jax_version} works with: {remedy}"
        )
    from packaging.specifiers import SpecifierSet

    if not any_version and not SpecifierSet(wanted).contains(version, prereleases=True):
        raise ValueError(
            f"libtpu is {version}, but jax {jax_version} works with libtpu{wanted}; {remedy}, or "
            "add --any-libtpu to plan with this one"
        )


def _wanted_libtpu() -> str:
    """Returns the versions of libtpu that jax[tpu] asks for, such as "==0.0.42.*"."""
    for requirement in importlib.metadata.requires("jax") or ():
        if found := re.match(r"libtpu\s*\(?([=<>!~][^;)]*)", requirement):
            return found[1].strip()
    return ""


def quieten() -> None:
    """Keeps libtpu from asking a cloud's metadata server, from its log, and from the TPU itself.

    Must come before the first use of libtpu. What is set in the environment stays.
    """
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Otherwise a second process waits for its lock file.
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # Any: it is looked for, but not used.
    }.items():
        os.environ.setdefault(name, value)


def quieten_without_tpu() -> None:
    """Calls `quieten` where libtpu is installed for planning, without a TPU in the machine."""
    if libtpu_version() is None:
        return
    # TPUs, and the network of Google's machines, have this vendor. jax is not asked: it loads long.
    with contextlib.suppress(OSError):
        vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
        if not any(vendor.read_text().strip() == "0x1ae0" for vendor in vendors):
            quieten()


def links(shape: Sequence[int], group: int) -> int:
    """Returns over how many links a device of a group of devices exchanges data at a time.

    A group is taken to fill whole dimensions of the torus, the largest ones first; each has two
    links, one to either side.
    """
    covered, dims = 1, 0
    for size in sorted(shape, reverse=True):
        if covered >= group:
            break
        covered, dims = covered * size, dims + 1
    return 2 * max(dims, 1)


def num_chips(shape: Sequence[int]) -> int:
    return math.prod(shape)
