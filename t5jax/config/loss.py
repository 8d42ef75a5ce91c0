"""The loss, and a teacher's part in it."""

import dataclasses

from t5jax.checks import check_at_least, check_positive


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The cross-entropy and its additional terms."""

    z_loss: float = 1e-4
    """Weight of log(Z)^2, which keeps the logits from drifting (T5X: 1e-4)."""
    label_smoothing: float = 0.0
    """Probability that is moved from the target to a uniform distribution over the vocabulary."""

    def __post_init__(self) -> None:
        check_at_least(self.z_loss, 0, "loss.z_loss")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"loss.label_smoothing is {self.label_smoothing}; it must be in [0, 1)"
            )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A teacher, whose probabilities of all tokens a run learns beside the targets."""

    teacher: str = ""
    """A Hugging Face Hub name or folder, a run, or one checkpoint of a run: a model of any size
    with the same vocabulary. Empty: none."""
    temperature: float = 2.0
    """Divides the logits of both; above 1, less probable tokens count more. The loss is multiplied
    by its square, so that the gradient keeps its size (arXiv:1503.02531)."""
    weight: float = 0.5
    """Share of the teacher's loss, KL(teacher || student) for each token; the cross-entropy with
    the targets has the rest."""
    cache: str = ""
    """Folder of what the teacher says: a row is asked for once, and read by later epochs and other
    students. Empty: the teacher computes in each step."""
    top_k: int | None = None
    """cache: how many of the largest probabilities of a target are kept; the others count as one.
    None: all."""
    init_layers: bool = False
    """Begin with the teacher's parameters, and of its layers with as many as the student has, from
    the first to the last at equal distances. Both must be equally wide."""

    def __post_init__(self) -> None:
        check_positive(self.temperature, "distill.temperature")
        if not 0 < self.weight <= 1:
            raise ValueError(f"distill.weight is {self.weight}; it must be in (0, 1]")
        if self.top_k is not None:
            check_at_least(self.top_k, 1, "distill.top_k")
            if not self.cache:
                raise ValueError(
                    f"distill.top_k is {self.top_k}, but distill.cache is empty, so nothing is "
                    "kept; set it, or leave the other out"
                )
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if changed and not self.teacher:
            raise ValueError(
                f"distill.{changed[0]} is {getattr(self, changed[0])}, but distill.teacher is "
                "empty, so it has no effect; set it, or leave the other out"
            )
