import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from t5jax.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from t5jax.tokenizers.common import clean_ids, first_sentinels, read_chat_template

T5_MODEL = Path(__file__).parents[3] / "shared/data/vocab/t5_spiece.model"
TEXTS = [
    "the cat sat on the mat",
    "a <extra_id_0> sat <extra_id_1> mat",
    "<extra_id_2> the dog",
    "",
    "  two  spaces\n and a newline",
    "unknown: Ω <extra_id_3>",
]


def train_model(**changes) -> bytes:
    words = [a + b for a in ("c", "d", "m", "s", "th", "l") for b in ("at", "og", "it", "e", "o")]
    lines = [f"the {a} {a}s {b} {b}ing on a newline" for a in words for b in words]
    settings = {"vocab_size": 40, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | changes
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, minloglevel=2, **settings
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_model()


# --- SentencePiece ------------------------------------------------------------------------------


@pytest.mark.skipif(not T5_MODEL.exists(), reason=f"{T5_MODEL} is absent")
def test_t5_ids_are_the_published_ones():
    tokenizer = load_tokenizer(T5_MODEL)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (32100, 0, 1)
    text = "translate English to German: The house is wonderful."
    ids = [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode([*ids, 1, 0, 0]) == text
    assert tokenizer.encode("Hello <extra_id_0> world <extra_id_99>") == [8774, 32099, 296, 32000]


def test_sentinels_are_the_last_ids_in_descending_order(model):
    tokenizer = SentencePieceTokenizer(model, extra_ids=4)
    assert tokenizer.vocab_size == 44
    assert tokenizer.encode("<extra_id_0><extra_id_1> <extra_id_3>") == [43, 42, 40]
    assert tokenizer.sentinel_ids == (43, 42, 41, 40)
    # Inside a word too, where SentencePiece alone would see unknown characters.
    assert tokenizer.encode("cat<extra_id_0>") == [*tokenizer.encode("cat"), 43]
    assert tokenizer.unk_id in tokenizer.encode("<extra_id_4>")
    assert SentencePieceTokenizer(model, extra_ids=0).vocab_size == 40


def test_a_model_with_its_own_sentinels_gets_no_more():
    pieces = [f"▁<extra_id_{i}>" for i in reversed(range(3))]
    tokenizer = SentencePieceTokenizer(train_model(user_defined_symbols=pieces))
    assert tokenizer.vocab_size == 40
    assert tokenizer.decode(tokenizer.encode("the <extra_id_0> sat")) == "the <extra_id_0> sat"


def test_decode_stops_at_eos_skips_padding_and_keeps_sentinels(model):
    tokenizer = SentencePieceTokenizer(model, extra_ids=4)
    cat, dog = tokenizer.encode("the cat"), tokenizer.encode("a dog")
    assert tokenizer.decode([0, *cat, 0, 43, *dog, 1, *dog]) == "the cat <extra_id_0> a dog"
    # An embedding has more rows than there are ids; a model may answer with any of them.
    unknown = tokenizer.decode([*cat, tokenizer.unk_id])
    assert unknown != "the cat"
    assert [tokenizer.decode([*cat, i]) for i in (44, 45, 100)] == [unknown] * 3


def test_repr_tells_vocabularies_apart(model):
    assert repr(SentencePieceTokenizer(model)) == repr(SentencePieceTokenizer(model))
    assert repr(SentencePieceTokenizer(model)) != repr(SentencePieceTokenizer(model, extra_ids=99))
    other = train_model(model_type="bpe")
    assert repr(SentencePieceTokenizer(model)) != repr(SentencePieceTokenizer(other))


# --- Hugging Face -------------------------------------------------------------------------------


@pytest.mark.parametrize("extra_ids", [0, 4, 100])
def test_hugging_face_reads_a_saved_sentencepiece_model(model, extra_ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = SentencePieceTokenizer(model, extra_ids)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size
    for text in TEXTS:
        if extra_ids or "extra_id" not in text:
            assert theirs(text).input_ids == [*ours.encode(text), ours.eos_id]
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    assert repr(load_tokenizer(tmp_path)) == repr(ours)


def test_hugging_face_reads_a_saved_byte_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = ByteTokenizer()
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size == 384
    for text in ["naïve 😀", "<extra_id_0>", "a<extra_id_10> b", "<extra_id_125>", ""]:
        assert theirs(text).input_ids == [*ours.encode(text), ours.eos_id], text
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_a_folder_of_hugging_face_is_saved_again_unchanged(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    SentencePieceTokenizer(model).save(tmp_path / "a")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")  # Writes tokenizer.json and no spiece.model.
    ours = load_tokenizer(tmp_path / "b")
    assert isinstance(ours, HuggingFaceTokenizer)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids
        assert ours.decode([*ids, 1, 5]) == theirs.decode(ids)
    ours.save(tmp_path / "c")
    before = {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}


def test_the_configuration_says_which_token_ends_a_text():
    vocabulary = tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, "<unk>")
    model = tokenizers.Tokenizer(vocabulary).to_str().encode()

    def eos(config=None, special=None):
        files = {"tokenizer_config.json": config, "special_tokens_map.json": special}
        files = {name: json.dumps(value).encode() for name, value in files.items() if value}
        return HuggingFaceTokenizer({"tokenizer.json": model} | files).eos_id

    assert eos() == 3
    assert eos(special={"eos_token": "a"}) == 1
    assert eos({"eos_token": {"content": "b"}}, {"eos_token": "a"}) == 2
    assert eos({"eos_token": "absent"}) == 3  # Which the vocabulary has not.
    assert eos({"sep_token": "a"}) == 1


def test_what_a_vocabulary_lacks_its_eos_stands_for():
    vocabulary = tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2}, "</s>")
    ours = HuggingFaceTokenizer(
        {"tokenizer.json": tokenizers.Tokenizer(vocabulary).to_str().encode()}
    )
    assert (ours.pad_id, ours.unk_id, ours.bos_id, ours.mask_id) == (2, 2, None, None)


def test_tokens_that_a_user_has_added_come_from_tokenizer_json(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    SentencePieceTokenizer(model).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["[NEW]"])
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "spiece.model").exists()
    assert load_tokenizer(tmp_path).encode("[NEW]") == [140]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"[NEW]": 140}')
    with pytest.raises(ValueError, match=r"\[NEW\].*has no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_tokens_that_the_model_has_itself_are_not_added(tmp_path):
    (tmp_path / "spiece.model").write_bytes(train_model(user_defined_symbols=["<sep>"]))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"additional_special_tokens": ["<sep>", "▁<extra_id_0>"]}))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, SentencePieceTokenizer)
    assert len(ours.encode("<sep>")) == 2  # And the space in front.
    path.write_text(json.dumps({"additional_special_tokens": ["<new>"]}))
    with pytest.raises(ValueError, match=r"adds tokens to its spiece.model \(<new>\) but has no"):
        load_tokenizer(tmp_path)


