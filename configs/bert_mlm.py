"""Masked language modelling: pre-training a small BERT on two novels, from scratch.

    T5JAX_DATA=... t5jax train bert_mlm --data.vocabulary google-bert/bert-base-uncased

tasks/novels.py says where the books are found; a local vocab.txt also works as the vocabulary. To
train on other text, set data.mixture to a task with the objective MaskedLM. Hardware: any; a few
minutes on 2 CPU cores. Expected result: the validation loss falls from 10.3 nats per predicted
token (chance) to 6.89, 6.76 and 6.74 at steps 50, 100 and 150; two books are not much to learn
from.
"""

from t5jax.architectures import BertConfig
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
        run_dir="runs/bert_mlm",
        model=BertConfig(
            d_model=128,
            d_ff=512,
            num_layers=2,
            num_heads=2,
            max_positions=128,
            dropout_rate=0.0,
            scan_layers=False,  # Unrolled is faster on CPU, and two layers compile quickly.
        ),
        data=DataConfig(mixture="novels_mlm", inputs_length=128, batch_size=32),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=2e-3, schedule="cosine", warmup_steps=20, clip_norm=1.0
        ),
        loss=LossConfig(z_loss=0.0),
        train=TrainConfig(steps=150, log_every=10),
        eval=EvalConfig(every=50, batch_size=32, generate=False),
        checkpoint=CheckpointConfig(every=150),
    )
