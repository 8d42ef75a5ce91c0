"""Loads the tokenizer for a name, a file or a folder."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5jax import storage
from t5jax.checks import reading
from t5jax.tokenizers import tokenizer_model
from t5jax.tokenizers.as_transformers import CONFIG, build
from t5jax.tokenizers.byt5 import ByteTokenizer
from t5jax.tokenizers.common import (
    SENTINEL,
    Tokenizer,
    of_libraries,
    read_file,
    read_json,
    write_files,
)
from t5jax.tokenizers.hugging_face import HuggingFaceTokenizer
from t5jax.tokenizers.sentence_piece import (
    SentencePieceTokenizer,
    is_of_t5_form,
    read_model,
    user_defined,
)

# A tokenizer's files in a Hugging Face folder; all are read, and saved again unchanged.
_FILES = (
    "spiece.model",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
# They do not say what is in a folder's other files.
_GENERIC_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")


class MissingTokenizer(ValueError):
    """A folder has no files of a tokenizer."""


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Returns the tokenizer for a name, a file or a folder.

    Args:
      source: "bytes"; a SentencePiece .model file, of T5's form or of Llama's and Gemma's; a
        tokenizer.json; a vocab.json of byte-level BPE next to its merges.txt, or a WordPiece
        vocab.txt, read as transformers does by default (prefixes are allowed: gpt2_vocab.json,
        gpt2_merges.txt); a folder with such files, as written by t5jax and Hugging Face; or a Hub
        name.
    Raises:
      ValueError: if there is no such tokenizer, or its files are damaged; MissingTokenizer if a
        folder has none.
    """
    if source == "bytes":
        return ByteTokenizer()
    with reading(f"the tokenizer {source}"), of_libraries(f"the tokenizer {source}"):
        return _load(source)


def _load(source: str | Path) -> Tokenizer:
    path = storage.path(source, "the tokenizer")
    if storage.is_remote(path):
        path = _copied(path)
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


def _copied(path: Path) -> Path:
    """Returns a copy of a file or folder in a bucket: of a folder not a model's weights, and with a
    file what may lie beside it."""

    def choose(names: list[str]) -> list[str]:
        ends = (".json", ".txt", ".model", ".jinja")
        return [name for name in names if "/" not in name and name.endswith(ends)]

    if path.suffix in (".json", ".txt"):
        return storage.local(path.parent, choose, "tokenizer") / path.name
    return storage.local(path, choose, "tokenizer")


def _not_found(source: str | Path) -> str:
    return (
        f'there is no tokenizer {str(source)!r}; expected "bytes", a SentencePiece .model file, a '
        "tokenizer.json, vocab.json or vocab.txt, a folder with tokenizer files, or a hub name "
        "such as google/flan-t5-small"
    )


def _load_file(path: Path) -> Tokenizer:
    name, beside = str(path), path.with_name("tokenizer_config.json")
    if path.name in ("tokenizer.json", "vocab.json", "vocab.txt") and beside.is_file():
        return _load_folder(path.parent)  # Whose settings count.
    if path.name.endswith("vocab.json"):
        merges = path.with_name(path.name.removesuffix("vocab.json") + "merges.txt")
        return _load_files({"vocab.json": read_file(path), "merges.txt": read_file(merges)}, name)
    if path.name.endswith("vocab.txt"):
        return _load_files({"vocab.txt": read_file(path)}, name)
    if path.suffix == ".json":
        return HuggingFaceTokenizer({"tokenizer.json": read_file(path)}, name)
    model = read_file(path)
    if is_of_t5_form(read_model(model, name)):
        return SentencePieceTokenizer(path)
    return _load_files({tokenizer_model.FILE: model}, name)


