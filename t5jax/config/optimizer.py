"""The optimizer and the learning rate."""

import dataclasses
import math
import typing
from typing import Literal

from t5jax.checks import check_at_least, check_choice, check_positive
from t5jax.config.patterns import parse_patterns

Optimizer = Literal["adafactor", "adamw", "adamw_scaled", "muon", "schedule_free"]
Schedule = Literal["constant", "inverse_sqrt", "cosine", "linear", "wsd"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. Setting a field that another optimizer or schedule uses is an error."""

    name: Optimizer = "adafactor"
    """adafactor: as in T5X. adamw: decoupled weight decay. adamw_scaled: AdamW with a learning rate
    that is scaled by each parameter's RMS, as Adafactor's is. muon: orthogonalized momentum for the
    matrices of the layers, AdamW for the rest; an update of a matrix has an RMS of 0.2 times the
    rate, about that of AdamW's, so that its rates apply. schedule_free: AdamW whose parameters are
    a running mean, in place of a schedule that decays."""
    learning_rate: float = 1e-3
    """The peak learning rate, relative to a parameter's RMS with adafactor and adamw_scaled."""
    schedule: Schedule = "constant"
    """The shape after warm-up. inverse_sqrt: learning_rate / sqrt(max(step, warmup_steps)); cosine
    and linear decay until train.steps. wsd: constant, then a decay in the last decay_steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up, the first at 1/warmup_steps of the peak; with inverse_sqrt, the
    steps at the constant initial rate (T5's pre-training: learning_rate 1.0, warmup_steps
    10000)."""
    final_fraction: float | None = None
    """cosine, linear and wsd: the rate at train.steps as a fraction of the peak. None: 0."""
    decay_steps: int | None = None
    """wsd: the number of steps of the decay. None: a tenth of train.steps."""
    clip_norm: float | None = None
    """Clip the gradient to this global norm. None: no clipping."""
    weight_decay: float | None = None
    """Weight decay, multiplied by the learning rate; norms and biases are excluded. None: 0."""
    b1: float | None = None
    """adamw, adamw_scaled, muon's AdamW: decay of the first moment. schedule_free: weight of the
    mean in the point where gradients are computed. None: 0.9. adafactor: momentum. None: off."""
    b2: float | None = None
    """All but adafactor: decay of the second moment. None: 0.999."""
    eps: float | None = None
    """All but adafactor: added to the square root of the second moment. None: 1e-8."""
    momentum: float | None = None
    """muon: decay of the mean of gradients that is orthogonalized. None: 0.95."""
    decay_rate: float | None = None
    """adafactor: exponent of the second moment's decay, 1 - step^-decay_rate. None: 0.8."""
    clip_threshold: float | None = None
    """adafactor: clip a parameter's update to this RMS, before the learning rate. None: 1.0."""
    ema: float | None = None
    """Keep an exponential moving average of the parameters, with this decay (such as 0.999). It is
    what evaluations, samples, exports and other runs get; training goes on from the parameters
    themselves. The average is corrected for its start: after n steps, the parameters of step k have
    a weight proportional to ema^(n - k), and the initial ones none. None: off."""
    freeze: tuple[str, ...] = ()
    """Parameters to leave as they are: patterns that match their paths, such as encoder/* or
    */embedding."""
    learning_rates: tuple[str, ...] = ()
    """Other peak learning rates for some parameters, as PATTERN:RATE, such as lm_head/*:1e-4. The
    last match counts; schedule and warm-up stay."""

    def __post_init__(self) -> None:
        check_choice(self.name, typing.get_args(Optimizer), "optimizer.name")
        check_choice(self.schedule, typing.get_args(Schedule), "optimizer.schedule")
        rate = self.learning_rate
        if rate is None or not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
            raise ValueError(
                f"optimizer.learning_rate is {rate}; expected a positive number (T5 fine-tunes "
                "with adafactor at 1e-3 and pre-trains at 1.0 with schedule inverse_sqrt)"
            )
        parse_patterns(self.learning_rates, float, "optimizer.learning_rates")
        check_at_least(self.warmup_steps, 0, "optimizer.warmup_steps")
        if self.schedule == "inverse_sqrt" and self.warmup_steps < 1:
            raise ValueError(
                "optimizer.warmup_steps is 0 with schedule inverse_sqrt; it must be at least 1 "
                "(T5 used 10000)"
            )
        adams = ("adamw", "adamw_scaled", "muon", "schedule_free")
        used_by = {
            "b2": ("name", adams),
            "eps": ("name", adams),
            "momentum": ("name", ("muon",)),
            "decay_rate": ("name", ("adafactor",)),
            "clip_threshold": ("name", ("adafactor",)),
            "final_fraction": ("schedule", ("cosine", "linear", "wsd")),
            "decay_steps": ("schedule", ("wsd",)),
        }
        for field, (chooser, users) in used_by.items():
            if getattr(self, field) is not None and getattr(self, chooser) not in users:
                raise ValueError(
                    f"optimizer.{field} is {getattr(self, field)}, but optimizer.{chooser} "
                    f"{getattr(self, chooser)} does not use it; leave it out, or set "
                    f"optimizer.{chooser} to {' or '.join(users)}"
                )
        for field in ("clip_norm", "eps", "decay_rate", "clip_threshold"):
            if getattr(self, field) is not None:
                check_positive(getattr(self, field), f"optimizer.{field}")
        if self.decay_steps is not None:
            check_at_least(self.decay_steps, 1, "optimizer.decay_steps")
        for field in ("weight_decay", "b1", "b2", "momentum", "final_fraction", "ema"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"optimizer.{field} is {value}; it must be in [0, 1)")
        if self.name == "schedule_free":
            if self.schedule != "constant":
                raise ValueError(
                    f"optimizer.schedule is {self.schedule}, but schedule_free takes the place of "
                    "a schedule; leave it out (warmup_steps still applies)"
                )
            if self.ema is not None:
                raise ValueError(
                    f"optimizer.ema is {self.ema}, but the parameters of schedule_free are an "
                    "average already; leave it out"
                )
            if self.b1 == 0:
                raise ValueError(
                    "optimizer.b1 is 0 with schedule_free, whose gradients would ignore the mean; "
                    "it must be above 0 (0.9 is usual)"
                )
