"""What the descriptions of all networks share, and what they answer to those that use a network.

Nothing outside of a family's own files asks which family a description is of: it asks here.
"""

import dataclasses
import inspect
import itertools
import typing
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

from t5jax.checks import check_at_least, check_choice, check_positive

Dtype = Literal["float32", "bfloat16"]
RematPolicy = Literal["none", "minimal", "full"]
Kind = Literal["encoder_decoder", "decoder", "encoder"]
"""What a network reads and writes: inputs and targets apart, one text, or the inputs alone."""
Head = Literal[
    "seq2seq_lm",
    "causal_lm",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "pooler",
    "none",
]
"""What a network predicts: the text that answers another, the rest of a text, its hidden tokens, a
class for a text, a class for each word; or nothing."""

_Class = TypeVar("_Class", bound=type)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def description(**defaults: Any) -> Callable[[_Class], _Class]:
    """Makes a class a frozen dataclass, for `Architecture` and the classes below it.

    Fields that a class writes down come before those that it inherits, in JSON and in the help.

    Args:
      **defaults: of fields that it inherits, where it has others.
    """

    def decorate(cls: _Class) -> _Class:
        own = inspect.get_annotations(cls)
        inherited: dict[str, Any] = {}
        for base in reversed(cls.__mro__[1:]):
            inherited |= inspect.get_annotations(base)
        for name, value in defaults.items():
            setattr(cls, name, value)
        cls.__annotations__ = own | {name: inherited[name] for name in defaults}
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)  # Changes the class itself.
        fields: dict[str, Any] = cls.__dict__["__dataclass_fields__"]
        ordered = {name: fields[name] for name in own if name in fields} | fields
        fields.clear()
        fields.update(ordered)
        return cls

    return decorate


