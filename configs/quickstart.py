"""A tiny T5 1.1 learns number words in three languages, from scratch, on two CPU cores.

    t5jax train quickstart        (or `make quickstart`, which also evaluates, exports and answers)

Hardware: any; under 5 minutes on 2 CPU cores. Expected result: at least 95 % exact match on every
task, on numbers that it was not trained on.
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
        run_dir="runs/quickstart",
        # No dropout: no example is seen often enough to be memorized. Unrolled layers are faster on
        # CPU, and two of them compile quickly.
        model=published("t5_tiny", vocab_size=384, dropout_rate=0.0, scan_layers=False),
        data=DataConfig(mixture="numbers", inputs_length=24, targets_length=16, batch_size=128),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=2e-3, schedule="cosine", warmup_steps=100
        ),
        train=TrainConfig(steps=900, log_every=20),
        eval=EvalConfig(every=300, num_examples=100, batch_size=100, num_samples=1),
        checkpoint=CheckpointConfig(every=300),
    )
