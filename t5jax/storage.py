"""Files and folders on disk that another process sees whole or not at all. No heavy imports."""

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """Returns the folder of files that can be made again: $T5JAX_CACHE, or ~/.cache/t5jax."""
    return Path(os.environ.get("T5JAX_CACHE") or "~/.cache/t5jax").expanduser()


def write_atomically(path: Path, content: bytes) -> Path:
    """Writes a file so that another process sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
    return path


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
