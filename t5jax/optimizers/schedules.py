"""The learning rate as a function of the step."""

import jax
import jax.numpy as jnp
import optax

from t5jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    During warm-up, step n has (n + 1) / warmup_steps of the peak rate, so that the first step is
    not 0 and step warmup_steps - 1 reaches the peak. From there cosine and linear decay to
    final_fraction at step `steps`, the first one after the run, and stay there. wsd (warm-up,
    stable, decay) is constant until the last decay_steps, in which it falls as 1 - sqrt(x), as in
    arXiv:2405.18392. inverse_sqrt has no linear warm-up: its rate is constant up to step
    warmup_steps.

    Args:
      config: the name of the schedule and its parameters.
      steps: the number of updates in the whole run.
    Returns:
      A function from the number of updates already made, an int or an int32 array of any shape,
      to a float32 learning rate of that shape.
    Raises:
      ValueError: if warm-up does not end within the run, or a decay begins before it ends.
    """
    warmup = config.warmup_steps
    decay = 0
    if config.schedule == "wsd":
        decay = config.decay_steps or max(steps // 10, 1)
        if warmup + decay > steps:
            raise ValueError(
                f"optimizer.warmup_steps {warmup} and decay_steps {decay} are {warmup + decay} "
                f"steps, but train.steps is {steps}; lower one of them, or raise train.steps"
            )
    falls = config.schedule in ("cosine", "linear")
    if config.schedule == "inverse_sqrt":
        # Does not depend on the length of the run: a short trial of a long recipe has its rates.
        return lambda step: (
            config.learning_rate
            * jax.lax.rsqrt(jnp.maximum(jnp.asarray(step, jnp.float32), warmup))
        )
    if warmup > steps or (falls and warmup == steps):
        remedy = (
            f"set optimizer.warmup_steps to {max(steps - falls, 0)} or less, or raise train.steps"
            if warmup > steps
            else f"lower it, or use schedule constant: {config.schedule} has no steps left to decay"
        )
        raise ValueError(
            f"optimizer.warmup_steps is {warmup}, but train.steps is {steps}; {remedy}"
        )
    final = config.final_fraction or 0.0

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        ramp = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        if decay:
            fallen = jnp.sqrt(jnp.clip((step - (steps - decay)) / decay, 0.0, 1.0))
            return config.learning_rate * ramp * (1 - (1 - final) * fallen)
        if not falls:
            return config.learning_rate * ramp
        fallen = jnp.clip((step - warmup) / (steps - warmup), 0.0, 1.0)
        if config.schedule == "cosine":
            fallen = (1 - jnp.cos(jnp.pi * fallen)) / 2
        return config.learning_rate * ramp * (1 - (1 - final) * fallen)

    return schedule
