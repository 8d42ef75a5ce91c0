"""Reads a compiled program's text: computations, their instructions, and what these say of cost."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_BITS = {"pred": 8, "token": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    """The type of the result, as written: `bf16[8,128]{1,0:T(8,128)}`, or a tuple of such."""
    opcode: str
    rest: str
    """Operands and attributes."""

    @functools.cached_property
    def arrays(self) -> list[int]:
        """The size of each array of the result in bytes, without padding."""
        return [
            math.prod(map(int, filter(None, dims.split(",")))) * _bits(dtype) // 8
            for dtype, dims, _ in _ARRAY.findall(self.shape)
        ]

    @property
    def in_hbm(self) -> bool:
        """Whether some of the result is in HBM; what is in the cores' memory has S(1)."""
        return any("S(1)" not in layout for _, _, layout in _ARRAY.findall(self.shape))

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, or None where there is none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """Where in the model it comes from: the names of modules and functions."""
        return self._find(r'op_name="([^"]*)"')

    @property
    def target(self) -> str:
        """Of a custom call."""
        return self._find(r'custom_call_target="([^"]*)"')

    @property
    def first_operand(self) -> str:
        return self._find(r"^%?([\w.\-]+)")

    @property
    def group_size(self) -> int:
        """How many devices take part in a collective together; 1 if it does not say."""
        text = self._find(r"replica_groups=(.*)")
        if found := re.match(r"\{\{([\d,]+)\}", text):
            return found[1].count(",") + 1
        if found := re.match(r"\[(\d+),(\d+)\]", text):
            return int(found[2])
        # The axes may follow an order of the devices: mesh['a'=16,'b'=4], device_ids=(...) {'a'}.
        if found := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}", text):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
        return 1

    @property
    def kernel_cost(self) -> dict[str, int]:
        """What a Pallas kernel says of itself: flops, bytes_accessed, transcendentals."""
        text = self._find(r'"cost_estimate":\{([^}]*)\}')
        return {name: int(float(n)) for name, n in re.findall(r'"(\w+)":"?([\d.e+]+)', text)}

    def attribute(self, name: str) -> str:
        """Returns the computation that an attribute names, or ""."""
        return self._find(rf"\b{name}=%?([\w.\-]+)")

    def branches(self) -> list[str]:
        """Returns the computations of a conditional."""
        listed = self._find(r"branch_computations=\{([^}]*)\}")
        both = [self.attribute("true_computation"), self.attribute("false_computation")]
        return [b.strip().lstrip("%") for b in listed.split(",")] if listed else both

    def _find(self, pattern: str) -> str:
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    entry: str
    computations: dict[str, list[Instruction]]

    def trips(self, loop: Instruction) -> int | None:
        """Returns how often a while loop's body runs; None if its data decide."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition"), [])
        constants = {
            i.name: int(i.rest.split(")")[0])
            for i in condition
            if i.opcode == "constant" and i.rest.split(")")[0].isdecimal()
        }
        test = condition[-1] if condition else None
        if test and test.opcode == "compare" and "direction=LT" in test.rest:
            for name in re.findall(r"%?([\w.\-]+)", test.rest.split(")")[0]):
                if name in constants:
                    return constants[name]
        return None

    def instructions(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation


def parse(text: str) -> Module:
    """Returns the computations of a scheduled module, by name."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            head = _COMPUTATION.match(line)
            current = computations.setdefault(head[2], []) if head else None
            if head and head[1]:
                entry = head[2]
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(Instruction(*found.groups()))
    assert entry, "the text has no entry computation"
    return Module(entry, computations)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    return int(re.sub(r"^[a-z]+(\d+).*$", r"\1", dtype)) if re.search(r"\d", dtype) else 0
