"""SentencePiece models with sentinels."""

import functools
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from t5jax.tokenizers.common import (
    SENTINEL,
    Tokenizer,
    clean_ids,
    cleaned_up,
    first_sentinels,
    json_bytes,
    of_libraries,
    read_chat_template,
    read_file,
    write_files,
)
from t5jax.tokenizers.trimming import trim_sentence_piece

_FILE = "spiece.model"
_SPACED_SENTINEL = re.compile(r" *(<extra_id_\d+>)")


class SentencePieceTokenizer:
    """A SentencePiece model followed by sentinels: T5, FLAN-T5, mT5, UMT5, UL2 and your own."""

    bos_id: int | None = None
    mask_id: int | None = None

    def __init__(
        self,
        model: bytes | str | Path,
        extra_ids: int = 100,
        *,
        files: Mapping[str, bytes] | None = None,
        cleans_up: bool = False,
    ) -> None:
        """Reads a model.

        Args:
          model: a serialized SentencePiece model, or the path of one.
          extra_ids: the number of sentinels to add, the last of which is "<extra_id_0>"; none are
            added to a model that already has some (as mT5's has).
          files: the Hugging Face files for `save` to write; made from the model by default.
          cleans_up: see `Tokenizer`.
        Raises:
          ValueError: if the file is missing or damaged, or the model has no pad, eos or unk.
        """
        name = "the SentencePiece model"
        if not isinstance(model, bytes):
            name, model = str(model), read_file(Path(model))
        proto = read_model(model, name)
        if any(SENTINEL.fullmatch(piece.piece.lstrip("▁")) for piece in proto.pieces):
            extra_ids = 0
        # As SeqIO does it: user-defined pieces that begin a word, the last sentinel first.
        for i in reversed(range(extra_ids)):
            proto.pieces.add(
                piece=f"▁<extra_id_{i}>", score=0.0, type=proto.SentencePiece.USER_DEFINED
            )
        self._num_added = extra_ids
        self.model_bytes: bytes = proto.SerializeToString()
        """The serialized model with its sentinels, for other SentencePiece runtimes."""
        with of_libraries(name):
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id: int = self._processor.pad_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        _check_special_ids(self, name)
        found = {
            int(match[1]): i
            for i, piece in enumerate(proto.pieces)
            if (match := SENTINEL.fullmatch(piece.piece.lstrip("▁")))
        }
        self.sentinel_ids = first_sentinels(found)
        own = (self.pad_id, self.eos_id, self.unk_id)
        self.special_ids = frozenset((*own, *found.values()))
        self.prompt_affixes: tuple[tuple[int, ...], tuple[int, ...]] | None = ((), (self.eos_id,))
        self.cleans_up = cleans_up
        self._files = dict(files) if files else self._hugging_face_files(model, extra_ids)
        self.chat_template = read_chat_template(self._files, name)
        self.special_tokens: Mapping[str, str] = {
            f"{what}_token": self._processor.id_to_piece(getattr(self, f"{what}_id"))
            for what in ("pad", "eos", "unk")
        }

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.model_bytes).hexdigest()[:12]
        return f"SentencePieceTokenizer({self.vocab_size} ids, sha256 {digest})"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(_spaced(text))
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode([_spaced(text) for text in texts])
        return ids

    def decode(
        self, ids: Iterable[int], *, special_tokens: bool = True, past_eos: bool = False
    ) -> str:
        processor = self._with_names if past_eos and special_tokens else self._processor
        text: str = processor.decode(clean_ids(self, ids, special_tokens, past_eos))
        return cleaned_up(text) if self.cleans_up else text

    @functools.cached_property
    def _with_names(self) -> sentencepiece.SentencePieceProcessor:
        """The model with transformers' texts of eos, padding, unknown tokens and sentinels."""
        proto = read_model(self.model_bytes, "the SentencePiece model")
        for i in (self.pad_id, self.eos_id):
            proto.pieces[i].type = proto.SentencePiece.USER_DEFINED
        for piece in proto.pieces[self.vocab_size - self._num_added :]:
            piece.piece = piece.piece.removeprefix("▁")
        proto.trainer_spec.unk_surface = proto.pieces[self.unk_id].piece
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def token_bytes(self) -> list[bytes]:
        """Returns the bytes of each id, with a space where a word begins; none for what is no
        text."""

        def one(i: int) -> bytes:
            piece: str = self._processor.id_to_piece(i)
            if self._processor.is_byte(i):
                return bytes([int(piece[3:5], 16)])
            is_text = i not in self.special_ids and not self._processor.is_control(i)
            return piece.replace("▁", " ").encode() if is_text else b""

        return list(map(one, range(self.vocab_size)))

    def save(self, folder: str | Path) -> None:
        write_files(folder, self._files)

    def trimmed(self, used: Collection[int]) -> tuple["SentencePieceTokenizer", np.ndarray]:
        """Returns a tokenizer that has the ids `used` and what no text can do without, and for each
        of its ids the one that it had here, int64."""
        model = read_model(self.model_bytes, "the SentencePiece model")
        num_sentinels = self.vocab_size - len(read_model(self._files[_FILE], _FILE).pieces)
        kept = trim_sentence_piece(model, used)
        if num_sentinels:  # They are added again.
            del model.pieces[-num_sentinels:]
            model.trainer_spec.vocab_size = len(model.pieces)
        serialized = model.SerializeToString()
        trimmed = SentencePieceTokenizer(serialized, num_sentinels, cleans_up=self.cleans_up)
        trimmed._files |= {name: x for name, x in self._files.items() if name.endswith(".jinja")}
        trimmed.chat_template = self.chat_template
        return trimmed, kept

    def _hugging_face_files(self, model: bytes, extra_ids: int) -> dict[str, bytes]:
        config = {
            "tokenizer_class": "T5Tokenizer",
            "pad_token": self._processor.id_to_piece(self.pad_id),
            "eos_token": self._processor.id_to_piece(self.eos_id),
            "unk_token": self._processor.id_to_piece(self.unk_id),
            "extra_ids": extra_ids,
            "additional_special_tokens": [f"<extra_id_{i}>" for i in range(extra_ids)],
            "clean_up_tokenization_spaces": self.cleans_up,
        }
        return {_FILE: model, "tokenizer_config.json": json_bytes(config)}