@description()
class Architecture:
    """What a network is: every description of one is of a class below this one."""

    if typing.TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    family: str = ""
    """Whose checkpoints hold such a network."""
    vocab_size: int = 1
    """Rows of the embedding; may be more than the tokenizer has."""
    d_model: int = 1
    """Width of the residual stream; where there is an encoder, of the encoder's."""
    pad_token_id: int = 0
    """Id of padding."""
    eos_token_id: int = 0
    """Id that ends a text."""
    dropout_rate: float = 0.0
    """Dropout in training."""
    dtype: Dtype = "float32"
    """What activations are computed in; norms' statistics, rotations, softmax and logits stay
    float32."""
    param_dtype: Dtype = "float32"
    """What parameters are stored in; optimizer states are float32 always."""
    scan_layers: bool = True
    """Compile one layer and loop over it (fast to compile), or unroll the loop (faster to run
    on CPU). The parameters are the same."""
    remat: RematPolicy = "none"
    """Recompute in the backward pass: nothing, all but weight products (minimal), or all (full)."""

    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ()
    """Whole numbers that may be 0; all others are at least 1, or None where they may be."""
    HEAD_REMEDY: ClassVar[str] = "take a model with a decoder"
    """What to do where there is no head, but one is needed."""

    def __post_init__(self) -> None:
        """Checks what can be told from a field's type or name, whatever the network.

        Raises:
          ValueError: for a choice, dtype, size, token id or dropout rate that cannot be.
        """
        for name in ("dtype", "param_dtype"):
            check_dtype(getattr(self, name), f"model.{name}")
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), hints[field.name]
            if value is None and type(None) in typing.get_args(kind):
                continue
            if typing.get_origin(kind) is Literal:
                check_choice(value, typing.get_args(kind), f"model.{field.name}")
            elif field.name.endswith("_token_id"):
                if not 0 <= value < self.vocab_size:
                    raise ValueError(
                        f"model.{field.name} is {value}; it must be in [0, {self.vocab_size}), "
                        "the vocabulary"
                    )
            elif kind in (int, int | None):
                least = 0 if field.name in self.MAY_BE_ZERO else 1
                check_at_least(value, least, f"model.{field.name}")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"model.dropout_rate is {self.dropout_rate}; it must be in [0, 1)")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            check_positive(getattr(self, name), f"model.{name}")

    # --- What it predicts -------------------------------------------------------------------------

    @property
    def kind(self) -> Kind:
        raise NotImplementedError

    @property
    def head(self) -> Head:
        """What it predicts."""
        heads: dict[Kind, Head] = {"encoder_decoder": "seq2seq_lm", "decoder": "causal_lm"}
        return heads.get(self.kind, "none")

    @property
    def num_outputs(self) -> int:
        """Width of the logits; 0 where there are none, and so nothing that could be trained."""
        return 0 if self.head in ("none", "pooler") else self.vocab_size

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their ids; none where there is no classifier."""
        return ()

    @property
    def has_pooler(self) -> bool:
        """Whether a layer makes one vector of a text's many."""
        return False

    def check_head(self) -> None:
        """Raises ValueError for a network that predicts nothing, and so cannot be trained."""
        if not self.num_outputs:
            raise ValueError(
                f"this {self.family} is an encoder without a head: it has no logits, and nothing "
                f"that could be trained; {self.HEAD_REMEDY}, or use its encodings (`t5jax embed`)"
            )

    def with_head_of(self, other: "Architecture") -> Self:
        """Returns this network under the head that another description asks for."""
        return self

    def encoder_alone(self) -> Self | None:
        """Returns the description of this network's encoder; None where it cannot stand alone."""
        return None

    # --- What it reads and writes -----------------------------------------------------------------

    @property
    def longest_row(self) -> int | None:
        """Tokens that a row may have; None where positions go on for ever."""
        return None

    @property
    def start_token_id(self) -> int:
        """Id that a row whose tokens have targets begins with."""
        raise NotImplementedError

    @property
    def inputs_start_id(self) -> int | None:
        """Id that inputs are read behind; None: they are read as they are."""
        return self.start_token_id

    @property
    def inputs_keep_eos(self) -> bool:
        """Whether the eos behind an example's inputs is read."""
        return self.inputs_start_id is None

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text, first the one that it was trained with."""
        return (self.eos_token_id,)

    @property
    def tokenizer_ids(self) -> dict[str, str]:
        """Fields whose ids must be a tokenizer's, and what `t5jax.tokenizers.Tokenizer` calls it.

        A decoder's padding is told by its place, not by its id.
        """
        padding = {} if self.kind == "decoder" else {"pad_token_id": "pad_id"}
        return {"eos_token_id": "eos_id", **padding}

    def ended_by(self, eos_id: int) -> Self:
        """Returns the same with `eos_id` first among the ids that end a text, if it is there."""
        return self

    def prompt(self, inputs: Sequence[int]) -> list[int]:
        """Returns what it reads of an example's inputs, with the eos behind them, as in training.

        Where nothing is read, and nothing begins what is read, it reads eos.
        """
        if not self.inputs_keep_eos:
            inputs = without_eos(inputs, self.eos_token_id)
        if self.inputs_start_id is None:
            return list(inputs) or [self.eos_token_id]
        return [self.inputs_start_id, *inputs]

    def answer(self, tokens: Sequence[int]) -> list[int]:
        """Returns the tokens that were written before the first that ends a text."""
        assert self.kind != "encoder", f"{self.family} writes nothing"
        ends = self.end_token_ids
        return list(itertools.takewhile(lambda i: i not in ends, tokens))

    # --- What a run decides -----------------------------------------------------------------------

    COMPUTE_FIELDS: ClassVar[tuple[str, ...]] = (
        *("dtype", "param_dtype", "scan_layers", "remat", "dropout_rate"),
    )
    """Fields that leave the parameters' names and values as they are: a run decides them for
    itself, whatever the weights were made with."""

    def computed_as(self, other: "Architecture") -> Self:
        """Returns this network with another's `COMPUTE_FIELDS`."""
        return dataclasses.replace(self, **{f: getattr(other, f) for f in self.COMPUTE_FIELDS})

    def has_params_of(self, other: "Architecture") -> bool:
        """Returns whether the two are one network, whose parameters are the same."""
        return self.computed_as(other) == other


def without_eos(inputs: Any, eos_id: int) -> Any:
    """Returns inputs without the eos at their end: where a decoder reads on, nothing has ended."""
    return inputs[:-1] if len(inputs) and inputs[-1] == eos_id else inputs


def check_dtype(value: str, name: str) -> None:
    """Raises ValueError for a dtype that networks are not computed in."""
    if value == "float16":
        raise ValueError(
            f"{name} is float16; activations of trained networks overflow float16 (above 65504) "
            "and turn into NaN; use bfloat16 or float32"
        )
    check_choice(value, typing.get_args(Dtype), name)
