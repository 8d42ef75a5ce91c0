"""The description of BERT, an encoder alone, and its published sizes by name."""

import dataclasses
from typing import Literal, Self

from t5jax.architectures.base import Architecture, Kind, description

BertActivation = Literal["gelu-exact", "gelu", "relu"]
BertHead = Literal["masked_lm", "sequence_classification", "token_classification", "pooler", "none"]


@description()
class BertConfig(Architecture):
    """BERT: an encoder that sees each text from both sides, and what predicts from its output.

    Devlin et al. 2019 (arXiv:1810.04805); Turc et al. 2019 (arXiv:1908.08962) for the small sizes.
    """

    family: Literal["bert"] = "bert"
    """Whose checkpoints hold such a network."""
    vocab_size: int = 30522
    """Rows of the embedding; may be more than the tokenizer has."""
    d_model: int = 768
    """Width of the residual stream; num_heads divides it."""
    d_ff: int = 3072
    """Width of the MLP's hidden layer."""
    num_layers: int = 12
    """Layers."""
    num_heads: int = 12
    """Attention heads of every layer."""
    max_positions: int = 512
    """Tokens of the longest row: one learned vector each."""
    type_vocab_size: int = 2
    """Kinds of text that were told apart in pretraining; every token here is of the first."""
    activation: BertActivation = "gelu-exact"
    """gelu-exact (by erf), gelu (by tanh) or relu: in the MLP and in the masked-LM head."""
    layer_norm_epsilon: float = 1e-12
    """Added to the variance in every LayerNorm."""
    dropout_rate: float = 0.1
    """Dropout in training, of embeddings, attention, both branches, and before a classifier."""
    initializer_range: float = 0.02
    """Standard deviation of initial matrices."""
    head: BertHead = "masked_lm"
    """masked_lm: the token at each position. sequence_classification: one of `labels` a text, from
    its first token. token_classification: one a word. pooler: nothing, but the layer over the
    first token that classification of texts begins with (Hugging Face: BertModel). none: nothing.
    """
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their ids; Hugging Face: id2label."""
    tie_word_embeddings: bool = True
    """masked_lm: one matrix for embedding and output, or a separate lm_head."""
    pad_token_id: int = 0
    """Id of padding."""
    cls_token_id: int = 101
    """Id that a text begins with, [CLS]."""
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
        """Whether the head gives classes."""
        return self.head in ("sequence_classification", "token_classification")

    @property
    def num_outputs(self) -> int:
        return len(self.labels) if self.classifies else super().num_outputs

    @property
    def has_pooler(self) -> bool:
        return self.head in ("pooler", "sequence_classification")

    @property
    def longest_row(self) -> int:
        return self.max_positions

    @property
    def start_token_id(self) -> int:
        return self.cls_token_id

    @property
    def inputs_keep_eos(self) -> bool:
        return True

    @property
    def tokenizer_ids(self) -> dict[str, str]:
        return {**super().tokenizer_ids, "cls_token_id": "bos_id"}

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    def with_head_of(self, other: Architecture) -> Self:
        """Returns this network under the head that another one asks for.

        It keeps its own where the other asks for no other: neither for one that is not the default,
        nor for labels; unless it has none that could be trained.
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


def check_labels(labels: tuple[str, ...], *, per_word: bool) -> None:
    """Raises ValueError for names of classes that targets could not be told by.

    Args:
      labels: the names.
      per_word: targets are labels with spaces between them.
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
