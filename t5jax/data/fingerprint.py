"""Describes what a cache depends on as JSON values that can be compared later. No TensorFlow.

Code is described by its content, not by its location or the version of Python: a function is
described by its syntax tree, defaults and closure, and what it uses from its own module and from
others that are not installed packages. So a change of a helper matters, but not one of a comment,
an annotation or a docstring. Installed packages are described by name. Of t5jax's own functions
only the syntax tree matters, without the names of t5jax's modules, so that they may move. Files are
described by `t5jax.data.stamps`.
"""

import ast
import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import itertools
import linecache
import os
import re
import site
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import numpy as np

_CONSTANTS = (type(None), bool, int, float, str)
_CONTAINERS = (Mapping, list, tuple, set, frozenset, collections.deque)

DESCRIBED_AS = "described as"
"""Key of a function in the metadata of a dataclass field, which returns the value to describe."""


# --- Python objects -----------------------------------------------------------------------------


def describe(value: Any) -> Any:
    """Returns JSON values that are equal for values with the same behaviour.

    Functions, partials, dataclasses, containers and plain objects are traversed; of other values
    only the type matters. Of a module that is not installed, everything in it counts. A container
    in a function's module counts by its content, or if functions of the module change it, by the
    statement that defines it.
    """
    return _Walk().describe(value)


def digest(value: Any) -> str:
    """Returns a short hash of the result of `describe`."""
    return hashlib.sha256(repr(describe(value)).encode()).hexdigest()[:16]


class _Walk:
    """One description, with references for values that occurred before, so that cycles end."""

    def __init__(self):
        self._met: dict[int, tuple[int, Any]] = {}  # Also the value, so that its id is not reused.

    def describe(self, value: Any) -> Any:
        if isinstance(value, _CONSTANTS):
            return value
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, (bytes, bytearray, np.ndarray, np.generic)):
            is_bytes = isinstance(value, (bytes, bytearray))
            content = value if is_bytes else np.asarray(value).tobytes()
            return [type(value).__name__, hashlib.sha256(content).hexdigest()[:16]]
        if isinstance(value, (tuple, frozenset)):  # Equal ones may or may not be one object.
            return self._walk(value)
        if id(value) in self._met:
            return f"see {self._met[id(value)][0]}"
        self._met[id(value)] = (len(self._met), value)
        return self._walk(value)

    def _walk(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): self.describe(item) for key, item in value.items()}
        if isinstance(value, (set, frozenset)):
            return [self.describe(item) for item in sorted(value, key=repr)]
        if isinstance(value, (list, tuple, collections.deque)):
            return [self.describe(item) for item in value]
        if isinstance(value, types.ModuleType):
            return self._module(value)
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
        if callable(getattr(value, "__wrapped__", None)):  # Such as functools.cache.
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
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        parts = [cells, function.__defaults__, function.__kwdefaults__]
        described = ["function", _name(function), *map(self.describe, parts)]
        if _is_library(function):
            return described
        tree = _tree_of(function.__code__, function.__globals__)
        modules = {k for k, v in function.__globals__.items() if _is_module_of_ours(v)}
        described.append(
            _hash_code(function.__code__) if tree is None else _hash_tree(tree, modules)
        )
        if not _is_ours(function):
            described.append({k: self.describe(v) for k, v in _named(function, tree)})
        return described

    def _module(self, module: types.ModuleType) -> Any:
        if not _is_of_user(module):
            return module.__name__
        names = [name for name in sorted(vars(module)) if not name.startswith("__")]
        content = {name: _content(vars(module), name) for name in names}
        return ["module", {k: self.describe(v) for k, v in content.items() if _counts(v)}]

    def _class(self, cls: type) -> Any:
        found = {key: _inner(value) for key, value in vars(cls).items()}
        if dataclasses.is_dataclass(cls):  # Some of its methods are generated from its fields.
            found = {key: value for key, value in found.items() if not key.startswith("__")}
        methods = {key: value for key, value in found.items() if inspect.isfunction(value)}
        if any(map(_is_library, methods.values())) or _is_installed(cls):
            return f"{cls.__module__}.{cls.__qualname__}"
        values = {
            key: value
            for key, value in found.items()
            if not key.startswith("__")
            and isinstance(value, (*_CONSTANTS, *_CONTAINERS, re.Pattern))
        }
        bases = [base for base in cls.__bases__ if base is not object]
        return ["class", _name(cls), self.describe(methods | values), [*map(self.describe, bases)]]


