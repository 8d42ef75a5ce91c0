"""UTF-8 bytes as ids."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from t5jax.tokenizers.common import SENTINEL, clean_ids, json_bytes, write_files


class ByteTokenizer:
    """UTF-8 bytes, as in ByT5: byte b is id b + 3, followed by 125 sentinels from id 259 on."""

    vocab_size, pad_id, eos_id, unk_id = 384, 0, 1, 2
    bos_id: int | None = None
    mask_id: int | None = None
    chat_template: str | None = None
    sentinel_ids = tuple(range(259, 384))
    special_tokens: Mapping[str, str] = MappingProxyType(
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    )

    _FIRST_BYTE, _FIRST_SENTINEL = 3, 259

    def __init__(self, *, files: Mapping[str, bytes] | None = None) -> None:
        """Creates the tokenizer; `files` are Hugging Face files that `save` writes unchanged."""
        config = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}
        self._files = dict(files) if files else {"tokenizer_config.json": json_bytes(config)}

    def __repr__(self) -> str:
        return f"ByteTokenizer({self.vocab_size} ids)"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        # Because of the group in the pattern, every second part is the number of a sentinel.
        for i, part in enumerate(SENTINEL.split(text)):
            if i % 2 == 0:
                ids.extend(byte + self._FIRST_BYTE for byte in part.encode())
            elif int(part) < self.vocab_size - self._FIRST_SENTINEL:
                ids.append(self._FIRST_SENTINEL + int(part))
            else:
                ids.extend(byte + self._FIRST_BYTE for byte in f"<extra_id_{part}>".encode())
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text, without unknown tokens and bytes that are not valid UTF-8."""
        data = bytearray()
        for i in clean_ids(self, ids):
            if i >= self._FIRST_SENTINEL:
                data += f"<extra_id_{i - self._FIRST_SENTINEL}>".encode()
            elif i >= self._FIRST_BYTE:
                data.append(i - self._FIRST_BYTE)
        return data.decode(errors="ignore")

    def save(self, folder: str | Path) -> None:
        write_files(folder, self._files)
