"""Descriptions: how their fields are arranged, and what every family answers of itself."""

import dataclasses

import pytest

from t5jax.architectures import FAMILIES, SIZES, Architecture, published
from t5jax.architectures.base import description
from t5jax.architectures.families import load_sizes


@description()
class Small(Architecture):
    """A description of its own."""

    kind = "decoder"
    start_token_id = 0

    family: str = "small"
    depth: int = 3
    dropout_rate: float = 0.5


@description(depth=5, vocab_size=7)
class Deep(Small):
    """One that has another default of a field that it inherits."""

    width: int = 4


def names(cls):
    return [field.name for field in dataclasses.fields(cls)]


def test_own_fields_come_first_and_what_all_have_last():
    assert names(Small)[:3] == ["family", "depth", "dropout_rate"]
    assert names(Small)[-5:] == ["dtype", "param_dtype", "scan_layers", "remat", "kv_cache"]
    assert names(Deep)[0] == "width"
    assert sorted(names(Deep)) == sorted([*names(Small), "width"])


def test_a_description_says_its_kind_and_what_a_row_begins_with():
    with pytest.raises(TypeError, match="abstract .*kind.*start_token_id"):
        Architecture()


def test_a_default_may_differ_from_the_inherited_one():
    assert (Small().depth, Small().vocab_size) == (3, 1)
    assert (Deep().depth, Deep().vocab_size, Deep().dropout_rate) == (5, 7, 0.5)
    assert dataclasses.replace(Deep(), depth=6) == Deep(depth=6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Deep().depth = 2
    with pytest.raises(ValueError, match="model.depth is 0; it must be at least 1"):
        Deep(depth=0)


# --- The table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_all_its_parts(name):
    family = FAMILIES[name]
    cls = family.load_description()
    assert issubclass(cls, Architecture)
    assert hasattr(family.load_network(), "Network")
    assert name in " ".join(family.load_table().model_types)
    sizes = load_sizes(name).SIZES
    assert sizes
    assert {(type(size), size.family) for size in sizes.values()} == {(cls, name)}
    assert sizes.items() <= SIZES.items()


def test_no_model_type_is_of_two_families():
    types = [t for family in FAMILIES.values() for t in family.load_table().model_types]
    assert len(types) == len(set(types))


# --- What a family answers ------------------------------------------------------------------------

_LM = {"eos_token_id": "eos_id"}
_PADDED = _LM | {"pad_token_id": "pad_id"}
ANSWERS = {
    # Size: kind, head, what prompts begin and end with, longest row, ids of the tokenizer.
    "t5_small": ("encoder_decoder", "seq2seq_lm", (), (1,), None, _PADDED),
    "t5gemma_s_s": ("encoder_decoder", "seq2seq_lm", (2,), (), None, _PADDED),
    "gpt2": ("decoder", "causal_lm", (), (), 1024, _LM),
    "llama3_8b": ("decoder", "causal_lm", (), (), None, _LM),
    "mistral_7b_v0_1": ("decoder", "causal_lm", (), (), None, _LM),
    "qwen3_8b": ("decoder", "causal_lm", (), (), None, _LM),
    "gemma2_2b": ("decoder", "causal_lm", (), (), None, _LM),
    "gemma3_1b": ("decoder", "causal_lm", (), (), None, _LM),
    "bert_tiny": (
        *("encoder", "masked_lm", (101,), (102,), 512),
        _PADDED | {"cls_token_id": "bos_id"},
    ),
}


def test_every_family_is_asked():
    assert {published(size).family for size in ANSWERS} == set(FAMILIES)


@pytest.mark.parametrize("size", ANSWERS)
def test_what_a_family_answers(size):
    model = published(size)
    kind, head, start, end, longest_row, tokenizer_ids = ANSWERS[size]
    assert (model.kind, model.head, model.longest_row) == (kind, head, longest_row)
    assert (model.prompt_start, model.prompt_end) == (start, end)
    assert model.tokenizer_ids == tokenizer_ids
    assert (model.num_outputs, model.labels, model.has_pooler) == (model.vocab_size, (), False)
    model.check_head()
    if kind != "encoder":
        assert model.answer([8, 7, model.eos_token_id, 6]) == [8, 7]


def test_ends():
    llama = published("llama3_8b", eos_token_id=5, more_eos_token_ids=(7, 9))
    assert llama.answer([1, 2, 9, 3]) == [1, 2]


def test_heads():
    bert = published("bert_tiny")
    texts = dataclasses.replace(bert, head="sequence_classification", labels=("a", "b"))
    assert (texts.num_outputs, texts.has_pooler) == (2, True)
    pooler = dataclasses.replace(bert, head="pooler")
    assert (pooler.num_outputs, pooler.has_pooler) == (0, True)
    for other in (texts, dataclasses.replace(bert, head="token_classification", labels=("x", "y"))):
        assert bert.with_head_of(other) == other
        assert published("gpt2").with_head_of(other) == published("gpt2")
    assert texts.with_head_of(published("gpt2")) == texts
    with pytest.raises(ValueError, match="this bert is an encoder without a head.*set model.head"):
        pooler.check_head()
    with pytest.raises(ValueError, match="this t5 is an encoder .*take a model with a decoder"):
        published("t5_small").encoder_alone().check_head()
    for size in ("gpt2", "t5gemma_s_s", "bert_tiny"):
        assert published(size).encoder_alone() is None
    assert published("t5_small").encoder_alone().encoder_alone() is None


def test_what_a_run_decides():
    ours = published("t5_small", dtype="bfloat16", scan_layers=False, dropout_rate=0.3)
    assert ours.has_params_of(published("t5_small", remat="full"))
    assert not ours.has_params_of(published("t5_base"))
    computed = published("t5_base").computed_as(ours)
    assert computed == published("t5_base", dtype="bfloat16", scan_layers=False, dropout_rate=0.3)
