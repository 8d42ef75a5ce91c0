"""A character-level GPT trained on one book, compared with a torch model of the same size.

Same text, batches, sizes, initial distribution and optimizer (AdamW with a constant learning rate),
alternating in one run. The table shows the loss on the last tenth of the book and the speed. The
default size and batch are those of nanoGPT's example for a CPU. Needs the `torch` extra.

    python benchmarks/gpt.py BOOK.md [--steps 400] [--rows 32 --length 128]
"""

import argparse
import dataclasses
import functools
import statistics
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from t5jax import batch as features
from t5jax import sharding
from t5jax.architectures import GPTConfig
from t5jax.config import Config, DataConfig, LossConfig, OptimizerConfig
from t5jax.host_memory import keep_freed_memory
from t5jax.losses import batch_loss
from t5jax.models import api
from t5jax.program import program
from turns import take_turns

RATE, STEPS_A_TURN = 1e-3, 20
MODEL = GPTConfig(
    vocab_size=256,
    d_model=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    d_ff=512,
    dropout_rate=0.0,
    pad_token_id=0,
    eos_token_id=0,
    decoder_start_token_id=0,
    scan_layers=False,
)


class Book:
    """Bytes to train on, and the last tenth to evaluate on."""

    def __init__(self, path: str, num_rows: int, length: int):
        self._num_rows, self._length = num_rows, length
        text = np.frombuffer(Path(path).read_bytes(), np.uint8).astype(np.int32)
        cut = len(text) * 9 // 10
        self._train, held_out = text[:cut], text[cut:]
        rows = len(held_out) // (length + 1)
        self.held_out = held_out[: rows * (length + 1)].reshape(rows, length + 1)[:256]
        self._rng = np.random.default_rng(0)

    def rows(self) -> np.ndarray:
        """Returns int32 [num_rows, length + 1], each from somewhere in the book."""
        starts = self._rng.integers(0, len(self._train) - self._length, self._num_rows)
        return np.stack([self._train[s : s + self._length + 1] for s in starts])


class T5jax:
    def __init__(self, path: str, num_rows: int, length: int):
        keep_freed_memory()
        self._book = Book(path, num_rows, length)
        model = dataclasses.replace(MODEL, max_positions=length)
        config = Config(
            model=model,
            data=DataConfig(batch_size=num_rows),
            optimizer=OptimizerConfig(name="adamw", learning_rate=RATE),
            loss=LossConfig(z_loss=0.0),
        )
        self._run = program(config, sharding.make_mesh())
        with self._run.use():
            self._state = self._run.create(jax.random.key(0))
        self._loss = jax.jit(lambda params, batch: batch_loss(model, params, batch, config.loss)[1])

    def __call__(self):
        with self._run.use():
            for _ in range(STEPS_A_TURN):
                self._state, metrics = self._run.step(self._state, _batch(self._book.rows()))
        metrics["loss"].block_until_ready()

    def result(self) -> float:
        sums = self._loss(self._state.params, _batch(self._book.held_out))
        return float(sums["nll"] / sums["tokens"])


def _batch(rows: np.ndarray) -> dict:
    return {
        features.DECODER_INPUT_TOKENS: rows[:, :-1],
        features.DECODER_TARGET_TOKENS: rows[:, 1:],
        features.DECODER_LOSS_WEIGHTS: np.ones((len(rows), rows.shape[1] - 1), np.float32),
    }


def torch_gpt(path: str, num_rows: int, length: int):
    """Returns torch's own layers put together as GPT-2, as a contestant."""
    import torch
    from torch import nn

    cfg = MODEL

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
            self.positions = nn.Embedding(length, cfg.d_model)
            layer = nn.TransformerEncoderLayer(
                cfg.d_model,
                cfg.num_heads,
                cfg.d_ff,
                dropout=0.0,
                activation=functools.partial(nn.functional.gelu, approximate="tanh"),
                batch_first=True,
                norm_first=True,
            )
            self.layers = nn.TransformerEncoder(
                layer, cfg.num_layers, nn.LayerNorm(cfg.d_model), enable_nested_tensor=False
            )
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))
            small = cfg.initializer_range * (2 * cfg.num_layers) ** -0.5
            for name, x in self.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(x)
                elif x.ndim == 2:
                    writes = name.endswith(("out_proj.weight", "linear2.weight"))
                    nn.init.normal_(x, std=small if writes else cfg.initializer_range)

        def forward(self, rows):
            x = self.tokens(rows[:, :-1]) + self.positions.weight
            x = self.layers(x, mask=self.mask, is_causal=True)
            logits = x @ self.tokens.weight.T
            return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    class Torch:
        def __init__(self):
            torch.manual_seed(0)
            self._book, self._network = Book(path, num_rows, length), GPT()
            self._optimizer = torch.optim.AdamW(
                self._network.parameters(), lr=RATE, weight_decay=0.0
            )

        def __call__(self):
            for _ in range(STEPS_A_TURN):
                self._optimizer.zero_grad()
                self._network(torch.tensor(self._book.rows()).long()).backward()
                self._optimizer.step()

        def result(self) -> float:
            with torch.inference_mode():
                return self._network(torch.tensor(self._book.held_out).long()).item()

    return Torch()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("book", help="a text file")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each")
    parser.add_argument("--rows", type=int, default=12, help="rows of a batch")
    parser.add_argument("--length", type=int, default=64, help="bytes of a row")
    args = parser.parse_args()

    contestants = {
        name: functools.partial(build, args.book, args.rows, args.length)
        for name, build in {"torch.nn, eager": torch_gpt, "t5jax": T5jax}.items()
    }
    # The first call, which is not timed, trains too.
    measured = take_turns(contestants, max(1, args.steps // STEPS_A_TURN - 1))
    model = dataclasses.replace(MODEL, max_positions=args.length)
    num_params = sum(x.size for x in jax.tree.leaves(api.param_shapes(model)))
    table = Table(
        title=f"GPT of {num_params:,} parameters, {args.rows} x {args.length} bytes a step, float32"
    )
    for column in ("", "nats a byte, held out", "steps/s", "times the first"):
        table.add_column(column, justify="left" if column == "" else "right")
    medians = {name: statistics.median(seconds) for name, (seconds, _) in measured.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        loss = measured[name][1]
        table.add_row(name, f"{loss:.3f}", f"{STEPS_A_TURN / median:.2f}", f"{first / median:.2f}x")
    Console().print(table)


if __name__ == "__main__":
    main()
