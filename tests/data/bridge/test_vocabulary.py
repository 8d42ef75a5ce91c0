"""GPT-2's BPE, BERT's WordPiece and tokenizer.json: ids as transformers', in SeqIO and without."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from t5jax.data.bridge.tf import tf
from t5jax.data.bridge.vocabulary import TokenizerVocabulary, as_tokenizer
from t5jax.tokenizers import HuggingFaceTokenizer, load_tokenizer
from t5jax.tokenizers.training import train_sentencepiece

VOCAB = Path(__file__).parents[4] / "shared/data/vocab"
needs_files = pytest.mark.skipif(not VOCAB.exists(), reason=f"{VOCAB} is absent")
TEXTS = [
    "Hello world",
    "It's 1984, don't you know?  Two  spaces\n\n and a tab\t.",
    "naïve Über-straße 日本 😀",
    "a <|endoftext|> b [MASK] c [SEP]",
    "",
    " ",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """GPT-2's and BERT's files under the names that Hugging Face gives them."""
    root = tmp_path_factory.mktemp("vocab")
    names = {
        "gpt2/vocab.json": "gpt2_vocab.json",
        "gpt2/merges.txt": "gpt2_merges.txt",
        "bert/vocab.txt": "bert_base_uncased_vocab.txt",
    }
    for new, old in names.items():
        (root / new).parent.mkdir(exist_ok=True)
        shutil.copy(VOCAB / old, root / new)
    return root


# --- GPT-2 and BERT -----------------------------------------------------------------------------


@needs_files
def test_gpt2_ids_are_the_published_ones():
    ours = load_tokenizer(VOCAB / "gpt2_vocab.json")
    assert ours.encode("Hello world") == [15496, 995]
    assert ours.encode("<|endoftext|>") == [50256]
    assert (ours.vocab_size, ours.eos_id, ours.pad_id, ours.unk_id) == (50257, 50256, 50256, 50256)
    assert (ours.bos_id, ours.mask_id, ours.sentinel_ids) == (50256, None, ())
    assert ours.decode([15496, 995, 50256, 995]) == "Hello world"
    assert ours.special_tokens["eos_token"] == "<|endoftext|>"


@needs_files
def test_bert_ids_are_the_published_ones():
    ours = load_tokenizer(VOCAB / "bert_base_uncased_vocab.txt")
    assert ours.encode("Hello, World!") == [7592, 1010, 2088, 999]
    assert ours.encode("unaffable [MASK]") == [14477, 20961, 3468, 103]
    assert (ours.vocab_size, ours.eos_id, ours.pad_id, ours.unk_id) == (30522, 102, 0, 100)
    assert (ours.bos_id, ours.mask_id, ours.sentinel_ids) == (101, 103, ())
    assert ours.decode([7592, 1010, 2088, 102, 999]) == "hello, world"


@needs_files
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_same_as_transformers_before_and_after_saving(name, folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = {"gpt2": transformers.GPT2Tokenizer, "bert": transformers.BertTokenizer}[name]
    ours, theirs = load_tokenizer(folders / name), kind.from_pretrained(folders / name)
    ours.save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_tokenizer(tmp_path / "theirs")  # Only their tokenizer.json is there.
    assert len(theirs) == len(saved) == ours.vocab_size == back.vocab_size
    special = ("pad_id", "eos_id", "unk_id", "bos_id", "mask_id")
    assert [getattr(back, s) for s in special] == [getattr(ours, s) for s in special]
    assert saved.pad_token_id == ours.pad_id
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        assert back.encode(text) == ids, text
        assert saved.encode(text, add_special_tokens=False) == ids, text
        assert saved.encode(text) == theirs.encode(text), text
        if ours.eos_id not in ids:
            assert ours.decode(ids) == theirs.decode(ids), text
    assert repr(load_tokenizer(tmp_path / "saved")) == repr(ours)


@needs_files
@pytest.mark.parametrize(
    "file", ["gpt2_vocab.json", "bert_base_uncased_vocab.txt", "t5_spiece.model", "bytes"]
)
def test_seqio_has_the_same_ids(file):
    ours = load_tokenizer(file if file == "bytes" else VOCAB / file)
    vocabulary = TokenizerVocabulary(ours)
    assert vocabulary.vocab_size == ours.vocab_size
    assert (vocabulary.pad_id, vocabulary.eos_id) == (ours.pad_id, ours.eos_id)
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).map(vocabulary.encode_tf)
    for text, got in zip(TEXTS, dataset.as_numpy_iterator(), strict=True):
        assert got.dtype == np.int32
        assert got.tolist() == ours.encode(text) == list(vocabulary.encode(text)), text
        if got.size:
            assert vocabulary.decode_tf(tf.constant(got)).numpy().decode() == ours.decode(got)
            assert vocabulary.decode(got) == ours.decode(got)
    assert as_tokenizer(vocabulary) is ours


# --- Any tokenizer.json -------------------------------------------------------------------------


def word_level(**words: int) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="unk"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


def files(tokenizer: tokenizers.Tokenizer, **config) -> dict[str, bytes]:
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def test_truncation_and_padding_of_the_file_are_not_ours():
    made = word_level(a=0, unk=1, end=2)
    made.enable_truncation(2)
    made.enable_padding(length=8)
    ours = HuggingFaceTokenizer(files(made, eos_token="end"))
    assert ours.encode("a a a a") == [0, 0, 0, 0]


def test_configured_tokens_win_and_names_stand_in():
    made = word_level(a=0, unk=1, end=2, stop=3, **{"[PAD]": 9, "[MASK]": 5})
    ours = HuggingFaceTokenizer(files(made, eos_token={"content": "stop"}, unk_token="unk"))
    # Ids 4, 6, 7 and 8 are holes, and 9 must have a row in the embedding.
    assert (ours.vocab_size, ours.eos_id, ours.pad_id, ours.unk_id) == (10, 3, 9, 1)
    assert (ours.bos_id, ours.mask_id) == (None, 5)
    # A token that the configuration names but the vocabulary lacks is as good as none.
    ours = HuggingFaceTokenizer(files(made, eos_token="end", pad_token="absent", bos_token="a"))
    assert (ours.eos_id, ours.pad_id, ours.unk_id, ours.bos_id) == (2, 9, 2, 0)


def test_sentinels_and_chat_template_are_found():
    made = word_level(a=0, unk=1, end=2)
    made.add_special_tokens(["<extra_id_0>", "<extra_id_1>", "<extra_id_3>"])
    plain = files(made, eos_token="end", chat_template="{{ messages }}")
    ours = HuggingFaceTokenizer(plain)
    assert ours.sentinel_ids == (3, 4)
    assert ours.encode("a <extra_id_1> a") == [0, 4, 0]
    assert ours.chat_template == "{{ messages }}"
    ours = HuggingFaceTokenizer(plain | {"chat_template.jinja": b"{{ other }}"})
    assert ours.chat_template == "{{ other }}"
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert HuggingFaceTokenizer(files(made, eos_token="end", chat_template=several)).chat_template
    assert load_tokenizer("bytes").chat_template is None


def test_what_cannot_be_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the folder has no token that ends a text; set eos_token"):
        HuggingFaceTokenizer(files(word_level(a=0)))
    (tmp_path / "vocab.txt").write_text("the\nof\n")
    with pytest.raises(ValueError, match=r"vocab.txt is not a WordPiece vocabulary: it lacks .PAD"):
        load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "x_vocab.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match="cannot read .*x_merges.txt: No such file"):
        load_tokenizer(tmp_path / "x_vocab.json")
    (tmp_path / "x_merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(ValueError, match="the vocabulary and the merges of .*x_vocab.json do not"):
        load_tokenizer(tmp_path / "x_vocab.json")
    (tmp_path / "x_vocab.json").write_text("{")
    with pytest.raises(ValueError, match=r"vocab.json in .*x_vocab.json is not JSON"):
        load_tokenizer(tmp_path / "x_vocab.json")


# --- Sentinels and training ---------------------------------------------------------------------


def test_sentinel_ids_are_what_encode_gives(tmp_path):
    lines = [f"the {a}at and the {b}og" for a in "bcfhmprs" for b in "bcdfhjl"]
    spiece = load_tokenizer(train_sentencepiece(lines, 24, tmp_path / "x.model"))
    for ours in (spiece, load_tokenizer("bytes")):
        texts = [f"<extra_id_{i}>" for i in range(len(ours.sentinel_ids))]
        assert [ours.encode(text) for text in texts] == [[i] for i in ours.sentinel_ids]
    assert spiece.sentinel_ids == tuple(range(123, 23, -1))
    assert spiece.special_tokens == {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
