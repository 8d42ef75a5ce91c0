"""What a run needs of a machine, examined one thing at a time; nothing is changed."""

import dataclasses
import fcntl
import importlib.metadata
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from t5jax import storage

_LEAST_MEMORY = 4 * 2**30
_LEAST_DISK = 5 * 2**30
# libtpu's own constant: the same on every machine, whatever TMPDIR says.
_LIBTPU_LOCK = Path("/tmp/libtpu_lockfile")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found, and what mends it, where it is wrong."""

    what: str
    found: str
    remedy: str = ""


def examine(folders: Sequence[str] = ()) -> Iterator[Finding]:
    """Yields the findings, as they are made.

    Args:
      folders: where runs write.
    """
    yield versions()
    yield libtpu()
    yield libtpu_lock()
    yield _tried("processes", _processes)
    accelerator = _tried("devices", _devices)
    yield accelerator
    yield memory()
    for folder in dict.fromkeys([str(storage.cache_dir()), *folders]):
        yield bucket(folder) if storage.is_remote(folder) else writable(Path(folder).expanduser())
    if not accelerator.remedy:
        yield _tried("compiler", _compile)


def versions(installed: Callable[[str], str] = importlib.metadata.version) -> Finding:
    """Whether the packages are those that t5jax was tested with."""
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires("t5jax") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("versions", "t5jax is not installed, so its bounds are unknown")
    wrong = []
    for requirement in map(Requirement, texts):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = installed(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if not (version and requirement.specifier.contains(version, prereleases=True)):
            # pip reads the name and its bounds without what it is for.
            wrong.append((f"{requirement.name} {version or 'is missing'}", requirement))
    names = ", ".join(f"{name} {installed(name)}" for name in ("t5jax", "jax", "jaxlib", "flax"))
    if not wrong:
        return Finding("versions", names)
    bounds = " ".join(f"'{r.name}{r.specifier}'" for _, r in wrong)
    return Finding("versions", ", ".join(text for text, _ in wrong), f"pip install {bounds}")


def libtpu() -> Finding:
    """Whether libtpu is the one that jax asks for."""
    from t5jax import distributed
    from t5jax.plan import chips

    if chips.libtpu_version() is None and not distributed.num_tpu_chips():
        return Finding("libtpu", "not installed, and there is no TPU")
    try:
        chips.check_libtpu()
    except ValueError as error:
        return Finding("libtpu", "does not fit", str(error))
    return Finding("libtpu", str(chips.libtpu_version()))


def libtpu_lock(path: Path = _LIBTPU_LOCK) -> Finding:
    """Whether a process holds the TPU, or its lock file is left from one that has ended."""
    if not path.exists():
        return Finding("TPU lock", "none")
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Finding(
            "TPU lock",
            f"{path} is held by a process",
            f"end the process that uses the TPU: sudo lsof -w {path}",
        )
    except OSError as error:
        return Finding(
            "TPU lock",
            f"{path} belongs to another user ({error.strerror})",
            f"if nobody uses the TPU: sudo rm -f {path}",
        )
    return Finding("TPU lock", f"{path} is left, and free")


def _processes() -> str:
    from t5jax import distributed

    found = distributed.find(os.environ)
    return f"process {found[2]} of {found[1]}, which meet at {found[0]}" if found else "one"


def _devices() -> str:
    from t5jax import distributed

    distributed.check_accelerator()
    import jax

    devices = jax.local_devices()
    text = f"{len(devices)} {devices[0].device_kind}"
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        text += f", {free / 2**30:.1f} GiB free on the first"
    return text


def memory(table: Path = Path("/proc/meminfo")) -> Finding:
    """How much of the host's memory is free."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", table.read_text()) if table.exists() else None
    if not found:
        return Finding("memory", "unknown")
    free = int(found[1]) * 1024
    remedy = "" if free >= _LEAST_MEMORY else "end other processes: a run needs 4 GiB at least"
    return Finding("memory", f"{free / 2**30:.1f} GiB free", remedy)


def writable(folder: Path, free: Callable[[Path], int] | None = None) -> Finding:
    """Whether a folder, or the one that it will be made in, can be written and has room."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    probe = there / f".doctor-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return Finding(str(folder), error.strerror or str(error), "choose another folder")
    left = (free or (lambda path: shutil.disk_usage(path).free))(there)
    remedy = "" if left >= _LEAST_DISK else "make room: checkpoints and caches need 5 GiB at least"
    return Finding(str(folder), f"writable, {left / 2**30:.1f} GiB free", remedy)


def bucket(folder: str) -> Finding:
    """Whether runs can be written into a folder of a bucket."""
    from t5jax import checkpoint

    try:
        checkpoint.create_run_dir(folder)
    except ValueError as error:
        return Finding(folder, "cannot be used", str(error))
    return Finding(folder, "can be read and written")


def _compile() -> str:
    import jax
    import jax.numpy as jnp

    x = jnp.ones((256, 256))
    begin = time.perf_counter()
    product = jax.jit(lambda x: jnp.tanh(x @ x).sum()).lower(x).compile()
    seconds = time.perf_counter() - begin
    if float(product(x)) != 256 * 256:
        raise ValueError("a product of matrices is wrong; the device or its driver is broken")
    return f"a small program in {seconds:.1f} s"


def _tried(what: str, examine: Callable[[], str]) -> Finding:
    try:
        return Finding(what, examine())
    except (ValueError, RuntimeError) as error:
        return Finding(what, "fails", str(error))