def _load_folder(folder: Path) -> Tokenizer:
    files = {file: read_file(folder / file) for file in _FILES if (folder / file).is_file()}
    if not files and (folder / "tokenizer").is_dir():  # A run, or a compressed model.
        return _load_folder(folder / "tokenizer")
    name = str(folder)
    config, added = read_json(files, CONFIG, name), _added_tokens(files, name)
    options: Any = {"files": files, "cleans_up": bool(config.get("clean_up_tokenization_spaces"))}
    if config.get("tokenizer_class") == "ByT5Tokenizer":
        if added := [token for token in added if not re.fullmatch(r"<unused_\d+>", token)]:
            raise ValueError(
                f"{name} adds tokens to the bytes of ByT5 ({', '.join(added[:3])}), which is not "
                "supported; leave them out of its files"
            )
        last = max(map(int, config.get("added_tokens_decoder") or {}), default=0)
        return ByteTokenizer(max(_extra_ids(config, 125), last - 258), **options)
    # Others have such a file as well, which is not read as T5's (ALBERT).
    kind = (config.get("tokenizer_class") or "T5Tokenizer").removesuffix("Fast")
    is_t5s = "spiece.model" in files and ("T5" in kind or kind in _GENERIC_CLASSES)
    if is_t5s:
        own = user_defined(read_model(files["spiece.model"], f"spiece.model in {name}"))
        added = [token for token in added if token not in own]
    if is_t5s and not added:
        return SentencePieceTokenizer(files["spiece.model"], _extra_ids(config, 100), **options)
    if is_t5s and "tokenizer.json" not in files:
        raise ValueError(
            f"{name} adds tokens to its spiece.model ({', '.join(added[:3])}) but has no "
            "tokenizer.json that assigns their ids; save it again with Hugging Face's tokenizer"
        )
    return _load_files(files, name, folder)


def _load_files(
    files: Mapping[str, bytes], name: str, folder: Path | None = None
) -> HuggingFaceTokenizer:
    """Returns the tokenizer of files of Hugging Face's.

    Args:
      files: their content by name.
      name: their folder in error messages.
      folder: the folder in which they are, if there is one.
    """
    complete = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"vocab.txt"})
    if not any(names <= set(files) for names in complete):
        if "spiece.model" not in files and tokenizer_model.FILE not in files:
            raise MissingTokenizer(
                f"{name} holds no tokenizer; expected spiece.model, tokenizer.model, "
                "tokenizer.json, vocab.json with merges.txt, vocab.txt, or a tokenizer_config.json "
                "of a ByT5Tokenizer: copy that of the model it was made from into it, or train it "
                "with one from elsewhere (--data.vocabulary)"
            )
        if "spiece.model" not in files:
            files, folder = tokenizer_model.tokenizer_json_files(files, name), None
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            write_files(made, files)
            built = build(Path(made), files, name)
    else:
        model = folder / "config.json"
        of_model = {model.name: read_file(model)} if model.is_file() else {}
        built = build(folder, {**files, **of_model}, name)
    return HuggingFaceTokenizer(built.files, name, built)


def _extra_ids(config: Mapping[str, Any], default: int) -> int:
    """Returns the number of ids after the vocabulary, which a list of sentinels may imply."""
    if config.get("extra_ids") is not None:
        return int(config["extra_ids"])
    names = config.get("additional_special_tokens") or []
    return sum(bool(SENTINEL.search(str(name))) for name in names) or default


def _added_tokens(files: Mapping[str, bytes], name: str) -> list[str]:
    """Returns the tokens that were added to those of the vocabulary file."""
    listed = list(read_json(files, "tokenizer.json", name).get("added_tokens") or [])
    listed += list(read_json(files, "added_tokens.json", name))
    for file in ("special_tokens_map.json", CONFIG):
        config = read_json(files, file, name)
        listed += (config.get("added_tokens_decoder") or {}).values()
        for field in ("additional_special_tokens", "extra_special_tokens"):
            more = config.get(field) or []
            listed += more.values() if isinstance(more, dict) else more
    tokens = [token["content"] if isinstance(token, dict) else token for token in listed]
    own = ("<pad>", "</s>", "<unk>", "<s>")
    tokens = [t for t in dict.fromkeys(tokens) if t not in own]
    return [t for t in tokens if not SENTINEL.fullmatch(t.lstrip("▁"))]
