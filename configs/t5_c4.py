"""Pre-training T5 1.1 base on C4 by span corruption.

    t5jax train t5_c4

tasks/c4.py streams C4's English part from the Hub. The recipe is that of Shazeer 2020
(arXiv:2002.05202), which introduced 1.1's MLP: 128 rows of 512 tokens and their 114 of targets,
Adafactor with the inverse square root of the step, no dropout. Hardware: eight v5e chips, for which
`t5jax plan` (libtpu 0.0.42) estimates 93 ms a step, 37 % MFU, and 2.1 of 15.75 GiB: 14 hours in
all. Nothing of this has run on a TPU yet. To expect: 1.942 nats per token on C4's validation split
after 65,536 steps, and 1.633 after 524,288 (the paper's table 1, GEGLU).
"""

import dataclasses

from t5jax.architectures import published
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
        run_dir="runs/t5_c4",
        model=dataclasses.replace(
            published("t5_1_1_base", dtype="bfloat16", remat="full"), dropout_rate=0.0
        ),
        data=DataConfig(
            mixture="c4",
            vocabulary="google/t5-v1_1-base",
            inputs_length=512,
            targets_length=114,
            batch_size=128,
        ),
        optimizer=OptimizerConfig(
            name="adafactor", learning_rate=1.0, schedule="inverse_sqrt", warmup_steps=10_000
        ),
        train=TrainConfig(steps=524_288),
        eval=EvalConfig(every=5000, num_examples=2000, generate=False),
        checkpoint=CheckpointConfig(every=5000),
    )
