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


NAMES = ("t5", "gpt2", "llama2", "unigram", "bytes")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("special_tokens", [True, False])
def test_pieces_are_the_text_of_all_tokens(tokenizers, name, special_tokens):
    tokenizer, rng = tokenizers[name], np.random.default_rng(0)
    ids = rng.integers(0, tokenizer.vocab_size, 400)
    ids = [int(i) for i in ids if i != tokenizer.eos_id]
    ids += tokenizer.encode(" the quick brown fox, äöü € 你好 🙂 again" * 5)
    stream = TextStream(tokenizer, special_tokens=special_tokens)
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    expected = tokenizer.decode(ids, special_tokens=special_tokens)
    assert "".join(pieces) == stream.text == expected
    assert sum(map(bool, pieces)) > 20


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_half_a_character_is_held_back(tokenizers, name):
    tokenizer = tokenizers[name]
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode("a€🙂")]
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
    ],
)
def test_a_stop_text(tokenizers, text, stop, expected):
    for name in ("gpt2", "bytes"):
        tokenizer = tokenizers[name]
        stream, sent = TextStream(tokenizer, stop=stop), ""
        for i in tokenizer.encode(text):
            sent += stream.push(i)
            assert expected.startswith(sent)
            if stream.stopped:
                break
        assert sent + stream.finish() == expected
        assert stream.stopped == (expected != text)


@pytest.mark.parametrize("name", NAMES)
def test_the_texts_of_tokens_make_up_a_text(tokenizers, name):
    tokenizer = tokenizers[name]
    text_of = TokenTexts(tokenizer)
    texts = [text_of(i) for i in tokenizer.encode("a the fox, he said")]
    assert "".join(texts).strip() == "a the fox, he said"
    assert text_of(tokenizer.eos_id) not in ("", None)
