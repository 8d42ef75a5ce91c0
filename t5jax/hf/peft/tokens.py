"""The tables of tokens that an adapter's folder has: they were trained, or tokens were added.

PEFT loads a tensor into the module of its name. A module of modules_to_save is a copy of the
base's, which is tied to nothing; any other is the base's own, and what is tied to it changes, too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from t5jax import trees
from t5jax.architectures import Architecture
from t5jax.hf.mapping import Row, Tensor, same_values
from t5jax.hf.peft.config import MERGE_THERE
from t5jax.hf.peft.modules import check_gathered, table_of
from t5jax.models import api


def with_tokens(
    base: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> Architecture:
    """Returns the network that an adapter makes of its base.

    It has as many tokens as the adapter's tables, and where an output matrix was trained apart from
    the embedding that it is tied to in the base, an output matrix of its own.

    Args:
      base: the description of the base.
      config: adapter_config.json.
      tensors: those of the adapter, under the names of the base's table.
      where: the folder, for messages.
    Raises:
      ValueError: if the tables are not whole, or the network cannot be described.
    """
    rows = _tables(base)
    there = [name for row in rows for name in _names(row) if name in tensors]
    if not there:
        return base
    for name in there:
        check_gathered(name, tensors[name], where)
    sizes = {name: tensors[name].shape[0] for name in there}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        raise ValueError(f"{where} has tables of different numbers of tokens: {listed}")
    size = next(iter(sizes.values()))
    model = dataclasses.replace(base, vocab_size=size)
    apart = [row for row in rows if not _is_one(row, config, tensors)]
    if apart and getattr(model, "tie_word_embeddings", False):
        changes: dict[str, Any] = {"tie_word_embeddings": False}
        model = dataclasses.replace(model, **changes)
        before, rows = {row.ours for row in rows}, _tables(model)
        apart = [row for row in rows if not _is_one(row, config, tensors)]
        # Without a tensor of its own, the output matrix is what the embedding was.
        apart += [row for row in rows if row.ours not in before and row.theirs not in tensors]
    if apart:
        raise ValueError(
            f"{where} has {', '.join(there)} (modules_to_save "
            f"{', '.join(config.get('modules_to_save') or ())}), which is one table in its base "
            f"with {', '.join(n for row in apart for n in _names(row) if n not in there)}, and is "
            f"not here: that is not implemented; {MERGE_THERE}"
        )
    missing = [row.theirs for row in rows if not any(name in tensors for name in _names(row))]
    if missing and size != base.vocab_size:
        raise ValueError(
            f"{where} has {', '.join(there)} for {size} tokens, its base has {base.vocab_size}, "
            f"and what was added to {', '.join(missing)} is in no file; where it is in memory, "
            "save the adapter with save_embedding_layers=True, or merge it and save that model"
        )
    return model


def _tables(model: Architecture) -> list[Row]:
    """Returns the rows of a family's table that have a row or a number for each token."""
    axes = trees.flatten(api.param_axes(model))
    return [row for row in table_of(model).rows(model) if "vocab" in axes[row.ours]]


def _names(row: Row) -> tuple[str, ...]:
    return (row.theirs, *row.aliases)


def _is_one(row: Row, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether all modules that share a table of the base still have the same values."""
    there = [name for name in _names(row) if name in tensors]
    if not all(same_values(tensors[there[0]], tensors[name]) for name in there[1:]):
        return False
    copied = tuple(config.get("modules_to_save") or ())
    is_copied = any(name.rpartition(".")[0].endswith(copied) for name in there)
    return not is_copied or len(there) == len(_names(row))
