"""The interface of a tokenizer, and functions that several kinds share."""

import contextlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from t5jax.checks import first_line

SENTINEL = re.compile(r"<extra_id_(\d+)>")


class Tokenizer(Protocol):
    """Text to ids and back. Two tokenizers with equal `repr()` produce the same ids."""

    vocab_size: int
    """Number of ids; a model's embedding may have more rows."""
    pad_id: int
    eos_id: int
    unk_id: int
    """Id of characters that are not in the vocabulary; eos_id if there are none (GPT-2)."""
    bos_id: int | None
    """Id that begins a text, such as BERT's [CLS]; None if there is none, as in T5."""
    mask_id: int | None
    """Id of the mask in masked language modelling, such as BERT's [MASK]; None if there is none."""
    sentinel_ids: tuple[int, ...]
    """Ids of "<extra_id_0>", "<extra_id_1>", ...; empty if the vocabulary has none."""
    special_ids: frozenset[int]
    """Ids that are no text: those above, sentinels, and what the files mark as special."""
    prompt_affixes: tuple[tuple[int, ...], tuple[int, ...]] | None
    """What the tokenizer puts in front of a text and after it; None if its files do not say."""
    chat_template: str | None
    """The model's Jinja template that turns a conversation into a prompt, if it has one."""
    special_tokens: Mapping[str, str]
    """The tokens that a chat template may refer to: {"eos_token": "</s>", ...}."""
    cleans_up: bool
    """Whether decoding removes spaces before punctuation, as `clean_up_tokenization_spaces`."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without eos. "<extra_id_0>" becomes the id of the sentinel."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of several texts, using all cores if the library has threads."""

    def decode(
        self, ids: Iterable[int], *, special_tokens: bool = True, past_eos: bool = False
    ) -> str:
        """Returns the text of the ids before the first eos. Padding is skipped, and ids beyond the
        vocabulary are unknown tokens.

        Args:
          ids: token ids.
          special_tokens: keep other special tokens, such as sentinels, as text.
          past_eos: of all ids, as transformers decodes them: eos and padding are special tokens
            like others, and ids beyond the vocabulary nothing.
        """

    def save(self, folder: str | Path) -> None:
        """Writes the files that Hugging Face's AutoTokenizer loads, unchanged if the tokenizer was
        loaded from such files. Creates the folder if necessary."""


# --- Ids ----------------------------------------------------------------------------------------


def clean_ids(
    tokenizer: Tokenizer, ids: Iterable[int], special_tokens: bool = True, past_eos: bool = False
) -> list[int]:
    """Returns the ids before the first eos, without padding; ids beyond the vocabulary become unk.

    Without special_tokens, these and all other special ids are left out. With past_eos, all ids are
    returned that the vocabulary has.
    """
    clean = []
    for i in ids:
        if past_eos and i >= tokenizer.vocab_size:
            continue
        if not past_eos and i == tokenizer.eos_id:
            break
        known = int(i) if i < tokenizer.vocab_size else tokenizer.unk_id
        is_kept = special_tokens or known not in tokenizer.special_ids
        if is_kept and (past_eos or i != tokenizer.pad_id):
            clean.append(known)
    return clean


def first_sentinels(sentinels: Mapping[int, int]) -> tuple[int, ...]:
    """Returns the ids of the sentinels 0, 1, ... up to the first missing one."""
    numbers = itertools.takewhile(sentinels.__contains__, itertools.count())
    return tuple(sentinels[number] for number in numbers)


def cleaned_up(text: str) -> str:
    """Returns a text without the spaces before punctuation that transformers removes."""
    from transformers import PreTrainedTokenizerBase

    cleaned: str = PreTrainedTokenizerBase.clean_up_tokenization(None, text)
    return cleaned


# --- Files --------------------------------------------------------------------------------------


def read_file(path: Path) -> bytes:
    """Returns the content of a file. Raises ValueError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def read_json(files: Mapping[str, bytes], file: str, name: str) -> dict[str, Any]:
    """Returns the content of one of a folder's JSON files, {} if it is missing.

    Args:
      files: the content of each file by name.
      file: the name of the file.
      name: the folder's name in error messages.
    Raises:
      ValueError: if the file is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(files.get(file, b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} in {name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} in {name} holds {content!r:.40}; expected a JSON object")
    return content


@contextlib.contextmanager
def of_libraries(name: str) -> Iterator[None]:
    """Raises ValueError for an error of tokenizers or SentencePiece, which have no class of their
    own."""
    try:
        yield
    except Exception as error:
        if type(error) not in (Exception, RuntimeError):
            raise
        raise ValueError(
            f"{name} is damaged, or was made by hand ({first_line(error)}); fetch it again"
        ) from error


def json_bytes(value: dict[str, Any]) -> bytes:
    """Returns the content of a JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Writes files, given as name to content, into a folder; creates it if necessary."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(folder) / name).write_bytes(content)


def read_chat_template(files: Mapping[str, bytes], name: str) -> str | None:
    """Returns the chat template in a folder's files, None if there is none. Arguments and errors
    are those of `read_json`."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    given = template = read_json(files, "tokenizer_config.json", name).get("chat_template")
    if isinstance(template, list):  # Several; "default" is for plain conversations.
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(
            f"chat_template of tokenizer_config.json in {name} is {given!r:.60}; expected a text, "
            'or a list of {"name": ..., "template": ...}'
        )
    return template
