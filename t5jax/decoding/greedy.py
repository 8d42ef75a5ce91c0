"""Greedy decoding: the most probable token at each step.

B batch, T tokens generated.
"""

from collections.abc import Mapping

import jax

from t5jax.architectures import Architecture
from t5jax.decoding.loop import Request, write
from t5jax.models import api


def greedy(
    model: Architecture, params: api.Params, batch: Mapping[str, jax.Array], max_tokens: int
) -> jax.Array:
    """Returns the most probable token at each step, int32 [B, max_tokens]; eos, then padding.

    Arguments as for `loop.write`.
    """
    return write(model, params, batch, max_tokens, Request()).tokens.T
