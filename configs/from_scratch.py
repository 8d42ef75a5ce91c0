"""A tiny T5 learns one of the shipped prompted tasks from scratch, on two CPU cores.

    T5JAX_DATA=... t5jax train from_scratch

trains on GSM8K, grade-school mathematics; tasks/gsm8k.py says where the data are. The others want
longer inputs and a larger vocabulary:

    T5JAX_DATA=... t5jax train from_scratch --run-dir runs/scitldr --data.mixture scitldr \\
      --model.vocab-size 4096 --data.inputs-length 320 --data.targets-length 48
    T5JAX_DATA=... t5jax train from_scratch --run-dir runs/xquad --data.mixture xquad \\
      --model.vocab-size 4096 --data.inputs-length 320 --data.targets-length 16

Hardware: any; one to three minutes on 2 CPU cores. Expected validation loss, in nats per token,
after 50 and 100 steps: gsm8k 4.2 and 4.0, scitldr 6.1 and 5.9, xquad 5.7 and 5.4. That is far from
useful answers; for those, start from a pre-trained model:

    t5jax train finetune --init.model google/flan-t5-base --data.mixture gsm8k
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
        run_dir="runs/from_scratch",
        # Unrolled layers are faster on CPU, and two of them compile quickly.
        model=published("t5_tiny", vocab_size=2048, dropout_rate=0.0, scan_layers=False),
        data=DataConfig(mixture="gsm8k", inputs_length=192, targets_length=128, batch_size=16),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=2e-3, schedule="cosine", warmup_steps=20
        ),
        train=TrainConfig(steps=100, log_every=10),
        # Answers this early are not worth generating; `t5jax eval` does it.
        eval=EvalConfig(every=50, num_examples=128, batch_size=32, generate=False),
        checkpoint=CheckpointConfig(every=100),
    )
