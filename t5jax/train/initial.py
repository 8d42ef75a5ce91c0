"""The train state that a run begins with or goes on with: of its last checkpoint, with the
parameters of a source or of a teacher's layers, over an adapter's base, or random."""

from pathlib import Path

import jax

from t5jax import checkpoint, trees
from t5jax.adapters import digest
from t5jax.adapters import params as adapted
from t5jax.architectures import Architecture
from t5jax.checkpoint import Checkpoints
from t5jax.config import AdapterConfig, Config
from t5jax.distill.teacher import student_params
from t5jax.models import api
from t5jax.monitor.goodput import Goodput
from t5jax.monitor.progress import say
from t5jax.program import Program
from t5jax.source import Source
from t5jax.train.start import Standing
from t5jax.train_state import TrainState

# Schedules that depend on train.steps.
FALLING = {"cosine", "linear", "wsd"}


def begin_or_restore(
    standing: Standing,
    run: Program,
    checkpoints: Checkpoints,
    goodput: Goodput,
    run_dir: Path,
    taught: api.Params | None = None,
) -> tuple[TrainState, dict[str, str] | None]:
    """Returns the state to train from, and with an adapter the digests of its base.

    Args:
      standing: where the run stands.
      run: its program.
      checkpoints: of the run.
      goodput: where the time is counted.
      run_dir: the run's folder, for messages.
      taught: the parameters of its teacher.
    """
    config, last = standing.config, standing.last
    source, base = standing.source, standing.base
    if last:
        assert standing.saved is not None
        say(f"going on from step {standing.step} of {run_dir}")
        if standing.loop.iterator:  # What was only imported has been trained elsewhere.
            for change in checkpoint.changed_settings(standing.saved, config):
                say(f"from here on otherwise: {change}")
        _say_how_the_rate_falls(standing.saved, config)
        with goodput.spend("checkpoint"):
            state = checkpoints.restore(last, run.saved(run.shapes), run.saved(run.shardings))
    else:
        with goodput.spend("other"):
            state = run.create(jax.random.key(config.train.seed))
        if source:
            how = ", dequantized" if source.is_quantized and not base else ""
            say(f"parameters from {source.place}{how}")
        if source and not base:
            new = new_params(source, run.model, state.params)
            del state  # Never two copies on the devices.
            state = run.begin(source.params(run.model, run.shardings.params, new))
    digests = None
    if base:
        assert config.adapter is not None
        own, key = run.saved(state), jax.random.key(config.train.seed)
        state = state.replace(params=None)
        params, digests = _params_over(base, run, config.adapter, own.params, key, begins=not last)
        state = state.replace(params=params)
        if last:
            digest.check(digests, checkpoint.read_base(last), str(run_dir), str(base.path))
    if run.teacher and config.distill.init_layers and not last:
        assert taught is not None
        del state
        params = student_params(run.teacher, taught, run.model, run.shardings.params)
        state = run.begin(params)
    return state, digests


def _say_how_the_rate_falls(saved: Config, config: Config) -> None:
    """Says where a schedule that falls until train.steps does not go on as it began."""
    schedules = {saved.optimizer.schedule, config.optimizer.schedule}
    if saved.train.steps != config.train.steps and schedules <= FALLING:
        say(
            f"the {config.optimizer.schedule} schedule falls until step {config.train.steps} from "
            f"here on; so far it fell until {saved.train.steps}"
        )


def new_params(source: Source, model: Architecture, params: api.Params) -> dict[str, jax.Array]:
    """Returns the initial parameters that the source lacks, such as a new head's, by path."""
    missing = source.missing(model)
    if missing:
        say(f"new, as the seed has them: {', '.join(missing)}")
    flat = trees.flatten(params)
    return {name: flat[name] for name in missing}


def _params_over(
    base: Source,
    run: Program,
    adapter: AdapterConfig,
    own: api.Params,
    key: jax.Array,
    *,
    begins: bool,
) -> tuple[api.Params, dict[str, str]]:
    """Returns the parameters of an adapter over its base, which is read, and the base's digests.

    Args:
      own: the parameters that the base does not have, and those of it that are trained.
      begins: whether no step has been trained, so that the base's are as they were.
    """
    own = trees.flatten(own)
    new = {path: own[path] for path in base.missing(run.model)}
    shardings = adapted.shardings(run.model, None, run.mesh, run.rules)
    params = base.params(run.model, shardings, new)
    read = trees.flatten(params)
    digests = digest.digests({path: read[path] for path in sorted(run.base)})
    if getattr(adapter, "base", None):
        round_base = jax.jit(lambda params: adapted.rounded(run.model, adapter, params))
        read = trees.flatten(round_base(params))
    if begins:
        own = {path: x for path, x in own.items() if path not in read}
    params = trees.unflatten(read | own)
    if getattr(adapter, "base", None):
        params = jax.device_put(params, run.shardings.params)
    return (adapted.begin(run.model, params, key) if begins else params), digests
