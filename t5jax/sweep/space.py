"""What a sweep varies: fields of a config, and the values that each may take."""

import ast
import dataclasses
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from t5jax.checks import did_you_mean, users_error
from t5jax.config import Config, override

FORMS = "log(LOW, HIGH), uniform(LOW, HIGH), int(LOW, HIGH[, STEP]), choice(A, B, ...)"


@dataclasses.dataclass(frozen=True)
class Values:
    """The values of one field."""

    kind: str
    """"log", "uniform", "int" or "choice"."""
    arguments: tuple[Any, ...]

    def suggest(self, trial: Any, name: str) -> Any:
        """Returns the value that an optuna.Trial takes."""
        if self.kind == "choice":
            return trial.suggest_categorical(name, self.arguments)
        low, high, *step = self.arguments
        if self.kind == "int":
            return trial.suggest_int(name, low, high, step=step[0] if step else 1)
        return trial.suggest_float(name, low, high, log=self.kind == "log")

    def grid(self, name: str) -> list[Any]:
        """Returns all values.

        Raises:
          ValueError: for a range of real numbers, which has no end of them.
        """
        if self.kind == "choice":
            return list(self.arguments)
        if self.kind == "int":
            low, high, *step = self.arguments
            return list(range(low, high + 1, step[0] if step else 1))
        raise ValueError(
            f"--space {name}={self.kind}(...) has no end of values for a grid; expected "
            "choice(...) or int(...), or take --sampler random"
        )

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(repr, self.arguments))})"


@dataclasses.dataclass(frozen=True)
class Space:
    """Fields with their values, or a function from a trial to fields and values."""

    fields: tuple[tuple[str, Values], ...] = ()
    function: Callable[[Any], dict[str, Any]] | None = None
    name: str = ""
    """Where the function is: FILE.py:NAME."""

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Returns the value of each field in a trial."""
        if self.function is None:
            return {name: values.suggest(trial, name) for name, values in self.fields}
        try:
            found = self.function(trial)
        except Exception as error:  # A user's own code.
            raise ValueError(f"--space {self.name} fails: {users_error(error)}") from error
        if not isinstance(found, dict):
            raise ValueError(
                f"{self.name} returned a {type(found).__name__}; expected a dict of fields and "
                'values, such as {"optimizer.learning_rate": trial.suggest_float(...)}'
            )
        return found

    def cells(self) -> Iterator[dict[str, Any]]:
        """Yields every combination of values.

        Raises:
          ValueError: if there is no end of them, or they are a function's.
        """
        if self.function is not None:
            raise ValueError(
                f"--space {self.name} is a function, of which there is no grid; take --sampler "
                "tpe or random"
            )
        names = [name for name, _ in self.fields]
        for values in itertools.product(*(values.grid(name) for name, values in self.fields)):
            yield dict(zip(names, values, strict=True))

    def __str__(self) -> str:
        return self.name or "; ".join(f"{name}={values}" for name, values in self.fields)


def parse_space(texts: Sequence[str], config: Config) -> Space:
    """Returns the space of `FIELD=VALUES` texts, or of one `FILE.py:FUNCTION`.

    Args:
      texts: such as "optimizer.learning_rate=log(1e-5, 1e-2)".
      config: has the fields; one value of each is tried in it.
    Raises:
      ValueError: for what is no field, no values of its type, or a function that does not exist.
    """
    if not texts:
        raise ValueError(
            "a sweep has nothing to vary; give --space, such as "
            '--space "optimizer.learning_rate=log(1e-5, 1e-2)"'
        )
    functions = [text for text in texts if re.fullmatch(r"[^=]+\.py:\w+", text)]
    if functions:
        if len(texts) > 1:
            raise ValueError(f"--space has a function, {functions[0]}, and more; give one of them")
        return _function(functions[0])
    fields = tuple(_field(text, config) for text in texts)
    names = [name for name, _ in fields]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--space has {', '.join(sorted(twice))} twice; give each field once")
    return Space(fields)


def _field(text: str, config: Config) -> tuple[str, Values]:
    name, equals, form = (part.strip() for part in text.partition("="))
    found = re.fullmatch(r"(\w+)\((.*)\)", form, re.DOTALL)
    if not equals or not found:
        raise ValueError(f"--space {text!r} cannot be read; expected FIELD=VALUES, one of {FORMS}")
    kind, inside = found[1], found[2]
    if kind not in ("log", "uniform", "int", "choice"):
        hint = did_you_mean(kind, ["log", "uniform", "int", "choice"])
        raise ValueError(f"--space {text!r}: there is no {kind}(...); {hint}expected {FORMS}")
    arguments = tuple(_literal(part) for part in _split(inside))
    _check(text, kind, arguments)
    values = Values(kind, arguments)
    for value in arguments if kind == "choice" else arguments[:2]:
        override(config, {name: value})  # Names a field that does not exist, or a wrong type.
    return name, values


def _split(text: str) -> list[str]:
    """Returns the arguments, which commas part where they are in no bracket and no quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _literal(text: str) -> Any:
    """Returns a Python literal, or the text itself: cosine, say."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check(text: str, kind: str, arguments: tuple[Any, ...]) -> None:
    if kind == "choice":
        if not arguments:
            raise ValueError(f"--space {text!r} has no values; expected choice(A, B, ...)")
        if bad := [a for a in arguments if not isinstance(a, str | int | float | bool | None)]:
            raise ValueError(
                f"--space {text!r}: {bad[0]!r} cannot be a value of a study; expected numbers, "
                "texts, True, False or None"
            )
        return
    numbers = (int,) if kind == "int" else (int, float)
    lengths = (2, 3) if kind == "int" else (2,)
    is_number = all(isinstance(a, numbers) and not isinstance(a, bool) for a in arguments)
    if len(arguments) not in lengths or not is_number:
        raise ValueError(f"--space {text!r} cannot be read; expected one of {FORMS}")
    low, high = arguments[:2]
    if not low < high or (kind == "log" and low <= 0) or (len(arguments) == 3 and arguments[2] < 1):
        above = "above 0 and " if kind == "log" else ""
        raise ValueError(
            f"--space {text!r}: expected a LOW {above}below HIGH, and a STEP of at least 1"
        )


def _function(text: str) -> Space:
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not path.exists():
        raise ValueError(f"--space {text}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"t5jax_space_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # A user's own code.
        raise ValueError(f"--space {text} fails: {users_error(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--space {text}: {path} has no function {name}")
    return Space(function=function, name=text)
