"""What Orbax raises where a checkpoint cannot be read or written, in one line."""

import contextlib
import json
from pathlib import Path

# How TensorStore begins to say that a file does not hold what it should, or is missing.
_LOST = ("DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND")


@contextlib.contextmanager
def naming_errors(checkpoint: Path):
    """Says which checkpoint an error inside is about, and whether the checkpoint is damaged.

    Only what cannot be decoded or is missing is damage: another error, such as missing permission
    or memory, says nothing about the checkpoint, which must not be deleted then.
    """
    if "\\" in str(checkpoint.absolute()):
        raise ValueError(
            f"checkpoint {checkpoint.absolute()} cannot be read where it is, since TensorStore "
            "takes a backslash for a slash; rename the folder"
        )
    try:
        yield
    except Exception as error:
        # A KeyError is of a part that Orbax does not find, such as "state".
        undecodable = (FileNotFoundError, KeyError, json.JSONDecodeError, UnicodeDecodeError)
        first = first_cause(error)
        reason = first_line(first)
        if isinstance(error, undecodable) or str(first).startswith(_LOST):
            raise ValueError(
                f"checkpoint {checkpoint} is damaged ({reason}); delete its folder to go on from "
                "the one before it, or copy it again"
            ) from error
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {reason}") from error


def first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:  # Orbax wraps what TensorStore says of an array.
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error) or type(error).__name__).splitlines()[0][:200]
