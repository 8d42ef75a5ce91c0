"""The time of a compiled program, as its compiler estimates it: computation, and communication.

The compiler writes the cycles of each fusion and product into the program's text. Their sum, each
loop's body times its number of rounds, is the time of the computation. It is good for comparing
programs, and pessimistic about what only moves bytes: an elementwise sum comes to a third of the
memory's rate.

- A Pallas kernel has no cycles. It is charged by what it says of itself, at the chip's peak rates,
  whichever of FLOPs, bytes and exponentials takes longest; else by the bytes of its result.
- Collectives have none either, alone or in a fusion of their own, as a reduce-scatter is. They are
  charged by the bytes that a device receives, at the rate of its links. One that is started and
  awaited later costs what of it the computation in between does not hide; the links carry one at a
  time.
"""

import collections
import dataclasses
import re

from t5jax.plan.chips import Chip, links
from t5jax.plan.hlo import Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_KERNEL = "tpu_custom_call"
# Neither computation nor movement of data; or movement that the scheduler has put beside it.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
    *("copy-start", "copy-done", "slice-start", "slice-done", "partition-id", "replica-id"),
    *("custom-call", "iota", "opt-barrier", "add-dependency", "broadcast", "async-update"),
    *("send", "recv"),
}


@dataclasses.dataclass
class Operation:
    """What one place in the model costs in a step."""

    place: str
    seconds: float = 0.0
    count: int = 0
    kernel: bool = False


@dataclasses.dataclass
class Collective:
    """What devices exchange in a step, of one kind over one network."""

    kind: str
    network: str
    """ICI or DCN."""
    count: int = 0
    bytes: float = 0.0
    """Received by a device."""
    seconds: float = 0.0
    """At the network's rate."""


@dataclasses.dataclass
class Cost:
    """The estimate of one run of a program."""

    seconds: float
    waiting: float
    """Seconds of these in which nothing but communication happens."""
    kernels: float
    """Seconds of these in Pallas kernels."""
    operations: list[Operation]
    """The longest first."""
    collectives: list[Collective]
    unpriced: list[str]
    """Kernels that do not say what they cost, and loops of unknown length, which count once."""


def cost(module: Module, chip: Chip, shape: tuple[int, ...]) -> Cost:
    """Returns the estimate of a compiled program.

    Args:
      shape: chips along each dimension of a slice.
    """
    walk = _Walk(module, chip, shape)
    seconds = walk.run(module.entry, 1)
    operations = sorted(walk.operations.values(), key=lambda o: -o.seconds)
    return Cost(
        seconds=seconds,
        waiting=walk.waiting,
        kernels=sum(o.seconds for o in operations if o.kernel),
        operations=operations,
        collectives=sorted(walk.collectives.values(), key=lambda c: -c.seconds),
        unpriced=list(dict.fromkeys(walk.unpriced)),
    )


