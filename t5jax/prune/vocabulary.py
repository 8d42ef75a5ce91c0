"""Parameters for a vocabulary with fewer pieces: rows of the embedding and of the output matrix."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5jax import trees
from t5jax.architectures import Architecture
from t5jax.models import api

# A vocabulary that is a multiple of this is fast on a TPU, and a mesh can split it.
_MULTIPLE = 128


def trim_vocabulary(
    model: Architecture, params: api.Params, kept: np.ndarray, *, padded: bool
) -> tuple[Architecture, api.Params]:
    """Returns a network for some of its ids, and its parameters.

    If rows of no id pad the embedding to a multiple of 128, copies of the last one still do.

    Args:
      model: the description.
      params: its parameters; they are read on the host.
      kept: int64: for each new id, the one that it was. It has all token ids of the description.
      padded: whether the last row of the embedding is of no id.
    """
    size = len(kept)
    if padded and model.vocab_size % _MULTIPLE == 0:
        size = -(-size // _MULTIPLE) * _MULTIPLE
    rows = np.concatenate([kept, np.full(size - len(kept), model.vocab_size - 1)])
    axes = trees.flatten(api.param_axes(model))
    leaves = {
        path: np.take(np.asarray(x), rows, axes[path].index("vocab"))
        if "vocab" in axes[path]
        else x
        for path, x in trees.flatten(params).items()
    }
    new = {int(old): i for i, old in enumerate(kept)}
    changes: dict[str, Any] = {"vocab_size": size}
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name.endswith("_token_id") and value is not None:
            changes[field.name] = new[value]
        elif field.name.endswith("_token_ids"):
            changes[field.name] = tuple(new[i] for i in value)
    smaller = dataclasses.replace(model, **changes)
    return smaller, trees.unflatten(leaves)


def token_ids_of(model: Architecture) -> set[int]:
    """Returns the ids that a description names."""
    ids: set[int] = {model.start_token_id, *model.prompt_start, *model.prompt_end}
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name.endswith("_token_id") and value is not None:
            ids.add(value)
        elif field.name.endswith("_token_ids"):
            ids |= set(value)
    return ids


# What names ids in a generation_config.json.
_ONE = ("bos", "eos", "pad", "decoder_start", "forced_bos", "forced_eos")
_ONE = tuple(f"{name}_token_id" for name in _ONE)
_SETS = ("suppress_tokens", "begin_suppress_tokens")


def token_ids_of_generation(generation: Mapping[str, Any]) -> set[int]:
    """Returns the ids that a generation_config.json needs."""
    ids: set[int] = set()
    for name in _ONE:
        value = generation.get(name)
        ids |= set(value) if isinstance(value, list) else set() if value is None else {value}
    return ids


def renumber_generation(generation: Mapping[str, Any], kept: np.ndarray) -> dict[str, Any]:
    """Returns a generation_config.json with the new ids; what is gone needs no suppression."""
    new = {int(old): i for i, old in enumerate(kept)}
    renumbered = dict(generation)
    for name in _ONE:
        value = generation.get(name)
        if value is not None:
            renumbered[name] = [new[i] for i in value] if isinstance(value, list) else new[value]
    for name in _SETS:
        if generation.get(name):
            renumbered[name] = [new[i] for i in generation[name] if i in new]
    if words := generation.get("bad_words_ids"):
        there = [[new[i] for i in word] for word in words if all(i in new for i in word)]
        renumbered["bad_words_ids"] = there or None
    return renumbered
