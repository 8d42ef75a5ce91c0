"""How many slots an engine has, how long they are, and in which parts they are stepped."""

import dataclasses

import jax

from t5jax.architectures import Architecture
from t5jax.models import api
from t5jax.serving import slots as device
from t5jax.serving.slots import Size

_SHORTEST_PROMPT = 16
_SHORTEST_ROW = 64
_MEMORY_SHARE = 0.6
_UNKNOWN_MEMORY = 2.0 * 2**30
_MOST_SLOTS, _MOST_SLOTS_CPU = 128, 32


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The sizes of an engine."""

    slots: int | None = None
    """Answers written at a time. None: as many as fit into free memory, within limits."""
    max_length: int = 1024
    """Maximum length of what a decoder reads in tokens: prompt and answer, or with an encoder, the
    answer."""
    max_source_length: int = 1024
    """Maximum length of an encoder's input in tokens."""
    max_waiting: int = 256
    """Answers that may wait for a slot; more are refused."""
    batch_invariant: bool = False
    """Always step all slots at their full length, which is slower: then the bits of an answer do
    not depend on what else is being written."""

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "max_source_length", "max_waiting"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


def whole_size(
    model: Architecture,
    params: api.Params,
    options: EngineOptions,
    mesh: jax.sharding.Mesh,
    parts: int,
) -> Size:
    """Returns the size of all slots.

    Args:
      model: the description.
      params: the parameters, which may have a soft prompt.
      options: the sizes that are asked for.
      mesh: the devices, whose free memory counts if the number of slots is not given.
      parts: the parts into which the devices divide rows.
    Raises:
      ValueError: if there is no room for one slot.
    """
    longest = model.longest_row
    length = min(options.max_length, longest or options.max_length)
    source, soft = 0, api.prompt_length(params)
    if model.kind == "encoder_decoder":
        source = min(options.max_source_length, longest or options.max_source_length)
    num_slots = options.slots
    free, most = free_memory(mesh)
    bytes_per_slot = slot_bytes(model, Size(parts, source, length, soft))
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    if num_slots is not None and is_cpu and num_slots * bytes_per_slot > 2 * free:
        # Other devices say so themselves; a CPU would end the process once they are used.
        raise too_many(num_slots, bytes_per_slot)
    if num_slots is None:
        num_slots = min(int(_MEMORY_SHARE * free / bytes_per_slot), most)
        if num_slots < parts:
            raise ValueError(
                f"{free / 2**30:.2f} GiB of memory are free, but the keys and values of one answer "
                f"take {bytes_per_slot / 2**30:.2f} GiB; set a smaller max_length (and with an "
                "encoder max_source_length)"
            )
    return Size(-(-num_slots // parts) * parts, source, length, soft)


def too_many(num_slots: int, bytes_per_slot: int) -> ValueError:
    """Returns the error of slots for which there is no room."""
    return ValueError(
        f"there is no memory for {num_slots:,} slots, whose keys and values take "
        f"{num_slots * bytes_per_slot / 2**30:,.2f} GiB; set fewer slots, or a smaller max_length "
        "(and with an encoder max_source_length)"
    )


def slot_bytes(model: Architecture, size: Size) -> int:
    """Returns the bytes of one slot."""
    slots = jax.eval_shape(lambda: device.empty(model, size))
    return int(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(slots)) // size.rows)


def step_sizes(whole: Size, parts: int, batch_invariant: bool) -> list[Size]:
    """Returns the shapes to step, the smallest first: quarters of the rows and of the lengths."""
    if batch_invariant:
        return [whole]
    rows, lengths = {whole.rows, parts}, {(whole.source_length, whole.length)}
    while (fewer := min(rows - {parts}, default=parts) // 4 // parts * parts) > 4:
        rows.add(fewer)
    factor = 4
    while whole.length // factor >= _SHORTEST_ROW:
        lengths.add((-(-whole.source_length // factor), -(-whole.length // factor)))
        factor *= 4
    soft = whole.prompt_length
    return [Size(r, *length, soft) for r in sorted(rows) for length in sorted(lengths)]


def prompt_lengths(whole: Size) -> list[int]:
    """Returns the lengths to which prompts are padded: powers of two, and the largest one."""
    powers, most = [], whole.source_length or whole.length
    least = _SHORTEST_PROMPT
    while least < most:
        powers.append(least)
        least *= 2
    return [*powers, most]


def free_memory(mesh: jax.sharding.Mesh) -> tuple[float, int]:
    """Returns the free memory of all devices in bytes, and a sensible maximum number of slots."""
    devices = mesh.local_devices
    if devices[0].platform == "cpu":
        return _free_host_memory(), _MOST_SLOTS_CPU
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in s for s in stats):
        return _UNKNOWN_MEMORY * len(devices), _MOST_SLOTS
    free = min(s.get("bytes_limit", 0) - s.get("bytes_in_use", 0) for s in stats)
    return free * len(devices), _MOST_SLOTS


def _free_host_memory() -> float:
    try:
        with open("/proc/meminfo") as file:
            kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
        return kib * 1024 / 2  # Others need memory as well.
    except (OSError, StopIteration):
        return _UNKNOWN_MEMORY
