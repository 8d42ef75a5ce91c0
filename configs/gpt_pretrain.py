"""Pre-training a GPT-2 medium, or training Llama 3 8B further, on your own text, on TPUs.

    t5jax train gpt_pretrain:gpt2_medium --data.mixture MIXTURE
    t5jax train gpt_pretrain:llama3_8b --data.mixture MIXTURE \\
      --init.model meta-llama/Meta-Llama-3-8B
    t5jax plan gpt_pretrain:llama3_8b --topology v5p:2x2x4 --no-inputs

MIXTURE is a text task with the objective CausalLM (`text_task`, as in tasks/novels.py); rows are
packed, 2,048 tokens each. The optimizer's settings follow Brown et al. 2020 (arXiv:2005.14165), at
a tenth of the learning rate for the model that is already trained. Hardware: four v5e chips, and 16
v5p chips. `t5jax plan` (libtpu 0.0.42) estimates for GPT-2 medium on v5e:2x2 0.40 s a step, 57 %
MFU, and 4.0 of 15.75 GiB; for Llama 3 8B on v5p:2x2x4 1.39 s, 62 % MFU, and 38 of 95.7 GiB. Nothing
of this has run on a TPU yet.
"""

import dataclasses

from t5jax.architectures import published
from t5jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)

# Remat policy, rows, learning rate, vocabulary, mesh, and changes of each model.
SIZES = {
    "gpt2_medium": (
        "full",
        32,
        3e-4,
        "openai-community/gpt2",
        MeshConfig(data=1, fsdp=-1),
        # The vocabulary is rounded up, and there are positions for 2,048 tokens.
        {"vocab_size": 50304, "max_positions": 2048},
    ),
    "llama3_8b": ("minimal", 64, 3e-5, "", MeshConfig(data=1, fsdp=-1), {}),
}


def get_config(size: str = "gpt2_medium") -> Config:
    if size not in SIZES:
        raise ValueError(f"gpt_pretrain has no size {size!r}; there are {', '.join(SIZES)}")
    remat, rows, rate, vocabulary, mesh, changes = SIZES[size]
    return Config(
        run_dir=f"runs/{size}",
        model=dataclasses.replace(
            published(size, dtype="bfloat16", remat=remat, **changes), dropout_rate=0.0
        ),
        data=DataConfig(vocabulary=vocabulary, targets_length=2048, batch_size=rows, pack=True),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=rate,
            schedule="cosine",
            warmup_steps=2000,
            final_fraction=0.1,
            weight_decay=0.1,
            b2=0.95,
            clip_norm=1.0,
        ),
        loss=LossConfig(z_loss=0.0),
        train=TrainConfig(steps=100_000),
        eval=EvalConfig(every=2000, num_examples=2000, generate=False),
        checkpoint=CheckpointConfig(every=2000),
        mesh=mesh,
    )
