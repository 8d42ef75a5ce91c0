"""One training step of T5 1.1 small, compared with transformers on torch in one run.

Same size, batch, dropout rate and optimizer (AdamW), random weights and tokens; the table shows
medians and ratios to the first row. Needs the `torch` extra.

    python benchmarks/train_step.py [--steps 5] [--dtype bfloat16] [--no-compile]
"""

import argparse
import functools

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from t5jax import batch as features
from t5jax import sharding
from t5jax.architectures import T5Config, published
from t5jax.config import Config, DataConfig, LoraConfig, LossConfig, OptimizerConfig
from t5jax.hf.t5 import write_config
from t5jax.host_memory import keep_freed_memory
from t5jax.program import program
from turns import median_seconds

BATCH, SOURCE, TARGET = 8, 256, 64


def random_batch(model: T5Config) -> dict:
    rng = np.random.default_rng(0)
    tokens = lambda length: rng.integers(2, model.vocab_size, (BATCH, length), np.int32)  # noqa: E731
    targets = tokens(TARGET)
    return {
        features.ENCODER_INPUT_TOKENS: tokens(SOURCE),
        features.DECODER_INPUT_TOKENS: features.shift_right(targets, 0),
        features.DECODER_TARGET_TOKENS: targets,
        features.DECODER_LOSS_WEIGHTS: np.ones((BATCH, TARGET), np.float32),
    }


def t5jax_step(model: T5Config, adapter: LoraConfig | None = None):
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


def torch_step(model: T5Config, compiled: bool, adapted=lambda network: network):
    """Returns the same of transformers.

    Args:
      adapted: returns the network with an adapter.
    """
    import torch
    from transformers import T5Config as HFConfig
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(0)
    config = HFConfig(**write_config(model) | {"use_cache": False})
    network = adapted(T5ForConditionalGeneration(config).to(getattr(torch, model.dtype))).train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    batch = random_batch(model)
    inputs = torch.tensor(batch[features.ENCODER_INPUT_TOKENS]).long()
    labels = torch.tensor(batch[features.DECODER_TARGET_TOKENS]).long()
    forward = torch.compile(network) if compiled else network

    def run():
        optimizer.zero_grad()
        loss = forward(input_ids=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()

    small = published("t5_1_1_small", dtype=args.dtype)
    unrolled = published("t5_1_1_small", dtype=args.dtype, scan_layers=False)
    contestants = {"transformers + torch, eager": functools.partial(torch_step, small, False)}
    if not args.no_compile:
        contestants["transformers + torch.compile"] = functools.partial(torch_step, small, True)
    contestants["t5jax, unrolled"] = functools.partial(t5jax_step, unrolled)
    contestants["t5jax, scanned"] = functools.partial(t5jax_step, small)
    show(median_seconds(contestants, args.steps), args.dtype)


def show(seconds: dict[str, float], dtype: str):
    """Prints medians, and how often each fits into the first."""
    table = Table(title=f"T5 1.1 small, one step, {BATCH} x ({SOURCE} + {TARGET}), {dtype}")
    for column in ("", "seconds", "tokens/s", "times the first"):
        table.add_column(column, justify="left" if column == "" else "right")
    first = seconds[next(iter(seconds))]
    for name, median in seconds.items():
        rate = BATCH * (SOURCE + TARGET) / median
        table.add_row(name, f"{median:.2f}", f"{rate:,.0f}", f"{first / median:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
