"""tokenizer.model, the SentencePiece model of Llama and Gemma, as a tokenizer.json.

transformers 5 takes a folder that has nothing else for one whose texts begin without a space, and
its LlamaTokenizer adds none to a text that begins with one. SentencePiece, with which the models
were trained, adds it to every text if the model says so.
"""

from collections.abc import Mapping
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sp
from tokenizers import AddedToken, decoders, models, normalizers, processors

from t5jax.tokenizers.as_transformers import CONFIG
from t5jax.tokenizers.common import json_bytes, read_json
from t5jax.tokenizers.sentence_piece import read_model, user_defined

FILE = "tokenizer.model"
_NAMES = ("unk", "bos", "eos", "pad")
_SPACE = "▁"
_PROBES = ("", "Hello world", "  two  spaces ", "e\u0301é 日本 😀\n\n\tﬁ", "1984, don't!", " a")


def tokenizer_json_files(files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    """Returns a folder's files with a tokenizer.json made from its tokenizer.model.

    Args:
      files: the content of the files by name.
      name: the folder's name in error messages.
    Raises:
      ValueError: if the model is damaged, or the `tokenizers` library cannot split texts as it
        does.
    """
    proto = read_model(files[FILE], f"{FILE} in {name}")
    processor = sentencepiece.SentencePieceProcessor(model_proto=files[FILE])
    tokenizer = _convert(proto)
    own = user_defined(proto)[:3]
    for text in (*_PROBES, *(f"a{piece} b".replace(_SPACE, " ") for piece in own)):
        theirs, ours = processor.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if theirs != ours:
            raise ValueError(
                f"{FILE} in {name} splits {text!r} into {theirs}, and as a tokenizer.json into "
                f"{ours}; save a tokenizer.json beside it that is right"
            )
    ids = {what: getattr(processor, f"{what}_id")() for what in _NAMES}
    special = {f"{what}_token": processor.id_to_piece(i) for what, i in ids.items() if i >= 0}
    config = read_json(files, CONFIG, name)
    # The publishers' default; transformers 5 reads this of a tokenizer.json's post-processor.
    added = [
        (what, special.get(f"{what}_token"))
        for what, default in (("bos", True), ("eos", False))
        if config.get(f"add_{what}_token", default)
    ]
    tokens = {what: token for what, token in added if token}
    if tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, (tokens.get("bos"), "$A", tokens.get("eos")))),
            special_tokens=[(token, ids[what]) for what, token in tokens.items()],
        )
    # This class takes all rules from tokenizer.json.
    config = special | config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    made = {"tokenizer.json": tokenizer.to_str().encode(), CONFIG: json_bytes(config)}
    return {**files, **made}


def _convert(proto: Any) -> tokenizers.Tokenizer:
    from transformers.tokenization_utils_base import generate_merges

    pieces, spec = [(piece.piece, piece.score) for piece in proto.pieces], proto.trainer_spec
    model: models.Model
    if spec.model_type == sp.TrainerSpec.UNIGRAM:
        model = models.Unigram(pieces, spec.unk_id, spec.byte_fallback)
    else:
        ids: Any = {piece: i for i, (piece, _) in enumerate(pieces)}
        model = models.BPE(
            ids,
            generate_merges(ids),
            unk_token=spec.unk_piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    tokenizer = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = []
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    ends = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    kinds = sp.ModelProto.SentencePiece
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == kinds.CONTROL)
            for piece in proto.pieces
            if piece.type in (kinds.CONTROL, kinds.USER_DEFINED)
        ]
    )
    return tokenizer