def _name(value: Any) -> str:
    """Returns the name of a function or class, for installed packages with the module."""
    is_library = _is_library(value) if inspect.isfunction(value) else _is_installed(value)
    return f"{value.__module__}.{value.__qualname__}" if is_library else value.__qualname__


def _inner(value: Any) -> Any:
    """Returns the function of a method, without decorators."""
    if isinstance(value, property):
        return value.fget
    if isinstance(value, functools.cached_property):
        return value.func
    return getattr(value, "__func__", value)


def _is_filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _named(function: types.FunctionType, tree: ast.AST | None) -> list[tuple[str, Any]]:
    """Returns what a function uses from its module ("helper") and from others ("other.helper"), by
    name; a module itself only if it is used other than before a dot."""
    module, file = function.__globals__, function.__code__.co_filename
    names = sorted(_names(function.__code__) & module.keys())
    known = {name: _content(module, name, file) for name in names}
    if tree is None:
        return [(name, value) for name, value in known.items() if _counts(value)]
    parts = list(_parts(tree))
    known |= _imported(parts, module)
    inner = {id(part.value) for part in parts if isinstance(part, ast.Attribute)}
    found = {}
    for path in (_dotted(part) for part in parts if id(part) not in inner):
        if not path or path[0] not in known:
            continue
        value, end = known[path[0]], 1
        while _is_of_user(value) and end < len(path):
            value, end = _content(vars(value), path[end]), end + 1
        found[".".join(path[:end])] = value
    return [(name, found[name]) for name in sorted(found) if _counts(found[name])]


def _counts(value: Any) -> bool:
    """Whether the value of a name affects the functions that use it."""
    is_module = isinstance(value, types.ModuleType)
    return value is not _VARIABLE and (not is_module or _is_of_user(value))


def _dotted(part: ast.AST) -> list[str]:
    """Returns ["a", "b"] for the expression a.b; nothing for others than names with dots."""
    if isinstance(part, ast.Name):
        return [part.id]
    if isinstance(part, ast.Attribute) and (path := _dotted(part.value)):
        return [*path, part.attr]
    return []


