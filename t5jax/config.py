"""The config of a run: frozen dataclasses, config files, and conversion to and from JSON.

A config file is a Python file with `get_config() -> Config`. The command line overrides its fields
(`--data.batch-size 64`); `t5jax train --help` prints their docstrings. Plain Python without jax, so
that it loads quickly.
"""

import dataclasses
import importlib.util
import inspect
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from t5jax import shipped
from t5jax.architectures import DEFAULT, FAMILIES, Architecture
from t5jax.checks import check_at_least, check_choice, check_positive, did_you_mean

Optimizer = Literal["adafactor", "adamw", "adamw_scaled", "muon", "schedule_free"]
Attention = Literal["auto", "reference", "flash", "cudnn"]
Section = TypeVar("Section")
Schedule = Literal["constant", "inverse_sqrt", "cosine", "linear", "wsd"]
SliceAxis = Literal["data", "fsdp"]
PrunePattern = Literal["unstructured", "2:4"]
PruneScope = Literal["layer", "global"]

MESH_AXES = ("data", "fsdp", "sequence", "model")
"""From the axis whose devices may lie furthest apart to the one that communicates most."""


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Initial parameters."""

    model: str = ""
    """A Hugging Face Hub name or folder, a run, or one checkpoint of a run. Empty: random
    parameters. The architecture must match `model`."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data and the shape of a batch."""

    mixture: str = ""
    """SeqIO task or mixture to train on."""
    mixture_changes: tuple[str, ...] = ()
    """Tasks or mixtures to switch to at a step, as STEP:NAME, such as 1000:harder_mixture.
    `mixture` is used until the first of these steps."""
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, in addition to ./tasks/*.py and the shipped ones."""
    vocabulary: str = ""
    """"bytes", a SentencePiece .model file, a tokenizer.json, GPT-2's vocab.json or BERT's
    vocab.txt, or a folder or Hub name with a tokenizer. Empty: the tokenizer of init.model, or
    otherwise the task's own."""
    cache: str | None = None
    """Folder of caches of tokenized examples, which are fully shuffled; a cache that is missing or
    does not match its task is written first (or beforehand by `t5jax cache`). None: stream."""
    inputs_length: int = 512
    """Length of encoder rows in tokens; longer inputs are truncated."""
    targets_length: int = 128
    """Length of decoder rows in tokens; longer targets are truncated."""
    batch_size: int = 128
    """Rows per step, over all devices and hosts."""
    pack: bool = False
    """Pack several short examples into one row, separated by segment ids."""
    prefix_lm: bool = False
    """Decoder-only models: attention among the inputs is bidirectional, as in T5's prefix language
    model, instead of causal."""
    seed: int = 0
    """Seed of the order of the examples."""

    def __post_init__(self) -> None:
        for name in ("inputs_length", "targets_length", "batch_size"):
            check_at_least(getattr(self, name), 1, f"data.{name}")
        if self.cache == "":
            raise ValueError(
                "data.cache is ''; expected a folder, or None to stream without a cache"
            )
        _ = self.mixtures  # Checks them.

    @property
    def mixtures(self) -> tuple[tuple[int, str], ...]:
        """The first step and the name of every mixture, in order: ((0, "easy"), (1000, "hard")).

        Raises:
          ValueError: if a change cannot be parsed, or the steps do not increase.
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
                    "must increase, starting from 1 or more"
                )
            mixtures.append((int(step), name))
        return tuple(mixtures)


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


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """Weights that become and stay 0 while the others are trained.

    Pruned are the matrices of the layers. The average of optimizer.ema is pruned alike.
    """

    sparsity: float | None = None
    """Share of the weights to remove in the end. None: no pruning. 0.5 of a model that is pruned
    already keeps its zeros."""
    pattern: PrunePattern = "unstructured"
    """unstructured: the weights of smallest magnitude. 2:4: the two smallest of every four
    neighbouring inputs, at step `begin`; sparsity 0.5."""
    scope: PruneScope | None = None
    """unstructured: the same share of each layer's matrix ("layer"), or of all weights together
    ("global"). None: layer."""
    begin: int = 0
    """Step at which pruning begins."""
    end: int | None = None
    """unstructured: step at which the whole share is removed; until then it grows from 0, fast at
    first: 1 - (1 - x)^3 (arXiv:1710.01878). None: at once, at `begin`."""
    every: int | None = None
    """Steps between two choices of what to remove, from `begin` to `end`. None: 100."""
    keep: tuple[str, ...] = ()
    """Matrices to leave as they are: patterns that match their paths, such as encoder/* or
    */wo/kernel."""

    def __post_init__(self) -> None:
        check_choice(self.pattern, typing.get_args(PrunePattern), "prune.pattern")
        default = {field.name: field.default for field in dataclasses.fields(self)}
        if self.sparsity is None:
            for name, value in default.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"prune.{name} is {getattr(self, name)!r}, but prune.sparsity is None, so "
                        "nothing is pruned; set it, or leave the other out"
                    )
            return
        if not 0 < self.sparsity < 1:
            raise ValueError(f"prune.sparsity is {self.sparsity}; it must be above 0 and below 1")
        check_at_least(self.begin, 0, "prune.begin")
        if self.scope is not None:
            check_choice(self.scope, typing.get_args(PruneScope), "prune.scope")
        if self.pattern == "2:4":
            if self.sparsity != 0.5:
                raise ValueError(f"prune.sparsity is {self.sparsity}, but 2:4 removes a half: 0.5")
            for name in ("scope", "end", "every"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"prune.{name} is {getattr(self, name)!r}, but pattern 2:4 prunes at once, "
                        "in groups of four; leave it out"
                    )
        if self.every is not None:
            check_at_least(self.every, 1, "prune.every")
            if self.end is None:
                raise ValueError(
                    f"prune.every is {self.every}, but prune.end is None, so all is removed at "
                    "once; set prune.end, or leave it out"
                )
        if self.end is not None and self.end <= self.begin:
            raise ValueError(f"prune.end is {self.end}; it must be above prune.begin, {self.begin}")


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


def parse_patterns(
    given: Iterable[str], kind: type[int] | type[float], name: str
) -> list[tuple[str, float]]:
    """Returns patterns with their numbers, from PATTERN:NUMBER each.

    Raises:
      ValueError: if one cannot be parsed, or its number is not above 0.
    """
    found = []
    for text in given:
        pattern, _, number = text.rpartition(":")
        try:
            value = kind(number)
        except ValueError:
            value = -1
        if not (pattern and 0 < value < math.inf):
            raise ValueError(
                f"{name} has {text!r}; expected PATTERN:NUMBER, such as "
                f"*/mlp/wo:{'16' if kind is int else '1e-4'}, with a number above 0"
            )
        found.append((pattern, value))
    return found


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
    init_layers: bool = False
    """Begin with the teacher's parameters, and of its layers with as many as the student has, from
    the first to the last at equal distances. Both must be equally wide."""

    def __post_init__(self) -> None:
        check_positive(self.temperature, "distill.temperature")
        if not 0 < self.weight <= 1:
            raise ValueError(f"distill.weight is {self.weight}; it must be in (0, 1]")
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if changed and not self.teacher:
            raise ValueError(
                f"distill.{changed[0]} is {getattr(self, changed[0])}, but distill.teacher is "
                "empty, so it has no effect; set it, or leave the other out"
            )


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


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh, over all slices. One of them may be -1: all
    that the others leave."""

    data: int = -1
    """Data parallelism: each copy of the model takes a part of the batch."""
    fsdp: int = 1
    """Data parallelism that also shards parameters and optimizer state."""
    sequence: int = 1
    """Sequence parallelism: shards the tokens of each row, for long inputs."""
    model: int = 1
    """Tensor parallelism: shards the matrices of every layer."""
    dcn: SliceAxis = "data"
    """Of several TPU slices: the axis that spans them, over the data center network. The other axes
    stay within a slice."""

    def __post_init__(self) -> None:
        check_choice(self.dcn, typing.get_args(SliceAxis), "mesh.dcn")
        rest = [name for name in MESH_AXES if getattr(self, name) == -1]
        if len(rest) > 1:
            others = " and ".join(f"mesh.{name}" for name in rest)
            raise ValueError(
                f"{others} are -1, all that the other axes leave; only one can be: set "
                f"mesh.{rest[0]} to 1"
            )
        for name in MESH_AXES:
            if getattr(self, name) != -1:
                check_at_least(getattr(self, name), 1, f"mesh.{name}")


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Quantization-aware training: the loss sees matrices as `t5jax compress` will round them.

    Gradients pass the rounding as if it were not there (arXiv:1308.3432).
    """

    weights: Literal["int8", "int4", "nf4", "fp8"] | None = None
    """What matrices are rounded to, as by `t5jax compress --weights`. None: no rounding."""
    group: int | None = None
    """int4, nf4: inputs per scale. None: 128, of nf4 64."""
    keep: tuple[str, ...] = ()
    """Shell patterns of paths of matrices that are not rounded."""

    def __post_init__(self) -> None:
        if self.weights is None:
            for name in ("group", "keep"):
                if getattr(self, name):
                    raise ValueError(
                        f"quantize.{name} is {getattr(self, name)!r}, but quantize.weights is "
                        "None, so nothing is rounded; set it, or leave the other out"
                    )


MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """The mesh axis (data, fsdp, sequence, model) over which each logical axis of an array is
    sharded.

    A field is a logical axis; its value is a mesh axis, several of them, or None to replicate.
    """

    batch: MeshAxes = ("data", "fsdp")
    """Rows of a batch."""
    length: MeshAxes = "sequence"
    """Tokens of a row, in batches and activations. Keys and values are whole in attention, and a
    length that the mesh does not divide, such as the one token of a decoding step, stays whole."""
    activation_embed: MeshAxes = None
    """d_model in activations: the residual stream."""
    embed: MeshAxes = "fsdp"
    """d_model in parameters."""
    heads: MeshAxes = "model"
    """Attention heads, in parameters and activations."""
    kv_heads: MeshAxes = "model"
    """Key and value heads in grouped-query attention; None if there are too few to shard."""
    head_dim: MeshAxes = None
    """Dimension of a head."""
    mlp: MeshAxes = "model"
    """Hidden units of the MLP, in parameters and activations."""
    vocab: MeshAxes = "model"
    """Vocabulary, in parameters and logits."""
    positions: MeshAxes = None
    """Learned positions of GPT-2 and BERT, in parameters."""
    rank: MeshAxes = None
    """The rank of adapters."""
    buckets: MeshAxes = None
    """Buckets of the relative-position bias."""
    layers: MeshAxes = None
    """Stacked layers, which a scan iterates over."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for axis in (value,) if isinstance(value, str) else value or ():
                check_choice(axis, MESH_AXES, f"axes.{field.name}")


