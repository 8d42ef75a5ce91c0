"""What a cache depends on, as plain JSON values that can be compared later. No TensorFlow.

Code is described by what it does, not by where it stands: a function is its bytecode, its
constants, its closure, and the functions and constants of its own module that it names, so that a
changed helper counts and a changed comment does not. Installed packages are described by name, and
t5jax's own functions without what they name. Files count by their contents and their order, not by
the folder they are in: hosts that keep them in different places share a cache.
"""

import dataclasses
import functools
import hashlib
import inspect
import logging
import os
import re
import site
import sysconfig
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)

_CONSTANTS = (type(None), bool, int, float, str)

DESCRIBED_AS = "described as"
"""In the metadata of a dataclass's field: a function of its value, for what is described."""


# --- Python objects -----------------------------------------------------------------------------


def describe(value: Any) -> Any:
    """Returns JSON values that are equal for values that do the same.

    Functions, partials, dataclasses, containers and plain objects are walked; of anything else the
    type alone counts. Containers that a function finds in its module are taken for constants where
    their name is in capitals, and for variables, which are left out, where it is not.
    """
    return _Walk().describe(value)


def digest(value: Any) -> str:
    """Returns a short hash of what `describe` gives."""
    return hashlib.sha256(repr(describe(value)).encode()).hexdigest()[:16]


class _Walk:
    """One description: what was met before is a reference, so that cycles end."""

    def __init__(self):
        self._met: dict[int, tuple[int, Any]] = {}  # The value too, so that its id stays its own.

    def describe(self, value: Any) -> Any:
        if isinstance(value, _CONSTANTS):
            return value
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, (bytes, np.ndarray, np.generic)):
            content = value if isinstance(value, bytes) else np.asarray(value).tobytes()
            return [type(value).__name__, hashlib.sha256(content).hexdigest()[:16]]
        if id(value) in self._met:
            return f"see {self._met[id(value)][0]}"
        self._met[id(value)] = (len(self._met), value)
        return self._walk(value)

    def _walk(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): self.describe(item) for key, item in value.items()}
        if isinstance(value, (set, frozenset)):
            return [self.describe(item) for item in sorted(value, key=repr)]
        if isinstance(value, (list, tuple)):
            return [self.describe(item) for item in value]
        if isinstance(value, functools.partial):
            return ["partial", *map(self.describe, (value.func, value.args, value.keywords))]
        if isinstance(value, re.Pattern):
            return ["pattern", value.pattern, value.flags]
        if isinstance(value, types.MethodType):
            return ["method", self.describe(value.__self__), self.describe(value.__func__)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if callable(getattr(value, "__wrapped__", None)):  # functools.cache, for one.
            return self.describe(value.__wrapped__)
        if callable(value) and hasattr(value, "__qualname__"):  # A built-in function.
            return f"{value.__module__}.{value.__qualname__}"
        if dataclasses.is_dataclass(value):
            fields = {
                f.name: f.metadata.get(DESCRIBED_AS, lambda x: x)(getattr(value, f.name))
                for f in dataclasses.fields(value)
            }
        else:
            fields = getattr(value, "__dict__", {})
        return [self.describe(type(value)), self.describe(fields)]

    def _function(self, function: types.FunctionType) -> Any:
        name = f"{function.__module__}.{function.__qualname__}"
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        parts = [cells, function.__defaults__, function.__kwdefaults__]
        described = ["function", name, *map(self.describe, parts)]
        if _is_library(function):
            return described
        described.append(_hash_code(function.__code__))
        if not _is_ours(function):
            names = sorted(_names(function.__code__) & function.__globals__.keys())
            found = {name: function.__globals__[name] for name in names}
            described.append({k: self.describe(v) for k, v in found.items() if _counts(k, v)})
        return described

    def _class(self, cls: type) -> Any:
        name = f"{cls.__module__}.{cls.__qualname__}"
        found = {key: getattr(value, "__func__", value) for key, value in vars(cls).items()}
        if dataclasses.is_dataclass(cls):  # Some of its methods say no more than its fields do.
            found = {key: value for key, value in found.items() if not key.startswith("__")}
        methods = {key: value for key, value in found.items() if inspect.isfunction(value)}
        if not methods or any(map(_is_library, methods.values())):
            return name
        return [name, self.describe(methods)]


def _is_filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _counts(name: str, value: Any) -> bool:
    """Whether a name of a module says something about what the functions that use it do."""
    if isinstance(value, types.ModuleType):
        return False
    if isinstance(value, (Mapping, list, set)):
        return name.isupper()
    return True


def _names(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _hash_code(code: types.CodeType) -> str:
    def tell(code):
        yield repr((code.co_code, code.co_names, code.co_varnames, code.co_freevars)).encode()
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                yield from tell(const)
            else:  # The order of a frozenset differs from process to process.
                const = sorted(const, key=repr) if isinstance(const, frozenset) else const
                yield repr(const).encode()

    return hashlib.sha256(b"|".join(tell(code))).hexdigest()[:16]


_INSTALLED = tuple(
    {
        os.path.realpath(path) + os.sep
        for path in (*site.getsitepackages(), sysconfig.get_path("stdlib"))
    }
)


def _is_library(function: types.FunctionType) -> bool:
    file = function.__code__.co_filename
    installed = file.startswith("<frozen") or os.path.realpath(file).startswith(_INSTALLED)
    return installed and not _is_ours(function)


def _is_ours(function: types.FunctionType) -> bool:
    return function.__module__.split(".")[0] == "t5jax"


# --- Files --------------------------------------------------------------------------------------


def stamp_files(paths: Iterable[str]) -> list[dict]:
    """Returns what tells files from changed ones: of each its path, size, time and content's hash.

    Files on this machine are read whole; of those behind a URL the file system says what it has
    (an ETag, say).

    Raises:
      ValueError: for a file that is missing.
    """
    return [_stamp(path, with_content=True) for path in dict.fromkeys(paths)]


def changed_file(stamps: Sequence[Mapping], paths: Iterable[str]) -> str | None:
    """Returns what differs from the stamps, or None.

    A file is read only where it has the stamp's size, but another time or path: a copy is no
    change. A file that cannot be reached now counts as unchanged, so that a cache does without its
    sources.
    """
    paths = list(dict.fromkeys(paths)) or [stamp["path"] for stamp in stamps]
    if len(paths) != len(stamps):
        return f"the number of source files was {len(stamps)} and is {len(paths)}"
    for stamp, path in zip(stamps, paths, strict=True):
        try:
            if not _is_unchanged(stamp, path):
                return f"{path} has changed"
        except ValueError as error:
            _log.warning("%s; its cache is used as it is", error)
    return None


def _is_unchanged(was: Mapping, path: str) -> bool:
    now = _stamp(path)
    if all(was.get(name) == value for name, value in now.items()):
        return True
    if "sha256" not in was or now.get("size") != was["size"]:
        return False
    return _stamp(path, with_content=True)["sha256"] == was["sha256"]


def _stamp(path: str, with_content: bool = False) -> dict:
    try:
        if "://" in path:
            import fsspec

            filesystem, name = fsspec.core.url_to_fs(path)
            return {"path": path, "key": str(filesystem.ukey(name))}
        stat = os.stat(path)
        # Whole: a relative path is another file elsewhere.
        stamp: dict[str, Any] = {"path": os.path.abspath(path)}
        stamp |= {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if with_content:
            with open(path, "rb") as file:
                stamp["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        return stamp
    except OSError as error:
        raise ValueError(
            f"the source file {path} cannot be read: {error.strerror or error}"
        ) from None