def test_the_folder_says_how_many_sentinels_there_are(model, tmp_path):
    (tmp_path / "spiece.model").write_bytes(model)
    assert load_tokenizer(tmp_path).vocab_size == 140
    names = [f"<extra_id_{i}>" for i in range(7)]
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"additional_special_tokens": names}))
    assert load_tokenizer(tmp_path).vocab_size == 47
    config.write_text(json.dumps({"extra_ids": 0, "additional_special_tokens": None}))
    assert load_tokenizer(tmp_path).vocab_size == 40


def test_sentinels_count_up_to_the_first_that_is_missing():
    assert first_sentinels({1: 8, 0: 9, 3: 6}) == (9, 8)
    assert first_sentinels({1: 8}) == ()


# --- Bytes --------------------------------------------------------------------------------------


def test_bytes_are_shifted_by_three():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé") == [100, 198, 172]
    assert tokenizer.decode([0, 100, 198, 172, 1, 100]) == "aé"
    assert tokenizer.decode([100, 198, 101, 2, 248, 259, 383, 400]) == "ab<extra_id_10>"
    # What decodes reads up to the first eos, without padding, and ids up to the last one.
    assert clean_ids(tokenizer, [0, 5, 383, 0, 384, 385, 1, 6]) == [5, 383, 2, 2]
    assert tokenizer.decode(tokenizer.encode("é <extra_id_5>ß")) == "é <extra_id_5>ß"


def test_the_sentinels_of_bytes_are_the_last_bytes():
    """As in the published checkpoints, where a span is 258, 257, ...

    SeqIO's ByteVocabulary has 259 ids, and T5 counts its sentinels down from the last.
    """
    tokenizer = ByteTokenizer()
    assert tokenizer.sentinel_ids == tuple(range(258, 158, -1))
    assert tokenizer.encode("a<extra_id_0>b<extra_id_99>") == [100, 258, 101, 159]
    # Bytes of text stay text, though further sentinels share their ids.
    for text in ("ÿ ÷ é 日本 😀", "\U0010ffff"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# --- Names and errors ---------------------------------------------------------------------------


def test_a_hub_name_is_resolved(model, tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes(model)
    asked = []
    monkeypatch.setattr("t5jax.hf.hub.resolve", lambda name: asked.append(name) or tmp_path)
    assert load_tokenizer("google/flan-t5-small").vocab_size == 140
    assert asked == ["google/flan-t5-small"]


@pytest.mark.parametrize("name", ["./nothing", "no/such/folder", "absent.model", Path("x/y")])
def test_what_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=r"there is no tokenizer .*expected \"bytes\""):
        load_tokenizer(name)


def test_damaged_files_are_named(model, tmp_path):
    bad = tmp_path / "bad.model"
    for content in (b"", b"not a model", model[:1000][::-1]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model"):
            load_tokenizer(bad)
    with pytest.raises(ValueError, match=r"cannot read .*absent"):
        SentencePieceTokenizer(tmp_path / "absent")

    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"folder holds no tokenizer; expected spiece.model"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json in .*folder is damaged"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json in .*folder is not JSON"):
        load_tokenizer(folder)
    for file in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / file).write_text("null")
        with pytest.raises(ValueError, match=f"{file} in .* holds None; expected a JSON object"):
            load_tokenizer(folder)
        (folder / file).unlink()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", "a"),
        (None, None),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ({"default": "d", "rag": "r"}, "d"),
        ([{"name": "rag"}], None),
    ],
)
def test_the_default_of_several_chat_templates(given, expected):
    files = {"tokenizer_config.json": json.dumps({"chat_template": given}).encode()}
    assert read_chat_template(files, "folder") == expected
    files["chat_template.jinja"] = b"of its own"
    assert read_chat_template(files, "folder") == "of its own"


def test_a_chat_template_that_is_no_text_is_refused():
    files = {"tokenizer_config.json": b'{"chat_template": 5}'}
    with pytest.raises(ValueError, match="chat_template of .* in folder is 5; expected a text, or"):
        read_chat_template(files, "folder")


def test_a_model_without_padding_is_refused():
    with pytest.raises(ValueError, match="has no pad token; a T5 tokenizer has pad, eos and unk"):
        SentencePieceTokenizer(train_model(pad_id=-1, unk_id=0, eos_id=2))