def _imported(parts: Iterable[ast.AST], module: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what import statements in a function bind, other than from installed packages."""
    found = {}
    for part in parts:
        if not isinstance(part, (ast.Import, ast.ImportFrom)):
            continue
        dots, origin = "." * getattr(part, "level", 0), getattr(part, "module", None) or ""
        for alias in part.names:
            name = dots + origin if origin or dots else alias.name
            with contextlib.suppress(ImportError, ValueError, AttributeError):
                value = _import(name, module.get("__package__"))
                if value is None:
                    continue
                if origin or dots:
                    here = getattr(value, alias.name, None)
                    value = here if here is not None else _import(f"{name}.{alias.name}", None)
                elif not alias.asname:
                    value = sys.modules[alias.name.split(".")[0]]
                found[alias.asname or alias.name.split(".")[0]] = value
    return found


def _import(name: str, package: Any) -> types.ModuleType | None:
    """Returns a module that is not installed."""
    name = importlib.util.resolve_name(name, package)
    spec = importlib.util.find_spec(name.split(".")[0])
    if spec is None or not spec.origin or spec.origin == "built-in" or _is_in_package(spec.origin):
        return None
    return importlib.import_module(name)


def _content(module: Mapping[str, Any], name: str, file: str = "") -> Any:
    """Returns what describes a name of a module: its value, or how it is defined if functions of
    the module change it, such as a dict of what has been computed; _VARIABLE if that is empty.

    Without the module's source, containers are only constants if their names are in capitals.
    """
    value = module.get(name)
    if not isinstance(value, (MutableMapping, list, set, collections.deque)):
        return value
    source = "".join(linecache.getlines(file or module.get("__file__") or "", dict(module)))
    if not source:
        return value if name.isupper() else _VARIABLE
    definitions, changed = _variables(source)
    # A defaultdict changes when it is read.
    if name not in changed and not isinstance(value, collections.defaultdict):
        return value
    definition = definitions.get(name, "{}")
    return _VARIABLE if definition in ("{}", "[]", "set()", "dict()", "list()") else definition


_VARIABLE = object()


_CHANGES = {
    *("add", "append", "appendleft", "clear", "discard", "extend", "extendleft", "insert", "pop"),
    *("popitem", "popleft", "remove", "reverse", "rotate", "setdefault", "sort", "subtract"),
    *("update", "difference_update", "intersection_update", "symmetric_difference_update"),
}  # Methods of containers.


@functools.lru_cache(maxsize=64)
def _variables(source: str) -> tuple[dict[str, str], set[str]]:
    """Returns the definitions of a module's variables, and those that its functions change."""
    try:
        whole = ast.parse(source)
    except (SyntaxError, ValueError):
        return {}, set()
    definitions, changed = {}, set()
    for statement in whole.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    definitions[target.id] = ast.unparse(statement.value)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inner = (function for function in ast.walk(whole) if isinstance(function, functions))
    for node in itertools.chain.from_iterable(map(ast.walk, inner)):
        if isinstance(node, ast.Global):
            changed.update(node.names)
        is_stored = isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))
        is_called = isinstance(node, ast.Attribute) and node.attr in _CHANGES
        if isinstance(node, (ast.Attribute, ast.Subscript)) and (is_called or is_stored):
            changed.update(_dotted(node.value)[:1])
    return definitions, changed


def _names(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


# --- Syntax trees -------------------------------------------------------------------------------

# Fields of nodes that do not affect behaviour, or do not exist in every version of Python.
_UNTOLD = ("annotation", "ctx", "kind", "returns", "type_comment", "type_params")


def _tree_of(code: types.CodeType, module: Mapping[str, Any]) -> ast.AST | None:
    """Returns the definition of a function.

    None if its source is not available, or has changed since it was loaded.
    """
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, dict(module))
    return _trees(code.co_filename, "".join(lines)).get(code)


