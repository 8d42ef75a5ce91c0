"""Descriptions: every published size has its count of parameters, and what cannot be is refused."""

import math

import jax
import pytest

from conformance.families import (
    BERT,
    GEMMA2,
    GEMMA3,
    GPT2,
    LLAMA,
    MISTRAL,
    QWEN3,
    T5,
    T5GEMMA,
    VARIANTS,
    change,
)
from t5jax.architectures import SIZES, BertConfig, published
from t5jax.config import Config, from_json, to_json
from t5jax.models import api

# As the checkpoints on the hub have it.
PUBLISHED = {
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312,
    "mt5_xl": 3_742_619_648,
    "mt5_xxl": 12_921_057_280,
    "byt5_small": 299_637_760,
    "byt5_base": 581_653_248,
    "byt5_large": 1_228_183_552,
    "byt5_xl": 3_737_801_728,
    "byt5_xxl": 12_906_899_328,
    # Two embeddings, 10 blocks of attention or MLP and the norms, 2 tables of position biases.
    "t5_tiny": 2 * 384 * 128 + 6 * 4 * 128**2 + 4 * 3 * 128 * 256 + 12 * 128 + 2 * 32 * 4,
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b_v0_1": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    # The published counts, less their image encoder's 416,866,032 and what joins the two.
    "gemma3_4b": 4_300_079_472 - 416_866_032 - 1153 * 2560 + 2560 - 1152,
    "gemma3_12b": 12_187_325_040 - 416_866_032 - 1153 * 3840 + 3840 - 1152,
    "gemma3_27b": 27_432_406_640 - 416_866_032 - 1153 * 5376 + 5376 - 1152,
    "t5gemma_s_s": 312_517_632,
    "t5gemma_b_b": 591_490_560,
    "t5gemma_l_l": 1_241_761_792,
    "t5gemma_ml_ml": 2_200_345_344,
    "t5gemma_xl_xl": 3_766_980_608,
    "t5gemma_2b_2b": 5_596_853_760,
    "t5gemma_9b_2b": 12_292_375_296,
    "t5gemma_9b_9b": 20_333_401_088,
    # With the tied masked-LM head.
    "bert_base_uncased": 109_514_298,
    "bert_large_uncased": 335_174_458,
    "bert_base_cased": 108_340_804,
    "bert_large_cased": 333_610_308,
}
# In millions (Turc et al. 2019, table 1): of pretraining, with the pooler and the next sentence.
SMALL_BERTS = {"tiny": 4.4, "mini": 11.3, "small": 29.1, "medium": 41.7, "base_uncased": 110.1}


def count(model) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(api.param_shapes(model)))


def test_published_sizes():
    assert {name: count(published(name)) for name in PUBLISHED} == PUBLISHED
    assert count(published("ul2")) == pytest.approx(19.5e9, rel=0.01)  # Known to three digits.
    # As diffusion models have it.
    assert count(published("t5_1_1_xxl").encoder_alone()) == 4_762_310_656
    assert count(published("bert_base_uncased", head="pooler")) == 109_482_240
    for name, millions in SMALL_BERTS.items():
        model = published(f"bert_{name}")
        both = count(model) + model.d_model * (model.d_model + 1) + 2 * (model.d_model + 1)
        assert round(both / 1e6, 1) == millions, name
    others = {name for name in SIZES if name.startswith(("flan", "umt5"))}
    berts = {f"bert_{name}" for name in SMALL_BERTS}
    assert set(SIZES) == set(PUBLISHED) | berts | others | {"ul2"}
    assert published("flan_ul2") == published("ul2")


@pytest.mark.parametrize("size", ["small", "base", "large", "xl", "xxl"])
def test_sizes_that_follow_from_others(size):
    assert published(f"flan_t5_{size}") == published(f"t5_1_1_{size}")
    if size == "large":
        return
    # UMT5 is mT5 with a larger vocabulary, and a bias table in every layer instead of two.
    mt5, umt5 = published(f"mt5_{size}"), published(f"umt5_{size}")
    tables = (2 * mt5.num_encoder_layers - 2) * 32 * mt5.num_heads
    rows = 2 * (256_384 - 250_112) * mt5.d_model
    assert count(umt5) - count(mt5) == tables + rows


def test_published_patterns():
    gemma2, gemma3 = published("gemma2_2b"), published("gemma3_4b")
    assert gemma2.local_layers == (True, False) * 13
    full = [i for i, is_local in enumerate(gemma3.local_layers) if not is_local]
    assert full == [5, 11, 17, 23, 29]
    assert len(gemma3.local_layers) == 34
    assert not any(published("qwen3_8b").local_layers)


@pytest.mark.parametrize("variant", VARIANTS)
def test_json_gives_the_same_description_back(variant):
    config = Config(model=VARIANTS[variant])
    assert from_json(to_json(config)) == config


