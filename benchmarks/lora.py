"""One training step of T5 1.1 small with LoRA, compared with PEFT on torch in one run.

Rank 16 in the queries and values of all layers; the same batch and optimizer (AdamW), random
weights and tokens. The table shows medians and ratios to the first row. Needs the `torch` extra.

    python benchmarks/lora.py [--steps 5] [--dtype bfloat16]

With --memory, it runs nothing: it compiles steps of T5 1.1 large and prints the compiler's figures.
Rank 16 in all matrices of the layers, 8 x (256 + 64), remat full.

    python benchmarks/lora.py --memory
"""

import argparse
import dataclasses
import functools
import math

import jax
from rich.console import Console
from rich.table import Table

from t5jax import sharding
from t5jax.architectures import published
from t5jax.batch import train_spec
from t5jax.config import Config, DataConfig, LoraConfig, OptimizerConfig
from t5jax.program import program
from train_step import BATCH, SOURCE, TARGET, show, t5jax_step, torch_step
from turns import median_seconds

RANK = 16


def with_lora(network):
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=RANK, lora_alpha=RANK, target_modules=["q", "v"]
    )
    return peft.get_peft_model(network, config)


def memory():
    """Prints what the compiler says that a step needs, for several ways of fine-tuning."""
    model = published("t5_1_1_large", dtype="bfloat16", remat="full")
    adapter = LoraConfig(rank=RANK, targets=("all-linear",))
    ways = {
        "all parameters, float32": (model, None),
        "LoRA over float32": (model, adapter),
        "LoRA over bfloat16": (dataclasses.replace(model, param_dtype="bfloat16"), adapter),
        "LoRA over int8": (model, dataclasses.replace(adapter, base="int8")),
        "LoRA over NF4 (QLoRA)": (model, dataclasses.replace(adapter, base="nf4")),
    }
    table = Table(title=f"T5 1.1 large, one step, {BATCH} x ({SOURCE} + {TARGET}), AdamW, GiB")
    for column in ("", "parameters", "optimizer", "temporaries", "in all"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, (described, given) in ways.items():
        data = DataConfig(batch_size=BATCH, inputs_length=SOURCE, targets_length=TARGET)
        optimizer = OptimizerConfig(name="adamw")
        config = Config(model=described, adapter=given, data=data, optimizer=optimizer)
        run = program(config, sharding.make_mesh())
        found = run.lower(train_spec(config)).compile().memory_analysis()
        params, moments = (
            sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
            for tree in (run.shapes.params, run.shapes.opt_state)
        )
        # The new state takes the place of the old one.
        whole = found.argument_size_in_bytes + found.temp_size_in_bytes
        sizes = (params, moments, found.temp_size_in_bytes, whole)
        table.add_row(name, *(f"{size / 2**30:.2f}" for size in sizes))
    Console().print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--memory", action="store_true", help="print memory instead of time")
    args = parser.parse_args()
    if args.memory:
        memory()
        return

    model = published("t5_1_1_small", dtype=args.dtype, scan_layers=False)
    contestants = {
        "PEFT + torch": functools.partial(torch_step, model, False, with_lora),
        "t5jax, LoRA": functools.partial(t5jax_step, model, LoraConfig(rank=RANK)),
        "t5jax, all parameters": functools.partial(t5jax_step, model),
    }
    show(median_seconds(contestants, args.steps), args.dtype)


if __name__ == "__main__":
    main()
