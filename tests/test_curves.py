"""Golden loss curves: a change of numerics anywhere between a batch and the update shows in review.

Each run is short, but long enough that an error of the gradient, of dropout, or of the optimizer's
state reaches the loss. The batches are made here, from sums such as "12 + 7 = 19" in bytes, so that
no change of the data pipeline moves a curve.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import pytest

from golden import assert_golden_curve
from t5jax import batch as features
from t5jax.architectures import Architecture, BertConfig, GPTConfig, T5Config
from t5jax.config import LossConfig, OptimizerConfig
from t5jax.models import api
from t5jax.optimizers import make_optimizer
from t5jax.train_state import create_train_state
from t5jax.train_step import make_train_step

STEPS, ROWS = 20, 8
VOCAB_SIZE, EOS, MASK = 384, 1, 2  # Bytes are ids 3 to 258, as in ByT5.


# --- Batches --------------------------------------------------------------------------------------


def text_ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def addition(i: int) -> tuple[str, str]:
    """Returns the i-th sum under one of two templates, and its answer."""
    a, b = 37 * i % 89, 11 * i % 31
    return (f"What is {a} plus {b}?", f"{a} + {b} =")[i % 2], str(a + b)


def prompted_batch(step: int) -> features.Batch:
    """Rows of an encoder-decoder, padded."""
    examples = [addition(step * ROWS + i) for i in range(ROWS)]
    inputs, targets = (
        [[*text_ids(t), EOS] for t in texts] for texts in zip(*examples, strict=True)
    )
    targets = features.pad_ids(targets, ROWS, 5)
    return {
        features.ENCODER_INPUT_TOKENS: features.pad_ids(inputs, ROWS, 24),
        features.DECODER_INPUT_TOKENS: features.shift_right(targets, 0),
        features.DECODER_TARGET_TOKENS: targets,
        features.DECODER_LOSS_WEIGHTS: (targets != 0).astype("float32"),
    }


def packed_batch(step: int) -> features.Batch:
    """Rows of a decoder with two examples each, whose loss is that of the answers alone."""
    length = 56
    batch = {
        name: np.zeros((ROWS, length), "int32")
        for name in (
            features.DECODER_INPUT_TOKENS,
            features.DECODER_TARGET_TOKENS,
            features.DECODER_SEGMENT_IDS,
            features.DECODER_POSITIONS,
        )
    }
    weights = np.zeros((ROWS, length), "float32")
    for row in range(ROWS):
        start = 0
        for segment in (1, 2):
            prompt, answer = map(text_ids, addition((step * ROWS + row) * 2 + segment))
            targets = [*prompt, *answer, EOS]
            here = np.s_[row, start : start + len(targets)]
            batch[features.DECODER_INPUT_TOKENS][here] = [0, *targets[:-1]]
            batch[features.DECODER_TARGET_TOKENS][here] = targets
            batch[features.DECODER_SEGMENT_IDS][here] = segment
            batch[features.DECODER_POSITIONS][here] = range(len(targets))
            weights[row, start + len(prompt) : start + len(targets)] = 1
            start += len(targets)
    return batch | {features.DECODER_LOSS_WEIGHTS: weights}


def masked_batch(step: int) -> features.Batch:
    """Rows of an encoder in which every fourth token is masked, and alone predicted."""
    texts = [" ".join(addition(step * ROWS + i)) for i in range(ROWS)]
    targets = features.pad_ids([[3, *text_ids(t), EOS] for t in texts], ROWS, 28)
    masked = (targets != 0) & (np.add.outer(np.arange(ROWS), np.arange(28)) % 4 == step % 4)
    return {
        features.ENCODER_INPUT_TOKENS: np.where(masked, MASK, targets),
        features.ENCODER_TARGET_TOKENS: targets,
        features.ENCODER_LOSS_WEIGHTS: masked.astype("float32"),
    }


# --- Runs -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    model: Architecture
    make_batch: Callable[[int], features.Batch]
    optimizer: OptimizerConfig
    loss: LossConfig = LossConfig()
    microbatches: int = 1


RUNS = {
    # T5 1.1 with T5's recipe, and wide enough that Adafactor factors its matrices.
    "t5": Run(
        T5Config(
            vocab_size=VOCAB_SIZE,
            d_model=128,
            d_kv=32,
            d_ff=160,
            num_heads=4,
            num_encoder_layers=2,
            num_decoder_layers=2,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            dropout_rate=0.1,
        ),
        prompted_batch,
        OptimizerConfig("adafactor", 1e-2, "inverse_sqrt", warmup_steps=4),
        microbatches=2,
    ),
    # Rope, grouped heads, norms of queries and keys, a window; packed rows, AdamW with everything.
    "gpt": Run(
        GPTConfig(
            family="gemma3",
            vocab_size=VOCAB_SIZE,
            d_model=64,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            d_ff=96,
            mlp_activation="gated-gelu",
            position="rope",
            max_positions=64,
            rope_theta=10_000.0,
            rope_local_theta=100.0,
            norm="rmsnorm",
            norm_plus_one=True,
            qk_norm=True,
            post_norms=True,
            attention_bias=False,
            mlp_bias=False,
            scale_embedding=True,
            layer_pattern=("local", "global"),
            sliding_window=6,
            dropout_rate=0.1,
            pad_token_id=0,
            eos_token_id=EOS,
            decoder_start_token_id=0,
            remat="minimal",
        ),
        packed_batch,
        OptimizerConfig(
            "adamw",
            3e-3,
            "cosine",
            warmup_steps=5,
            final_fraction=0.1,
            weight_decay=0.1,
            b2=0.95,
            clip_norm=1.0,
        ),
    ),
    # LayerNorms and biases, an untied head, label smoothing; AdamW with a relative rate.
    "bert": Run(
        BertConfig(
            vocab_size=VOCAB_SIZE,
            d_model=48,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            max_positions=32,
            tie_word_embeddings=False,
            dropout_rate=0.1,
            cls_token_id=3,
            eos_token_id=EOS,
            scan_layers=False,
        ),
        masked_batch,
        OptimizerConfig("adamw_scaled", 3e-2, "linear", warmup_steps=2),
        LossConfig(z_loss=1e-3, label_smoothing=0.1),
    ),
}


def train(run: Run) -> dict[str, list[float]]:
    """Returns the loss a token and the norm of the gradient of every step."""
    tx = make_optimizer(run.optimizer, STEPS, api.param_axes(run.model))
    step = jax.jit(make_train_step(run.model, tx, run.loss, microbatches=run.microbatches))
    state = jax.jit(lambda key: create_train_state(run.model, tx, key))(jax.random.key(0))
    curve = {"loss": [], "grad_norm": []}
    for i in range(STEPS):
        state, metrics = step(state, run.make_batch(i))
        curve["loss"].append(float(metrics["loss"] / metrics["tokens"]))
        curve["grad_norm"].append(float(metrics["grad_norm"]))
    return curve


@pytest.mark.parametrize("name", RUNS)
def test_golden_curve(name):
    assert_golden_curve(f"curves/{name}.json", train(RUNS[name]), rtol=1e-5)
