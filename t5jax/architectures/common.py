"""What the descriptions of all networks share: choices, dtypes, and checks of their fields."""

import dataclasses
import typing
from typing import Any, Literal

from t5jax.checks import check_at_least, check_choice, check_positive

Dtype = Literal["float32", "bfloat16"]
RematPolicy = Literal["none", "minimal", "full"]
Kind = Literal["encoder_decoder", "decoder", "encoder"]
"""What a network reads and writes: inputs and targets apart, one text, or the inputs alone."""


def check_dtype(value, name):
    """Raises ValueError for a dtype that networks are not computed in."""
    if value == "float16":
        raise ValueError(
            f"{name} is float16; T5's activations overflow float16 (above 65504) and turn into "
            "NaN; use bfloat16 or float32"
        )
    check_choice(value, Dtype.__args__, name)


def check_fields(model: Any, *, may_be_zero: tuple[str, ...] = ()) -> None:
    """Checks what can be told from a field's type or name, whatever the network.

    Args:
      model: a description: a dataclass with vocab_size, dtype, param_dtype and dropout_rate.
      may_be_zero: whole numbers that may be 0; all others are at least 1, or None where they may.
    Raises:
      ValueError: for a choice, dtype, size, token id or dropout rate that cannot be.
    """
    for name in ("dtype", "param_dtype"):
        check_dtype(getattr(model, name), f"model.{name}")
    hints = typing.get_type_hints(type(model))
    for field in dataclasses.fields(model):
        value, kind = getattr(model, field.name), hints[field.name]
        if value is None and type(None) in typing.get_args(kind):
            continue
        if typing.get_origin(kind) is Literal:
            check_choice(value, kind.__args__, f"model.{field.name}")
        elif field.name.endswith("_token_id"):
            if not 0 <= value < model.vocab_size:
                raise ValueError(
                    f"model.{field.name} is {value}; it must be in [0, {model.vocab_size}), "
                    "the vocabulary"
                )
        elif kind in (int, int | None):
            check_at_least(value, 0 if field.name in may_be_zero else 1, f"model.{field.name}")
    check_dropout(model.dropout_rate, "model.dropout_rate")


def check_above_0(model: Any, *names: str) -> None:
    """Raises ValueError for a field that is not above 0."""
    for name in names:
        check_positive(getattr(model, name), f"model.{name}")


def check_dropout(rate: float, name: str) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"{name} is {rate}; it must be in [0, 1)")
