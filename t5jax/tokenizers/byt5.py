"""UTF-8 bytes as ids."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from t5jax.tokenizers.common import (
    SENTINEL,
    clean_ids,
    cleaned_up,
    json_bytes,
    read_chat_template,
    write_files,
)

_FIRST_BYTE, _NUM_BYTES = 3, 256
_LAST_BYTE = _FIRST_BYTE + _NUM_BYTES - 1
_NUM_SENTINELS = 100
# 0xf5 to 0xff, which are in no UTF-8 text.
_NUM_FREE = 11


class ByteTokenizer:
    """UTF-8 bytes, as in ByT5: byte b is id b + 3, and the sentinels are the last 100 bytes.

    They count down from id 258, as in the published checkpoints and SeqIO's `ByteVocabulary`; the
    ids from 259 on are never used. Hugging Face's ByT5Tokenizer gives "<extra_id_0>" the id 259,
    which no published model has seen. In a decoded text the first 11 sentinels, bytes that are in
    no UTF-8 text, are shown; the others are parts of characters as well.
    """

    pad_id, eos_id, unk_id = 0, 1, 2
    bos_id: int | None = None
    mask_id: int | None = None
    # Most of them are bytes of ordinary text as well: a text must not lose them.
    sentinel_ids = tuple(range(_LAST_BYTE, _LAST_BYTE - _NUM_SENTINELS, -1))
    prompt_affixes: tuple[tuple[int, ...], tuple[int, ...]] | None = ((), (1,))
    special_tokens: Mapping[str, str] = MappingProxyType(
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    )

    def __init__(
        self,
        extra_ids: int = 125,
        *,
        files: Mapping[str, bytes] | None = None,
        cleans_up: bool = False,
    ) -> None:
        """Creates the tokenizer.

        Args:
          extra_ids: the number of unused ids at the end; ByT5's models have 384 ids in all.
          files: Hugging Face files that `save` writes unchanged.
          cleans_up: see `Tokenizer`.
        """
        self.vocab_size: int = _LAST_BYTE + 1 + extra_ids
        free = range(_LAST_BYTE + 1 - _NUM_FREE, self.vocab_size)
        self.special_ids = frozenset((self.pad_id, self.eos_id, self.unk_id, *free))
        self._files, self.cleans_up = dict(files) if files else None, cleans_up
        self.chat_template = read_chat_template(files or {}, "the folder")

    def __repr__(self) -> str:
        return f"ByteTokenizer({self.vocab_size} ids)"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        # Because of the group in the pattern, every second part is the number of a sentinel.
        for i, part in enumerate(SENTINEL.split(text)):
            if i % 2 == 0:
                ids.extend(byte + _FIRST_BYTE for byte in part.encode())
            elif int(part) < _NUM_SENTINELS:
                ids.append(_LAST_BYTE - int(part))
            else:
                ids.extend(byte + _FIRST_BYTE for byte in f"<extra_id_{part}>".encode())
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(
        self, ids: Iterable[int], *, special_tokens: bool = True, past_eos: bool = False
    ) -> str:
        """Returns the text, without bytes that are not valid UTF-8, and without unknown tokens, but
        with past_eos."""
        data, names = bytearray(), tuple(self.special_tokens.values())
        for i in clean_ids(self, ids, special_tokens, past_eos):
            if past_eos and i < _FIRST_BYTE:
                data += names[i].encode()
            elif _LAST_BYTE - _NUM_FREE < i <= _LAST_BYTE:
                data += f"<extra_id_{_LAST_BYTE - i}>".encode()
            elif _FIRST_BYTE <= i <= _LAST_BYTE:
                data.append(i - _FIRST_BYTE)
        text = data.decode(errors="ignore")
        return cleaned_up(text) if self.cleans_up else text

    def token_bytes(self) -> list[bytes]:
        """Returns the bytes of each id; none for what is no text."""
        text = range(_FIRST_BYTE, _LAST_BYTE + 1 - _NUM_FREE)
        return [bytes([i - _FIRST_BYTE]) if i in text else b"" for i in range(self.vocab_size)]

    def save(self, folder: str | Path) -> None:
        write_files(folder, self._files or _hugging_face_files(self))


def _hugging_face_files(tokenizer: ByteTokenizer) -> dict[str, bytes]:
    """Returns files that give text and the free sentinels the same ids.

    They are for ByT5Tokenizer, and for models whose tokenizer transformers reads from
    tokenizer.json whatever its class is, such as UMT5.
    """
    import tokenizers
    from tokenizers import decoders, models, processors

    own = dict(zip(tokenizer.special_tokens.values(), range(_FIRST_BYTE), strict=True))
    free = {f"<extra_id_{i}>": _LAST_BYTE - i for i in reversed(range(_NUM_FREE))}
    free |= {f"<unused_{i}>": i for i in range(_LAST_BYTE + 1, tokenizer.vocab_size)}
    num_text = _NUM_BYTES - _NUM_FREE
    vocab = own | {f"<0x{byte:02X}>": byte + _FIRST_BYTE for byte in range(num_text)} | free
    # Characters are not in the vocabulary, so that they become bytes.
    json = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    json.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    json.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    json.add_special_tokens([tokenizers.AddedToken(name, **flags) for name in (*own, *free)])
    config = {
        "tokenizer_class": "ByT5Tokenizer",
        **tokenizer.special_tokens,
        "extra_ids": 0,  # Of Hugging Face's own, whose first has the id 259.
        "added_tokens_decoder": {
            str(i): {"content": name, **flags, "special": True} for name, i in free.items()
        },
    }
    return {"tokenizer.json": json.to_str().encode(), "tokenizer_config.json": json_bytes(config)}
