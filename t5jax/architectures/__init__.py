"""Descriptions of networks, as frozen dataclasses, and every published size by name.

Plain Python without jax, so that configs load and print quickly. The networks themselves are in
`t5jax/models/`. Names follow the papers and Hugging Face's `config.json`.
"""

import dataclasses
from typing import Any

from t5jax.architectures.base import (
    Architecture,
    Classifier,
    Dtype,
    Head,
    Kind,
    RematPolicy,
    check_dtype,
)
from t5jax.architectures.bert import BertActivation, BertConfig, BertHead
from t5jax.architectures.families import FAMILIES, load_sizes
from t5jax.architectures.gpt import GPTActivation, GPTConfig, GPTFamily, RopeScaling
from t5jax.architectures.stack import LayerKind
from t5jax.architectures.t5 import MlpActivation, T5Config
from t5jax.architectures.t5gemma import T5GemmaConfig
from t5jax.checks import check_choice

__all__ = [
    "DEFAULT",
    "FAMILIES",
    "SIZES",
    "Architecture",
    "BertActivation",
    "BertConfig",
    "BertHead",
    "Classifier",
    "Dtype",
    "GPTActivation",
    "GPTConfig",
    "GPTFamily",
    "Head",
    "Kind",
    "LayerKind",
    "MlpActivation",
    "RematPolicy",
    "RopeScaling",
    "T5Config",
    "T5GemmaConfig",
    "check_dtype",
    "published",
]

DEFAULT: Architecture = T5Config()
"""The model of a config that does not set one."""

SIZES: dict[str, Architecture] = {
    name: size for family in FAMILIES for name, size in load_sizes(family).SIZES.items()
}


def published(name: str, **changes: Any) -> Architecture:
    """Returns the description of a published size, with fields changed.

    Args:
      name: a key of `SIZES`, such as "t5_1_1_base".
      **changes: fields to replace, such as dtype="bfloat16".
    Raises:
      ValueError: if the name is unknown, suggesting the most similar one.
    """
    check_choice(name, SIZES, "the model's size")
    return dataclasses.replace(SIZES[name], **changes)
