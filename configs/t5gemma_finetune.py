"""Fine-tuning a pre-trained T5Gemma on one task.

    t5jax train t5gemma_finetune --init.model google/t5gemma-b-b-prefixlm --data.mixture MIXTURE

AdamW with a learning rate of 1e-4, a short warm-up and dropout 0.1. T5's recipe does not fit: its
learning rate is relative to the scale of a parameter, but Gemma's norms store w of a factor 1 + w.
Gemma's weights can be downloaded from the Hub after accepting their terms (`hf auth login`); a
local folder works too.

Hardware: 16 bytes per parameter for parameters, gradients and AdamW, plus activations. t5gemma-s-s
(0.3 billion parameters, most of them embeddings) takes 5 GB and runs on a CPU for a first try; b-b
takes 9.5 GB and runs on one GPU or TPU chip with 16 GB; for 2b-2b and above set mesh.fsdp,
model.dtype bfloat16, model.remat minimal and train.microbatches. None of these has been tested,
only a small model on a CPU. The result depends on your task; training stops early according to
eval.patience.
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
