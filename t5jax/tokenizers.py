"""Text to token ids and back, without TensorFlow: SentencePiece, bytes, Hugging Face.

Ids are those of the T5 papers: pad 0, eos 1, unk 2, and the sentinels "<extra_id_0>", ... of span
corruption (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4) at the end of the vocabulary.
SentencePiece ids equal SeqIO's `SentencePieceVocabulary`, byte ids Hugging Face's ByT5Tokenizer
(Xue et al. 2022, arXiv:2105.13626). The data pipeline uses the same objects
(`t5jax/data/vocabularies.py`), so that training, evaluation and serving agree by construction.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

SENTINEL = re.compile(r"<extra_id_(\d+)>")

# What belongs to a tokenizer in a Hugging Face folder; read together, and saved again unchanged.
_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class Tokenizer(Protocol):
    """Text to ids and back. `repr()` names the ids: equal for tokenizers that give the same."""

    vocab_size: int
    """Number of ids; a model's embedding may have more rows."""
    pad_id: int
    eos_id: int
    unk_id: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without eos. "<extra_id_0>" becomes the sentinel's id."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids before the first eos. Padding is skipped, ids beyond the
        vocabulary are unknown tokens, and sentinels stay as text: they say where a span goes."""

    def save(self, folder: str | Path) -> None:
        """Writes the files that Hugging Face's AutoTokenizer loads; what came from such a folder
        is written unchanged. The folder is made where it is missing."""


class SentencePieceTokenizer:
    """A SentencePiece model with sentinels behind it: T5, FLAN-T5, mT5, UMT5, UL2 and your own."""

    def __init__(
        self,
        model: bytes | str | Path,
        extra_ids: int = 100,
        *,
        files: Mapping[str, bytes] | None = None,
    ):
        """Reads a model.

        Args:
          model: a serialized SentencePiece model, or the path of one.
          extra_ids: sentinels to add; "<extra_id_0>" is the last id. A model that holds its own
            (mT5's does) gets none.
          files: the Hugging Face files that `save` shall write; made from the model by default.
        Raises:
          ValueError: for a missing or damaged file, and for a model without pad, eos or unk.
        """
        name = "the SentencePiece model"
        if not isinstance(model, bytes):
            name, model = str(model), _read(Path(model))
        proto = sentencepiece_model_pb2.ModelProto()
        try:
            proto.ParseFromString(model)
        except DecodeError:
            proto.Clear()
        if not proto.pieces:
            raise ValueError(
                f"{name} is not a SentencePiece model ({len(model)} bytes were read); give the "
                "spiece.model of a T5 model, or train one with t5jax.data.vocabularies"
            )
        if any(SENTINEL.fullmatch(piece.piece.lstrip("▁")) for piece in proto.pieces):
            extra_ids = 0
        # As SeqIO does it: user-defined pieces that begin a word, the last sentinel first.
        for i in reversed(range(extra_ids)):
            proto.pieces.add(
                piece=f"▁<extra_id_{i}>", score=0.0, type=proto.SentencePiece.USER_DEFINED
            )
        self.model_bytes: bytes = proto.SerializeToString()
        """The serialized model with its sentinels, for other SentencePiece runtimes."""
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id: int = self._processor.pad_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        _check_special_ids(self, name)
        self._files = dict(files) if files else self._hugging_face_files(model, extra_ids)

    def __repr__(self):
        digest = hashlib.sha256(self.model_bytes).hexdigest()[:12]
        return f"SentencePieceTokenizer({self.vocab_size} ids, sha256 {digest})"

    def encode(self, text: str) -> list[int]:
        # A sentinel is a piece only where a word begins, so it is made to begin one.
        return self._processor.encode(SPACED_SENTINEL.sub(r" \1", text))

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode(_clean(self, ids))

    def save(self, folder: str | Path) -> None:
        _write(folder, self._files)

    def _hugging_face_files(self, model: bytes, extra_ids: int) -> dict[str, bytes]:
        config = {
            "tokenizer_class": "T5Tokenizer",
            "pad_token": self._processor.id_to_piece(self.pad_id),
            "eos_token": self._processor.id_to_piece(self.eos_id),
            "unk_token": self._processor.id_to_piece(self.unk_id),
            "extra_ids": extra_ids,
            "additional_special_tokens": [f"<extra_id_{i}>" for i in range(extra_ids)],
            "clean_up_tokenization_spaces": False,
        }
        return {"spiece.model": model, "tokenizer_config.json": _json_bytes(config)}


SPACED_SENTINEL = re.compile(r" *(<extra_id_\d+>)")
"""Sentinels with the spaces before them; RE2 reads this pattern too."""


class ByteTokenizer:
    """UTF-8 bytes, as ByT5 has them: byte b is id b + 3, and 125 sentinels follow from id 259."""

    vocab_size, pad_id, eos_id, unk_id = 384, 0, 1, 2

    _FIRST_BYTE, _FIRST_SENTINEL = 3, 259

    def __init__(self, *, files: Mapping[str, bytes] | None = None):
        """Needs nothing; `files` are the Hugging Face files that `save` shall write unchanged."""
        config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
        self._files = dict(files) if files else {"tokenizer_config.json": _json_bytes(config)}

    def __repr__(self):
        return f"ByteTokenizer({self.vocab_size} ids)"

    def encode(self, text: str) -> list[int]:
        ids = []
        # The pattern's group makes every second part the number of a sentinel.
        for i, part in enumerate(SENTINEL.split(text)):
            if i % 2 == 0:
                ids.extend(byte + self._FIRST_BYTE for byte in part.encode())
            elif int(part) < self.vocab_size - self._FIRST_SENTINEL:
                ids.append(self._FIRST_SENTINEL + int(part))
            else:
                ids.extend(byte + self._FIRST_BYTE for byte in f"<extra_id_{part}>".encode())
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text; bytes that are not UTF-8, and unknown tokens, are left out."""
        data = bytearray()
        for i in _clean(self, ids):
            if i >= self._FIRST_SENTINEL:
                data += f"<extra_id_{i - self._FIRST_SENTINEL}>".encode()
            elif i >= self._FIRST_BYTE:
                data.append(i - self._FIRST_BYTE)
        return data.decode(errors="ignore")

    def save(self, folder: str | Path) -> None:
        _write(folder, self._files)


class HuggingFaceTokenizer:
    """A tokenizer.json, read by the `tokenizers` library, for folders without a spiece.model."""

    def __init__(self, files: Mapping[str, bytes], name: str = "the folder"):
        """Reads the files of a folder.

        Args:
          files: name to content; tokenizer.json and tokenizer_config.json are read, all are saved.
          name: what error messages call them.
        Raises:
          ValueError: for damaged files, and where they name no pad, eos or unk token.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # The library raises Exception itself.
            raise ValueError(f"tokenizer.json in {name} is damaged: {error}") from None
        self._files = dict(files)
        config = _read_json(files, "tokenizer_config.json", name)
        config = _read_json(files, "special_tokens_map.json", name) | config
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.pad_id = self._special_id(config, "pad_token", "<pad>")
        self.eos_id = self._special_id(config, "eos_token", "</s>")
        self.unk_id = self._special_id(config, "unk_token", "<unk>")
        _check_special_ids(self, name)

    def _special_id(self, config: dict, key: str, default: str) -> int:
        token = config.get(key) or default
        token = token["content"] if isinstance(token, dict) else token
        found = self._tokenizer.token_to_id(token)
        return -1 if found is None else found

    def __repr__(self):
        digest = hashlib.sha256(self._files["tokenizer.json"]).hexdigest()[:12]
        return f"HuggingFaceTokenizer({self.vocab_size} ids, sha256 {digest})"

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(_clean(self, ids), skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        _write(folder, self._files)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Returns the tokenizer that a name means.

    Args:
      source: "bytes", a SentencePiece .model file, a folder with the tokenizer files of t5jax or
        Hugging Face, or a hub name.
    Raises:
      ValueError: where nothing is found, or what is found is damaged.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = Path(source).expanduser()
    if path.is_file():
        return SentencePieceTokenizer(path)
    if path.is_dir():
        return _load_folder(path)
    # A hub name is "name" or "owner/name", without a suffix.
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        raise ValueError(_not_found(source))
    if path.suffix in (".model", ".json"):
        raise ValueError(_not_found(source))
    from t5jax.hf.io import resolve

    return _load_folder(resolve(source))


def _not_found(source) -> str:
    return (
        f'there is no tokenizer {str(source)!r}; expected "bytes", a SentencePiece .model file, '
        "a folder with tokenizer files, or a hub name such as google/flan-t5-small"
    )


def _load_folder(folder: Path) -> Tokenizer:
    files = {name: _read(folder / name) for name in _FILES if (folder / name).is_file()}
    config = _read_json(files, "tokenizer_config.json", str(folder))
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
    if "spiece.model" in files:
        raise ValueError(
            f"{folder} adds tokens to its spiece.model ({', '.join(added[:3])}) but has no "
            "tokenizer.json that places them; save it once more with Hugging Face's tokenizer"
        )
    raise ValueError(
        f"{folder} holds no tokenizer; expected spiece.model, tokenizer.json, or a "
        "tokenizer_config.json of a ByT5Tokenizer"
    )


def _added_tokens(files: Mapping[str, bytes], name: str) -> list[str]:
    """Returns the tokens that a user has added to the SentencePiece model's."""
    listed = _read_json(files, "tokenizer.json", name).get("added_tokens", [])
    tokens = [token["content"] for token in listed]
    tokens += list(_read_json(files, "added_tokens.json", name))
    own = ("<pad>", "</s>", "<unk>", "<s>")
    return [t for t in dict.fromkeys(tokens) if t not in own and not SENTINEL.fullmatch(t)]


def _check_special_ids(tokenizer: Tokenizer, name: str) -> None:
    for what in ("pad", "eos", "unk"):
        if getattr(tokenizer, f"{what}_id") < 0:
            raise ValueError(
                f"{name} has no {what} token; a T5 tokenizer has pad, eos and unk (train "
                "SentencePiece with pad_id=0, eos_id=1, unk_id=2)"
            )


def _clean(tokenizer: Tokenizer, ids: Iterable[int]) -> list[int]:
    """Returns the ids before the first eos, without padding; ids beyond the vocabulary as unk."""
    clean = []
    for i in ids:
        if i == tokenizer.eos_id:
            break
        if i != tokenizer.pad_id:
            clean.append(int(i) if i < tokenizer.vocab_size else tokenizer.unk_id)
    return clean


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _read_json(files: Mapping[str, bytes], file: str, name: str) -> dict:
    try:
        return json.loads(files.get(file, b"{}"))
    except ValueError as error:
        raise ValueError(f"{file} in {name} is not JSON: {error}") from None


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(folder: str | Path, files: Mapping[str, bytes]) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(folder) / name).write_bytes(content)
