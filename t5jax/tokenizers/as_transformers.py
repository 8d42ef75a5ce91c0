"""Builds the tokenizer of a Hugging Face folder, as transformers does.

What a folder's files mean depends on its model and on the class of its tokenizer: vocab.json and
merges.txt split text by other rules for Qwen 3 than for GPT-2, tokenizer_config.json overrides
tokenizer.json, and added tokens are in any of four files. So transformers reads them. The result
belongs to the `tokenizers` library.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import models

from t5jax.checks import first_line
from t5jax.tokenizers.common import json_bytes, read_file, read_json

_log = logging.getLogger(__name__)

CONFIG = "tokenizer_config.json"
_NAMES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
_OF_MODEL = ("tokenizer_class", "model_type")
# For a folder that says neither what its model nor what its tokenizer is.
_CLASSES = {
    "tokenizer.json": "PreTrainedTokenizerFast",
    "vocab.json": "GPT2Tokenizer",
    "vocab.txt": "BertTokenizer",
}


class Built(NamedTuple):
    """The tokenizer of a folder."""

    tokenizer: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    """The tokens that the folder or its class names: {"eos_token": "</s>", ...}."""
    cleans_up: bool
    """Whether spaces before punctuation are removed from decoded texts."""
    files: dict[str, bytes]
    """Files from which the same tokenizer is built, without those of the model."""


def build(folder: Path, files: Mapping[str, bytes], name: str) -> Built:
    """Returns the tokenizer of a folder, with all its settings and added tokens.

    Args:
      folder: the folder.
      files: the content of its files by name, including the model's config.json if there is one.
      name: the folder's name in error messages.
    Raises:
      ValueError: if transformers cannot build it, or a setting cannot be honoured.
    """
    theirs = _load(folder, files, name)
    if not getattr(theirs, "is_fast", False):
        raise ValueError(
            f"the tokenizer of {name} is a {type(theirs).__name__}, which has no tokenizer.json; "
            "save one beside it, or choose another tokenizer"
        )
    if theirs.split_special_tokens:
        raise ValueError(
            f"{CONFIG} in {name} sets split_special_tokens, which is not supported; leave it out"
        )
    special = {
        f"{what}_token": str(token)
        for what in _NAMES
        if (token := getattr(theirs, f"{what}_token", None)) is not None
    }
    if "vocab.txt" in files and "tokenizer.json" not in files:
        own = read_json(files, "special_tokens_map.json", name) | read_json(files, CONFIG, name)
        _check_word_pieces(theirs, [t for key, t in special.items() if key not in own], name)
    tokenizer = theirs.backend_tokenizer
    _warn_of_new(tokenizer, special, files, name)
    cleans_up = theirs.clean_up_tokenization_spaces and (
        type(tokenizer.model).__name__ != "BPE"
        or theirs.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    )
    kept = {file: content for file, content in files.items() if file != "config.json"}
    config = read_json(files, CONFIG, name)
    eos = _models_eos(files, name)
    token = None if eos is None or eos < 0 else tokenizer.id_to_token(eos)
    if token is not None and not {"eos_token", "sep_token"} & set(special):
        # In transformers, what ends an answer need not be a special token of the tokenizer.
        special["eos_token"] = config["eos_token"] = token
        kept[CONFIG] = json_bytes(config)
    kind = _class_name(theirs)
    if "tokenizer.json" not in files:
        # A tokenizer that pads needs a token for it.
        config = (
            special | {"pad_token": special.get("pad_token", special.get("eos_token"))} | config
        )
    elif str(config.get("tokenizer_class")).removesuffix("Fast") == kind.removesuffix("Fast"):
        return Built(tokenizer, special, cleans_up, kept)
    # The model may have said of which class it is, and it is not among these files.
    config["tokenizer_class"] = kind
    made = {"tokenizer.json": tokenizer.to_str().encode(), CONFIG: json_bytes(config)}
    return Built(tokenizer, special, cleans_up, kept | made)


def read_tokenizer(files: Mapping[str, bytes], name: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer in tokenizer.json. Raises ValueError if it is damaged."""
    try:
        return tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # The library raises Exception itself.
        raise ValueError(f"tokenizer.json in {name} is damaged: {error}") from None


