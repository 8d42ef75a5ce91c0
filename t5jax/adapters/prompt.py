"""Prompt tuning: a soft prompt, vectors that the encoder reads before its input.

Lester et al. 2021 (arXiv:2104.08691), whose best start are the embeddings of tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp

from t5jax.architectures import Architecture
from t5jax.config import PromptConfig
from t5jax.models import api

LEAF = "embedding"
PATH = f"soft_prompt/{LEAF}"


def leaves(config: PromptConfig, model: Architecture) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns the shape and the logical axes of the prompt, by path."""
    return {PATH: ((config.prompt_length, model.d_model), ("rank", "embed"))}


def init(config: PromptConfig, base: api.Params, key: jax.Array) -> api.Params:
    """Returns the base's parameters with a prompt of the embeddings of random tokens, float32."""
    table_VD = base["token_embedder"]["embedding"]
    ids_P = jax.random.randint(key, (config.prompt_length,), 0, len(table_VD))
    return {**base, "soft_prompt": {LEAF: jnp.take(table_VD, ids_P, axis=0).astype(jnp.float32)}}
