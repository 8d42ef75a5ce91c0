"""T5's span corruption on two novels, from nothing: pre-training in the small.

    T5JAX_DATA=... t5jax train novels_spans

tasks/novels.py says where the books are found. Hardware: any; one to four minutes on
2 CPU cores. Result to expect: a validation loss of 5.05 nats a token after 50 steps, 4.91 after 100
and 4.87 after 150.
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
        run_dir="runs/novels_spans",
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
        # 142 tokens of text fill 128 of inputs; what is cut out of them takes 29 of targets.
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