def _models_eos(files: Mapping[str, bytes], name: str) -> int | None:
    """Returns the first id with which an answer ends, as config.json has it."""
    eos = read_json(files, "config.json", name).get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    return first if type(first) is int else None


def _warn_of_new(
    tokenizer: tokenizers.Tokenizer,
    special: Mapping[str, str],
    files: Mapping[str, bytes],
    name: str,
) -> None:
    """Warns of special tokens that are named without being in the vocabulary."""
    listed = {
        token["content"]
        for token in read_json(files, "tokenizer.json", name).get("added_tokens") or []
    }
    listed |= set(read_json(files, "added_tokens.json", name))
    decoder = read_json(files, CONFIG, name).get("added_tokens_decoder") or {}
    listed |= {token["content"] for token in decoder.values()}
    has = tokenizer.model.token_to_id
    for field, token in special.items():
        if token not in listed and has(token) is None:
            _log.warning(
                "%s: %s is %r, which is not in the vocabulary; it gets the id %s, as in "
                "transformers, for which no model was trained",
                *(name, field, token, tokenizer.token_to_id(token)),
            )


def _check_merges(folder: Path, files: Mapping[str, bytes], name: str) -> None:
    """Raises ValueError if vocab.json and merges.txt are damaged or do not fit."""
    read_json(files, "vocab.json", name)
    try:
        models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise ValueError(
            f"the vocabulary and the merges of {name} do not fit: {first_line(error)}"
        ) from None


def _check_word_pieces(theirs: Any, special: Iterable[str], name: str) -> None:
    """Raises ValueError if BERT's special tokens are not in vocab.txt."""
    has = theirs.backend_tokenizer.model.token_to_id
    if missing := [token for token in special if has(token) is None]:
        raise ValueError(
            f"{name} is not a WordPiece vocabulary: it lacks {', '.join(missing)}; expected one "
            "token per line, as in BERT's vocab.txt"
        )


def write_tokenizer_json(folder: Path) -> None:
    """Adds a tokenizer.json to the files of a tokenizer in a folder, if there is none.

    transformers reads the tokenizers of some models from it alone.
    """
    if (folder / "tokenizer.json").exists():
        return
    files = {CONFIG: read_file(folder / CONFIG)}
    kind = read_json(files, CONFIG, str(folder))["tokenizer_class"].removesuffix("Fast")
    theirs = _load(folder, files, str(folder), kind)
    theirs.backend_tokenizer.save(str(folder / "tokenizer.json"))


def _class_name(theirs: Any) -> str:
    name = type(theirs).__name__
    # Its name in transformers 4, which version 5 reads as well.
    return "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name


def _load(folder: Path, files: Mapping[str, bytes], name: str, kind: str = "") -> Any:
    """Returns the tokenizer of transformers; kind: its class, if its files do not decide."""
    # Without torch, it advises to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    model, own = read_json(files, "config.json", name), read_json(files, CONFIG, name)
    says = own.get("tokenizer_class"), own.get("auto_map"), *map(model.get, _OF_MODEL)
    options = {}
    if not kind and any(says):
        kind, options = "AutoTokenizer", {"config": _config(model)}
    elif not kind:
        kind = next(kind for file, kind in _CLASSES.items() if file in files)
    loader = getattr(transformers, kind)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return loader.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # Of any class, from three libraries.
        if "tokenizer.json" in files:
            read_tokenizer(files, name)
        elif "vocab.json" in files:
            _check_merges(folder, files, name)
        raise ValueError(
            f"transformers cannot build the tokenizer of {name}: {first_line(error)}"
        ) from None
    finally:
        transformers.logging.set_verbosity(verbosity)


def _config(model: Mapping[str, Any]) -> Any:
    """Returns what the choice of a tokenizer depends on in config.json, as AutoTokenizer takes it.

    The rest of it is not checked: transformers refuses models of which it needs no more than this.
    """
    import transformers

    try:
        config = transformers.AutoConfig.for_model(model.get("model_type"))
    except ValueError:  # It does not know the type.
        config = transformers.PreTrainedConfig()
    for key in ("tokenizer_class", "_name_or_path"):
        if key in model:
            setattr(config, key, model[key])
    return config
