"""The base class of all descriptions, and the questions that other code asks about a network.

Code outside a family's own files does not depend on the family; it uses these properties.
"""

import abc
import dataclasses
import inspect
import itertools
import typing
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

from t5jax.checks import check_at_least, check_choice, check_positive

Dtype = Literal["float32", "bfloat16"]
RematPolicy = Literal["none", "minimal", "mlp", "attention", "full"]
"""What of a layer is computed again, the least first; see `remat_policy` in models/layers.py."""
Kind = Literal["encoder_decoder", "decoder", "encoder"]
"""Whether a network has an encoder, a decoder, or both."""
Head = Literal[
    "seq2seq_lm",
    "causal_lm",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "pooler",
    "none",
]
"""What a network predicts: targets from inputs, the next token, masked tokens, the class of a text,
the class of each word; or nothing."""

Classifier = Literal["sequence_classification", "token_classification"]
"""The heads that have classes."""

_Class = TypeVar("_Class", bound=type)


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def description(**defaults: Any) -> Callable[[_Class], _Class]:
    """Makes `Architecture` or a subclass a frozen dataclass.

    In JSON and in the help, a class's own fields come before those that it inherits.

    Args:
      **defaults: new defaults of inherited fields.
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
class Architecture(abc.ABC):
    """The description of a network; the base class of all families' descriptions."""

    if typing.TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    family: str = ""
    """The family, named after the `model_type` of its Hugging Face checkpoints."""
    vocab_size: int = 1
    """Rows of the embedding; may be more than the tokenizer's vocabulary."""
    d_model: int = 1
    """Width of the residual stream, of the encoder's if there is an encoder."""
    pad_token_id: int = 0
    """Id of padding."""
    eos_token_id: int = 0
    """Id that ends a text."""
    dropout_rate: float = 0.0
    """Dropout in training."""
    dtype: Dtype = "float32"
    """Dtype of activations; statistics of norms, rotary embeddings, softmax and logits are float32.
    """
    param_dtype: Dtype = "float32"
    """Dtype of parameters; the optimizer's state is always float32."""
    scan_layers: bool = True
    """Scan over the layers (fast to compile) or unroll them (faster on CPU). The parameters are the
    same."""
    remat: RematPolicy = "none"
    """What of each layer is computed again in the backward pass, to save memory. none: nothing.
    minimal: all but products with weights and attention. mlp: all but the MLP's first products.
    attention: all but attention. full: everything."""

    kv_cache: Literal["int8"] | None = None
    """Decoding: keep keys and values in int8, with a scale for each token and head. None: in
    `dtype`."""

    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ()
    """Integer fields that may be 0; all others must be at least 1, or None if they are optional."""
    TAKES_SOFT_PROMPTS: ClassVar[bool] = False
    """Whether the encoder reads a soft prompt before its input."""
    HEAD_REMEDY: ClassVar[str] = "take a model with a decoder"
    """What to do if a head is needed, but there is none; part of an error message."""

    def __post_init__(self) -> None:
        """Checks fields by their type or name, for all networks.

        Raises:
          ValueError: if a choice, dtype, size, token id or dropout rate is invalid.
        """
        for name in ("dtype", "param_dtype"):
            check_dtype(getattr(self, name), f"model.{name}")
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), hints[field.name]
            if value is None and type(None) in typing.get_args(kind):
                continue
            if typing.get_origin(kind) is typing.Union:  # Of a choice and None.
                kind = typing.get_args(kind)[0]
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
        if self.kv_cache and self.kind == "encoder":
            raise ValueError(
                f"model.kv_cache is {self.kv_cache}, but this {self.family} is an encoder, which "
                "keeps no keys and values; leave it out"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"model.dropout_rate is {self.dropout_rate}; it must be in [0, 1)")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            check_positive(getattr(self, name), f"model.{name}")

    # --- Outputs ----------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def kind(self) -> Kind:
        """What the network reads and writes."""

    @property
    def head(self) -> Head:
        """What the network predicts."""
        heads: dict[Kind, Head] = {"encoder_decoder": "seq2seq_lm", "decoder": "causal_lm"}
        return heads.get(self.kind, "none")

    @property
    def num_outputs(self) -> int:
        """Width of the logits; 0 if there are none, so that the network cannot be trained."""
        return 0 if self.head in ("none", "pooler") else self.vocab_size

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their ids; empty if it is not a classifier."""
        return ()

    @property
    def has_pooler(self) -> bool:
        """Whether there is a layer that pools a text into one vector."""
        return False

    @property
    def reads_pairs(self) -> bool:
        """Whether inputs may be two texts, which the model tells apart by their token types."""
        return False

    def check_head(self) -> None:
        """Raises ValueError if the network has no head, and so cannot be trained."""
        if not self.num_outputs:
            raise ValueError(
                f"this {self.family} is an encoder without a head: it has no logits, and nothing "
                f"that could be trained; {self.HEAD_REMEDY}, or use its encodings (`t5jax embed`)"
            )

    def with_head_of(self, other: "Architecture") -> Self:
        """Returns this network with the head that another description has."""
        return self

    def as_classifier(self, head: Classifier, labels: Sequence[str]) -> Self:
        """Returns this network with a classifier as its head; itself if it can have none."""
        return self

    def encoder_alone(self) -> Self | None:
        """Returns the description of this network's encoder; None if it cannot be used alone."""
        return None

    # --- Inputs and answers -----------------------------------------------------------------------

    @property
    def longest_row(self) -> int | None:
        """Maximum length of a row in tokens; None if it is not limited."""
        return None

    @property
    @abc.abstractmethod
    def start_token_id(self) -> int:
        """Id that begins the rows for which targets are predicted."""

    @property
    def prompt_start(self) -> tuple[int, ...]:
        """What inputs begin with if the tokenizer's files do not say."""
        return ()

    @property
    def prompt_end(self) -> tuple[int, ...]:
        """What inputs end with if the tokenizer's files do not say."""
        return ()

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text; the first is the one used in training."""
        return (self.eos_token_id,)

    @property
    def pads_with_eos(self) -> bool:
        """Whether an encoder's padding has the id of what ends a text."""
        return self.kind != "decoder" and self.pad_token_id == self.eos_token_id

    def _check_ends(self) -> None:
        ends = self.end_token_ids
        if len(set(ends)) < len(ends) or not all(0 <= i < self.vocab_size for i in ends):
            raise ValueError(
                f"model.more_eos_token_ids is {ends[1:]}; expected different ids in "
                f"[0, {self.vocab_size}), the vocabulary, other than model.eos_token_id "
                f"{self.eos_token_id}"
            )

    @property
    def tokenizer_ids(self) -> dict[str, str]:
        """Maps the fields whose ids must agree with the tokenizer's to attributes of `Tokenizer`.

        A decoder recognizes padding by segment ids, so its id does not matter.
        """
        padding = {} if self.kind == "decoder" else {"pad_token_id": "pad_id"}
        return {"eos_token_id": "eos_id", **padding}

    def answer(self, tokens: Sequence[int]) -> list[int]:
        """Returns the generated tokens before the first one that ends a text."""
        assert self.kind != "encoder", f"{self.family} writes nothing"
        ends = self.end_token_ids
        return list(itertools.takewhile(lambda i: i not in ends, tokens))

    # --- Settings of a run ------------------------------------------------------------------------

    COMPUTE_FIELDS: ClassVar[tuple[str, ...]] = (
        *("dtype", "param_dtype", "scan_layers", "remat", "dropout_rate", "kv_cache"),
    )
    """Fields that do not affect the names and values of parameters: each run sets them,
    independently of how the weights were trained."""

    def computed_as(self, other: "Architecture") -> Self:
        """Returns this network with another's `COMPUTE_FIELDS`."""
        return dataclasses.replace(self, **{f: getattr(other, f) for f in self.COMPUTE_FIELDS})

    def has_params_of(self, other: "Architecture") -> bool:
        """Returns whether both describe the same network, apart from `COMPUTE_FIELDS`."""
        return self.computed_as(other) == other


def check_dtype(value: str, name: str) -> None:
    """Raises ValueError for a dtype that is not supported."""
    if value == "float16":
        raise ValueError(
            f"{name} is float16; activations of trained networks overflow float16 (above 65504) "
            "and turn into NaN; use bfloat16 or float32"
        )
    check_choice(value, typing.get_args(Dtype), name)