@dataclasses.dataclass(frozen=True)
class Config:
    """The config of a run."""

    run_dir: str = "runs/default"
    """Folder for checkpoints, metrics, plots and tokenizer. A run that already exists there is
    resumed."""
    model: Architecture = DEFAULT
    init: InitConfig = InitConfig()
    adapter: LoraConfig | PromptConfig | None = None
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    prune: PruneConfig = PruneConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    axes: AxisRules = AxisRules()
    quantize: QuantizeConfig = QuantizeConfig()

    def __post_init__(self) -> None:
        if self.data.batch_size % self.train.microbatches:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} is not divisible by train.microbatches "
                f"{self.train.microbatches}; change one of them"
            )
        if self.distill.init_layers and self.init.model:
            raise ValueError(
                f"distill.init_layers and init.model {self.init.model} both say what to begin with"
                "; leave one of them out"
            )
        if self.distill.teacher and self.model.kind == "encoder":
            raise ValueError(
                f"distill.teacher is {self.distill.teacher}, but a {self.model.family} writes no "
                "text; distillation is for models with a decoder"
            )
        beside = {
            "prune.sparsity": self.prune.sparsity is not None,
            "optimizer.ema": self.optimizer.ema is not None,
            "optimizer.name schedule_free": self.optimizer.name == "schedule_free",
        }
        if self.adapter is not None and any(beside.values()):
            name = next(name for name, is_set in beside.items() if is_set)
            raise ValueError(
                f"{name} is not possible with an adapter, of which checkpoints have the trained "
                "parameters alone; leave one of them out"
            )
        if self.prune.sparsity is not None and self.optimizer.name == "schedule_free":
            raise ValueError(
                "prune.sparsity is set, but schedule_free moves a second set of parameters that "
                "would not be pruned; choose another optimizer.name"
            )
        if self.train.epochs is not None and self.data.mixture_changes:
            raise ValueError(
                f"train.epochs is {self.train.epochs:g}, but data.mixture_changes reads several "
                "mixtures, whose epochs differ; set train.steps, and leave train.epochs out"
            )
        if self.adapter is not None and self.optimizer.freeze:
            raise ValueError(
                f"optimizer.freeze is {self.optimizer.freeze}, but with an adapter all parameters "
                "of the base are frozen; leave it out (adapter.train names those that are not)"
            )
        if isinstance(self.adapter, PromptConfig) and self.data.pack:
            raise ValueError(
                "data.pack is True, but a soft prompt is before each row, and only its first text "
                "would read it; leave data.pack out"
            )
        if self.adapter is not None and self.quantize.weights:
            raise ValueError(
                f"quantize.weights is {self.quantize.weights}, but with an adapter the base is "
                "frozen, and rounding it is not learned; leave one of them out, or start from a "
                "model that `t5jax compress` wrote"
            )
        if self.data.prefix_lm and self.model.kind != "decoder":
            raise ValueError(
                f"data.prefix_lm is True, but {self.model.family} is not a decoder-only model, so "
                "it would have no effect; leave it out"
            )


