"""Which tokens prompts begin and end with, what pads, and what ends a text: decided once.

Several files of a model have something to say. The tokenizer's own rules come first, then
generation_config.json, then config.json, as in transformers; contradictions are logged.

- `reconcile` decides the ids in a description when a folder is read.
- `example_format` decides how prompts are read, for training, evaluation and generation alike.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from t5jax.architectures import Architecture
from t5jax.batch import ExampleFormat
from t5jax.tokenizers import HuggingFaceTokenizer, Tokenizer

_log = logging.getLogger(__name__)


def example_format(model: Architecture, tokenizer: Tokenizer) -> ExampleFormat:
    """Returns how a model reads examples that this tokenizer has encoded.

    A prompt begins and ends as the tokenizer begins and ends a text, or if its files do not say, as
    the model's family does. A decoder continues a prompt, so the eos of T5's vocabularies, which is
    meant for encoders, does not come between.
    """
    start, end = tokenizer.prompt_affixes or (model.prompt_start, model.prompt_end)
    if model.kind == "decoder" and not isinstance(tokenizer, HuggingFaceTokenizer):
        start, end = model.prompt_start, model.prompt_end
    return ExampleFormat(
        eos_id=tokenizer.eos_id,
        start_id=model.start_token_id,
        pad_id=model.pad_token_id,
        num_embeddings=model.vocab_size,
        prompt_start=start,
        prompt_end=end,
        nothing=model.start_token_id if model.kind == "decoder" else model.eos_token_id,
        head=model.head,
        num_labels=len(model.labels),
    )


def check_vocabulary(model: Architecture, tokenizer: Tokenizer) -> None:
    """Raises ValueError if a tokenizer writes texts with ids that have no embedding.

    Special tokens may exceed the embedding, as that of Gemma 3's images does; they are refused
    where they occur.
    """
    added = [i for affix in tokenizer.prompt_affixes or () for i in affix if i >= model.vocab_size]
    if added:
        raise ValueError(
            f"{tokenizer} puts id {added[0]} around every text, but model.vocab_size is "
            f"{model.vocab_size}: it has no embedding; name tokens of the vocabulary as bos_token "
            "and eos_token in tokenizer_config.json"
        )
    if set(range(model.vocab_size, tokenizer.vocab_size)) - tokenizer.special_ids:
        raise ValueError(
            f"the vocabulary {tokenizer} has {tokenizer.vocab_size} ids, but model.vocab_size is "
            f"{model.vocab_size}: texts may have ids without an embedding; set it to "
            f"{-(-tokenizer.vocab_size // 128) * 128} for a new model, or take the vocabulary that "
            "the model was trained with"
        )


def check_prompts(
    model: Architecture, tokenizer: Tokenizer, prompts: Iterable[Sequence[int]]
) -> None:
    """Raises ValueError for a prompt without ids, or with one that has no embedding."""
    for number, prompt in enumerate(prompts):
        if not len(prompt) or min(prompt) < 0:
            raise ValueError(
                f"prompt {number} has {'the id ' + str(min(prompt)) if len(prompt) else 'no ids'}; "
                "expected one or more ids, which begin at 0"
            )
        largest = max(prompt)
        if largest >= model.vocab_size:
            raise ValueError(
                f"prompt {number} has id {largest} ({tokenizer.decode([largest])!r}), but "
                f"model.vocab_size is {model.vocab_size}: it has no embedding; take it out of the "
                "text"
            )


# --- The ids of a folder --------------------------------------------------------------------------


def reconcile(
    raw: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Returns the token ids that replace those of config.json.

    An answer ends with the ids of generation_config.json, or if it has none, with those of
    config.json, or if this has none either, with the tokenizer's eos. Ids beyond the rows of the
    embedding are never written, and are left out.

    Args:
      raw: config.json.
      generation: generation_config.json; empty if there is none.
      tokenizer: the tokenizer that the model is read with, if there is one.
    Raises:
      ValueError: if an id is not a whole number.
    """
    raw = _decoder_keys(raw)
    places = {"generation_config.json": dict(generation), "config.json": raw}
    if raw.get("is_encoder_decoder") and generation.get("decoder_start_token_id") is None:
        # As in transformers, which does not look into config.json then.
        start = generation.get("bos_token_id")
        places["generation_config.json"]["decoder_start_token_id"] = start
    ids: dict[str, Any] = {}
    for key in ("bos_token_id", "decoder_start_token_id", "pad_token_id", "eos_token_id"):
        found = {name: _read_ids(place, key, name, raw) for name, place in places.items()}
        found = {name: value for name, value in found.items() if value}
        values = list(found.values())
        if key == "pad_token_id":  # That of generation_config.json fills answers up.
            values.reverse()
        elif len(values) == 2 and not set(values[0]) & set(values[1]):
            _log.warning(
                "%s is %s in generation_config.json and %s in config.json; the former is taken",
                *(key, _shown(values[0]), _shown(values[1])),
            )
        if key != "eos_token_id":
            ids |= {key: values[0][0]} if values else {}
            continue
        own = [] if tokenizer is None else _in_range([tokenizer.eos_id], raw)
        ends = values[0] if values else own
        if own and own[0] not in ends:
            assert tokenizer is not None
            _log.warning(
                "the tokenizer ends a text with %s (%r), but %s with %s; answers end as the latter "
                "says, as in transformers, and training teaches the former",
                *(own[0], tokenizer.special_tokens.get("eos_token"), next(iter(found))),
                _shown(ends),
            )
        # What training uses comes first.
        ends = [*(i for i in own if i in ends), *(i for i in ends if i not in own)]
        ids |= {key: ends if len(ends) > 1 else ends[0]} if ends else {}
    bos = None if tokenizer is None else tokenizer.bos_id
    if "bos_token_id" not in ids and bos is not None and _in_range([bos], raw):
        ids["bos_token_id"] = bos
    return ids


