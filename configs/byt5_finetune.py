"""Fine-tuning ByT5, which reads and writes bytes.

    t5jax train byt5_finetune --init.model google/byt5-base --data.mixture MIXTURE
    t5jax plan byt5_finetune:byt5_base --topology v5e:2x4

The recipe is that of Xue et al. 2022 (arXiv:2105.13626): mT5's, with rows of 1,024 bytes, and
longer targets, since a byte is a token. Hardware: eight v5e chips for base, for which `t5jax plan`
(libtpu 0.0.42) estimates 490 ms a step, 51 % MFU, and 7.4 of 15.75 GiB. Nothing of this has run on
a TPU yet. The result depends on your task; training stops early according to eval.patience.
"""

import dataclasses

from t5jax.architectures import T5Config, published
from t5jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config(size: str = "") -> Config:
    model = published(size) if size else T5Config()  # Without a size, that of init.model.
    return Config(
        run_dir="runs/byt5",
        model=dataclasses.replace(model, dtype="bfloat16", remat="full"),
        data=DataConfig(inputs_length=1024, targets_length=256, batch_size=128),
        optimizer=OptimizerConfig(name="adafactor", learning_rate=1e-3),
        train=TrainConfig(steps=10_000),
        eval=EvalConfig(every=500, patience=4),
        checkpoint=CheckpointConfig(every=500),
    )
