"""Fine-tuning mT5 or UMT5 on tasks in any of their languages.

    t5jax train mt5_finetune --init.model google/mt5-base --data.mixture MIXTURE
    t5jax plan mt5_finetune:mt5_base --topology v5e:2x4

The recipe is that of Xue et al. 2021 (arXiv:2010.11934): Adafactor at 1e-3, dropout 0.1, 2^17
tokens of inputs a step. Most of base is its embedding of 250,112 pieces; `t5jax trim-vocabulary`
keeps those of your languages. Hardware: eight v5e chips for base, for which `t5jax plan` (libtpu
0.0.42) estimates 215 ms a step, 36 % MFU, and 6.0 of 15.75 GiB. Nothing of this has run on a TPU
yet. To expect: trained on SQuAD, in English alone, base answers XQuAD's questions in its eleven
languages with an F1 of 67.0 and 49.0 % exact match (table 2 of the paper). Training stops early
according to eval.patience.
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
        run_dir="runs/mt5",
        model=dataclasses.replace(model, dtype="bfloat16", remat="full"),
        data=DataConfig(inputs_length=1024, targets_length=128, batch_size=128),
        optimizer=OptimizerConfig(name="adafactor", learning_rate=1e-3),
        train=TrainConfig(steps=10_000),
        eval=EvalConfig(every=500, patience=4),
        checkpoint=CheckpointConfig(every=500),
    )
