"""Fine-tuning a pre-trained T5 on one task, with T5's own recipe.

    t5jax train finetune --init.model google/flan-t5-base --data.mixture MIXTURE

Adafactor with a constant learning rate of 1e-3 and dropout 0.1, as in Raffel et al. 2020
(arXiv:1910.10683). Hardware: flan-t5-small runs on a CPU for a first try, flan-t5-base on one TPU
chip or GPU; for larger models set mesh.fsdp, model.dtype bfloat16 and model.remat minimal. The
result depends on your task; training stops early according to eval.patience.
"""

from t5jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        run_dir="runs/finetune",
        data=DataConfig(inputs_length=256, targets_length=64, batch_size=32),
        optimizer=OptimizerConfig(name="adafactor", learning_rate=1e-3),
        train=TrainConfig(steps=1000),
        eval=EvalConfig(every=200, patience=3),
        checkpoint=CheckpointConfig(every=200),
    )
