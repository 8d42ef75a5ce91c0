"""Adapters over a frozen base: LoRA and soft prompts."""

import dataclasses
from typing import Literal

from t5jax.checks import check_at_least, check_choice, check_positive
from t5jax.config.patterns import parse_patterns


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv:2106.09685): a matrix W becomes W + scale A B. Only A and B are
    trained and saved; the parameters of init.model stay as they are."""

    rank: int = 8
    """R: a matrix [in, out] gets A [in, R] and B [R, out]."""
    alpha: float | None = None
    """The scale is alpha / rank. None: alpha is the rank, and the scale 1."""
    targets: tuple[str, ...] = ("query", "value")
    """Matrices to adapt: the last part of their paths, such as query or wi_0, or patterns of whole
    paths, such as decoder/*/mlp/*. all-linear: all matrices of all layers."""
    dropout: float = 0.0
    """Rate of dropout of an adapter's input, in training."""
    rslora: bool = False
    """The scale is alpha / sqrt(rank) (arXiv:2312.03732), with which high ranks learn as fast."""
    dora: bool = False
    """Also train the norm of each column (arXiv:2402.09353)."""
    ranks: tuple[str, ...] = ()
    """Other ranks for some of the targets, as PATTERN:RANK, such as */mlp/wo:16. The last match
    counts."""
    alphas: tuple[str, ...] = ()
    """Other values of alpha for some of the targets, as PATTERN:ALPHA."""
    base: Literal["int8", "int4", "nf4", "fp8"] | None = None
    """What the matrices of the base's layers are rounded to in memory, as in QLoRA (nf4;
    arXiv:2305.14314). None: they stay as they are."""
    train: tuple[str, ...] = ()
    """Parameters of the base to train and save too: patterns of their paths, such as */scale or
    lm_head/*. A new head is always trained."""

    def __post_init__(self) -> None:
        check_at_least(self.rank, 1, "adapter.rank")
        if self.alpha is not None:
            check_positive(self.alpha, "adapter.alpha")
        if not self.targets:
            raise ValueError(
                "adapter.targets is empty; expected matrices, such as query and value, or "
                "all-linear"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout is {self.dropout}; it must be in [0, 1)")
        check_choice(self.base, (None, "int8", "int4", "nf4", "fp8"), "adapter.base")
        parse_patterns(self.ranks, int, "adapter.ranks")
        parse_patterns(self.alphas, float, "adapter.alphas")


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Prompt tuning (arXiv:2104.08691): vectors that the encoder of a T5 reads before its input.
    Only they are trained and saved; the parameters of init.model stay as they are."""

    prompt_length: int = 20
    """The number of vectors. They begin as the embeddings of tokens that the seed draws."""

    def __post_init__(self) -> None:
        check_at_least(self.prompt_length, 1, "adapter.prompt_length")


AdapterConfig = LoraConfig | PromptConfig
