"""Pieces of text add up to the whole text, and nothing of a stop text is sent."""

import numpy as np
import pytest

import folders
from t5jax.serving.text import TextStream, TokenTexts
from t5jax.tokenizers import ByteTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers")
    for name in ("t5", "gpt2", "llama2", "unigram"):
        (path / name).mkdir()
    folders.write_spiece(path / "t5")
    gpt2 = folders.byte_level(["<|endoftext|>"])
    folders.write_tokenizer(path / "gpt2", gpt2, eos_token="<|endoftext|>")
    llama = folders.sentence_piece_like(["<unk>", "<s>", "</s>"], "<s>", True)
    folders.write_tokenizer(path / "llama2", llama, bos_token="<s>", eos_token="</s>")
    folders.write_tokenizer(path / "unigram", folders.unigram(0), eos_token="</s>")
    found = {name: load_tokenizer(path / name) for name in ("t5", "gpt2", "llama2", "unigram")}
    return found | {"bytes": ByteTokenizer()}


def _pieces(stream, ids):
    for i in ids:
        if stream.stopped:
            return
        stream.push(i)
        yield stream.take()


NAMES = ("t5", "gpt2", "llama2", "unigram", "bytes")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("special_tokens", [True, False])
def test_pieces_are_the_text_of_all_tokens(tokenizers, name, special_tokens):
    tokenizer, rng = tokenizers[name], np.random.default_rng(0)
    ids = rng.integers(0, tokenizer.vocab_size, 400).tolist()
    ids += tokenizer.encode(" the quick brown fox, äöü € 你好 🙂 again" * 5)
    stream = TextStream(tokenizer, special_tokens=special_tokens)
    pieces = [*_pieces(stream, ids), stream.finish()]
    expected = tokenizer.decode(ids, special_tokens=special_tokens, past_eos=True)
    assert "".join(pieces) == stream.text == expected
    assert sum(map(bool, pieces)) > 20


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("begin", ["the quick", "the quick ", "", "said: ä"])
def test_a_text_that_goes_on_another_one(tokenizers, name, begin):
    tokenizer = tokenizers[name]
    before, ids = tokenizer.encode(begin), tokenizer.encode("the brown fox, he said" * 9)
    stream = TextStream(tokenizer, before=before)
    sent = "".join(_pieces(stream, ids)) + stream.finish()
    whole = tokenizer.decode([*before, *ids], special_tokens=False)
    assert tokenizer.decode(before, special_tokens=False) + sent == whole
    stopped = TextStream(tokenizer, before=[tokenizer.eos_id, *before], stop=["fox,"])
    sent = "".join(_pieces(stopped, ids)) + stopped.finish()
    assert tokenizer.decode(before, special_tokens=False) + sent == whole[: whole.index("fox,")]


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_half_a_character_is_held_back(tokenizers, name):
    tokenizer = tokenizers[name]
    stream = TextStream(tokenizer)
    pieces = list(_pieces(stream, tokenizer.encode("a€🙂")))
    assert "".join(pieces) == "a€🙂"
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "e t"], "on"),
        ("abababac", ["abac"], "abab"),
        ("one two", ["nothing"], "one two"),
        ("one two", ["two three"], "one two"),
        ("one", ["one"], ""),
        ("xa€y", ["a€"], "x"),
        ("xa🙂y", ["z", "a🙂y"], "x"),
    ],
)
def test_a_stop_text(tokenizers, text, stop, expected):
    for name in ("gpt2", "bytes"):
        tokenizer = tokenizers[name]
        stream, sent = TextStream(tokenizer, stop=stop), ""
        for piece in _pieces(stream, tokenizer.encode(text)):
            sent += piece
            assert expected.startswith(sent)
        assert sent + stream.finish() == expected
        assert stream.stopped == (expected != text)


@pytest.mark.parametrize("stop", ["<extra_id_1>", "fox<extra_id_1> the", "a<extra_id_1>", "x the"])
def test_a_stop_text_is_found_among_special_tokens_that_are_not_shown(tokenizers, stop):
    tokenizer = tokenizers["t5"]
    ids = tokenizer.encode("<extra_id_0> the fox<extra_id_1> the end<extra_id_2>")
    whole = tokenizer.decode(ids, past_eos=True)
    text = tokenizer.decode(ids, special_tokens=False)
    stream = TextStream(tokenizer, stop=[stop])
    sent = "".join(_pieces(stream, ids)) + stream.finish()
    assert stream.stopped == (stop in whole or stop in text)
    if not stream.stopped:
        assert sent == text
    elif stop in text:
        assert sent == text[: text.index(stop)]
    else:
        assert text.startswith(sent)
        kept = whole[: whole.index(stop)].replace("<extra_id_0>", "")
        assert sent.split() == kept.split()


def test_spaces_that_a_tokenizer_cleans_up_are_not_sent(tmp_path):
    folders.write_tokenizer(
        tmp_path, folders.unigram(0), eos_token="</s>", clean_up_tokenization_spaces=True
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.cleans_up
    ids = tokenizer.encode("the dog , he said . they don 't , do they ' re it 's")
    stream = TextStream(tokenizer)
    expected = tokenizer.decode(ids, special_tokens=False)
    assert "".join(_pieces(stream, ids)) + stream.finish() == expected
    assert "dog, he said." in expected


def test_an_eos_that_ends_no_answer_hides_nothing(tokenizers):
    tokenizer = tokenizers["gpt2"]
    ids = [*tokenizer.encode("one"), tokenizer.eos_id, *tokenizer.encode(" two")]
    for special_tokens, expected in ((False, "one two"), (True, "one<|endoftext|> two")):
        stream = TextStream(tokenizer, special_tokens=special_tokens)
        assert "".join(_pieces(stream, ids)) + stream.finish() == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_texts_of_tokens_make_up_a_text(tokenizers, name):
    tokenizer = tokenizers[name]
    text_of = TokenTexts(tokenizer)
    texts = [text_of(i) for i in tokenizer.encode("a the fox, he said")]
    assert "".join(texts).strip() == "a the fox, he said"
    assert text_of(tokenizer.eos_id) == tokenizer.special_tokens["eos_token"]
