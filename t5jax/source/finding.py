"""Finds a model by its name or path: what it is, and of an adapter where its base is."""

import contextlib
from pathlib import Path

from t5jax import checkpoint, storage
from t5jax.config import Config, override
from t5jax.hf import hub, peft
from t5jax.hf import io as hf_io
from t5jax.quantize import files as quantized_files
from t5jax.source.adapted import AdaptedSource
from t5jax.source.whole import Source
from t5jax.t5x import files as t5x_files
from t5jax.tokenizers import Tokenizer, load_tokenizer

_OR_BASE = ", or give it with --base (in Python, base) where the adapter is MODEL"


def find(
    name_or_path: str, vocabulary: str = "", *, base: str = "", revision: str | None = None
) -> Source:
    """Finds a model without reading its weights; for a run, its best checkpoint.

    Args:
      name_or_path: a Hub name, a Hugging Face folder, a run, or a checkpoint of a run.
      vocabulary: the tokenizer to use instead of the model's own, as for `load_tokenizer`.
      base: of an adapter: where its base is now. Empty: where the adapter says.
      revision: of a model on the Hub: a branch, a tag or a commit. None: the newest.
    Raises:
      ValueError: if there is no such model, or its family is unknown; if a base is given, and it is
        no adapter.
    """
    source = _find(name_or_path, vocabulary, base, revision, ())
    if base and not isinstance(source, AdaptedSource):
        raise ValueError(
            f"{source.path} is a whole model, so --base {base} (base) has no effect; leave it out"
        )
    return source


def _find(
    name_or_path: str, vocabulary: str, base: str, revision: str | None, over: tuple[Path, ...]
) -> Source:
    """Returns the model; `over` are the adapters whose base it is."""
    tokenizer = load_tokenizer(vocabulary) if vocabulary else None
    path = storage.path(name_or_path, "the model")
    if checkpoint.is_run(path):
        path = checkpoint.best_checkpoint(path)
    if checkpoint.is_checkpoint(path):
        checkpoint.check(path)
        config = checkpoint.read_config(path)
        if config.adapter is None:
            return Source(path, config, tokenizer)
        return AdaptedSource(
            path, config, tokenizer, base=_base_of(path, config, base, over), named_base=base
        )
    origin = path if storage.is_remote(path) else None
    if quantized_files.is_quantized(path):
        path = storage.local(path)
        return Source(path, quantized_files.read_config(path), tokenizer, origin)
    if path.is_dir() and t5x_files.is_checkpoint(path):
        raise ValueError(
            f"{path} is a T5X checkpoint; make a run of it with `t5jax import {path} OUTPUT "
            "--vocabulary FILE`, and give OUTPUT here"
        )
    path = hub.resolve(name_or_path, revision)
    if peft.is_adapter(path):
        return _peft_adapter(path, tokenizer, vocabulary, base, over)
    if tokenizer is None:
        # If there is none, or it is damaged, `Source.tokenizer` will say so.
        with contextlib.suppress(ValueError):
            tokenizer = load_tokenizer(path)
    return Source(path, Config(model=hf_io.read_config(path, tokenizer)), tokenizer, origin)


def find_base(config: Config, over: tuple[Path, ...] = ()) -> Source:
    """Returns the base of an adapter's run: init.model.

    Args:
      config: of the run.
      over: the adapters that are over it already, of which it must be none.
    Raises:
      ValueError: if the config names none, or it cannot be found.
    """
    if not config.init.model:
        raise ValueError(
            "adapter is set, but init.model is empty: an adapter is trained over a model; set "
            "init.model, or leave the adapter out"
        )
    return _find(config.init.model, config.data.vocabulary, "", None, over)


def _peft_adapter(
    path: Path,
    tokenizer: Tokenizer | None,
    vocabulary: str,
    given: str,
    over: tuple[Path, ...],
) -> AdaptedSource:
    name = given or peft.base_of(path)
    if not name:
        raise ValueError(
            f"{path} holds an adapter alone, and its adapter_config.json names no base; write it "
            f"there, as base_model_name_or_path{_OR_BASE}"
        )
    revision = None if given else peft.revision_of(path)
    try:
        base = _find(name, vocabulary, "", revision, _over(path, over))
    except ValueError as error:
        remedy = (
            f"; write where it is into adapter_config.json, as base_model_name_or_path{_OR_BASE}"
        )
        raise ValueError(_without_base(path, name, error) + ("" if given else remedy)) from error
    if tokenizer is None:
        with contextlib.suppress(ValueError):
            tokenizer = load_tokenizer(path)
    config = Config(model=peft.model_of(path, base.model))
    # How prompts are read is no part of PEFT's format, and the base's own is the best guess.
    config = override(config, {"data.prefix_lm": base.config.data.prefix_lm})
    return AdaptedSource(
        path, config, tokenizer or base.own_tokenizer(), base=base, named_base=given
    )


def _base_of(path: Path, config: Config, given: str, over: tuple[Path, ...]) -> Source:
    if given:
        config = override(config, {"init.model": given})
    try:
        return find_base(config, _over(path, over))
    except ValueError as error:
        told = _without_base(path, config.init.model, error)
        remedy = (
            f"; put it back{_OR_BASE}; what `t5jax export {path} FOLDER --merge --base BASE` "
            "writes needs none"
        )
        raise ValueError(told + ("" if given else remedy)) from error


def _over(path: Path, over: tuple[Path, ...]) -> tuple[Path, ...]:
    """Returns the adapters over the base of one. Raises ValueError if it is its own base."""
    path = path.absolute()
    if path in over:
        raise ValueError(f"{path} is an adapter over itself")
    return (*over, path)


def _without_base(path: Path, name: str, error: ValueError) -> str:
    return f"{path} holds an adapter alone; its base {name} cannot be read: {error}"
