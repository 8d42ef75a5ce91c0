"""Vocabularies with fewer pieces, which split the texts that need no others as before.

Why it is sound, for each algorithm: Unigram takes the most probable split, and the one of the whole
vocabulary is still there among fewer. WordPiece takes the longest piece, likewise. BPE makes a
piece by merges, all of which stay with it, and those that are gone did not apply, or their result
would be there. Special tokens, bytes, sentinels and user-defined pieces stay, in their order.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sp

_BYTES = frozenset(f"<0x{i:02X}>" for i in range(256))


# --- SentencePiece ------------------------------------------------------------------------------


def trim_sentence_piece(proto: sp.ModelProto, used: Collection[int]) -> np.ndarray:
    """Removes the pieces that are not needed from a model.

    Args:
      proto: the model; it is changed.
      used: ids of the pieces that texts need.
    Returns:
      int64: for each id that is left, the one that it had.
    """
    kinds = sp.ModelProto.SentencePiece
    normal = [i for i, piece in enumerate(proto.pieces) if piece.type == kinds.NORMAL]
    kept = {i for i, piece in enumerate(proto.pieces) if piece.type != kinds.NORMAL} | set(used)
    if proto.trainer_spec.model_type == sp.TrainerSpec.BPE:
        ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}

        def parts(i: int) -> Iterable[int]:
            piece = proto.pieces[i].piece
            for cut in range(1, len(piece)):
                halves = ids.get(piece[:cut]), ids.get(piece[cut:])
                # A single character is there for a merge even if it is no piece.
                if all(
                    h is not None or len(p) == 1
                    for h, p in zip(halves, (piece[:cut], piece[cut:]), strict=True)
                ):
                    yield from (h for h in halves if h is not None)

        kept = _closure(kept, parts)
    kept |= _extremes({i: proto.pieces[i].score for i in normal})
    order = sorted(kept)
    pieces = [proto.pieces[i] for i in order]
    new = {old: i for i, old in enumerate(order)}
    spec = proto.trainer_spec
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        old = getattr(spec, name)
        setattr(spec, name, new.get(old, -1))
    copies = [sp.ModelProto.SentencePiece.FromString(piece.SerializeToString()) for piece in pieces]
    del proto.pieces[:]
    proto.pieces.extend(copies)
    spec.vocab_size = len(copies)
    return np.asarray(order)


def _extremes(scores: Mapping[int, float]) -> set[int]:
    """Returns the ids of the least and the most probable piece.

    The score of an unknown character is the least one less 10, that of a user-defined piece a
    multiple of the largest.
    """
    if not scores:
        return set()
    return {min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)}


def _closure(start: Iterable[Any], needs: Any) -> set[Any]:
    """Returns what is needed by anything in it."""
    found, waiting = set(start), list(start)
    while waiting:
        for other in needs(waiting.pop()):
            if other not in found:
                found.add(other)
                waiting.append(other)
    return found


# --- tokenizer.json -----------------------------------------------------------------------------


def trim_tokenizer_json(text: str, used: Collection[int], name: str) -> tuple[str, np.ndarray]:
    """Returns the content of a tokenizer.json without the pieces that are not needed.

    Args:
      text: the content of the file.
      used: ids of the pieces that texts need.
      name: of the tokenizer, for messages.
    Returns:
      The new content; int64: for each id that is left, the one that it had.
    Raises:
      ValueError: for an algorithm that is not known to split texts as before.
    """
    content = json.loads(text)
    model = content["model"]
    kind = model["type"]
    if kind not in _TRIMMED:
        raise ValueError(
            f"{name} is a {kind} vocabulary, which cannot be trimmed; expected one of "
            f"{', '.join(_TRIMMED)}"
        )
    vocab = model["vocab"]
    ids = dict(vocab) if kind != "Unigram" else {piece: i for i, (piece, _) in enumerate(vocab)}
    # Of a piece that is there twice, both stay.
    tokens = {i: token for token, i in ids.items()}
    if kind == "Unigram":
        tokens = {i: piece for i, (piece, _) in enumerate(vocab)}
    kept = {i for i in used if i in tokens}
    kept |= {i for i, token in tokens.items() if token in _BYTES}
    kept |= {token["id"] for token in content["added_tokens"]} & set(tokens)
    if unk := model.get("unk_token"):
        kept.add(ids[unk])
    if kind == "BPE":
        kept |= _alphabet(content, ids)
    kept = _TRIMMED[kind](model, ids, tokens, kept)
    added = [token["id"] for token in content["added_tokens"]]
    order = sorted(kept | set(added))
    new = {old: i for i, old in enumerate(order)}
    if kind == "Unigram":
        model["vocab"] = [vocab[i] for i in sorted(kept)]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[i] for token, i in ids.items() if i in kept}
    for token in content["added_tokens"]:
        token["id"] = new[token["id"]]
    content["added_tokens"].sort(key=lambda token: token["id"])
    if content.get("post_processor"):
        _renumber(content["post_processor"], new)
    return json.dumps(content, ensure_ascii=False), np.asarray(order)


def _alphabet(content: Mapping[str, Any], ids: Mapping[str, int]) -> set[int]:
    """Returns the ids of all bytes, if pieces are made of bytes in GPT-2's alphabet."""
    parts = [content.get(part) or {} for part in ("pre_tokenizer", "decoder", "normalizer")]
    if '"ByteLevel"' not in json.dumps(parts):
        return set()
    return {ids[c] for c in tokenizers.pre_tokenizers.ByteLevel.alphabet() if c in ids}


def _trim_bpe(model: Any, ids: Any, tokens: Any, kept: set[int]) -> set[int]:
    prefix = model.get("continuing_subword_prefix") or ""
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
        for merge in model["merges"]
    ]
    results = [ids.get(a + b.removeprefix(prefix)) for a, b in merges]
    made_of: dict[int, list[int]] = {}
    for (a, b), result in zip(merges, results, strict=True):
        made_of.setdefault(result, []).extend((ids[a], ids[b]))
    kept = _closure(kept, lambda i: made_of.get(i, ()))
    model["merges"] = [
        merge for merge, result in zip(model["merges"], results, strict=True) if result in kept
    ]
    return kept


def _trim_unigram(model: Any, ids: Any, tokens: Any, kept: set[int]) -> set[int]:
    scores = {i: score for i, (_, score) in enumerate(model["vocab"])}
    unk = model.get("unk_id")
    return kept | _extremes(scores) | ({unk} if unk is not None else set())


def _trim_words(model: Any, ids: Any, tokens: Any, kept: set[int]) -> set[int]:
    return kept


_TRIMMED = {
    "BPE": _trim_bpe,
    "Unigram": _trim_unigram,
    "WordPiece": _trim_words,
    "WordLevel": _trim_words,
}


def _renumber(part: Any, new: Mapping[int, int]) -> None:
    """Changes the ids in a post-processor."""
    for nested in part.get("processors", ()):
        _renumber(nested, new)
    for name in ("sep", "cls"):  # BERT's and RoBERTa's: [token, id].
        if name in part:
            part[name] = [part[name][0], new[part[name][1]]]
    special = part.get("special_tokens")
    if isinstance(special, dict):  # A template's.
        for token in special.values():
            token["ids"] = [new[i] for i in token["ids"]]


def renumber_config(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Returns a tokenizer_config.json with the new ids of its added tokens."""
    decoder = config.get("added_tokens_decoder")
    if not decoder:
        return dict(config)
    renumbered = {str(new[int(i)]): token for i, token in decoder.items() if int(i) in new}
    return {**config, "added_tokens_decoder": renumbered}
