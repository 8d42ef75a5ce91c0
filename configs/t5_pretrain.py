"""Pre-training T5 1.1 on your own text, on TPUs: base, large or XXL.

    t5jax train t5_pretrain:base --data.mixture MIXTURE --data.vocabulary spiece.model
    t5jax plan t5_pretrain:xxl --topology v5p:4x4x4

MIXTURE is a text task with the objective SpanCorruption (`text_task`, as in tasks/novels.py). The
recipe is that of Raffel et al. 2020 (arXiv:1910.10683) for 1.1: Adafactor with the inverse square
root of the step, no dropout, span corruption of 512 tokens. Hardware: base and large on one v5e
chip or more, XXL on 64 v5p chips. `t5jax plan` (libtpu 0.0.42) estimates for base on one v5e chip
151 ms a step, 46 % MFU, and 2.6 of 15.75 GiB; for large 266 ms, 45 %, and 6.2 GiB; for XXL on
v5p:4x4x4 735 ms, 51 %, and 23.5 of 95.7 GiB. Nothing of this has run on a TPU yet. To fine-tune the
result, or a published model, on the same chips, take the config `finetune` with this one's
model.dtype, model.remat and mesh.
"""

import dataclasses

from t5jax.architectures import published
from t5jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)

# Remat policy, rows, length of targets, and mesh of each size.
SIZES = {
    "base": ("full", 32, 114, MeshConfig()),
    "large": ("full", 16, 114, MeshConfig()),
    # Parameters are divided over a plane of the torus; over all of it, libtpu gathers them slowly.
    "xxl": ("minimal", 512, 128, MeshConfig(data=-1, fsdp=16)),
}


def get_config(size: str = "base") -> Config:
    if size not in SIZES:
        raise ValueError(f"t5_pretrain has no size {size!r}; there are {', '.join(SIZES)}")
    remat, rows, targets_length, mesh = SIZES[size]
    return Config(
        run_dir=f"runs/t5_{size}",
        model=dataclasses.replace(
            published(f"t5_1_1_{size}", dtype="bfloat16", remat=remat), dropout_rate=0.0
        ),
        data=DataConfig(inputs_length=512, targets_length=targets_length, batch_size=rows),
        optimizer=OptimizerConfig(
            name="adafactor", learning_rate=1.0, schedule="inverse_sqrt", warmup_steps=10_000
        ),
        train=TrainConfig(steps=524_288),
        eval=EvalConfig(every=5000, num_examples=2000, generate=False),
        checkpoint=CheckpointConfig(every=5000),
        mesh=mesh,
    )
