"""Loads the tokenizer for a name, a file or a folder."""

import re
from collections.abc import Mapping
from pathlib import Path

from t5jax.tokenizers.byt5 import ByteTokenizer
from t5jax.tokenizers.common import SENTINEL, Tokenizer, read_file, read_json
from t5jax.tokenizers.hugging_face import HuggingFaceTokenizer, bpe_files, word_piece_files
from t5jax.tokenizers.sentence_piece import SentencePieceTokenizer

# A tokenizer's files in a Hugging Face folder; all are read, and saved again unchanged.
_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Returns the tokenizer for a name, a file or a folder.

    Args:
      source: "bytes"; a SentencePiece .model file; a tokenizer.json; a vocab.json of byte-level BPE
        next to its merges.txt; a WordPiece vocab.txt (prefixes are allowed: gpt2_vocab.json,
        gpt2_merges.txt); a folder with such files, as written by t5jax and Hugging Face; or a Hub
        name.
    Raises:
      ValueError: if there is no such tokenizer, or its files are damaged.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = Path(source).expanduser()
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        return _load_folder(path)
    # A Hub name is "name" or "owner/name", without a suffix.
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        raise ValueError(_not_found(source))
    if path.suffix in (".model", ".json", ".txt"):
        raise ValueError(_not_found(source))
    from t5jax.hf.hub import resolve

    return _load_folder(resolve(source))


def _not_found(source: str | Path) -> str:
    return (
        f'there is no tokenizer {str(source)!r}; expected "bytes", a SentencePiece .model file, a '
        "tokenizer.json, vocab.json or vocab.txt, a folder with tokenizer files, or a hub name "
        "such as google/flan-t5-small"
    )


def _load_file(path: Path) -> Tokenizer:
    if path.name.endswith("vocab.json"):
        merges = path.with_name(path.name.removesuffix("vocab.json") + "merges.txt")
        return HuggingFaceTokenizer(
            bpe_files(read_file(path), read_file(merges), {}, str(path)), str(path)
        )
    if path.name.endswith("vocab.txt"):
        return HuggingFaceTokenizer(word_piece_files(read_file(path), {}, str(path)), str(path))
    if path.suffix == ".json":
        return HuggingFaceTokenizer({"tokenizer.json": read_file(path)}, str(path))
    return SentencePieceTokenizer(path)


def _load_folder(folder: Path) -> Tokenizer:
    files = {name: read_file(folder / name) for name in _FILES if (folder / name).is_file()}
    config = read_json(files, "tokenizer_config.json", str(folder))
    if config.get("tokenizer_class") == "ByT5Tokenizer":
        return ByteTokenizer(files=files)
    if "spiece.model" in files and not (added := _added_tokens(files, str(folder))):
        extra_ids = config.get("extra_ids")
        if extra_ids is None:
            names = config.get("additional_special_tokens") or []
            extra_ids = sum(bool(SENTINEL.search(str(name))) for name in names) or 100
        return SentencePieceTokenizer(files["spiece.model"], extra_ids, files=files)
    if "tokenizer.json" in files:
        return HuggingFaceTokenizer(files, str(folder))
    if {"vocab.json", "merges.txt"} <= set(files):
        files = bpe_files(files["vocab.json"], files["merges.txt"], files, str(folder))
        return HuggingFaceTokenizer(files, str(folder))
    if "vocab.txt" in files:
        files = word_piece_files(files["vocab.txt"], files, str(folder))
        return HuggingFaceTokenizer(files, str(folder))
    if "spiece.model" in files:
        raise ValueError(
            f"{folder} adds tokens to its spiece.model ({', '.join(added[:3])}) but has no "
            "tokenizer.json that assigns their ids; save it again with Hugging Face's tokenizer"
        )
    raise ValueError(
        f"{folder} holds no tokenizer; expected spiece.model, tokenizer.json, vocab.json with "
        "merges.txt, vocab.txt, or a tokenizer_config.json of a ByT5Tokenizer"
    )


def _added_tokens(files: Mapping[str, bytes], name: str) -> list[str]:
    """Returns the tokens that were added to those of the SentencePiece model."""
    listed = read_json(files, "tokenizer.json", name).get("added_tokens", [])
    tokens = [token["content"] for token in listed]
    tokens += list(read_json(files, "added_tokens.json", name))
    own = ("<pad>", "</s>", "<unk>", "<s>")
    return [t for t in dict.fromkeys(tokens) if t not in own and not SENTINEL.fullmatch(t)]