@functools.lru_cache(maxsize=64)
def _trees(file: str, source: str) -> dict[types.CodeType, ast.AST]:
    """Returns the definition of every function of a module, by its code."""
    try:
        whole, compiled = ast.parse(source), compile(source, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return {}
    places: dict[tuple[str, int], list] = {}
    for node in ast.walk(whole):
        if isinstance(node, ast.Lambda):
            places.setdefault(("<lambda>", node.lineno), []).append(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            places.setdefault((node.name, line), []).append(node)
    trees, codes = {}, [compiled]
    for code in codes:  # The list grows.
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        found = places.get((code.co_name, code.co_firstlineno), [])
        if len(found) > 1:
            found = [node for node in found if _is_around(node, code)]
        if found:  # Nested lambdas come after the enclosing ones.
            trees[code] = found[-1]
    return trees


def _is_around(node: Any, code: types.CodeType) -> bool:
    """Whether all positions of a code are in a lambda's body; a line may have several lambdas."""
    if not isinstance(node, ast.Lambda):
        return False
    start = node.body.lineno, node.body.col_offset
    end = node.body.end_lineno, node.body.end_col_offset
    places = [place for place in code.co_positions() if None not in place and place[3] > 0]
    if not places:  # Only a constant, whose position not every version of Python keeps.
        constant = compile(ast.Expression(node.body), "", "eval", dont_inherit=True)
        return repr(constant.co_consts) == repr(code.co_consts[-1:])
    return all(
        start <= (line, column) and (last, stop) <= end for line, last, column, stop in places
    )


def _parts(tree: Any) -> Iterable[ast.AST]:
    """Yields the nodes of a definition, without decorators and defaults, which were evaluated."""
    arguments = ast.arguments(
        **{name: getattr(tree.args, name) for name in tree.args._fields}
        | {"defaults": [], "kw_defaults": []}
    )
    left = [arguments, *(tree.body if isinstance(tree.body, list) else [tree.body])]
    for part in left:
        yield part
        for name, value in ast.iter_fields(part):
            if name not in _UNTOLD:
                values = value if isinstance(value, list) else [value]
                left += [item for item in values if isinstance(item, ast.AST)]


def _hash_tree(tree: Any, modules: set[str]) -> str:
    """Returns the hash of a function's definition.

    Args:
      tree: a function or lambda.
      modules: names of t5jax's own modules in it, which are ignored.
    """

    def tell(node):
        if isinstance(node, list):
            return [tell(item) for item in node if not _is_text(item)]
        if not isinstance(node, ast.AST):
            return f"{type(node).__name__} {node!r}"
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in modules:
            return ["Name", ["id", tell(node.attr)]]
        fields = {
            name: value
            for name, value in ast.iter_fields(node)
            if name not in _UNTOLD and (isinstance(node, ast.Constant) or value not in (None, []))
        }
        if isinstance(node, ast.JoinedStr):  # 3.12 adds an empty text to the format of a field.
            fields["values"] = [x for x in node.values if getattr(x, "value", None) != ""]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "t5jax":
            del fields["module"]
        return [type(node).__name__, *([name, tell(fields[name])] for name in sorted(fields))]

    arguments = [
        [name, tell(value)]
        for name, value in sorted(ast.iter_fields(tree.args))
        if name not in ("defaults", "kw_defaults")
    ]
    told = [type(tree).__name__, arguments, tell(tree.body)]
    return hashlib.sha256(repr(told).encode(errors="surrogatepass")).hexdigest()[:16]


def _is_text(node: Any) -> bool:
    """Whether a statement is a string, such as a docstring."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _hash_code(code: types.CodeType) -> str:
    """Returns the hash of the bytecode, for functions without available source."""

    def tell(code):
        yield repr((code.co_code, code.co_names, code.co_varnames, code.co_freevars)).encode()
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                yield from tell(const)
            else:  # The order of a frozenset differs between processes.
                const = sorted(const, key=repr) if isinstance(const, frozenset) else const
                yield repr(const).encode()

    return hashlib.sha256(b"|".join(tell(code))).hexdigest()[:16]


# --- Whose code it is ---------------------------------------------------------------------------

_INSTALLED = tuple(
    {
        os.path.realpath(path) + os.sep
        for path in (*site.getsitepackages(), sysconfig.get_path("stdlib"))
    }
)


def _is_library(function: types.FunctionType) -> bool:
    return _is_in_package(function.__code__.co_filename) and not _is_ours(function)


def _is_installed(value: Any) -> bool:
    """Whether a class or module belongs to an installed package or the standard library."""
    module = value if isinstance(value, types.ModuleType) else sys.modules.get(value.__module__)
    if _is_ours(value):
        return False
    file = getattr(module, "__file__", None)
    # Without a file it is built in, unless it was created at run time (in a notebook, by exec).
    return _is_in_package(file) if file else getattr(module, "__name__", "") in _BUILT_IN


_BUILT_IN = sys.builtin_module_names


def _is_in_package(file: str) -> bool:
    return file.startswith("<frozen") or os.path.realpath(file).startswith(_INSTALLED)


def _is_ours(value: Any) -> bool:
    """Whether a function, class or module belongs to t5jax."""
    name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
    return (name or "").split(".")[0] == "t5jax"


def _is_of_user(value: Any) -> bool:
    is_module = isinstance(value, types.ModuleType)
    return is_module and not _is_ours(value) and not _is_installed(value)


def _is_module_of_ours(value: Any) -> bool:
    return isinstance(value, types.ModuleType) and _is_ours(value)
