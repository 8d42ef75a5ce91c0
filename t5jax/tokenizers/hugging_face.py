"""Tokenizers of the `tokenizers` library; conversion of older BPE and WordPiece files."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from t5jax.tokenizers.common import (
    SENTINEL,
    clean_ids,
    first_sentinels,
    json_bytes,
    read_chat_template,
    read_json,
    write_files,
)

# For each special token: the fields that name it, and its names in common models otherwise.
_SPECIAL_TOKENS = {
    "eos": (("eos_token", "sep_token"), ("</s>", "<|endoftext|>", "[SEP]")),
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "unk": (("unk_token",), ("<unk>", "[UNK]")),
    "bos": (("bos_token", "cls_token"), ("[CLS]",)),
    "mask": (("mask_token",), ("[MASK]", "<mask>")),
}


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

    def __init__(self, files: Mapping[str, bytes], name: str = "the folder") -> None:
        """Reads the files of a folder.

        Args:
          files: the content of each file by name; tokenizer.json, tokenizer_config.json,
            special_tokens_map.json and chat_template.jinja are read, all are saved.
          name: the folder's name in error messages.
        Raises:
          ValueError: if files are damaged, or there is no eos token.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # The library raises Exception itself.
            raise ValueError(f"tokenizer.json in {name} is damaged: {error}") from None
        # Some files enable truncation or padding, which would change the text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._files = dict(files)
        config = read_json(files, "tokenizer_config.json", name)
        config = read_json(files, "special_tokens_map.json", name) | config
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
        self.chat_template = read_chat_template(files, name)

    def __repr__(self) -> str:
        digest = hashlib.sha256(self._files["tokenizer.json"]).hexdigest()[:12]
        return f"HuggingFaceTokenizer({self.vocab_size} ids, sha256 {digest})"

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [x.ids for x in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(clean_ids(self, ids), skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        write_files(folder, self._files)


def _special_token(what: str, config: Mapping[str, Any], ids: Mapping[str, int]) -> str | None:
    fields, names = _SPECIAL_TOKENS[what]
    configured = [config.get(field) for field in fields]
    configured = [token["content"] if isinstance(token, dict) else token for token in configured]
    return next((token for token in (*configured, *names) if token in ids), None)


def bpe_files(
    vocab: bytes, merges: bytes, files: Mapping[str, bytes], name: str
) -> dict[str, bytes]:
    """Returns GPT-2's vocab.json and merges.txt as a tokenizer.json and its configuration."""
    ids = read_json({"vocab.json": vocab}, "vocab.json", name)
    lines = merges.decode().splitlines()
    pairs: Any = [tuple(x.split(" ")) for x in lines if x and not x.startswith("#version")]
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(ids, pairs))
    except Exception as error:
        raise ValueError(f"the vocabulary and the merges of {name} do not fit: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = read_json(files, "tokenizer_config.json", name)
    config = {"tokenizer_class": "GPT2Tokenizer"} | config
    # A special token is never split: "<|endoftext|>" in a text becomes its id.
    tokenizer.add_special_tokens([t for t in ("<|endoftext|>",) if t in ids])
    for field in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if "<|endoftext|>" in ids:
            config.setdefault(field, "<|endoftext|>")
    return _with_tokenizer_json(tokenizer, config, files)


def word_piece_files(vocab: bytes, files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    """Returns BERT's vocab.txt as a tokenizer.json and its configuration.

    If the configuration does not say, texts are lower-cased if no entry has a capital letter.
    """
    tokens = vocab.decode().splitlines()
    ids = {token: i for i, token in enumerate(tokens)}
    missing = [token for token in _BERT_TOKENS if token not in ids]
    if missing:
        raise ValueError(
            f"{name} is not a WordPiece vocabulary: it lacks {', '.join(missing)}; expected one "
            "token per line, as in BERT's vocab.txt"
        )
    config: dict[str, Any] = {"tokenizer_class": "BertTokenizer"}
    config |= {
        f"{what}_token": f"[{what.upper()}]" for what in ("unk", "sep", "pad", "cls", "mask")
    }
    has_capitals = any(token != token.lower() for token in tokens if not token.startswith("["))
    config |= {"do_lower_case": not has_capitals}
    config |= read_json(files, "tokenizer_config.json", name)
    tokenizer = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=config["do_lower_case"])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(_BERT_TOKENS))
    # For users of the saved files; our own `encode` adds no special tokens.
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    return _with_tokenizer_json(tokenizer, config, files)


_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _with_tokenizer_json(
    tokenizer: tokenizers.Tokenizer, config: dict[str, Any], files: Mapping[str, bytes]
) -> dict[str, bytes]:
    made = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json_bytes(config),
    }
    return {**files, **made}
