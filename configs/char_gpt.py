"""A character-level GPT of two novels, from scratch, on two CPU cores.

    T5JAX_DATA=... t5jax train char_gpt
    t5jax infer runs/char_gpt --prompt "It is a truth universally" --max-tokens 90

tasks/novels.py says where the books are found. The tokens are bytes, so no vocabulary has to be
trained. Hardware: any; 600 steps take seven minutes on 2 CPU cores. Expected result: the validation
loss falls from 5.9 nats per byte (chance) to 2.36, 2.04 and 1.93 at steps 200, 400 and 600.
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
        run_dir="runs/char_gpt",
        model=GPTConfig(
            vocab_size=384,
            d_model=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            d_ff=512,
            max_positions=128,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            scan_layers=False,  # Unrolled is faster on CPU, and four layers compile quickly.
        ),
        data=DataConfig(mixture="novels_lm", vocabulary="bytes", targets_length=128, batch_size=32),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=3e-3,
            schedule="cosine",
            warmup_steps=50,
            weight_decay=0.1,
            b2=0.95,
            clip_norm=1.0,
        ),
        loss=LossConfig(z_loss=0.0),
        train=TrainConfig(steps=600, log_every=20),
        eval=EvalConfig(every=200, batch_size=64, num_examples=500, generate=False),
        checkpoint=CheckpointConfig(every=300),
    )
