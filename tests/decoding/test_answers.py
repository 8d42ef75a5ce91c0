"""Answers of a generator: the same in any company, drawn, searched, stopped and constrained."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest

import folders
from conformance.cases import random_params
from conformance.families import VARIANTS, change
from t5jax import sharding
from t5jax.config import MeshConfig
from t5jax.decoding import Constraint, GenerationOptions, Generator
from t5jax.tokenizers import ByteTokenizer, load_tokenizer

INPUTS = [[70, 80, 1], [90, 1], [*range(60, 90), 1]]
sample = functools.partial(GenerationOptions, max_tokens=8, temperature=1.0)


@functools.cache
def setting(variant="t5_1_0"):
    model = change(VARIANTS[variant], vocab_size=384, scan_layers=False)
    if variant == "t5_1_0":
        model = change(model, num_encoder_layers=1, num_decoder_layers=1)  # Compiled sooner.
    mesh = sharding.make_mesh(MeshConfig(data=-1))
    return Generator(model, ByteTokenizer(), mesh), random_params(model, seed=1)


def answers(options, inputs=INPUTS, variant="t5_1_0", **more):
    generate, params = setting(variant)
    return generate.answers(params, inputs, options, **{"batch_size": 8} | more)


def test_drawn_answers_depend_on_seed_and_numbers_alone():
    two = answers(sample(num_answers=2, logprobs=0))
    tokens = [one.tokens for own in two for one in own]
    assert len(set(map(tuple, tokens))) == 6
    # The second prompt alone, with its number.
    alone = answers(sample(num_answers=2, logprobs=0), INPUTS[1:2], first=1)
    assert [one.tokens for one in alone[0]] == tokens[2:4]
    np.testing.assert_allclose(alone[0][1].log_probs, two[1][1].log_probs, atol=1e-5)
    assert answers(sample(num_answers=2, seed=1, logprobs=0))[0][0].tokens != tokens[0]
    # What was written has the log-probabilities that scoring gives it.
    generate, params = setting()
    scored = generate.score(params, INPUTS, [own[0].tokens for own in two], batch_size=8)
    for own, score in zip(two, scored, strict=True):
        np.testing.assert_allclose(own[0].log_probs, score.log_probs, atol=2e-4)
        assert own[0].score == pytest.approx(score.total, abs=1e-3)


def test_an_answer_ends_before_a_stop_string():
    letters = sample(max_tokens=12, allowed_tokens=tuple(range(100, 126)))
    (plain,), *_ = answers(letters, INPUTS[:1])
    assert plain.finish == "length"
    text, stop = plain.text, plain.text[9:11]
    assert len(text) == 12
    (stopped,), *_ = answers(dataclasses.replace(letters, stop=("-", stop)), INPUTS[:1])
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish == "stop"
    # Tokens are those that were needed.
    assert ByteTokenizer().decode(stopped.tokens) == stopped.text + stop


def test_beams_have_room_of_their_own_and_scores_that_fall():
    options = GenerationOptions(num_beams=3, num_answers=2, max_length=12)
    inputs = [[70] * 4, [71] * 9]
    found = answers(options, inputs, variant="llama")
    assert [len(own) for own in found] == [2, 2]
    for own, room in zip(found, (8, 3), strict=True):
        assert own[0].score >= own[1].score
        assert max(len(one.tokens) for one in own) == room
    assert answers(options, inputs[1:], variant="llama")[0][0].tokens == found[1][0].tokens


def test_answers_match_a_schema_and_an_expression():
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    found = answers(sample(max_tokens=64, json_schema=json.dumps(schema)))
    whole = [one for (one,) in found if one.finish == "stop"]
    assert whole
    for one in whole:
        value = json.loads(one.text)
        assert set(value) == {"a", "b"}
        assert value["a"] in ("x", "y")
    regex = "(ab|c)d{2,5}[xyz]"
    for (one,) in answers(sample(regex=regex)):
        assert one.finish == "stop"
        assert re.fullmatch(regex, one.text)
    for changes, message in (
        ({"regex": "a("}, r"regex 'a\(' is invalid: .*unclosed group"),
        ({"json_schema": '{"type": "foo"}'}, "is invalid: .*Invalid type: foo"),
        ({"json_schema": "{"}, "is not JSON"),
        ({"json_schema": "[" * 9999 + "]" * 9999}, "is nested too deeply"),
        ({"regex": "a+", "forced_tokens": (101,)}, "id 101 was written, which .* leave them out"),
        ({"regex": r"a[^\s\S]"}, "nothing that could come next .* loosen it"),
    ):
        with pytest.raises(ValueError, match=message):
            answers(GenerationOptions(**changes), INPUTS[:1])


@pytest.mark.parametrize("kind", ["pieces", "byte_level", "prefix_space"])
def test_any_vocabulary_follows_a_grammar(kind, tmp_path):
    """Tokens are drawn from those that are allowed, without a model."""
    if kind == "pieces":
        folders.write_spiece(tmp_path)
    elif kind == "byte_level":
        tokenizer = folders.byte_level(["<|endoftext|>"])
        folders.write_tokenizer(tmp_path, tokenizer, eos_token="<|endoftext|>")
    else:
        tokenizer = folders.sentence_piece_like(["<unk>", "<s>", "</s>"], "<s>", True)
        folders.write_tokenizer(tmp_path, tokenizer, eos_token="</s>", unk_token="<unk>")
    tokenizer, rng = load_tokenizer(tmp_path), np.random.default_rng(0)
    options = GenerationOptions(regex="(sells|buys) the (sea|dog)( and s{1,2})?")
    for _ in range(5):
        constraint, ids = Constraint(options, tokenizer, (tokenizer.eos_id,)), []
        while tokenizer.eos_id not in ids:
            words = np.zeros(tokenizer.vocab_size // 32 + 1, np.int32)
            constraint.fill(words)
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")
            ids.append(int(rng.choice(np.flatnonzero(bits))))
            constraint.read(ids[-1])
        assert re.fullmatch(options.regex, tokenizer.decode(ids[:-1]))


class NoBraces(ByteTokenizer):
    """As T5's own vocabulary."""

    def token_bytes(self):
        return [b"" if text in (b"{", b"}") else text for text in super().token_bytes()]


def test_a_vocabulary_that_cannot_write_a_schema_says_so():
    generate, params = setting()
    generate = dataclasses.replace(generate, tokenizer=NoBraces())
    options = GenerationOptions(json_schema="{}")
    with pytest.raises(ValueError, match=r"no token for what the json_schema .*T5's own"):
        generate.answers(params, INPUTS[:1], options, batch_size=8)


def test_few_programs_for_prompts_of_any_length(caplog):
    rng = np.random.default_rng(0)
    generate, params = setting()

    def write(lengths, first):
        inputs = [[70] * n for n in lengths]
        generate.answers(params, inputs, sample(), batch_size=8, rows=8, first=first)

    with jax.log_compiles():
        write([3, 17, 33], 0)  # Buckets of 16, 32 and 64 tokens.
        assert "Compiling" in caplog.text
        caplog.clear()
        for first in range(3):
            write(rng.integers(1, 64, 9 + first).tolist(), first)
        assert "Compiling" not in caplog.text
