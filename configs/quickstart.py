"""A small T5 1.1 that learns number words in three languages, from nothing, on two CPU cores.

    t5jax train quickstart        (or `make quickstart`, which also evaluates, exports and answers)

Hardware: any; under 5 minutes on 2 CPU cores. Result to expect: at least 95 % exact match on
every task, on numbers that were never seen.
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
        run_dir="runs/quickstart",
        model=T5Config(
            vocab_size=384,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_heads=4,
            num_encoder_layers=2,
            num_decoder_layers=2,
            dropout_rate=0.0,  # No example is seen often enough to be learnt by heart.
            scan_layers=False,  # Unrolled is faster on CPU, and two layers compile quickly.
        ),
        data=DataConfig(mixture="numbers", inputs_length=24, targets_length=16, batch_size=128),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=2e-3, schedule="cosine", warmup_steps=100
        ),
        train=TrainConfig(steps=900, log_every=20),
        eval=EvalConfig(every=300, num_examples=100, batch_size=100, num_samples=1),
        checkpoint=CheckpointConfig(every=300),
    )
