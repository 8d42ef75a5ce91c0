"""A small T5 begins to learn grade-school mathematics, from nothing.

    T5JAX_DATA=... t5jax train gsm8k

tasks/gsm8k.py says where the data are. Hardware: any; one to three minutes on 2 CPU cores. Result
to expect: a validation loss of 4.2 nats a token after 50 steps and of 4.0 after 100, on the way to
useful answers but far from them. For those, start from a model that has learnt to read:

    t5jax train finetune --init.model google/flan-t5-base --data.mixture gsm8k
"""

from t5jax.architectures import T5Config
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
        run_dir="runs/gsm8k",
        model=T5Config(
            vocab_size=2048,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_heads=4,
            num_encoder_layers=2,
            num_decoder_layers=2,
            dropout_rate=0.0,
            scan_layers=False,  # Unrolled is faster on CPU, and two layers compile quickly.
        ),
        data=DataConfig(mixture="gsm8k", inputs_length=192, targets_length=128, batch_size=16),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=2e-3, schedule="cosine", warmup_steps=20
        ),
        train=TrainConfig(steps=100, log_every=10),
        # Half-learnt answers are not worth generating; `t5jax eval` does it.
        eval=EvalConfig(every=50, num_examples=128, batch_size=32, generate=False),
        checkpoint=CheckpointConfig(every=100),
    )
