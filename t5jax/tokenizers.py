"""Text to token ids and back, without TensorFlow: SentencePiece, bytes, Hugging Face.

SentencePiece and bytes have the ids of the T5 papers: pad 0, eos 1, unk 2, and the sentinels
"<extra_id_0>", ... of span corruption (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4) at the
end of the vocabulary. SentencePiece ids equal SeqIO's `SentencePieceVocabulary`, byte ids Hugging
Face's ByT5Tokenizer (Xue et al. 2022, arXiv:2105.13626). GPT-2's byte-level BPE, BERT's WordPiece
and any tokenizer.json have the ids of transformers; `HuggingFaceTokenizer` says which of them end
and pad a text. The data pipeline uses the same objects (`t5jax/data/vocabularies.py`), so that
training, evaluation and serving agree by construction.
"""

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from t5jax.architectures import BertConfig, ModelConfig

SENTINEL = re.compile(r"<extra_id_(\d+)>")

# What belongs to a tokenizer in a Hugging Face folder; read together, and saved again unchanged.
_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)


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


class SentencePieceTokenizer:
    """A SentencePiece model with sentinels behind it: T5, FLAN-T5, mT5, UMT5, UL2 and your own."""

    bos_id: int | None = None
    mask_id: int | None = None

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
        found = {
            int(match[1]): i
            for i, piece in enumerate(proto.pieces)
            if (match := SENTINEL.fullmatch(piece.piece.lstrip("▁")))
        }
        self.sentinel_ids = _first_ones(found)
        self._files = dict(files) if files else self._hugging_face_files(model, extra_ids)
        self.chat_template = _chat_template(self._files, name)
        self.special_tokens: Mapping[str, str] = {
            f"{what}_token": self._processor.id_to_piece(getattr(self, f"{what}_id"))
            for what in ("pad", "eos", "unk")
        }

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
    bos_id: int | None = None
    mask_id: int | None = None
    chat_template: str | None = None
    sentinel_ids = tuple(range(259, 384))
    special_tokens: Mapping[str, str] = MappingProxyType(
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    )

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
        config = _read_json(files, "tokenizer_config.json", name)
        config = _read_json(files, "special_tokens_map.json", name) | config
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
        self.sentinel_ids = _first_ones({int(match[1]): i for match, i in matches if match})
        self.chat_template = _chat_template(files, name)

    def __repr__(self):
        digest = hashlib.sha256(self._files["tokenizer.json"]).hexdigest()[:12]
        return f"HuggingFaceTokenizer({self.vocab_size} ids, sha256 {digest})"

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(_clean(self, ids), skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        _write(folder, self._files)


class LabelTokenizer:
    """A classifier's classes, as the tokenizer of its targets: one label a text, or one a word.

    Class i has id i. What ends a target, and in targets of words what has no label, come after the
    classes. `repr()` names the classes in their order.
    """

    def __init__(self, labels: Sequence[str], per_word: bool = False):
        """Takes the names of the classes; per_word: a target has a label for each word."""
        self.labels, self.per_word = tuple(labels), per_word
        self._ids = {label: i for i, label in enumerate(self.labels)}
        self.eos_id = self.pad_id = self.unk_id = len(self.labels)
        self._ids[_NO_LABEL] = len(self.labels) + 1
        self.vocab_size = len(self._ids) + 1

    @staticmethod
    def of(model: ModelConfig) -> "LabelTokenizer | None":
        """Returns that of a model that classifies, None for any other."""
        if not isinstance(model, BertConfig) or not model.classifies:
            return None
        return LabelTokenizer(model.labels, model.head == "token_classification")

    def __repr__(self):
        digest = hashlib.sha256("\n".join(self.labels).encode()).hexdigest()[:12]
        each = "one a word" if self.per_word else "one a text"
        return f"LabelTokenizer({len(self.labels)} labels, {each}, sha256 {digest})"

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the labels in a target, without eos.

        Raises:
          ValueError: for what is no label.
        """
        found = text.split() if self.per_word else [text.strip()]
        return [self._id(label) for label in found]

    def _id(self, label: str) -> int:
        if label not in self._ids:
            near = difflib.get_close_matches(label, self.labels, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(map(repr, self.labels[:20]))
            raise ValueError(
                f"{label!r:.60} is no class of the model; {hint}model.labels has {known}"
                f"{', ...' if len(self.labels) > 20 else ''}; correct the data, or add it to "
                "model.labels"
            )
        return self._ids[label]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the labels before the first eos, with spaces between them."""
        before = itertools.takewhile(lambda i: i != self.eos_id, ids)
        return " ".join(self.labels[i] for i in before if i < len(self.labels))

    def arrange(self, inputs: str, targets: str, tokenizer: Tokenizer) -> str:
        """Returns the targets as `encode` shall read them: with what inputs' pieces have a label.

        A text's label stays what it is. A word's goes to the first of the word's pieces, and the
        others have none; so there is something for every piece of the inputs.

        Args:
          inputs: a text; of words, with one space between them.
          targets: its label, or its words' labels.
          tokenizer: of the inputs.
        Raises:
          ValueError: for what is no label, for more or fewer labels than words, and for words that
            the tokenizer does not split one by one.
        """
        self.encode(targets)  # Raises for what is no label.
        if not self.per_word:
            return targets
        words, labels = inputs.split(), targets.split()
        if len(words) != len(labels):
            raise ValueError(
                f"its inputs have {len(words)} words and its targets {len(labels)} labels "
                f"({inputs!r:.40}, {targets!r:.40}); expected a label for each word, with spaces "
                "between them"
            )
        # Where a space belongs to the piece behind it, it is there.
        pieces = [tokenizer.encode(f" {word}" if i else word) for i, word in enumerate(words)]
        if list(itertools.chain(*pieces)) != tokenizer.encode(inputs):
            raise ValueError(
                f"its inputs {inputs!r:.60} are not split word by word by {tokenizer}; put one "
                "space between words, and none around them"
            )
        arranged = (
            [label, *[_NO_LABEL] * (len(ids) - 1)]
            for label, ids in zip(labels, pieces, strict=True)
            if ids
        )
        return " ".join(itertools.chain(*arranged))


_NO_LABEL = "\0"  # No label is called that: labels are printable.


# Where a configuration names no such token, the names by which the common models have it.
_SPECIAL_TOKENS = {
    "eos": (("eos_token", "sep_token"), ("</s>", "<|endoftext|>", "[SEP]")),
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "unk": (("unk_token",), ("<unk>", "[UNK]")),
    "bos": (("bos_token", "cls_token"), ("[CLS]",)),
    "mask": (("mask_token",), ("[MASK]", "<mask>")),
}


def _special_token(what: str, config: Mapping, ids: Mapping[str, int]) -> str | None:
    fields, names = _SPECIAL_TOKENS[what]
    configured = [config.get(field) for field in fields]
    configured = [token["content"] if isinstance(token, dict) else token for token in configured]
    return next((token for token in (*configured, *names) if token in ids), None)


def _first_ones(sentinels: Mapping[int, int]) -> tuple[int, ...]:
    """Returns the ids of sentinels 0, 1, ... up to the first that is missing."""
    numbers = itertools.takewhile(sentinels.__contains__, itertools.count())
    return tuple(sentinels[number] for number in numbers)


def _chat_template(files: Mapping[str, bytes], name: str) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = _read_json(files, "tokenizer_config.json", name).get("chat_template")
    if isinstance(template, list):  # Several, of which one is for plain conversations.
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _bpe_files(vocab: bytes, merges: bytes, files: Mapping[str, bytes], name: str) -> dict:
    """Returns what GPT-2's vocab.json and merges.txt are as a tokenizer.json, and its config."""
    ids = _read_json({"vocab.json": vocab}, "vocab.json", name)
    lines = merges.decode().splitlines()
    pairs: Any = [tuple(x.split(" ")) for x in lines if x and not x.startswith("#version")]
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(ids, pairs))
    except Exception as error:
        raise ValueError(f"the vocabulary and the merges of {name} do not fit: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = _read_json(files, "tokenizer_config.json", name)
    config = {"tokenizer_class": "GPT2Tokenizer"} | config
    # A token of its own, never pieces: "<|endoftext|>" in a text is its id.
    tokenizer.add_special_tokens([t for t in ("<|endoftext|>",) if t in ids])
    for field in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if "<|endoftext|>" in ids:
            config.setdefault(field, "<|endoftext|>")
    return _with_tokenizer_json(tokenizer, config, files)


def _word_piece_files(vocab: bytes, files: Mapping[str, bytes], name: str) -> dict:
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
    config |= _read_json(files, "tokenizer_config.json", name)
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
        "tokenizer_config.json": _json_bytes(config),
    }
    return {**files, **made}


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Returns the tokenizer that a name means.

    Args:
      source: "bytes"; a SentencePiece .model file; a tokenizer.json; a vocab.json of byte-level BPE
        with its merges.txt beside it; a WordPiece vocab.txt (the names may have something in
        front: gpt2_vocab.json, gpt2_merges.txt); a folder with such files, as t5jax and Hugging
        Face write them; or a hub name.
    Raises:
      ValueError: where nothing is found, or what is found is damaged.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = Path(source).expanduser()
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        return _load_folder(path)
    # A hub name is "name" or "owner/name", without a suffix.
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        raise ValueError(_not_found(source))
    if path.suffix in (".model", ".json", ".txt"):
        raise ValueError(_not_found(source))
    from t5jax.hf.hub import resolve

    return _load_folder(resolve(source))