def trained_with(model: Architecture, tokenizer: Tokenizer) -> Architecture:
    """Returns a description whose texts end with the tokenizer's eos, as training teaches it.

    Raises:
      ValueError: if it has no embedding.
    """
    eos, ends = tokenizer.eos_id, model.end_token_ids
    if eos >= model.vocab_size:
        raise ValueError(
            f"{tokenizer} ends a text with {tokenizer.special_tokens.get('eos_token')!r}, whose id "
            f"{eos} has no embedding: model.vocab_size is {model.vocab_size}; name a token of the "
            "vocabulary as eos_token in tokenizer_config.json"
        )
    if eos == ends[0] or model.kind == "encoder":
        return model
    more = tuple(i for i in ends if i != eos)
    fields: dict[str, Any] = {"eos_token_id": eos, "more_eos_token_ids": more}
    return dataclasses.replace(model, **fields)


def adapt(model: Architecture, tokenizer: Tokenizer) -> Architecture:
    """Returns a description with the padding and the beginning of a text that its tokenizer has.

    Padding only matters to encoders; a decoder's text begins as its prompts do.
    """
    new: dict[str, Any] = {}
    start = (tokenizer.prompt_affixes or ((), ()))[0]
    if model.kind == "decoder":
        if start and isinstance(tokenizer, HuggingFaceTokenizer):
            new["decoder_start_token_id"] = start[0]
    elif tokenizer.pad_id != tokenizer.eos_id:
        new["pad_token_id"] = tokenizer.pad_id
    for field, value in new.items():
        if getattr(model, field) != value:
            _log.warning(
                "%s is %d in the tokenizer and %d in config.json; the tokenizer's is taken",
                *(_NAMES[field], value, getattr(model, field)),
            )
    new = {field: value for field, value in new.items() if value < model.vocab_size}
    return dataclasses.replace(model, **new)


_NAMES = {"decoder_start_token_id": "bos_token_id", "pad_token_id": "pad_token_id"}


def _decoder_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of config.json, with those of the part that writes text if it has parts."""
    parts = [raw[key] for key in ("decoder", "text_config") if isinstance(raw.get(key), dict)]
    inner = parts[0] if parts else {}
    return {**inner, **{key: value for key, value in raw.items() if value is not None}}


def _read_ids(place: Mapping[str, Any], key: str, name: str, raw: Mapping[str, Any]) -> list[int]:
    value = place.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in ids):
        raise ValueError(f"{name}: {key} is {value!r}; expected whole numbers")
    kept = _in_range(ids, raw)
    if kept != ids and key != "pad_token_id":
        _log.warning(
            "%s: %s is %s, but there are %s rows of embeddings; ids beyond them are left out",
            *(name, key, value, raw.get("vocab_size")),
        )
    return kept


def _in_range(ids: list[int], raw: Mapping[str, Any]) -> list[int]:
    rows = raw.get("vocab_size")
    return [i for i in ids if i >= 0 and not (type(rows) is int and i >= rows)]


def _shown(ids: list[int]) -> str:
    return " and ".join(map(str, ids))
