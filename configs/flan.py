"""Instruction tuning as for FLAN-T5: a T5 1.1 on a mixture of many tasks.

    t5jax train flan --init.model google/t5-base-lm-adapt
    t5jax train flan --init.model google/t5-base-lm-adapt --data.mixture p3
    t5jax plan flan:t5_1_1_base --topology v5e:2x4

tasks/natural_instructions.py has the tasks of Natural Instructions, tasks/p3.py those of T0 with
promptsource's templates; both say where the files are. Batch, learning rate and dropout are those
of FLAN-T5 (Chung et al. 2022, arXiv:2210.11416); examples are packed. Hardware: eight v5e chips for
base, for which `t5jax plan` (libtpu 0.0.42) estimates 100 ms a step, 39 % MFU, and 2.2 of
15.75 GiB: 2.3 hours in all. Nothing of this has run on a TPU yet. To expect on the test tasks of
Natural Instructions, none of which was trained on: 62.0 ROUGE-L for 11 billion parameters
(Tk-Instruct, arXiv:2204.07705, by another learning rate), less for base.
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
        run_dir="runs/flan",
        model=dataclasses.replace(model, dtype="bfloat16", remat="full", dropout_rate=0.05),
        data=DataConfig(
            mixture="natural_instructions",
            inputs_length=1024,
            targets_length=256,
            batch_size=64,
            pack=True,
        ),
        optimizer=OptimizerConfig(name="adafactor", learning_rate=5e-4),
        train=TrainConfig(steps=84_000),
        eval=EvalConfig(every=2000, num_examples=1000),
        checkpoint=CheckpointConfig(every=2000),
    )
