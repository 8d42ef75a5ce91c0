"""The config of a run: its sections, and what they may not say together."""

import dataclasses

from t5jax.architectures import DEFAULT, Architecture
from t5jax.config.adapter import LoraConfig, PromptConfig
from t5jax.config.data import DataConfig, InitConfig
from t5jax.config.loss import DistillConfig, LossConfig
from t5jax.config.mesh import AxisRules, MeshConfig
from t5jax.config.optimizer import OptimizerConfig
from t5jax.config.prune import PruneConfig
from t5jax.config.quantize import QuantizeConfig
from t5jax.config.train import CheckpointConfig, EvalConfig, TrainConfig
from t5jax.config.watch import WatchConfig


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
    watch: WatchConfig = WatchConfig()

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