# --- Files --------------------------------------------------------------------------------------


def load_config(name_or_path: str) -> Config:
    """Runs a config file and returns what its `get_config()` returns.

    Args:
      name_or_path: a Python file, or the name of one in ./configs or of a shipped config; an
        argument of its `get_config` may follow: "t5_pretrain:large".
    Raises:
      ValueError: if there is no such file, or it does not return a Config.
    """
    name_or_path, argument = split_config_name(name_or_path)
    path = shipped.find("configs", name_or_path)
    spec = importlib.util.spec_from_file_location(f"t5jax_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(
            f"{path} has no get_config(); a config file defines get_config() -> Config"
        )
    takes = inspect.signature(module.get_config).parameters
    if argument and not takes:
        raise ValueError(
            f"{path} has one config, so {argument!r} has no effect; leave :{argument} out"
        )
    config = module.get_config(*([argument] if argument else []))
    if not isinstance(config, Config):
        raise ValueError(f"get_config() in {path} returned {type(config).__name__}, not a Config")
    return config


def split_config_name(name_or_path: str) -> tuple[str, str]:
    """Returns a config's name or path, and the argument behind its colon, or ""."""
    name, _, argument = name_or_path.rpartition(":")
    # A colon in a path, such as that of a drive, is none of ours.
    return (name, argument) if name and not {"/", "\\"} & set(argument) else (name_or_path, "")


