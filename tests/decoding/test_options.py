"""What may be asked of decoding, and what generation_config.json asks."""

import logging
import re

import pytest

from t5jax.decoding import GenerationOptions, Parts, options_of
from t5jax.decoding.options import _say


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"temperature": float("inf")}, "temperature is inf; it must be a finite number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"temperature": 1.0, "min_p": 1.1}, "min_p is 1.1; it must be in"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": 3, "min_tokens": 4}, "raise max_tokens"),
        ({"top_k": 5, "top_p": 0.5}, "top_k 5 and top_p 0.5 would change nothing.*temperature"),
        ({"length_penalty": 2.0}, "length_penalty is 2.0, but is for beam search; set num_beams"),
        ({"early_stopping": "yes"}, "early_stopping is 'yes'; expected one of true, false, never"),
        ({"num_answers": 2}, "num_answers is 2.*set temperature to draw them, or num_beams"),
        ({"num_answers": 3, "num_beams": 2}, "only 2 beams; raise num_beams"),
        ({"num_beams": 2, "temperature": 1.0}, "beam search draws no tokens"),
        ({"num_beams": 2, "stop": ("x",)}, "stop cannot be combined with beam search"),
        ({"stop": ("x", "")}, "stop has an empty text"),
        ({"json_schema": "{}", "regex": "a"}, "json_schema and regex are both set"),
        ({"forced_tokens": (3,), "suppressed_tokens": (3,)}, "id 3 is both in forced_tokens and"),
        ({"forced_tokens": (3,), "allowed_tokens": (4,)}, "id 3 of forced_tokens is not in allo"),
        ({"allowed_tokens": (4,), "suppressed_tokens": (4,)}, "allowed_tokens leaves no id"),
        ({"allowed_tokens": (-4,)}, "an id of allowed_tokens is -4"),
        ({"seed": 2**64}, r"below 2\^64"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
    ],
)
def test_what_is_out_of_range_or_contradicts_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**changes)


@pytest.mark.parametrize(
    ("generation", "given", "expected"),
    [
        ({}, {}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {}, {}),  # They are for drawing.
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            {},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 50},
        ),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.0}, {}),
        ({}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 50}),
        ({}, {"temperature": 0.8, "top_k": 0}, {"temperature": 0.8}),
        ({"temperature": 0.7}, {"top_p": 0.5}, {"temperature": 0.7, "top_p": 0.5, "top_k": 50}),
        (
            {"num_beams": 4, "length_penalty": 0.6, "early_stopping": True},
            {},
            {"num_beams": 4, "length_penalty": 0.6, "early_stopping": "true"},
        ),
        ({"num_beams": 4, "length_penalty": 0.6}, {"num_beams": 1}, {}),
        ({"num_beams": 4}, {"temperature": 1.0, "top_k": 3}, {"temperature": 1.0, "top_k": 3}),
        ({"do_sample": True, "top_p": 0.9}, {"num_beams": 3}, {"num_beams": 3}),
        (
            {"max_length": 84, "no_repeat_ngram_size": 2},
            {},
            {"max_length": 84, "no_repeat_ngram_size": 2},
        ),
        ({"max_length": 84}, {"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_new_tokens": 7, "max_length": 84}, {}, {"max_tokens": 7}),
        (
            {"forced_bos_token_id": 9, "suppress_tokens": [3]},
            {},
            {"forced_tokens": (9,), "suppressed_tokens": (3,)},
        ),
    ],
)
def test_generation_config_asks_as_of_transformers_and_the_user_wins(generation, given, expected):
    assert options_of(generation, given) == GenerationOptions(**expected)


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": "0.7"},
        {"top_k": 5.5},
        {"num_beams": True},
        {"suppress_tokens": ["a"]},
        {"forced_bos_token_id": {}},
        {"early_stopping": 1},
        {"max_length": [3]},
    ],
)
def test_a_generation_config_of_other_types_is_one_message(generation):
    ((name, value),) = generation.items()
    message = f"generation_config.json: {name} is {value!r}, a {type(value).__name__}, which"
    with pytest.raises(ValueError, match=re.escape(message)):
        options_of(generation)


def test_the_log_says_what_was_taken_and_what_is_ignored(caplog):
    with caplog.at_level(logging.WARNING):
        options_of(
            {
                "repetition_penalty": 1.3,
                "max_length": 9,
                "typical_p": 0.3,
                "force_words_ids": [[5]],
            },
            {"max_tokens": 4},
        )
    assert "generation_config.json: repetition_penalty 1.3" in caplog.text
    assert "max_length" not in caplog.text
    assert "typical_p 0.3, force_words_ids [[5]], which is not implemented" in caplog.text
    caplog.clear()
    _say.cache_clear()
    options_of({"min_p": 0.25}, {"temperature": 0.5})
    first, second = caplog.messages
    assert first == "generation_config.json: min_p 0.25, as transformers takes it"
    assert second.startswith("one of the 50 most probable tokens is drawn, as in transformers")


def test_room_for_an_answer():
    assert GenerationOptions().limit(5) == 64
    assert GenerationOptions(min_tokens=70).limit(5) == 70
    assert GenerationOptions(max_tokens=9, max_length=3).limit(5) == 9
    assert GenerationOptions(max_length=20).limit(5) == 15
    with pytest.raises(ValueError, match="has 20 tokens, but max_length is 20.*set max_tokens"):
        GenerationOptions(max_length=20).limit(20)


def test_a_program_only_has_the_parts_that_are_asked():
    assert Parts.of([GenerationOptions(max_tokens=3, num_beams=4)]) == Parts()
    asked = [GenerationOptions(temperature=1.0), GenerationOptions(regex="a", min_tokens=2)]
    assert Parts.of(asked) == Parts(draws=True, min_tokens=True, allows=True)
    assert not Parts.of(asked).reads_history
    assert Parts.of([GenerationOptions(no_repeat_ngram_size=2)]).reads_history
