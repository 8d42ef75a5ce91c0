"""What a network is: frozen descriptions, and every published size by name.

Plain Python without jax, so that configs load and print at once. The networks that read these
descriptions are in `t5jax/models/`. Names follow the papers and Hugging Face's `config.json`.

Whatever its family, a description has `family`, `kind`, `vocab_size`, `num_outputs`,
`dropout_rate`, `dtype`, `param_dtype`, `scan_layers`, `remat`, and the ids of special tokens.
"""

import dataclasses

from t5jax.architectures import bert, gpt, t5, t5gemma
from t5jax.architectures.bert import BertActivation, BertConfig, BertHead
from t5jax.architectures.common import Dtype, Kind, RematPolicy, check_choice, check_dtype
from t5jax.architectures.gpt import GPTActivation, GPTConfig, GPTFamily, LayerKind, RopeScaling
from t5jax.architectures.t5 import MlpActivation, T5Config
from t5jax.architectures.t5gemma import T5GemmaConfig

__all__ = [
    "SIZES",
    "BertActivation",
    "BertConfig",
    "BertHead",
    "Dtype",
    "GPTActivation",
    "GPTConfig",
    "GPTFamily",
    "Kind",
    "LayerKind",
    "MlpActivation",
    "ModelConfig",
    "RematPolicy",
    "RopeScaling",
    "T5Config",
    "T5GemmaConfig",
    "check_choice",
    "check_dtype",
    "published",
]

ModelConfig = T5Config | GPTConfig | BertConfig | T5GemmaConfig

SIZES: dict[str, ModelConfig] = t5.SIZES | gpt.SIZES | bert.SIZES | t5gemma.SIZES


def published(name: str, **changes) -> ModelConfig:
    """Returns the description of a published size, with fields changed.

    Args:
      name: a key of `SIZES`, such as "t5_1_1_base".
      **changes: fields to replace, such as dtype="bfloat16".
    Raises:
      ValueError: for a name that is not known, naming the nearest.
    """
    check_choice(name, tuple(SIZES), "the model's size")
    return dataclasses.replace(SIZES[name], **changes)