def to_json(config: Any) -> str:
    """Returns a config, or a section of one, as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, cls: type[Any] = Config) -> Any:
    """Returns the config, or the section `cls`, from the output of `to_json`.

    Raises:
      ValueError: if a field does not exist, suggesting the most similar one, or has another type.
    """
    return _from_plain(json.loads(text), cls, "")


def override(config: Section, changes: Mapping[str, Any]) -> Section:
    """Returns a config, or a section of one, with some fields replaced.

    Args:
      config: the config or section; it stays as it is.
      changes: field to value; a dot leads into a section: {"optimizer.learning_rate": 1e-3}.
    Raises:
      ValueError: as in `from_json`, and if a section refuses the new values.
    """
    changed: Section = _override(config, changes, "")
    return changed


def _override(section: Any, changes: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(type(section))
    values: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for field, value in changes.items():
        name, dot, rest = field.partition(".")
        _check_field(name, hints, path)
        if dot:
            inner.setdefault(name, {})[rest] = value
        else:
            values[name] = _from_plain(value, hints[name], f"{path}{name}.")
    for name, below in inner.items():
        value = values.get(name, getattr(section, name))
        if not dataclasses.is_dataclass(value):
            raise ValueError(
                f"config field {path}{name} is {value!r} and has no field {next(iter(below))!r}"
            )
        values[name] = _override(value, below, f"{path}{name}.")
    return dataclasses.replace(section, **values)


def _check_field(name: str, known: Iterable[str], path: str) -> None:
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"config field {path}{name} does not exist; {hint}".rstrip("; "))


def _fields_of(kind: Any) -> tuple[str, ...]:
    return tuple(getattr(kind, "__dataclass_fields__", ()))


class _WrongType(ValueError):
    """A value has none of the types of its field."""


def _from_plain(value: Any, kind: Any, path: str) -> Any:
    """Builds a value of type `kind` from plain JSON values, according to type annotations."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Architecture and isinstance(value, dict):
        check_choice(value.get("family"), FAMILIES, f"{path}family")
        kind = FAMILIES[value["family"]].load_description()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        for name in value:
            _check_field(name, hints, path)
        return kind(**{n: _from_plain(v, hints[n], f"{path}{n}.") for n, v in value.items()})
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, dict):  # Of several sections, the one that has these fields.
            args = tuple(sorted(args, key=lambda arg: len(set(value) - set(_fields_of(arg)))))
        for arg in args:
            try:
                return _from_plain(value, arg, path)
            except _WrongType:
                continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_plain(v, args[0], path) for v in value)
    elif origin is Literal:
        return value  # The section checks it.
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind or (
        isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, kind)
    ):
        return value  # Not isinstance for plain values: True is an int.
    expected = kind.__name__ if isinstance(kind, type) and not args else kind
    raise _WrongType(
        f"config field {path.rstrip('.') or '(the whole)'} is {value!r}; expected {expected}"
    )
