"""The model that becomes smaller, and the folder of the one that it becomes."""

import dataclasses
from typing import Any

import jax

from t5jax.architectures import Architecture, Dtype
from t5jax.convert import stopping
from t5jax.hf import io as hf_io
from t5jax.models import api
from t5jax.source import Source, find
from t5jax.tokenizers import Tokenizer


def find_floats(model: str | Source) -> Source:
    """Returns where a model is. Raises ValueError if it is quantized, or has a soft prompt."""
    source = find(model) if isinstance(model, str) else model
    source.check_whole()
    source.warn_if_unrounded()
    if source.is_quantized:
        raise ValueError(
            f"{source.path} is compressed already; prune or trim the model that it was made from, "
            "and compress the result"
        )
    return source


def sizes(before: Architecture, after: Architecture) -> str:
    """Returns what two descriptions differ in, and their numbers of parameters."""
    changes = [
        f"{field.name} {was} -> {now}"
        for field in dataclasses.fields(before)
        if (was := getattr(before, field.name)) != (now := getattr(after, field.name))
    ]
    counts = [sum(x.size for x in jax.tree.leaves(api.param_shapes(m))) for m in (before, after)]
    return f"{', '.join(changes)}: {counts[0]:,} -> {counts[1]:,} parameters"


def write(
    source: Source,
    output: str,
    model: Architecture,
    params: api.Params,
    tokenizer: Tokenizer | None,
    dtype: Dtype,
    overwrite: bool,
    generation: dict[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face folder; without `generation`, with what the source has of it."""
    source.warn_of_prefixes(output)
    hf_io.save_params(
        output,
        model,
        params,
        dtype=dtype,
        tokenizer=tokenizer,
        generation=stopping(source.generation() if generation is None else generation, model),
        overwrite=overwrite,
    )
