"""Pre-training a tiny T5 on two novels, from scratch, on two CPU cores.

    T5JAX_DATA=... t5jax train novels

uses T5's span corruption. tasks/novels.py says where the books are found, and lists the other
objectives; this one is causal language modelling, where the encoder reads nothing but eos:

    T5JAX_DATA=... t5jax train novels --run-dir runs/novels_lm --data.mixture novels_lm \\
      --data.inputs-length 1 --data.targets-length 128

Hardware: any; one to four minutes on 2 CPU cores. Expected validation loss, in nats per token,
after 50, 100 and 150 steps: novels_spans 5.05, 4.91 and 4.87; novels_lm 5.87, 5.43 and 5.34.
"""

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
        run_dir="runs/novels",
        # Unrolled layers are faster on CPU, and two of them compile quickly.
        model=published("t5_tiny", vocab_size=2048, dropout_rate=0.0, scan_layers=False),
        # 142 tokens of text give 128 of inputs; the corrupted spans make 29 tokens of targets.
        data=DataConfig(
            mixture="novels_spans", inputs_length=128, targets_length=32, batch_size=32
        ),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=2e-3, schedule="cosine", warmup_steps=20
        ),
        train=TrainConfig(steps=150, log_every=10),
        eval=EvalConfig(every=50, batch_size=32, generate=False),
        checkpoint=CheckpointConfig(every=150),
    )