class _Walk:
    """One pass over the schedule."""

    def __init__(self, module: Module, chip: Chip, shape: tuple[int, ...]) -> None:
        self.module, self.chip, self.shape = module, chip, shape
        self.operations: dict[tuple[str, bool], Operation] = {}
        self.collectives: dict[tuple[str, str], Collective] = {}
        self.unpriced: list[str] = []
        self.waiting = 0.0

    def run(self, name: str, times: int) -> float:
        """Returns the seconds of one run of a computation, and records `times` runs."""
        clock = 0.0
        free: dict[str, float] = collections.defaultdict(float)  # When a network is idle again.
        arrives: dict[str, float] = {}

        for i in self.module.computations.get(name, []):
            opcode = i.opcode
            if opcode == "while":
                trips = self.module.trips(i)
                if trips is None:
                    trips = 1
                    self.unpriced.append(f"a loop of unknown length in {place(i.op_name)}")
                clock += trips * self.run(i.attribute("body"), times * trips)
            elif opcode == "conditional":
                # The longest branch; others are recorded too, as a step may take them.
                clock += max(self.run(branch, times) for branch in i.branches())
            elif opcode == "call":
                clock += self.run(i.attribute("to_apply"), times)
            elif found := self._collective(i):
                kind, network, size, seconds = found
                self._record(kind, network, size, seconds, times)
                free[network] = max(free[network], clock) + seconds
                arrives[i.name] = free[network]
                if not opcode.endswith("-start") and network == "ICI":
                    self.waiting += times * (arrives[i.name] - clock)
                    clock = arrives[i.name]
            elif opcode.endswith("-done") and opcode not in ("copy-done", "slice-done"):
                late = max(0.0, arrives.get(i.first_operand, 0.0) - clock)
                self.waiting += times * late
                clock += late
            elif opcode == "async-start":
                clock += self.run(i.attribute("calls"), times)
            else:
                seconds, kernel = self._seconds(i)
                if seconds:
                    clock += seconds
                    key = (place(i.op_name), kernel)
                    operation = self.operations.setdefault(key, Operation(key[0], kernel=kernel))
                    operation.seconds += times * seconds
                    operation.count += times
        return clock

    def _seconds(self, i: Instruction) -> tuple[float, bool]:
        """Returns the seconds of an instruction, and whether it is a kernel."""
        if i.cycles is not None:
            return i.cycles / self.chip.clock, False
        if i.opcode == "custom-call" and i.target == _KERNEL:
            says = i.kernel_cost
            if not says:
                self.unpriced.append(f"a kernel in {place(i.op_name)} without a cost_estimate")
                says = {"bytes_accessed": 2 * sum(i.arrays)}
            rates = {
                "flops": self.chip.peak_flops,
                "bytes_accessed": self.chip.hbm_rate,
                "transcendentals": self.chip.vector_lanes * self.chip.clock,
            }
            return max((n / rates[what] for what, n in says.items() if what in rates)), True
        if i.opcode in _FREE or not i.in_hbm:
            return 0.0, False
        return 2 * sum(i.arrays) / self.chip.hbm_rate, False  # Read and written.

    def _collective(self, i: Instruction) -> tuple[str, str, float, float] | None:
        """Returns kind, network, bytes and seconds, or None."""
        if i.opcode in ("send", "recv"):
            transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.rest)
            # The sender's half of the transfer is in the receiver's, on another slice.
            if transfer is None or i.opcode == "send":
                return None
            size = float(i.arrays[0])
            kind = transfer[1].lower().replace("_", "-")
            return kind, "DCN", size, size / self.chip.dcn_rate
        kind, group, arrays = i.opcode.removesuffix("-start"), i.group_size, i.arrays
        size = float(sum(arrays))
        if i.opcode == "fusion" and "kind=kCustom" in i.rest:
            inside = self.module.computations.get(i.attribute("calls"), [])
            fused = next((j for j in inside if j.opcode in COLLECTIVES), None)
            if fused is None:
                return None
            kind, group = fused.opcode, fused.group_size
            if kind == "all-reduce" and size < sum(fused.arrays):
                kind = "reduce-scatter"  # Of the sum, each device keeps its part.
        if kind not in COLLECTIVES:
            return None
        if i.opcode.endswith("-start") and kind != "all-reduce":
            size = max(arrays)  # Operand and result are in a tuple.
            if kind == "reduce-scatter":
                size = min(a for a in arrays if a > 4)
        others = (group - 1) / group
        received = {
            "all-gather": size * others,
            "all-reduce": 2 * size * others,
            "reduce-scatter": size * (group - 1),
            "all-to-all": size * others,
            "collective-permute": size,
        }[kind]
        many = 2 if kind == "collective-permute" else links(self.shape, group)
        return kind, "ICI", received, received / (many * self.chip.link_rate)

    def _record(self, kind: str, network: str, size: float, seconds: float, times: int) -> None:
        found = self.collectives.setdefault((kind, network), Collective(kind, network))
        found.count += times
        found.bytes += times * size
        found.seconds += times * seconds


# What JAX, Flax and the scan add to a name, and what says how a product is written.
_ADDED = re.compile(
    r"^(jit\(.*\)|while|body|cond|closed_call|checkpoint|rematted_computation|remat|Network"
    r"|transpose\(.*\)|jvp\(.*\)|custom_vjp_call.*|vmap\(.*\)|shard_map|core_call|branch_\d+_fun)$"
)


def place(op_name: str) -> str:
    """Returns the place in the model of an operation: "encoder/layers/mlp/wi_0 (backward)".

    Args:
      op_name: of the compiled text, such as
        jit(step)/transpose(jvp(Network.hidden))/decoder/while/body/layers/mlp/wi_0/dot_general.
    """
    if not op_name:
        return "without a name"
    # Einsum's equations have no slash, but dots and commas.
    parts = op_name.split("/")
    inner = [p for p in parts[:-1] if not _ADDED.match(p) and "->" not in p]
    # "attention.keys_values" is a method of the module before it.
    path = [p for p in inner if "." not in p]
    if "rematted_computation" in parts:
        phase = " (recomputed)"
    elif any(p.startswith("transpose(") for p in parts):
        phase = " (backward)"
    else:
        phase = ""
    name = "/".join(path) or parts[-1]
    return name + phase
