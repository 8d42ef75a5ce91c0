"""Several adapters over one base, each for some of the requests that are served at once."""

import warnings
from collections.abc import Mapping
from pathlib import PurePath

import numpy as np

from t5jax import checkpoint, storage, trees
from t5jax.adapters import digest, lora, prompt
from t5jax.architectures import Architecture
from t5jax.config import Config
from t5jax.hf import hub, peft
from t5jax.models import api
from t5jax.source.adapted import AdaptedSource
from t5jax.source.whole import Source


def read_adapters(
    base: Source, model: Architecture, params: api.Params, adapters: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Returns several adapters over one base, as `lora.stack` stacks them.

    Args:
      base: the base.
      model: its network.
      params: its parameters.
      adapters: runs, checkpoints or PEFT's folders by name.
    Raises:
      ValueError: if one is no adapter, is of another base, or replaces parameters of the base.
    """
    flat, found = trees.flatten(params), []
    for name, given in adapters.items():
        path = storage.path(given, f"adapter {name}")
        if checkpoint.is_run(path):
            path = checkpoint.best_checkpoint(path)
        config = Config(model=base.model)
        if checkpoint.is_checkpoint(path):
            checkpoint.check(path)
            config = checkpoint.read_config(path)
            if config.adapter is None:
                raise ValueError(
                    f"adapter {name}: {given} is a run without an adapter; serve it as a model"
                )
            if rounding := getattr(config.adapter, "base", None):
                raise ValueError(
                    f"adapter {name}: {given} was trained over its base in {rounding} "
                    "(adapter.base), and would answer otherwise over this one; serve it as a model "
                    f"of its own: t5jax serve {given}; or let go of the rounding, with the folder "
                    f"that `t5jax export {given} FOLDER` writes"
                )
            saved = checkpoint.read_base(path)
            read = digest.digests({p: flat[p] for p in saved if p in flat})
            digest.check(read, saved, str(path), str(base.path))
        elif not peft.is_adapter(path := hub.resolve(given)):
            raise ValueError(f"adapter {name}: {given} is a whole model; serve it as a model")
        elif (named := peft.base_of(path)) and not _may_be(base, named):
            warnings.warn(
                f"adapter {name}: {given} names {named} as its base, and is used over "
                f"{base.place}; PEFT's format has no checksums, so only their shapes are compared",
                stacklevel=3,
            )
        if not checkpoint.is_checkpoint(path) and peft.model_of(path, base.model) != base.model:
            raise ValueError(
                f"adapter {name}: {given} also replaces its base's tables of tokens or its head, "
                f"which cannot be shared; serve it as a model of its own: t5jax serve {given}"
            )
        adapted = AdaptedSource(path, config, base=base)
        check_reads_alike(adapted, base, f"adapter {name}: {given}", given)
        leaves = adapted.adapter(model)
        if prompt.PATH in leaves:
            raise ValueError(
                f"adapter {name}: {given} is a soft prompt, which cannot share a base; serve it as "
                f"a model of its own: t5jax serve {given}"
            )
        if replaced := [p for p in leaves if p.rpartition("/")[2] not in lora.LEAVES]:
            raise ValueError(
                f"adapter {name}: {given} also replaces {replaced[0]} of its base, which cannot be "
                f"shared; serve it as a model of its own: t5jax serve {given}"
            )
        found.append(leaves)
    return lora.stack(model, found)


def check_reads_alike(adapted: AdaptedSource, base: Source, what: str, given: str) -> None:
    """Raises ValueError if a run's adapter was trained on prompts that are read otherwise than its
    base reads them; warns if it has another tokenizer."""
    own, here = adapted.config.data.prefix_lm, base.config.data.prefix_lm
    if adapted.is_checkpoint and own != here:
        raise ValueError(
            f"{what} was trained with data.prefix_lm {own}, and {base.place} is read with {here}; "
            f"serve it as a model of its own: t5jax serve {given}"
        )
    theirs, ours = adapted.own_tokenizer(), base.own_tokenizer()
    if None not in (theirs, ours) and repr(theirs) != repr(ours):
        warnings.warn(
            f"{what} has another tokenizer ({theirs}) than {base.place} ({ours}), which is used "
            "for both; if they do not split a text alike, serve it as a model of its own: t5jax "
            f"serve {given}",
            stacklevel=4,
        )


def _may_be(base: Source, name: str) -> bool:
    """Returns whether a model may be what an adapter names as its base, wherever it lies now."""
    last = PurePath(name).name
    # In the Hub's cache, the parent of a model's folder is models--OWNER--NAME.
    return any(part == last or part.endswith(f"--{last}") for part in base.place.parts)
