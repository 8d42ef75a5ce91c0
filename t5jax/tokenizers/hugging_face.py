"""Tokenizers of the `tokenizers` library."""

import functools
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from t5jax.tokenizers.as_transformers import Built, read_tokenizer
from t5jax.tokenizers.common import (
    SENTINEL,
    clean_ids,
    cleaned_up,
    first_sentinels,
    json_bytes,
    of_libraries,
    read_chat_template,
    read_json,
    write_files,
)
from t5jax.tokenizers.trimming import renumber_config, trim_tokenizer_json

# For each special token: the fields that name it, and its names in common models otherwise.
_SPECIAL_TOKENS = {
    "eos": (("eos_token", "sep_token"), ("</s>", "<|endoftext|>", "[SEP]")),
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "unk": (("unk_token",), ("<unk>", "[UNK]")),
    "bos": (("bos_token", "cls_token"), ("[CLS]",)),
    "mask": (("mask_token",), ("[MASK]", "<mask>")),
}


_log = logging.getLogger(__name__)

_CONFIG = "tokenizer_config.json"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class HuggingFaceTokenizer:
    """Any tokenizer of the `tokenizers` library.

    A special token is the first of these that is in the vocabulary, where the names in the first
    column are fields of the folder's configuration:

    | | configured | by name | otherwise |
    |---|---|---|---|
    | eos | eos_token, sep_token | </s>, <|endoftext|>, [SEP] | an error |
    | pad | pad_token | <pad>, [PAD] | eos |
    | unk | unk_token | <unk>, [UNK] | eos: byte-level vocabularies do not need it |
    | bos | bos_token, cls_token | [CLS] | None |
    | mask | mask_token | [MASK], <mask> | None |

    So GPT-2 uses <|endoftext|> (50256) as eos, pad and bos; BERT uses [SEP], [PAD] and [CLS].
    Neither has sentinels: span corruption needs a vocabulary that does.
    """

    def __init__(
        self, files: Mapping[str, bytes], name: str = "the folder", built: Built | None = None
    ) -> None:
        """Reads the files of a tokenizer.

        Args:
          files: the content of each file by name; tokenizer.json, tokenizer_config.json,
            special_tokens_map.json and chat_template.jinja are read, all are saved.
          name: the folder's name in error messages.
          built: the tokenizer of the files, with settings that are not in tokenizer.json; by
            default that of tokenizer.json alone.
        Raises:
          ValueError: if files are damaged, or there is no eos token.
        """
        if built is None:
            built = Built(read_tokenizer(files, name), {}, False, {})
        self._tokenizer = built.tokenizer
        # Some files enable truncation or padding, which would change the text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._files, self.cleans_up = dict(files), built.cleans_up
        self._named = built.special_tokens
        config = read_json(files, _CONFIG, name)
        config = read_json(files, "special_tokens_map.json", name) | config | built.special_tokens
        ids = self._tokenizer.get_vocab()
        self.vocab_size: int = max(ids.values(), default=-1) + 1  # There may be holes.
        chosen = {what: _special_token(what, config, ids) for what in _SPECIAL_TOKENS}
        eos = chosen["eos"]
        if eos is None:
            raise ValueError(
                f"{name} has no token that ends a text; set eos_token in tokenizer_config.json to "
                "one of its vocabulary"
            )
        pad, unk = (chosen[what] or eos for what in ("pad", "unk"))
        chosen |= {"pad": pad, "unk": unk}
        self.special_tokens: Mapping[str, str] = {
            f"{what}_token": token for what, token in chosen.items() if token is not None
        }
        self.eos_id: int = ids[eos]
        self.pad_id: int = ids[pad]
        self.unk_id: int = ids[unk]
        self.bos_id: int | None = ids[chosen["bos"]] if chosen["bos"] else None
        self.mask_id: int | None = ids[chosen["mask"]] if chosen["mask"] else None
        matches = ((SENTINEL.fullmatch(token), i) for token, i in ids.items())
        self.sentinel_ids = first_sentinels({int(match[1]): i for match, i in matches if match})
        self.special_ids = _special_ids(self._tokenizer, config, ids)
        self.prompt_affixes = _prompt_affixes(self._tokenizer)
        for what, affix in zip(("bos", "eos"), self.prompt_affixes or (), strict=False):
            asked = config.get(f"add_{what}_token")
            if asked is not None and asked != bool(affix):
                _log.warning(
                    "%s: add_%s_token is %s in tokenizer_config.json, but tokenizer.json %s; the "
                    "latter holds, as in transformers",
                    *(name, what, asked, "adds none" if asked else "adds one"),
                )
        self.chat_template = read_chat_template(files, name)

    def __repr__(self) -> str:
        return f"HuggingFaceTokenizer({self.vocab_size} ids, sha256 {self._digest})"

    @functools.cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:12]

    def encode(self, text: str) -> list[int]:
        with of_libraries("the tokenizer"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with of_libraries("the tokenizer"):
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [x.ids for x in found]

    def decode(
        self, ids: Iterable[int], *, special_tokens: bool = True, past_eos: bool = False
    ) -> str:
        kept = clean_ids(self, ids, special_tokens, past_eos)
        text = self._tokenizer.decode(kept, skip_special_tokens=False)
        return cleaned_up(text) if self.cleans_up else text

    @functools.cached_property
    def is_byte_level(self) -> bool:
        """Whether its tokens are bytes in the alphabet of GPT-2."""
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        parts = [decoder, *decoder.get("decoders", ())]
        return any(part.get("type") == "ByteLevel" for part in parts)

    def token_bytes(self) -> list[bytes]:
        """Returns the bytes of each id of a vocabulary like SentencePiece's, with a space where a
        word begins; none for what is no text."""

        def one(i: int) -> bytes:
            token = self._tokenizer.id_to_token(i)
            if token is None or i in self.special_ids:
                return b""
            if match := _BYTE.fullmatch(token):
                return bytes([int(match[1], 16)])
            return token.replace("▁", " ").encode()

        return list(map(one, range(self.vocab_size)))

    def to_json(self) -> str:
        """Returns the content of a tokenizer.json."""
        return self._tokenizer.to_str()

    def save(self, folder: str | Path) -> None:
        write_files(folder, self._files)

    def trimmed(self, used: Collection[int]) -> tuple["HuggingFaceTokenizer", np.ndarray]:
        """Returns a tokenizer that has the ids `used` and what no text can do without, and for each
        of its ids the one that it had here, int64.

        Raises:
          ValueError: for an algorithm that is not known to split texts as before.
        """
        text, kept = trim_tokenizer_json(self.to_json(), used, repr(self))
        new = {int(old): i for i, old in enumerate(kept)}
        config = renumber_config(read_json(self._files, _CONFIG, repr(self)), new)
        of_tokens = ("special_tokens_map.json", "chat_template.jinja")
        files = {name: self._files[name] for name in of_tokens if name in self._files}
        files |= {"tokenizer.json": text.encode(), _CONFIG: json_bytes({**config, **self._named})}
        built = Built(read_tokenizer(files, repr(self)), self._named, self.cleans_up, {})
        return HuggingFaceTokenizer(files, repr(self), built), kept


def _special_token(what: str, config: Mapping[str, Any], ids: Mapping[str, int]) -> str | None:
    fields, names = _SPECIAL_TOKENS[what]
    configured = [config.get(field) for field in fields]
    configured = [token["content"] if isinstance(token, dict) else token for token in configured]
    return next((token for token in (*configured, *names) if token in ids), None)


def _special_ids(
    tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], ids: Mapping[str, int]
) -> frozenset[int]:
    """Returns the ids that tokenizer.json marks as special or the configuration names."""
    marked = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    fields = [field for names, _ in _SPECIAL_TOKENS.values() for field in names]
    named = [config.get(field) for field in fields]
    for field in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(field) or []
        named += more.values() if isinstance(more, dict) else more
    texts = {token["content"] if isinstance(token, dict) else token for token in named}
    return frozenset(marked | {i for text, i in ids.items() if text in texts})


def _prompt_affixes(
    tokenizer: tokenizers.Tokenizer,
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns what the post-processor adds before and after a text; None if there is none.

    transformers, too, reads add_bos_token and add_eos_token only if there is no tokenizer.json.
    """
    if tokenizer.post_processor is None:
        return None
    for text in ("a", *itertools.islice(tokenizer.get_vocab(), 100)):
        encoding = tokenizer.encode(text, add_special_tokens=True)
        ids, is_added = tuple(encoding.ids), encoding.special_tokens_mask
        if 0 in is_added:  # Some vocabularies have no "a".
            end = len(ids) - is_added[::-1].index(0)
            return ids[: is_added.index(0)], ids[end:]
    return None