def read_model(model: bytes, name: str) -> sentencepiece_model_pb2.ModelProto:
    """Returns the content of a SentencePiece model. Raises ValueError if it is damaged."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise ValueError(
            f"{name} is not a SentencePiece model ({len(model)} bytes were read); give the "
            "spiece.model of a T5 model, or train one (`t5jax vocab train`)"
        )
    return proto


def user_defined(proto: sentencepiece_model_pb2.ModelProto) -> list[str]:
    """Returns the pieces of a model that it always splits off."""
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    return [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]


def is_of_t5_form(proto: sentencepiece_model_pb2.ModelProto) -> bool:
    """Returns whether a model is one of T5's, mT5's, UMT5's or our own, rather than Llama's, which
    does not pad, or Gemma's, which is a BPE model that begins texts."""
    spec = proto.trainer_spec
    is_unigram = spec.model_type == sentencepiece_model_pb2.TrainerSpec.UNIGRAM
    return spec.pad_id >= 0 and (is_unigram or spec.bos_id < 0)


def _spaced(text: str) -> str:
    # Sentinels are pieces that begin a word, so they need a space in front.
    return _SPACED_SENTINEL.sub(r" \1", text) if "<extra_id_" in text else text


def _check_special_ids(tokenizer: Tokenizer, name: str) -> None:
    for what in ("pad", "eos", "unk"):
        if getattr(tokenizer, f"{what}_id") < 0:
            raise ValueError(
                f"{name} has no {what} token; a T5 tokenizer has pad, eos and unk (train "
                "SentencePiece with pad_id=0, eos_id=1, unk_id=2)"
            )