def test_only_the_head_of_a_description_is_another_ones():
    classifier, labels = VARIANTS["bert_sequence_classification"], ("x", "y")
    # Nothing asked for: the head stays.
    assert classifier.with_head_of(BertConfig()) == classifier
    assert BERT.with_head_of(BertConfig()) == BERT
    untied = VARIANTS["bert_masked_lm_untied"]
    assert untied.with_head_of(BertConfig()) == untied
    # Another one: it comes without the old one's fields.
    asked = BertConfig(head="sequence_classification", labels=labels)
    expected = change(BERT, head="sequence_classification", labels=labels)
    assert BERT.with_head_of(asked) == expected
    assert change(BERT, tie_word_embeddings=False).with_head_of(asked) == expected
    assert classifier.with_head_of(asked).labels == labels
    tagger = change(asked, head="token_classification")
    assert classifier.with_head_of(tagger).head == "token_classification"
    # What has none gets the default one.
    assert change(BERT, head="none").with_head_of(BertConfig()) == BERT


# --- What cannot be -------------------------------------------------------------------------------

CLASSES = {"head": "sequence_classification", "labels": ("a", "b")}
ALONE = T5.encoder_alone()


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (ALONE, {"tie_word_embeddings": True}, r"tie_word_embeddings is True, but with"),
        (ALONE, {"scale_decoder_outputs": True}, r"scale_decoder_outputs is True, but with"),
        (GPT2, {"family": "gpt3"}, r"model\.family is 'gpt3'; expected one of gpt2, llama.*gpt2\?"),
        (GPT2, {"d_model": 0}, r"model\.d_model is 0; it must be at least 1"),
        (GPT2, {"eos_token_id": 61}, r"model\.eos_token_id is 61; .* \[0, 61\)"),
        (GPT2, {"more_eos_token_ids": (1,)}, r"more_eos_token_ids is \(1,\); expected different"),
        (GPT2, {"more_eos_token_ids": (61,)}, r"more_eos_token_ids is \(61,\)"),
        (GPT2, {"head_dim": 5}, r"head_dim 5 do not fit gpt2"),
        (GPT2, {"norm_epsilon": 0.0}, r"model\.norm_epsilon is 0\.0; it must be above 0"),
        (GPT2, {"position": "rope"}, r"model\.rope_theta is None; model\.position rope"),
        (GPT2, {"rope_theta": 1e4}, r"rope_theta is 10000\.0, but model\.position learned"),
        (GPT2, {"rope_scaling": "linear"}, r"rope_scaling is 'linear', but model\.position is"),
        (GPT2, {"attention_bias": False}, r"attention_bias is False, which no checkpoint of gpt2"),
        (GPT2, {"qk_norm": True}, r"model\.qk_norm are of rmsnorm"),
        (GPT2, {"mlp_activation": "gated-silu"}, r"'gated-silu', which no .* of gpt2 can say"),
        (LLAMA, {"mlp_activation": "gated-gelu"}, r"'gated-gelu', which no checkpoint of llama"),
        (LLAMA, {"num_kv_heads": 2}, r"num_heads 3 is not divisible by model\.num_kv_heads 2"),
        (LLAMA, {"head_dim": 5}, r"head_dim is 5; rope turns pairs"),
        (
            LLAMA,
            {"d_model": 13},
            r"d_model 13 is not divisible .* transformers refuses such a llama",
        ),
        (LLAMA, {"rope_theta": None}, r"rope_theta is None; .* needs it"),
        (LLAMA, {"rope_theta": -1.0}, r"rope_theta is -1\.0; it must be above 0"),
        (LLAMA, {"rope_local_theta": 1.0}, r"rope_local_theta is 1\.0, but .* no local layer"),
        (LLAMA, {"rope_scaling": "yarn"}, r"rope_scaling is 'yarn'; expected one of none, linear"),
        (LLAMA, {"rope_scaling": "linear"}, r"rope_scaling_factor is None; .* linear needs it"),
        (LLAMA, {"rope_scaling_factor": 2.0}, r"rope_scaling_factor is 2\.0, but .* none has no"),
        (LLAMA, {"attention_softcap": 5.0}, r"attention_softcap is 5\.0, which no .* of llama"),
        (LLAMA, {"sliding_window": 5}, r"sliding_window is 5 with .*; a window needs local layers"),
        (LLAMA, {"layer_pattern": ("local",)}, r"sliding_window is None with .*'local'"),
        (
            LLAMA,
            {"layer_pattern": ("local",), "sliding_window": 5},
            r"layer_pattern is \('local',\), which no checkpoint of llama can say",
        ),
        (MISTRAL, {"mlp_bias": True}, r"mlp_bias is True, which no .* of mistral"),
        (
            MISTRAL,
            {"layer_pattern": ("local", "global")},
            r"\('local', 'global'\), which no checkpoint of mistral can say",
        ),
        (QWEN3, {"layer_pattern": ("near",)}, r"layer_pattern is 'near'; expected one of global"),
        (QWEN3, {"layer_pattern": ()}, r"layer_pattern has 0 entries; expected 1 to 2"),
        (QWEN3, {"layer_pattern": ("global",) * 3}, r"has 3 entries; expected 1 to 2"),
        (QWEN3, {"qk_norm": False}, r"qk_norm is False, which no checkpoint of qwen3"),
        (GEMMA3, {"rope_local_theta": None}, r"rope_local_theta is None; local layers of gemma3"),
        (GEMMA3, {"attention_softcap": 9.0}, r"attention_softcap is 9\.0, which no .* of gemma3"),
        (GEMMA3, {"final_softcap": 0.0}, r"final_softcap is 0\.0; it must be above 0"),
        (GEMMA3, {"sliding_window": 0}, r"sliding_window is 0; it must be at least 1"),
        (GEMMA2, {"rope_local_theta": 9.0}, r"rope_local_theta is 9\.0, which no"),
        (
            VARIANTS["llama_scaled"],
            {"rope_low_frequency_factor": 3.0},
            r"rope_low_frequency_factor 3\.0 must be below model\.rope_high_frequency_factor 3\.0",
        ),
        (T5GEMMA, {"family": "t5gemma2"}, r"family is 't5gemma2'; expected one of t5gemma"),
        (T5GEMMA, {"num_decoder_layers": 0}, r"num_decoder_layers is 0"),
        (T5GEMMA, {"num_kv_heads": 2}, r"num_heads 3 is not divisible by"),
        (T5GEMMA, {"decoder_num_kv_heads": 3}, r"decoder_num_heads 4 is not divisible by"),
        (T5GEMMA, {"decoder_head_dim": 5}, r"decoder_head_dim is 5; rope turns pairs"),
        (T5GEMMA, {"decoder_d_model": 9}, r"decoder_d_model 9 is not divisible .* such a t5gemma"),
        (T5GEMMA, {"rope_theta": 0.0}, r"rope_theta is 0\.0; it must be above 0"),
        (
            T5GEMMA,
            {"layer_pattern": ("local",) * 4},
            r"layer_pattern has 4 entries; expected 1",
        ),
        (T5GEMMA, {"layer_pattern": ("round",)}, r"layer_pattern is 'round'; expected one"),
        (T5GEMMA, {"dtype": "float16"}, r"dtype is float16; .* use bfloat16 or float32"),
        (BERT, {"family": "brt"}, "model.family is 'brt'; expected one of bert; did you mean bert"),
        (
            BERT,
            {"activation": "silu"},
            "model.activation is 'silu'; expected one of gelu-exact, gelu, re",
        ),
        (BERT, {"head": "mlm"}, "model.head is 'mlm'; expected one of masked_lm, sequence_"),
        (
            BERT,
            {"d_model": 100},
            "model.d_model 100 is not divisible by model.num_heads 3; a head is d_m",
        ),
        (BERT, {"num_layers": 0}, "model.num_layers is 0; it must be at least 1"),
        (BERT, {"layer_norm_epsilon": 0.0}, "model.layer_norm_epsilon is 0.0; it must be above 0"),
        (BERT, {"initializer_range": -1.0}, "model.initializer_range is -1.0; it must be above 0"),
        (BERT, {"dropout_rate": 1.0}, r"model.dropout_rate is 1.0; it must be in \[0, 1\)"),
        (BERT, {"cls_token_id": 99999}, r"model.cls_token_id is 99999; it must be in \[0, 67\)"),
        (BERT, {"dtype": "float16"}, "model.dtype is float16"),
        (
            BERT,
            {"labels": ("a", "b")},
            r"model.labels are \('a', 'b'\), but model.head masked_lm has no c",
        ),
        (
            BERT,
            CLASSES | {"labels": ()},
            r"model.labels are \(\); model.head sequence_classification nee",
        ),
        (BERT, CLASSES | {"labels": ("a",)}, "needs two or more: the names of the classes"),
        (
            BERT,
            CLASSES | {"labels": ("a", "b", "a")},
            "model.labels has 'a' twice; every class needs its",
        ),
        (
            BERT,
            CLASSES | {"labels": ("a ", "b")},
            "model.labels has 'a '; expected a printable name with",
        ),
        (BERT, CLASSES | {"labels": ("", "b")}, "model.labels has ''; expected a printable name"),
        (BERT, CLASSES | {"labels": ("a\0", "b")}, "expected a printable name with single spaces"),
        (
            BERT,
            {"head": "token_classification", "labels": ("a b", "c")},
            "model.labels has 'a b'; expected a printable name without spaces",
        ),
        (
            BERT,
            CLASSES | {"tie_word_embeddings": False},
            "tie_word_embeddings is False, but model.head s",
        ),
    ],
    ids=str,
)
def test_a_description_that_cannot_be(model, changes, message):
    with pytest.raises(ValueError, match=message):
        change(model, **changes)
