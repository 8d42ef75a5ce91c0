"""The loop: steps, evaluations, checkpoints."""

import dataclasses
import typing
from typing import Literal

from t5jax.checks import check_at_least, check_choice, check_positive

Attention = Literal["auto", "reference", "flash", "cudnn"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Steps, microbatches, logging."""

    steps: int = 1000
    """Total number of steps, counted from the beginning of the run even if it is resumed."""
    microbatches: int = 1
    """Split a batch into this many parts that are computed in sequence, to save memory; the result
    is the same."""
    log_every: int = 50
    """Steps between two reports of metrics."""
    seed: int = 0
    """Seed of the initial parameters and of dropout."""
    profile: int = 0
    """Steps to trace, once the first few are done; the trace is in `profile` of the run's folder,
    for xprof and TensorBoard. 0: none."""
    epochs: float | None = None
    """Passes over the training examples of one task, in place of `steps`, which is computed from
    it. None: `steps` counts."""
    attention: Attention = "auto"
    """Implementation of attention. flash: the kernel for TPU, which stores no scores. cudnn:
    NVIDIA's for GPU, which has no position bias of T5, soft cap, or dropout. reference: plain JAX.
    auto: flash on TPU; cudnn on GPU, except for layers that it cannot compute; otherwise
    reference."""

    def __post_init__(self) -> None:
        for name in ("steps", "microbatches", "log_every"):
            check_at_least(getattr(self, name), 1, f"train.{name}")
        check_at_least(self.profile, 0, "train.profile")
        check_choice(self.attention, typing.get_args(Attention), "train.attention")
        if self.epochs is not None:
            check_positive(self.epochs, "train.epochs")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training."""

    every: int = 500
    """Steps between two evaluations; there is one after the last step, too. 0: none."""
    split: str = "validation"
    """Split to evaluate on."""
    batch_size: int = 64
    """Rows per batch."""
    num_examples: int | None = None
    """Maximum number of examples of each task, drawn from all of them. None: all."""
    max_tokens: int | None = None
    """Maximum number of tokens to generate. None: data.targets_length."""
    generate: bool = True
    """Generate text and compute the tasks' own metrics, in addition to the loss."""
    num_samples: int = 3
    """Predictions to print for each task, if text is generated."""
    patience: int | None = None
    """Stop if the validation loss has not improved for this many evaluations. None: never."""

    def __post_init__(self) -> None:
        check_at_least(self.every, 0, "eval.every")
        check_at_least(self.batch_size, 1, "eval.batch_size")
        check_at_least(self.num_samples, 0, "eval.num_samples")
        for name in ("num_examples", "max_tokens", "patience"):
            if getattr(self, name) is not None:
                check_at_least(getattr(self, name), 1, f"eval.{name}")
        if self.max_tokens is not None and not self.generate:
            raise ValueError(
                f"eval.max_tokens is {self.max_tokens}, but eval.generate is False, so nothing is "
                "generated; leave one of them out"
            )
        if self.patience and not self.every:
            raise ValueError(
                f"eval.patience is {self.patience}, but eval.every is 0, so nothing is measured "
                "that could stop the run; set eval.every"
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = 500
    """Steps between two checkpoints; there is one after every evaluation and the last step, too."""
    keep: int = 2
    """Number of recent checkpoints to keep, in addition to the one with the lowest validation
    loss."""

    def __post_init__(self) -> None:
        check_at_least(self.every, 1, "checkpoint.every")
        check_at_least(self.keep, 1, "checkpoint.keep")
