"""Small BERTs under each head, parameters and batches for them.

Heads are odd in number, activations and norms differ, and no two widths are the same.
"""

import dataclasses

import jax
import numpy as np

from t5jax.architectures import BertConfig
from t5jax.models import api

TEXT_LABELS, WORD_LABELS = ("bad", "so so", "good"), ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
SMALL = BertConfig(
    vocab_size=67,
    d_model=21,
    d_ff=34,
    num_layers=3,
    num_heads=3,
    max_positions=29,
    cls_token_id=2,
    eos_token_id=3,
)
VARIANTS = {
    "masked_lm": SMALL,
    "masked_lm_untied": dataclasses.replace(
        SMALL, activation="gelu", num_heads=1, d_model=16, tie_word_embeddings=False
    ),
    "sequence_classification": dataclasses.replace(
        SMALL, activation="relu", head="sequence_classification", labels=TEXT_LABELS
    ),
    "token_classification": dataclasses.replace(
        SMALL,
        num_heads=5,
        d_model=20,
        layer_norm_epsilon=1e-3,
        type_vocab_size=1,
        head="token_classification",
        labels=WORD_LABELS,
    ),
    "pooler": dataclasses.replace(SMALL, num_layers=1, activation="gelu", head="pooler"),
    "none": dataclasses.replace(SMALL, num_layers=2, head="none"),
}
WITH_LOGITS = [name for name, config in VARIANTS.items() if config.num_outputs]


def random_params(config):
    """Parameters all of which matter: norm scales away from 1, biases as large as the rest."""
    rng = np.random.default_rng(0)

    def one(path, x):
        values = 0.4 * rng.standard_normal(x.shape)
        return (values + (path[-1].key == "scale")).astype("float32")

    return jax.tree_util.tree_map_with_path(one, api.param_shapes(config))


def texts(config, lengths=(25, 17, 4), seed=1):
    rng = np.random.default_rng(seed)
    return [np.array([2, *rng.integers(4, config.vocab_size, n - 2), 3], np.int32) for n in lengths]


def as_rows(texts, values, length):
    """int32 [texts, length]: values for each text, padded with 0."""
    out = np.zeros((len(texts), length), np.int32)
    for row, value in zip(out, values, strict=True):
        row[: len(value)] = value
    return out


def targets_of(config, texts):
    """A target for every token of each text, and which of them are asked (at least one)."""
    rng = np.random.default_rng(2)
    targets = [rng.integers(0, config.num_outputs, len(text)) for text in texts]
    asked = [rng.random(len(text)) < 0.5 for text in texts]
    if config.head == "sequence_classification":
        asked = [np.arange(len(text)) == 0 for text in texts]
    return targets, asked


def batch_of(config, length=27):
    rows = texts(config)
    targets, asked = targets_of(config, rows) if config.num_outputs else (rows, rows)
    return {
        "encoder_input_tokens": as_rows(rows, rows, length),
        "encoder_target_tokens": as_rows(rows, targets, length),
        "encoder_loss_weights": as_rows(rows, asked, length).astype("float32"),
    }


def pack(config, texts, groups, length=27):
    """Rows that each hold some of the texts, by number, with their targets."""
    targets, asked = targets_of(config, texts)
    columns = {
        "input_tokens": texts,
        "target_tokens": targets,
        "loss_weights": asked,
        "positions": [range(len(text)) for text in texts],
    }
    batch = {
        f"encoder_{name}": as_rows(
            groups, [[x for i in group for x in values[i]] for group in groups], length
        )
        for name, values in columns.items()
    }
    numbers = [[n for n, i in enumerate(group, 1) for _ in texts[i]] for group in groups]
    batch["encoder_segment_ids"] = as_rows(groups, numbers, length)
    return batch | {"encoder_loss_weights": batch["encoder_loss_weights"].astype("float32")}
