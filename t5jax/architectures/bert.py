"""The description of BERT, an encoder-only network, and its published sizes by name."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Self

from t5jax.architectures.base import Architecture, Classifier, Kind, description

BertActivation = Literal["gelu-exact", "gelu", "relu"]
BertHead = Literal["masked_lm", "sequence_classification", "token_classification", "pooler", "none"]


@description()
class BertConfig(Architecture):
    """BERT: a bidirectional encoder with a head.

    Devlin et al. 2019 (arXiv:1810.04805); Turc et al. 2019 (arXiv:1908.08962) for the small sizes.
    """

    family: Literal["bert"] = "bert"
    """The family, named after the `model_type` of its Hugging Face checkpoints."""
    vocab_size: int = 30522
    """Rows of the embedding; may be more than the tokenizer's vocabulary."""
    d_model: int = 768
    """Width of the residual stream, a multiple of num_heads."""
    d_ff: int = 3072
    """Width of the MLP's hidden layer."""
    num_layers: int = 12
    """Number of layers."""
    num_heads: int = 12
    """Attention heads of every layer."""
    max_positions: int = 512
    """Maximum length of a row in tokens; the number of learned positions."""
    type_vocab_size: int = 2
    """Number of token types: 0 for a text, 1 for the second of two."""
    activation: BertActivation = "gelu-exact"
    """gelu-exact (erf), gelu (tanh approximation) or relu, in the MLP and the masked-LM head."""
    layer_norm_epsilon: float = 1e-12
    """Added to the variance in every LayerNorm."""
    dropout_rate: float = 0.1
    """Dropout in training, of embeddings, attention and both branches, and before a classifier."""
    initializer_range: float = 0.02
    """Standard deviation of initial matrices."""
    head: BertHead = "masked_lm"
    """masked_lm: the token at each position. sequence_classification: one of `labels` per text,
    from its first token. token_classification: one per word. pooler: only the layer over the first
    token that precedes a sequence classifier (Hugging Face: BertModel). none: no head.
    """
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their ids; Hugging Face: id2label."""
    tie_word_embeddings: bool = True
    """masked_lm: use the embedding as the output matrix, or a separate lm_head."""
    pad_token_id: int = 0
    """Id of padding."""
    cls_token_id: int = 101
    """Id that begins a text, [CLS]."""
    eos_token_id: int = 102
    """Id that ends a text, [SEP]."""

    HEAD_REMEDY = "set model.head to masked_lm, sequence_classification or token_classification"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("layer_norm_epsilon", "initializer_range")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"model.d_model {self.d_model} is not divisible by model.num_heads "
                f"{self.num_heads}; a head is d_model / num_heads wide"
            )
        if not self.tie_word_embeddings and self.head != "masked_lm":
            raise ValueError(
                f"model.tie_word_embeddings is False, but model.head {self.head} has no output "
                "matrix over the vocabulary; leave it out"
            )
        self._check_labels()

    def _check_labels(self) -> None:
        if not self.classifies:
            if self.labels:
                raise ValueError(
                    f"model.labels are {self.labels}, but model.head {self.head} has no classes; "
                    "leave them out, or set model.head to sequence_classification or "
                    "token_classification"
                )
            return
        if len(self.labels) < 2:
            raise ValueError(
                f"model.labels are {self.labels}; model.head {self.head} needs two or more: the "
                "names of the classes"
            )
        check_labels(self.labels, per_word=self.head == "token_classification")

    @property
    def kind(self) -> Kind:
        return "encoder"

    @property
    def classifies(self) -> bool:
        """Whether the head is a classifier."""
        return self.head in ("sequence_classification", "token_classification")

    @property
    def num_outputs(self) -> int:
        return len(self.labels) if self.classifies else super().num_outputs

    @property
    def has_pooler(self) -> bool:
        return self.head in ("pooler", "sequence_classification")

    @property
    def reads_pairs(self) -> bool:
        return self.head == "sequence_classification" and self.type_vocab_size > 1

    @property
    def longest_row(self) -> int:
        return self.max_positions

    @property
    def start_token_id(self) -> int:
        return self.cls_token_id

    @property
    def prompt_start(self) -> tuple[int, ...]:
        return (self.cls_token_id,)

    @property
    def prompt_end(self) -> tuple[int, ...]:
        return (self.eos_token_id,)

    @property
    def tokenizer_ids(self) -> dict[str, str]:
        return {**super().tokenizer_ids, "cls_token_id": "bos_id"}

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    def with_head_of(self, other: Architecture) -> Self:
        """Returns this network with the head of another description.

        If the other has the default head without labels, this network keeps its own, unless that
        cannot be trained.
        """
        if not isinstance(other, BertConfig):
            return self
        head, labels = other.head, other.labels
        if head == BertConfig.head and self.num_outputs:
            return self
        if head == self.head:
            return dataclasses.replace(self, labels=labels or self.labels)
        tied = other.tie_word_embeddings
        return dataclasses.replace(self, head=head, labels=labels, tie_word_embeddings=tied)

    def as_classifier(self, head: Classifier, labels: Sequence[str]) -> Self:
        return dataclasses.replace(self, head=head, labels=tuple(labels), tie_word_embeddings=True)


def check_labels(labels: tuple[str, ...], *, per_word: bool) -> None:
    """Raises ValueError for names of classes that are ambiguous or cannot be read from targets.

    Args:
      labels: the names.
      per_word: targets are labels separated by spaces.
    """
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ValueError(f"model.labels has {twice[0]!r} twice; every class needs its own name")
    for label in labels:
        words = label.split(" ")
        if not label.isprintable() or not all(words) or (per_word and len(words) > 1):
            spaces = "without spaces" if per_word else "with single spaces, and none around it"
            raise ValueError(f"model.labels has {label!r}; expected a printable name {spaces}")


# --- Published sizes ----------------------------------------------------------------------------

_UNCASED, _CASED = 30522, 28996


def _bert(d_model: int, layers: int, vocab_size: int = _UNCASED) -> BertConfig:
    return BertConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=4 * d_model,
        num_layers=layers,
        num_heads=d_model // 64,
    )


SIZES: dict[str, BertConfig] = {
    "bert_tiny": _bert(128, 2),
    "bert_mini": _bert(256, 4),
    "bert_small": _bert(512, 4),
    "bert_medium": _bert(512, 8),
    "bert_base_uncased": _bert(768, 12),
    "bert_base_cased": _bert(768, 12, _CASED),
    "bert_large_uncased": _bert(1024, 24),
    "bert_large_cased": _bert(1024, 24, _CASED),
}
