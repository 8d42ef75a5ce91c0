"""What the `tokenizers` library reads, and older files brought into its form: BPE, WordPiece."""

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

# Where a configuration names no such token, the names by which the common models have it.
_SPECIAL_TOKENS = {
    "eos": (("eos_token", "sep_token"), ("</s>", "<|endoftext|>", "[SEP]")),
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "unk": (("unk_token",), ("<unk>", "[UNK]")),
    "bos": (("bos_token", "cls_token"), ("[CLS]",)),
    "mask": (("mask_token",), ("[MASK]", "<mask>")),
}


class HuggingFaceTokenizer:
    """Any tokenizer of the `tokenizers` library: a tokenizer.json, or what BPE and WordPiece keep.

    Which token ends, pads and so on is what the folder's configuration says, or else:

    | | the first of these that the vocabulary has |
    |---|---|
    | eos | eos_token, sep_token, </s>, <|endoftext|>, [SEP] |
    | pad | pad_token, <pad>, [PAD], or else the eos token |
    | unk | unk_token, <unk>, [UNK], or else the eos token: a byte-level vocabulary lacks nothing |
    | bos | bos_token, cls_token, [CLS]; None if there is none |
    | mask | mask_token, [MASK], <mask>; None if there is none |

    So GPT-2 ends, pads and begins with <|endoftext|> (50256), and BERT begins with [CLS], ends with
    [SEP] and pads with [PAD]. Neither has sentinels: span corruption needs a vocabulary that does.
    """

    def __init__(self, files: Mapping[str, bytes], name: str = "the folder"):
        """Reads the files of a folder.

        Args:
          files: name to content; tokenizer.json, tokenizer_config.json, special_tokens_map.json
            and chat_template.jinja are read, all are saved.
          name: what error messages call them.
        Raises:
          ValueError: for damaged files, and where no token ends a text.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # The library raises Exception itself.
            raise ValueError(f"tokenizer.json in {name} is damaged: {error}") from None
        # Some files ask for rows of one length, which would change the text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._files = dict(files)
        config = read_json(files, "tokenizer_config.json", name)
        config = read_json(files, "special_tokens_map.json", name) | config
        ids = self._tokenizer.get_vocab()
        self.vocab_size: int = max(ids.values(), default=-1) + 1  # There may be holes.
        chosen = {what: _special_token(what, config, ids) for what in _SPECIAL_TOKENS}
        if chosen["eos"] is None:
            raise ValueError(
                f"{name} has no token that ends a text; name one of its vocabulary as eos_token in "
                "tokenizer_config.json"
            )
        chosen["pad"] = chosen["pad"] or chosen["eos"]
        chosen["unk"] = chosen["unk"] or chosen["eos"]
        self.special_tokens: Mapping[str, str] = {
            f"{what}_token": token for what, token in chosen.items() if token is not None
        }
        self.eos_id: int = ids[chosen["eos"]]
        self.pad_id: int = ids[chosen["pad"]]
        self.unk_id: int = ids[chosen["unk"]]
        self.bos_id: int | None = ids.get(chosen["bos"])
        self.mask_id: int | None = ids.get(chosen["mask"])
        matches = ((SENTINEL.fullmatch(token), i) for token, i in ids.items())
        self.sentinel_ids = first_sentinels({int(match[1]): i for match, i in matches if match})
        self.chat_template = read_chat_template(files, name)

    def __repr__(self):
        digest = hashlib.sha256(self._files["tokenizer.json"]).hexdigest()[:12]
        return f"HuggingFaceTokenizer({self.vocab_size} ids, sha256 {digest})"

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(clean_ids(self, ids), skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        write_files(folder, self._files)


def _special_token(what: str, config: Mapping, ids: Mapping[str, int]) -> str | None:
    fields, names = _SPECIAL_TOKENS[what]
    configured = [config.get(field) for field in fields]
    configured = [token["content"] if isinstance(token, dict) else token for token in configured]
    return next((token for token in (*configured, *names) if token in ids), None)


def bpe_files(vocab: bytes, merges: bytes, files: Mapping[str, bytes], name: str) -> dict:
    """Returns what GPT-2's vocab.json and merges.txt are as a tokenizer.json, and its config."""
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
    # A token of its own, never pieces: "<|endoftext|>" in a text is its id.
    tokenizer.add_special_tokens([t for t in ("<|endoftext|>",) if t in ids])
    for field in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if "<|endoftext|>" in ids:
            config.setdefault(field, "<|endoftext|>")
    return _with_tokenizer_json(tokenizer, config, files)


def word_piece_files(vocab: bytes, files: Mapping[str, bytes], name: str) -> dict:
    """Returns what BERT's vocab.txt is as a tokenizer.json, and its config.

    Unless the configuration says so, texts are lower-cased where no entry has a capital letter.
    """
    tokens = vocab.decode().splitlines()
    ids = {token: i for i, token in enumerate(tokens)}
    missing = [token for token in _BERT_TOKENS if token not in ids]
    if missing:
        raise ValueError(
            f"{name} is not a WordPiece vocabulary: it lacks {', '.join(missing)}; expected one "
            "token a line, as in BERT's vocab.txt"
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
    # For those who load what we save; our own `encode` adds nothing.
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    return _with_tokenizer_json(tokenizer, config, files)


_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _with_tokenizer_json(
    tokenizer: tokenizers.Tokenizer, config: dict, files: Mapping[str, bytes]
) -> dict[str, bytes]:
    made = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json_bytes(config),
    }
    return {**files, **made}
