"""What is measured of a run, and what is done where training goes wrong."""

import dataclasses
import math
import typing
from typing import Literal

from t5jax.checks import check_at_least, check_choice

OnNonFinite = Literal["stop", "skip", "rewind"]
OnSpike = Literal["ignore", "stop", "skip", "rewind"]
Tracker = Literal["trackio", "wandb"]


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What is measured of a run, and what is done where training goes wrong."""

    norms: bool = True
    """Report the norms of gradients, parameters and updates by group, such as encoder/attention,
    every train.log_every steps. Each step computes them, so that a run does not depend on how often
    it reports."""
    on_nonfinite: OnNonFinite = "stop"
    """Where the loss or the gradient is NaN or infinite. stop: end with an error; the last
    checkpoint stands. skip: pass over the batch, as if it had not been in the data. rewind: go back
    to the last checkpoint, and pass over all batches since then. Either way the batch is kept in
    the run's folder, as text."""
    on_spike: OnSpike = "ignore"
    """Where the loss of a step is far above the recent ones."""
    spike_threshold: float | None = None
    """How far above: the median of the recent losses + spike_threshold x their standard deviation,
    which is estimated from the median of the distances to the median. None: 10."""
    spike_window: int | None = None
    """Number of recent losses. None: 100. Until there are 20, no loss is a spike."""
    most_passed_over: int = 20
    """How many batches may be skipped, and how often a run may rewind, until it stops."""
    trackers: tuple[Tracker, ...] = ()
    """Where metrics are also written: trackio, wandb (pip install 't5jax[trackio,wandb]'). Their
    own environment variables say where to, and hold the keys: WANDB_MODE, WANDB_API_KEY,
    TRACKIO_DIR."""
    project: str | None = None
    """The project in the trackers. None: t5jax."""

    def __post_init__(self) -> None:
        check_choice(self.on_nonfinite, typing.get_args(OnNonFinite), "watch.on_nonfinite")
        check_choice(self.on_spike, typing.get_args(OnSpike), "watch.on_spike")
        check_at_least(self.most_passed_over, 0, "watch.most_passed_over")
        for name in ("spike_threshold", "spike_window"):
            if getattr(self, name) is not None and self.on_spike == "ignore":
                raise ValueError(
                    f"watch.{name} is {getattr(self, name)}, but watch.on_spike is ignore, so "
                    "nothing looks for spikes; set it, or leave the other out"
                )
        threshold = self.spike_threshold
        if threshold is not None and not 0 < threshold < math.inf:
            raise ValueError(f"watch.spike_threshold is {threshold}; it must be positive")
        if self.spike_window is not None:
            check_at_least(self.spike_window, 20, "watch.spike_window")
        for tracker in self.trackers:
            check_choice(tracker, typing.get_args(Tracker), "watch.trackers")
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(
                f"watch.trackers is {', '.join(self.trackers)}; name each of them once"
            )
        if self.project is not None and not self.trackers:
            raise ValueError(
                f"watch.project is {self.project!r}, but watch.trackers is empty, so nothing is "
                "written there; set it, or leave the other out"
            )

    @property
    def skips(self) -> bool:
        """Whether the step itself leaves the state as it was for some batches."""
        return "skip" in (self.on_nonfinite, self.on_spike)

    @property
    def rewinds(self) -> bool:
        """Whether the run may go back to a checkpoint."""
        return "rewind" in (self.on_nonfinite, self.on_spike)
