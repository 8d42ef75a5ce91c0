"""Fine-tuning a pre-trained T5Gemma on one task.

    t5jax train t5gemma_finetune --init.model google/t5gemma-b-b-prefixlm --data.mixture MIXTURE

AdamW at 1e-4 with a short warm-up, and dropout 0.1: norms that hold w of 1 + w are no scale for a
relative rate such as that of T5's recipe. The hub lets nobody read Gemma's weights who has not
accepted their terms (`hf auth login`); a folder that holds them does as well.

Hardware: 16 bytes a parameter for parameters, gradients and AdamW, and activations. t5gemma-s-s
(0.3 billion, most of them embeddings) takes 5 GB, on a CPU for a try; b-b 9.5 GB, on one GPU or TPU
chip of 16 GB; for 2b-2b and above set mesh.fsdp, model.dtype bfloat16, model.remat minimal and
train.microbatches. None of them has been run yet; a small folder goes through the same steps on a
CPU in seconds. Result to expect: that of your task; it stops early by eval.patience.
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
        run_dir="runs/t5gemma_finetune",
        data=DataConfig(inputs_length=256, targets_length=64, batch_size=32),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=1e-4, schedule="linear", warmup_steps=50, clip_norm=1.0
        ),
        train=TrainConfig(steps=1000),
        eval=EvalConfig(every=200, patience=3),
        checkpoint=CheckpointConfig(every=200),
    )
