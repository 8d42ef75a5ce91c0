"""Options of a command: a dataclass in, its instance out. tyro does the work."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from t5jax.checks import check_at_least, did_you_mean


def parse(
    kind,
    args: Sequence[str],
    *,
    prog: str,
    default=None,
    positional: bool = False,
    description=None,
    return_unknown: bool = False,
):
    """Returns the dataclass that the arguments describe; prints help, or exits with 2.

    Args:
      kind: the dataclass; its docstring is the help, and so are those of its fields.
      args: of the command line, behind the command.
      prog: what the help calls the command.
      default: an instance of `kind`, where its fields' own defaults are not meant.
      positional: required fields are given by position, not by name.
      description: in place of the dataclass's docstring.
      return_unknown: return (dataclass, arguments that it does not know) instead.
    """
    import tyro

    # A field of several dataclasses, such as `model`, is of the one that its default is of.
    markers: tuple = (tyro.conf.AvoidSubcommands,)
    if positional:
        markers += (tyro.conf.PositionalRequiredArgs, tyro.conf.PositionalMetavarFromFieldName)
    more: dict[str, Any] = {"return_unknown_args": True} if return_unknown else {}
    return tyro.cli(
        kind,
        args=_join_repeated(args, set(_lists(kind if default is None else default))),
        prog=prog,
        description=description or inspect.cleandoc(kind.__doc__),
        default=tyro.MISSING_NONPROP if default is None else default,
        config=markers,
        **more,
    )


def _lists(kind: Any, prefix: str = "--") -> Iterator[str]:
    """Yields the options of a dataclass, or of an instance, that take several values."""
    for field in dataclasses.fields(kind):
        value = getattr(kind, field.name, None)
        name = f"{prefix}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _lists(value, f"{name}.")
        elif isinstance(value, tuple) or "tuple[" in str(field.type):
            yield name


def _join_repeated(args: Sequence[str], lists: Collection[str]) -> list[str]:
    """Returns the arguments with all values of a list behind its first option.

    Where an option is given twice, argparse would take the last one alone, without a word.
    """
    given = [word.partition("=")[0].replace("_", "-") for word in args if word.startswith("--")]
    lists = {name for name in lists if given.count(name) > 1}
    parts: list[list[str]] = [[]]
    for word in args:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            parts[-1].append(word)
        elif equals and name.replace("_", "-") in lists:
            parts.append([name, value])
        else:
            parts.append([word])
    joined, first = [], {}
    for part in parts:
        name = part[0].replace("_", "-") if part else ""
        if name in first:
            first[name].extend(part[1:])
            continue
        joined.append(part)
        if name in lists:
            first[name] = part
    return [word for part in joined for word in part]


def take_models(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the values of all `--model VALUE`, "" for a missing one, and the other arguments."""
    models, rest = [], []
    words = iter(args)
    for word in words:
        if word == "--model":
            models.append(next(words, ""))
        elif word.startswith("--model="):
            models.append(word.removeprefix("--model="))
        else:
            rest.append(word)
    return models, rest


def model_first(args: Sequence[str]) -> list[str]:
    """Returns the arguments with MODEL in front, where it was given as `--model MODEL`.

    Raises:
      ValueError: if a model is given in both ways, or twice, or is missing behind --model.
    """
    models, rest = take_models(args)
    if not models:
        return rest
    if any(not model or model.startswith("--") for model in models):
        raise ValueError("--model has no value; give a model, either as MODEL or as --model MODEL")
    given = [*models, *(word for word in rest[:1] if not word.startswith("-"))]
    if len(given) > 1:
        raise ValueError(
            f"there are {len(given)} models, {' and '.join(given)}; give one, either as MODEL or "
            "as --model MODEL"
        )
    return [*models, *rest]


def take_option(args: Sequence[str], name: str) -> tuple[list[str], str | None]:
    """Returns the arguments without `--name VALUE`, and the value, or None if it is not given.

    Raises:
      ValueError: if the value is missing.
    """
    rest, value = [], None
    words = iter(args)
    for word in words:
        if word == name:
            value = next(words, "")
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
            continue
        if not value or value.startswith("--"):
            raise ValueError(f"{name} has no value; expected {name} FILE")
    return rest, value


def fields(options) -> dict:
    """Returns a dataclass's fields as arguments, without copying what they hold."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def check_options(options, least: int, *names: str, section: str = "") -> None:
    """Raises ValueError for an option, where it is given, that is below `least`."""
    for name in names:
        if getattr(options, name) is not None:
            check_at_least(getattr(options, name), least, _flag(section + name))


def check_used(options, by: str, *names: str, section: str = "") -> None:
    """Raises ValueError for an option that is set, where the one that alone uses it is not."""
    if getattr(options, by):
        return
    default = {field.name: field.default for field in dataclasses.fields(options)}
    for name in names:
        if getattr(options, name) != default[name]:
            raise ValueError(
                f"{_flag(section + name)} is {getattr(options, name)}, but without "
                f"{_flag(section + by)} it has no effect; give {_flag(section + by)}, or leave it "
                "out"
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def choose(name: str, commands: Mapping[str, Any], what: str = "command") -> Any:
    """Returns what is known by a name.

    Raises:
      ValueError: if there is none, with the nearest one.
    """
    if name not in commands:
        hint = did_you_mean(name, commands)
        raise ValueError(f"there is no {what} {name!r}; {hint}known are {', '.join(commands)}")
    return commands[name]


def run_group(
    args: Sequence[str], usage: str, group: str, commands: Mapping[str, Callable]
) -> int | None:
    """Runs a command of a group such as `t5jax tasks`; without one prints what there is."""
    if not args or args[0] in ("-h", "--help"):
        print(usage, end="")
        return 0
    return choose(args[0], commands, f"command {group}")(list(args[1:]))
