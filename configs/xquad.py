"""A small T5 begins to learn to answer questions in English and German, from nothing.

    T5JAX_DATA=... t5jax train xquad

tasks/xquad.py says where the data are. Hardware: any; one to three minutes on 2 CPU cores. Result
to expect: a validation loss of 5.7 nats a token after 50 steps and of 5.4 after 100, on the way to
useful answers but far from them. For those, start from a model that has learnt to read:

    t5jax train finetune --init.model google/flan-t5-base --data.mixture xquad
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
        run_dir="runs/xquad",
        model=T5Config(
            vocab_size=4096,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_heads=4,
            num_encoder_layers=2,
            num_decoder_layers=2,
            dropout_rate=0.0,
            scan_layers=False,  # Unrolled is faster on CPU, and two layers compile quickly.
        ),
        data=DataConfig(mixture="xquad", inputs_length=320, targets_length=16, batch_size=16),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=2e-3, schedule="cosine", warmup_steps=20
        ),
        train=TrainConfig(steps=100, log_every=10),
        # Half-learnt answers are not worth generating; `t5jax eval` does it.
        eval=EvalConfig(every=50, num_examples=128, batch_size=32, generate=False),
        checkpoint=CheckpointConfig(every=100),
    )
