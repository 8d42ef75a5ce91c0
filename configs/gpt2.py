"""Pre-training GPT-2 small (124 million parameters) on your own text.

    t5jax train gpt2 --data.mixture MIXTURE

MIXTURE is a text task with the objective CausalLM (`text_task`, as in tasks/novels.py); rows are
packed, 1,024 tokens each. The optimizer settings follow Brown et al. 2020 (arXiv:2005.14165),
appendix B. Hardware: a TPU v4-8 or 8 GPUs with 40 GB; with fewer, raise train.microbatches. 100,000
steps of 512 rows are 50 billion tokens, which on web text give about the published model's loss
(3.1 nats per token on OpenWebText) and take several days. The full run has not been done with
t5jax.
"""

import dataclasses

from t5jax.architectures import published
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
        run_dir="runs/gpt2",
        model=dataclasses.replace(
            # The vocabulary is rounded up so that it can be sharded evenly.
            published("gpt2", vocab_size=50304, dtype="bfloat16", remat="minimal"),
            dropout_rate=0.0,
        ),
        data=DataConfig(
            vocabulary="openai-community/gpt2", targets_length=1024, batch_size=512, pack=True
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=6e-4,
            schedule="cosine",
            warmup_steps=2000,
            final_fraction=0.1,
            weight_decay=0.1,
            b2=0.95,
            clip_norm=1.0,
        ),
        loss=LossConfig(z_loss=0.0),
        train=TrainConfig(steps=100_000, microbatches=4),
        eval=EvalConfig(every=2000, num_examples=2000, generate=False),
        checkpoint=CheckpointConfig(every=2000),
    )
