"""The description of a run: frozen sections, files that build them, and a JSON round trip.

A config is a Python file with `get_config() -> Config`. The command line overrides its fields
(`--data.batch-size 64`). What a field says in its docstring is what `t5jax train --help` prints.
Plain Python without jax, so that it loads at once.
"""

import dataclasses
import importlib.util
import json
import math
import types
import typing
from typing import Any, Literal

from t5jax import shipped
from t5jax.architectures import DEFAULT, FAMILIES, Architecture
from t5jax.checks import check_at_least, check_choice, check_positive, did_you_mean

Optimizer = Literal["adafactor", "adamw", "adamw_scaled"]
Schedule = Literal["constant", "inverse_sqrt", "cosine", "linear"]


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the parameters come from when the run begins."""

    model: str = ""
    """A Hugging Face hub name, or a folder: a Hugging Face one, a run, or one checkpoint of a run.
    Empty: random parameters. The architecture must agree with `model`."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and in which shape it reaches the model."""

    mixture: str = ""
    """SeqIO task or mixture to train on."""
    mixture_changes: tuple[str, ...] = ()
    """Tasks or mixtures to go on with from a step on, as STEP:NAME, such as 1000:harder_mixture.
    `mixture` is read until the first of these steps."""
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, beside ./tasks/*.py and the shipped ones."""
    vocabulary: str = ""
    """"bytes", a SentencePiece .model file, a tokenizer.json, GPT-2's vocab.json or BERT's
    vocab.txt, or a folder or hub name with a tokenizer. Empty: the tokenizer of init.model, or
    else the task's own."""
    cache: str | None = None
    """Folder of caches of tokenized examples, read in a global order and made where they are
    missing or do not match their task (`t5jax cache` makes them beforehand). None: stream."""
    inputs_length: int = 512
    """Tokens of an encoder row; longer inputs are cut."""
    targets_length: int = 128
    """Tokens of a decoder row; longer targets are cut."""
    batch_size: int = 128
    """Rows in one step, over all devices and hosts."""
    pack: bool = False
    """Put several short examples into one row, kept apart by segment ids."""
    prefix_lm: bool = False
    """Decoder-only models: inputs see one another in both directions, as T5's prefix language
    model does it, instead of only what stands before them."""
    seed: int = 0
    """Seed of the order of examples."""

    def __post_init__(self):
        for name in ("inputs_length", "targets_length", "batch_size"):
            check_at_least(getattr(self, name), 1, f"data.{name}")
        if self.cache == "":
            raise ValueError(
                "data.cache is ''; expected a folder, or None to stream without a cache"
            )
        _ = self.mixtures  # Checks them.

    @property
    def mixtures(self) -> tuple[tuple[int, str], ...]:
        """First step and name of every mixture, in order: ((0, "easy"), (1000, "hard")).

        Raises:
          ValueError: for a change that cannot be read, and for steps that do not rise.
        """
        mixtures = [(0, self.mixture)]
        for change in self.mixture_changes:
            step, colon, name = change.partition(":")
            if not (step.isascii() and step.isdecimal() and colon and name):
                raise ValueError(
                    f"data.mixture_changes has {change!r}; expected STEP:NAME, such as "
                    "1000:other_mixture"
                )
            if int(step) <= mixtures[-1][0]:
                raise ValueError(
                    f"data.mixture_changes has {change!r} after step {mixtures[-1][0]}; the steps "
                    "must rise, from 1 on"
                )
            mixtures.append((int(step), name))
        return tuple(mixtures)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates. A field of another optimizer or schedule is refused."""

    name: Optimizer = "adafactor"
    """adafactor: T5X's. adamw: decoupled weight decay. adamw_scaled: AdamW whose rate is scaled
    by each parameter's RMS, as Adafactor's is."""
    learning_rate: float = 1e-3
    """The peak rate. With adafactor and adamw_scaled it is relative to the parameter's RMS."""
    schedule: Schedule = "constant"
    """Shape after warm-up. inverse_sqrt: learning_rate / sqrt(max(step, warmup_steps)); cosine
    and linear fall until train.steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up, the first at 1/warmup_steps of the peak; with inverse_sqrt, the
    steps at the constant first rate (T5's pre-training: learning_rate 1.0, warmup_steps 10000)."""
    final_fraction: float | None = None
    """cosine and linear: share of the peak that the rate reaches at train.steps. None: 0."""
    clip_norm: float | None = None
    """Largest global norm of the gradient. None: no clipping."""
    weight_decay: float | None = None
    """Share of each matrix taken off per step, times the rate; norms and biases are spared.
    None: 0."""
    b1: float | None = None
    """adamw, adamw_scaled: decay of the first moment. None: 0.9. adafactor: momentum. None: off."""
    b2: float | None = None
    """adamw, adamw_scaled: decay of the second moment. None: 0.999."""
    eps: float | None = None
    """adamw, adamw_scaled: added to the root of the second moment. None: 1e-8."""
    decay_rate: float | None = None
    """adafactor: exponent of the second moment's decay, 1 - step^-decay_rate. None: 0.8."""
    clip_threshold: float | None = None
    """adafactor: largest RMS of one parameter's update before the rate. None: 1.0."""

    def __post_init__(self):
        check_choice(self.name, Optimizer.__args__, "optimizer.name")
        check_choice(self.schedule, Schedule.__args__, "optimizer.schedule")
        rate = self.learning_rate
        if rate is None or not (isinstance(rate, (int, float)) and 0 < rate < math.inf):
            raise ValueError(
                f"optimizer.learning_rate is {rate}; expected a positive number (T5 fine-tunes "
                "with adafactor at 1e-3 and pre-trains at 1.0 with schedule inverse_sqrt)"
            )
        check_at_least(self.warmup_steps, 0, "optimizer.warmup_steps")
        if self.schedule == "inverse_sqrt" and self.warmup_steps < 1:
            raise ValueError(
                "optimizer.warmup_steps is 0 with schedule inverse_sqrt; it must be at least 1 "
                "(T5 used 10000)"
            )
        used_by = {
            "b2": ("name", ("adamw", "adamw_scaled")),
            "eps": ("name", ("adamw", "adamw_scaled")),
            "decay_rate": ("name", ("adafactor",)),
            "clip_threshold": ("name", ("adafactor",)),
            "final_fraction": ("schedule", ("cosine", "linear")),
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
        for field in ("weight_decay", "b1", "b2", "final_fraction"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"optimizer.{field} is {value}; it must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The cross-entropy and its terms."""

    z_loss: float = 1e-4
    """Weight of log(Z)^2, which keeps the logits from drifting (T5X: 1e-4)."""
    label_smoothing: float = 0.0
    """Probability spread over the whole vocabulary instead of the target."""

    def __post_init__(self):
        check_at_least(self.z_loss, 0, "loss.z_loss")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"loss.label_smoothing is {self.label_smoothing}; it must be in [0, 1)"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and granularity of training."""

    steps: int = 1000
    """Steps in all, counted from the beginning of the run, not from where it was resumed."""
    microbatches: int = 1
    """Parts of a batch computed one after the other, to fit into memory; the result is the same."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    seed: int = 0
    """Seed of random parameters and of dropout."""

    def __post_init__(self):
        for name in ("steps", "microbatches", "log_every"):
            check_at_least(getattr(self, name), 1, f"train.{name}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured while training, and by `t5jax eval`."""

    every: int = 500
    """Steps between two evaluations; the last step has one too. 0: none."""
    split: str = "validation"
    """Split of the task that is measured."""
    batch_size: int = 64
    """Rows at a time."""
    num_examples: int | None = None
    """Examples of each task at most. None: all."""
    max_tokens: int | None = None
    """Tokens to generate. None: data.targets_length."""
    generate: bool = True
    """Generate text and compute the tasks' own metrics, beside the loss."""
    num_samples: int = 3
    """Predictions to print for each task, where text is generated."""
    patience: int | None = None
    """Stop when the validation loss has not fallen for this many evaluations. None: never."""

    def __post_init__(self):
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
    """What is kept of a run."""

    every: int = 500
    """Steps between two checkpoints; every evaluation and the last step have one too."""
    keep: int = 2
    """How many of the last checkpoints stay; the one with the best validation loss always does."""

    def __post_init__(self):
        check_at_least(self.every, 1, "checkpoint.every")
        check_at_least(self.keep, 1, "checkpoint.keep")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh."""

    data: int = -1
    """Copies of the model that share the batch; -1: all devices that the other axes leave."""
    fsdp: int = 1
    """Devices that share the batch and also split parameters and optimizer state."""
    model: int = 1
    """Devices that split every layer's matrices (tensor parallelism)."""

    def __post_init__(self):
        for name in ("data", "fsdp", "model"):
            if (name, getattr(self, name)) != ("data", -1):
                check_at_least(getattr(self, name), 1, f"mesh.{name}")


MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Which mesh axis (data, fsdp, model) splits which logical axis of the arrays.

    A field is a logical axis; its value a mesh axis, several, or None for no split.
    """

    batch: MeshAxes = ("data", "fsdp")
    """Examples."""
    length: MeshAxes = None
    """Tokens of activations."""
    activation_embed: MeshAxes = None
    """The residual stream, d_model wide."""
    embed: MeshAxes = "fsdp"
    """d_model in parameters."""
    heads: MeshAxes = "model"
    """Attention heads, in parameters and activations."""
    kv_heads: MeshAxes = "model"
    """Heads of keys and values where several heads of queries share one; None where
    they are too few to split."""
    head_dim: MeshAxes = None
    """Width of one head."""
    mlp: MeshAxes = "model"
    """Hidden units of the MLP, in parameters and activations."""
    vocab: MeshAxes = "model"
    """Rows of the vocabulary, in parameters and logits."""
    buckets: MeshAxes = None
    """Buckets of the relative-position bias."""
    layers: MeshAxes = None
    """The stack of layers that a scan runs over."""

    def __post_init__(self):
        allowed = tuple(field.name for field in dataclasses.fields(MeshConfig))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for axis in (value,) if isinstance(value, str) else value or ():
                check_choice(axis, allowed, f"axes.{field.name}")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    run_dir: str = "runs/default"
    """Folder of the run: checkpoints, metrics, plots, tokenizer. A run that is found there goes
    on."""
    model: Architecture = DEFAULT
    init: InitConfig = InitConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    axes: AxisRules = AxisRules()

    def __post_init__(self):
        if self.data.batch_size % self.train.microbatches:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} is not divisible by train.microbatches "
                f"{self.train.microbatches}; change one of them"
            )
        if self.data.prefix_lm and self.model.kind != "decoder":
            raise ValueError(
                f"data.prefix_lm is True, but {self.model.family} is not a decoder-only model, so "
                "nothing would change; leave it out"
            )


# --- Files --------------------------------------------------------------------------------------


def load_config(name_or_path: str) -> Config:
    """Runs a config file and returns what its `get_config()` returns.

    Args:
      name_or_path: a Python file, or the name of one in ./configs or among the shipped configs.
    Raises:
      ValueError: if no such file exists, or it does not return a Config.
    """
    path = shipped.find("configs", name_or_path)
    spec = importlib.util.spec_from_file_location(f"t5jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(
            f"{path} has no get_config(); a config file defines get_config() -> Config"
        )
    config = module.get_config()
    if not isinstance(config, Config):
        raise ValueError(f"get_config() in {path} returned {type(config).__name__}, not a Config")
    return config


def to_json(config) -> str:
    """Returns a config, or a section of one, as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, cls: type = Config):
    """Returns the config, or the section `cls`, that `to_json` wrote.

    Raises:
      ValueError: for a field that does not exist, naming the nearest, or a value of another type.
    """
    return _from_plain(json.loads(text), cls, "")


class _WrongType(ValueError):
    """A value is of none of the types that its field may have."""


def _from_plain(value: Any, kind, path: str):
    """Builds `kind` from plain JSON values, following type annotations."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Architecture and isinstance(value, dict):
        check_choice(value.get("family"), FAMILIES, f"{path}family")
        kind = FAMILIES[value["family"]].load_description()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                hint = did_you_mean(name, hints)
                raise ValueError(f"config field {path}{name} does not exist; {hint}".rstrip("; "))
        return kind(**{n: _from_plain(v, hints[n], f"{path}{n}.") for n, v in value.items()})
    if origin in (typing.Union, types.UnionType):
        for arg in args:
            try:
                return _from_plain(value, arg, path)
            except _WrongType:
                continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_plain(v, args[0], path) for v in value)
    elif origin is Literal:
        return value  # The section's own check names the choices.
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:  # Not isinstance: True is an int.
        return value
    expected = kind.__name__ if isinstance(kind, type) and not args else kind
    raise _WrongType(
        f"config field {path.rstrip('.') or '(the whole)'} is {value!r}; expected {expected}"
    )
