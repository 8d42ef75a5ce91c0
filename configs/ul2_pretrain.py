"""Pre-training a model of T5's base size on C4 by UL2's mixture of denoisers.

    t5jax train ul2_pretrain
    t5jax train ul2_pretrain --data.mixture MIXTURE --data.vocabulary spiece.model

tasks/c4.py streams C4's English part from the Hub; MIXTURE is a text task of yours with the
objective ul2(). The recipe is that of the ablations of Tay et al. 2023 (arXiv:2205.05131): 128 rows
of 512 tokens on both sides, SwiGLU, Adafactor with the inverse square root of the step, no dropout.
Hardware: eight v5e chips, for which `t5jax plan` (libtpu 0.0.42) estimates 141 ms a step, 44 % MFU,
and 3.0 of 15.75 GiB: 20 hours in all. Nothing of this has run on a TPU yet, and the paper gives no
loss that this one could be compared with.
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
        run_dir="runs/ul2",
        model=dataclasses.replace(
            published("t5_1_1_base", dtype="bfloat16", remat="full"),
            mlp_activation="gated-silu",
            dropout_rate=0.0,
        ),
        data=DataConfig(
            mixture="c4_ul2",
            vocabulary="google/t5-v1_1-base",
            inputs_length=512,
            targets_length=512,
            batch_size=128,
        ),
        optimizer=OptimizerConfig(
            name="adafactor", learning_rate=1.0, schedule="inverse_sqrt", warmup_steps=10_000
        ),
        train=TrainConfig(steps=500_000),
        eval=EvalConfig(every=5000, num_examples=2000, generate=False),
        checkpoint=CheckpointConfig(every=5000),
    )
