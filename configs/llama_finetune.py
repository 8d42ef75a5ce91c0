"""Fine-tuning a pre-trained Llama 3 (or Qwen 3, Gemma 2 and 3, GPT-2) on prompted tasks.

    t5jax train llama_finetune --init.model meta-llama/Llama-3.2-1B --data.mixture MIXTURE

The loss is computed on the answers alone; examples are packed. The architecture and the vocabulary
come with the model. AdamW with a low learning rate, bfloat16 activations and float32 parameters.
Hardware: 1B on 4 TPU v4 chips (--mesh.fsdp 4) or 4 GPUs with 40 GB, 8B on 32 chips (--mesh.fsdp
32); neither has been tested, only a small model on a CPU. The result depends on your task; training
stops early according to eval.patience.
"""

from t5jax.architectures import GPTConfig
from t5jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        run_dir="runs/llama_finetune",
        model=GPTConfig(dtype="bfloat16", remat="minimal", dropout_rate=0.0),
        data=DataConfig(inputs_length=768, targets_length=256, batch_size=64, pack=True),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=2e-5,
            schedule="cosine",
            warmup_steps=50,
            final_fraction=0.1,
            b2=0.95,
            clip_norm=1.0,
        ),
        loss=LossConfig(z_loss=0.0),
        train=TrainConfig(steps=1000),
        eval=EvalConfig(every=200, patience=3),
        checkpoint=CheckpointConfig(every=200),
    )
