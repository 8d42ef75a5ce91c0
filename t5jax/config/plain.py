"""Configs and their sections to and from JSON, and with some fields replaced."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from t5jax.architectures import FAMILIES, Architecture
from t5jax.checks import check_choice, did_you_mean, reading
from t5jax.config.config import Config

Section = TypeVar("Section")


def to_json(config: Any) -> str:
    """Returns a config, or a section of one, as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, cls: type[Any] = Config) -> Any:
    """Returns the config, or the section `cls`, from the output of `to_json`.

    Raises:
      ValueError: if a field does not exist, suggesting the most similar one, or has another type.
    """
    with reading("the config", "write it again with --print-config"):
        return _from_plain(json.loads(text), cls, "")


def override(config: Section, changes: Mapping[str, Any]) -> Section:
    """Returns a config, or a section of one, with some fields replaced.

    Args:
      config: the config or section; it stays as it is.
      changes: field to value; a dot leads into a section: {"optimizer.learning_rate": 1e-3}.
    Raises:
      ValueError: as in `from_json`, and if a section refuses the new values.
    """
    changed: Section = _override(config, changes, "")
    return changed


def _override(section: Any, changes: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(type(section))
    values: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for field, value in changes.items():
        name, dot, rest = field.partition(".")
        _check_field(name, hints, path)
        if dot:
            inner.setdefault(name, {})[rest] = value
        else:
            values[name] = _from_plain(value, hints[name], f"{path}{name}.")
    for name, below in inner.items():
        value = values.get(name, getattr(section, name))
        if not dataclasses.is_dataclass(value):
            raise ValueError(
                f"config field {path}{name} is {value!r} and has no field {next(iter(below))!r}"
            )
        values[name] = _override(value, below, f"{path}{name}.")
    return dataclasses.replace(section, **values)


def _check_field(name: str, known: Iterable[str], path: str) -> None:
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"config field {path}{name} does not exist; {hint}".rstrip("; "))


def _fields_of(kind: Any) -> tuple[str, ...]:
    return tuple(getattr(kind, "__dataclass_fields__", ()))


class _WrongType(ValueError):
    """A value has none of the types of its field."""


def _from_plain(value: Any, kind: Any, path: str) -> Any:
    """Builds a value of type `kind` from plain JSON values, according to type annotations."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Architecture and isinstance(value, dict):
        check_choice(value.get("family"), FAMILIES, f"{path}family")
        kind = FAMILIES[value["family"]].load_description()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        for name in value:
            _check_field(name, hints, path)
        return kind(**{n: _from_plain(v, hints[n], f"{path}{n}.") for n, v in value.items()})
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, dict):  # Of several sections, the one that has these fields.
            args = tuple(sorted(args, key=lambda arg: len(set(value) - set(_fields_of(arg)))))
        for arg in args:
            try:
                return _from_plain(value, arg, path)
            except _WrongType:
                continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_plain(v, args[0], path) for v in value)
    elif origin is Literal:
        return value  # The section checks it.
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind or (
        isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, kind)
    ):
        return value  # Not isinstance for plain values: True is an int.
    expected = kind.__name__ if isinstance(kind, type) and not args else kind
    raise _WrongType(
        f"config field {path.rstrip('.') or '(the whole)'} is {value!r}; expected {expected}"
    )
