"""What a tokenizer is, and what more than one kind of them does."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

SENTINEL = re.compile(r"<extra_id_(\d+)>")


class Tokenizer(Protocol):
    """Text to ids and back. `repr()` names the ids: equal for tokenizers that give the same."""

    vocab_size: int
    """Number of ids; a model's embedding may have more rows."""
    pad_id: int
    eos_id: int
    unk_id: int
    """What stands for a character that the vocabulary lacks; eos_id where it lacks none (GPT-2)."""
    bos_id: int | None
    """What begins a text, BERT's [CLS]; None where nothing does, as in T5."""
    mask_id: int | None
    """What hides a token in masked language modelling, BERT's [MASK]."""
    sentinel_ids: tuple[int, ...]
    """Ids of "<extra_id_0>", "<extra_id_1>", ...; empty where the vocabulary has none."""
    chat_template: str | None
    """The Jinja text by which the model's makers turn a conversation into a prompt."""
    special_tokens: Mapping[str, str]
    """What a chat template may name: {"eos_token": "</s>", ...}."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without eos. "<extra_id_0>" becomes the sentinel's id."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids before the first eos. Padding is skipped, ids beyond the
        vocabulary are unknown tokens, and sentinels stay as text: they say where a span goes."""

    def save(self, folder: str | Path) -> None:
        """Writes the files that Hugging Face's AutoTokenizer loads; what came from such a folder
        is written unchanged. The folder is made where it is missing."""


# --- Ids ----------------------------------------------------------------------------------------


def clean_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> list[int]:
    """Returns the ids before the first eos, without padding; ids beyond the vocabulary as unk."""
    clean = []
    for i in ids:
        if i == tokenizer.eos_id:
            break
        if i != tokenizer.pad_id:
            clean.append(int(i) if i < tokenizer.vocab_size else tokenizer.unk_id)
    return clean


def first_sentinels(sentinels: Mapping[int, int]) -> tuple[int, ...]:
    """Returns the ids of sentinels 0, 1, ... up to the first that is missing."""
    numbers = itertools.takewhile(sentinels.__contains__, itertools.count())
    return tuple(sentinels[number] for number in numbers)


# --- Files --------------------------------------------------------------------------------------


def read_file(path: Path) -> bytes:
    """Returns a file's content; ValueError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def read_json(files: Mapping[str, bytes], file: str, name: str) -> dict:
    """Returns what is in one of a folder's files, {} where there is no such file.

    Args:
      files: name to content.
      file: which.
      name: what error messages call the folder.
    Raises:
      ValueError: if the file is no JSON.
    """
    try:
        return json.loads(files.get(file, b"{}"))
    except ValueError as error:
        raise ValueError(f"{file} in {name} is not JSON: {error}") from None


def json_bytes(value: dict) -> bytes:
    """Returns a JSON file's content."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Writes name to content into a folder, which is made where it is missing."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(folder) / name).write_bytes(content)


def read_chat_template(files: Mapping[str, bytes], name: str) -> str | None:
    """Returns the chat template of a folder's files, None if it has none; arguments and errors as
    `read_json`."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = read_json(files, "tokenizer_config.json", name).get("chat_template")
    if isinstance(template, list):  # Several, of which one is for plain conversations.
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
