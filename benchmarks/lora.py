"""One training step of T5 1.1 small with LoRA, compared with PEFT on torch in one run.

Rank 16 in the queries and values of all layers; the same batch and optimizer (AdamW), random
weights and tokens. The table shows medians and ratios to the first row. Needs the `torch` extra.

    python benchmarks/lora.py [--steps 5] [--dtype bfloat16]
"""

import argparse
import functools

import jax
from rich.console import Console
from rich.table import Table

from t5jax import sharding
from t5jax.architectures import T5Config, published
from t5jax.config import Config, DataConfig, LoraConfig, LossConfig, OptimizerConfig
from t5jax.hf.t5 import write_config
from t5jax.host_memory import keep_freed_memory
from t5jax.program import program
from train_step import BATCH, SOURCE, TARGET, random_batch
from turns import median_seconds

RANK = 16


def t5jax_step(model: T5Config, adapter: LoraConfig | None):
    """Returns a function that does one step and waits for it."""
    keep_freed_memory()
    config = Config(
        model=model,
        adapter=adapter,
        data=DataConfig(batch_size=BATCH),
        optimizer=OptimizerConfig(name="adamw"),
        loss=LossConfig(z_loss=0.0),
    )
    training = program(config, sharding.make_mesh())
    batch = random_batch(model)
    with training.use():
        state = training.create(jax.random.key(0))

    def run():
        nonlocal state
        with training.use():
            state, metrics = training.step(state, batch)
        return float(metrics["loss"]) / (BATCH * TARGET)

    return run


def peft_step(model: T5Config):
    import peft
    import torch
    from transformers import T5Config as HFConfig
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    config = HFConfig(**write_config(model) | {"use_cache": False})
    network = T5ForConditionalGeneration(config).to(getattr(torch, model.dtype))
    lora = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=RANK, lora_alpha=RANK, target_modules=["q", "v"]
    )
    network = peft.get_peft_model(network, lora).train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    batch = random_batch(model)
    inputs = torch.tensor(batch["encoder_input_tokens"]).long()
    labels = torch.tensor(batch["decoder_target_tokens"]).long()

    def run():
        optimizer.zero_grad()
        loss = network(input_ids=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()

    model = published("t5_1_1_small", dtype=args.dtype, scan_layers=False)
    adapter = LoraConfig(rank=RANK)
    contestants = {
        "PEFT + torch": functools.partial(peft_step, model),
        "t5jax, LoRA": functools.partial(t5jax_step, model, adapter),
        "t5jax, all parameters": functools.partial(t5jax_step, model, None),
    }
    seconds = median_seconds(contestants, args.steps)
    table = Table(title=f"T5 1.1 small, one step, {BATCH} x ({SOURCE} + {TARGET}), {args.dtype}")
    for column in ("", "seconds", "tokens/s", "times the first"):
        table.add_column(column, justify="left" if column == "" else "right")
    first = seconds[next(iter(contestants))]
    for name, median in seconds.items():
        rate = BATCH * (SOURCE + TARGET) / median
        table.add_row(name, f"{median:.2f}", f"{rate:,.0f}", f"{first / median:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