def _not_found(source) -> str:
    return (
        f'there is no tokenizer {str(source)!r}; expected "bytes", a SentencePiece .model file, a '
        "tokenizer.json, vocab.json or vocab.txt, a folder with tokenizer files, or a hub name "
        "such as google/flan-t5-small"
    )


def _load_file(path: Path) -> Tokenizer:
    if path.name.endswith("vocab.json"):
        merges = path.with_name(path.name.removesuffix("vocab.json") + "merges.txt")
        return HuggingFaceTokenizer(
            _bpe_files(_read(path), _read(merges), {}, str(path)), str(path)
        )
    if path.name.endswith("vocab.txt"):
        return HuggingFaceTokenizer(_word_piece_files(_read(path), {}, str(path)), str(path))
    if path.suffix == ".json":
        return HuggingFaceTokenizer({"tokenizer.json": _read(path)}, str(path))
    return SentencePieceTokenizer(path)


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
    if {"vocab.json", "merges.txt"} <= set(files):
        files = _bpe_files(files["vocab.json"], files["merges.txt"], files, str(folder))
        return HuggingFaceTokenizer(files, str(folder))
    if "vocab.txt" in files:
        files = _word_piece_files(files["vocab.txt"], files, str(folder))
        return HuggingFaceTokenizer(files, str(folder))
    if "spiece.model" in files:
        raise ValueError(
            f"{folder} adds tokens to its spiece.model ({', '.join(added[:3])}) but has no "
            "tokenizer.json that places them; save it once more with Hugging Face's tokenizer"
        )
    raise ValueError(
        f"{folder} holds no tokenizer; expected spiece.model, tokenizer.json, vocab.json with "
        "merges.txt, vocab.txt, or a tokenizer_config.json of a ByT5Tokenizer"
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
