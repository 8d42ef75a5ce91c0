"""Tokenizers of Hugging Face folders, against transformers and SentencePiece."""

import io
import json

import pytest
import sentencepiece
import tokenizers

import folders
from t5jax.tokenizers import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from t5jax.tokenizers.as_transformers import write_tokenizer_json

transformers = pytest.importorskip("transformers", reason="the judge")
TEXTS = [
    "Hello world, the cat isn't here .",
    "  two  spaces ",
    "na\u00efve nai\u0308ve CAF\u00c9 😀",
    "中文 a\u2028b\u0085c\x0cd\r\ne",
    "the <new> cat [X]x [X]  <special>  b<plain>c <|end|>",
    "",
    " ",
]
LINES = [
    "hello world the cat is here and there",
    "naïve café 中文 CAT Hello",
    "two spaces, isn't it .",
]


def added(content, **flags):
    names = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": content} | dict.fromkeys(names, False) | flags


@pytest.fixture(scope="module")
def vocabularies():
    """vocab.json and merges.txt; vocab.txt; tokenizer.json of each: contents by name."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(LINES * 2, trainer)
    bpe.add_special_tokens(["<|end|>"])
    model = json.loads(bpe.to_str())["model"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = sorted(set("".join([*LINES, "e\u0301"])) - {" "})
    pieces = [
        *special,
        *characters,
        *(f"##{c}" for c in characters),
        "cat",
        "the",
        "Hello",
        "##llo",
    ]
    vocab = model["vocab"] | {"<|end|>": len(model["vocab"])}
    return {
        "bpe": {
            "vocab.json": json.dumps(vocab),
            "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]),
        },
        "words": {"vocab.txt": "".join(f"{piece}\n" for piece in pieces)},
        "json": {"tokenizer.json": bpe.to_str()},
    }


KINDS = {
    "gpt2": ("bpe", {"tokenizer_class": "GPT2Tokenizer"}, "gpt2"),
    "qwen": ("bpe", {"tokenizer_class": "Qwen2Tokenizer"}, "qwen3"),
    "bert": ("words", {"tokenizer_class": "BertTokenizer"}, "bert"),
    "any": ("json", {"tokenizer_class": "PreTrainedTokenizerFast"}, "llama"),
}
ENDS = {field: "<|end|>" for field in ("bos_token", "eos_token", "unk_token")}
SETTINGS = {
    "plain": {},
    "class from the model": {"tokenizer_class": None},
    "prefix": {"add_prefix_space": True},
    "cased": {"do_lower_case": False},
    "accents": {"strip_accents": False},
    "chinese": {"tokenize_chinese_chars": False},
    "clean": {"clean_up_tokenization_spaces": True},
    "bos": {"add_bos_token": True},
    "more": {"additional_special_tokens": ["<special>", "[X]"]},
    "decoder": {
        "added_tokens_decoder": [
            added("<new>", lstrip=True),
            added("[X]", single_word=True, normalized=True),
            added("<special>", special=True, rstrip=True),
            added("<plain>"),
        ]
    },
    "added_tokens.json": {},
    "special_tokens_map.json": {},
}


def make_folder(folder, vocabularies, kind, setting):
    files, config, model_type = KINDS[kind]
    contents = dict(vocabularies[files])
    size = len(json.loads(contents["vocab.json"])) if "vocab.json" in contents else 0
    size = size or contents.get("vocab.txt", "").count("\n") or 301
    config = config | (ENDS if files != "words" else {}) | SETTINGS[setting]
    if "added_tokens_decoder" in config:
        tokens = config["added_tokens_decoder"]
        config["added_tokens_decoder"] = {str(size + i): token for i, token in enumerate(tokens)}
    contents["tokenizer_config.json"] = json.dumps(
        {k: v for k, v in config.items() if v is not None}
    )
    contents["config.json"] = json.dumps({"model_type": model_type})
    if setting == "added_tokens.json":
        contents[setting] = json.dumps({"<new>": size, "[X]": size + 1})
    if setting == "special_tokens_map.json":
        names = {"additional_special_tokens": ["<new>", "<special>"], "pad_token": "<plain>"}
        contents[setting] = json.dumps(names)
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8", newline="")


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(kind, setting, vocabularies, tmp_path):
    make_folder(tmp_path, vocabularies, kind, setting)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    ours.save(tmp_path / "saved")  # As of a run, without the config.json of the model.
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    back = load_tokenizer(tmp_path / "saved")
    assert repr(back) == repr(ours)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == back.encode(text) == ids, text
        assert saved.encode(text) == theirs.encode(text), text
        kept = [i for i in ids if i not in (ours.eos_id, ours.pad_id)]
        assert ours.decode(kept) == theirs.decode(kept), text


def test_settings_change_something(vocabularies, tmp_path):
    """Otherwise the test above would compare nothing."""
    found = {}
    for setting in ("plain", "cased", "accents", "prefix", "decoder"):
        for kind in ("bert", "gpt2"):
            folder = tmp_path / f"{kind}-{setting}"
            folder.mkdir()
            make_folder(folder, vocabularies, kind, setting)
            ours = load_tokenizer(folder)
            found[kind, setting] = [ours.encode(text) for text in TEXTS]
    assert found["bert", "cased"] != found["bert", "plain"] != found["bert", "accents"]
    assert found["gpt2", "prefix"] != found["gpt2", "plain"] != found["gpt2", "decoder"]


def test_a_line_of_vocab_txt_ends_at_a_newline_alone(tmp_path):
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "\u2028", "b", "\u0085", "c\r"]
    (tmp_path / "vocab.txt").write_bytes("\n".join([*lines, "d\u2028e", "e"]).encode())
    ours = load_tokenizer(tmp_path / "vocab.txt")
    assert ours.encode("a b c e") == [5, 7, 9, 11]
    assert ours.vocab_size == 12


def test_a_vocabulary_without_settings_is_lower_cased_whatever_its_letters(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Paris", "paris", "##ian"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    assert load_tokenizer(tmp_path).encode("Parisian paris") == [6, 7, 6]
    assert load_tokenizer(tmp_path / "vocab.txt").encode("Parisian paris") == [6, 7, 6]
    # What lies beside a file counts as it does for its folder.
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path / "vocab.txt").encode("Parisian paris") == [5, 7, 6]


def test_what_cannot_be_honoured_is_named(vocabularies, tmp_path):
    make_folder(tmp_path, vocabularies, "gpt2", "plain")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"split_special_tokens": True}))
    with pytest.raises(ValueError, match="sets split_special_tokens, which is not supported"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps(config | {"tokenizer_class": "CTRLTokenizer"}))
    with pytest.raises(ValueError, match="is a CTRLTokenizer, which has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").unlink()
    path.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["theirs.Own", None]}}))
    with pytest.raises(ValueError, match="transformers cannot build the tokenizer of"):
        load_tokenizer(tmp_path)


def test_of_the_models_config_no_more_counts_than_what_its_tokenizer_needs(vocabularies, tmp_path):
    """transformers refuses such a config.json as a whole, and then a tokenizer beside it."""
    make_folder(tmp_path, vocabularies, "qwen", "class from the model")
    expected = repr(load_tokenizer(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "hidden_size": "many"}')
    assert repr(load_tokenizer(tmp_path)) == expected
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert repr(load_tokenizer(tmp_path)) != expected  # Qwen's rule for words is another.


def test_a_spiece_model_that_is_not_t5s_is_read_as_what_it_is(tmp_path):
    (tmp_path / "spiece.model").write_bytes(
        train_model(vocab_size=60, control_symbols="[CLS],[SEP]")
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "AlbertTokenizer"}')
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
    assert ours.sentinel_ids == ()


# --- tokenizer.model ----------------------------------------------------------------------------


def train_model(**settings) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 4),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **settings,
    )
    return model.getvalue()


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
BPE = {"model_type": "bpe", "vocab_size": 320, "byte_fallback": True}
MODELS = {
    "llama": BPE | IDENTITY,
    "gemma": BPE
    | IDENTITY
    | {"add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    | {"user_defined_symbols": ["<start_of_turn>", "\n\n"]},
    "normalized": BPE,
    "unigram": {"model_type": "unigram", "vocab_size": 60},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_tokenizer_model_alone_is_as_sentencepiece_has_it(name, tmp_path):
    model = train_model(**MODELS[name])
    (tmp_path / "tokenizer.model").write_bytes(model)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=model), load_tokenizer(tmp_path)
    assert repr(load_tokenizer(tmp_path / "tokenizer.model")) == repr(ours)
    ours.save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert ours.vocab_size == len(saved) == theirs.vocab_size()
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
    unknown = theirs.unk_id()
    for text in (*TEXTS, "<start_of_turn>user\nhi\n\n\n"):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert saved.encode(text) == [theirs.bos_id(), *ids], text
        if unknown not in ids:  # SentencePiece shows it as ⁇.
            assert ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_model_file_of_t5s_form_has_sentinels_whatever_its_name(kind, tmp_path):
    settings = {"model_type": kind, "vocab_size": 60, "pad_id": 0, "eos_id": 1, "unk_id": 2}
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_model(bos_id=3 if kind == "unigram" else -1, **settings))
    assert isinstance(load_tokenizer(path), SentencePieceTokenizer)


def test_added_tokens_and_settings_of_a_tokenizer_model_count(tmp_path):
    model = train_model(**MODELS["llama"])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": theirs.vocab_size()}))
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    assert ours.encode("the[PAD]") == [*theirs.encode("the"), theirs.vocab_size()]
    assert ours.pad_id == theirs.vocab_size()
    ours.save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.encode("the") == theirs.encode("the")


@pytest.mark.parametrize("kind", ["T5Tokenizer", "ByT5Tokenizer"])
@pytest.mark.parametrize("cleans", [True, False])
def test_spaces_before_punctuation_are_cleaned_up_as_the_folder_says(kind, cleans, tmp_path):
    if kind == "T5Tokenizer":
        model = train_model(vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
        (tmp_path / "spiece.model").write_bytes(model)
    config = {"tokenizer_class": kind, "clean_up_tokenization_spaces": cleans}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    ids = ours.encode("two cats , it is here .")
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids) == ("two cats, it is here." if cleans else "two cats , it is here .")
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").decode(ids) == ours.decode(ids)
    if kind == "T5Tokenizer":
        trimmed, kept = ours.trimmed(set(ids))
        assert kept[trimmed.encode("two cats .")].tolist() == ours.encode("two cats .")
        trimmed.save(tmp_path / "trimmed")
        again = load_tokenizer(tmp_path / "trimmed")
        assert again.decode(trimmed.encode("cats .")) == ours.decode(ours.encode("cats ."))


# --- Bytes, and UMT5 ----------------------------------------------------------------------------


def test_settings_of_byt5_count(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    config = {"tokenizer_class": "ByT5Tokenizer"}
    for extra_ids, size in ((None, 384), (0, 259), (5, 264)):
        path.write_text(json.dumps(config | {"extra_ids": extra_ids}))
        ours = load_tokenizer(tmp_path)
        assert (ours.vocab_size, ours.encode("<extra_id_0>")) == (size, [258])
    path.write_text(json.dumps(config | {"additional_special_tokens": ["<extra_id_0>", "<new>"]}))
    with pytest.raises(ValueError, match=r"adds tokens to the bytes of ByT5 \(<new>\)"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["bytes", "spiece"])
def test_transformers_reads_what_is_exported_with_a_umt5(kind, tmp_path):
    ours = (
        ByteTokenizer()
        if kind == "bytes"
        else SentencePieceTokenizer(
            train_model(vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
        )
    )
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "umt5"}')
    write_tokenizer_json(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    for text in ("two  spaces <extra_id_0> here<extra_id_1>", "café 中文", ""):
        assert theirs(text).input_ids == [*ours.encode(text), 1], text
    assert repr(load_tokenizer(tmp_path)) == repr(ours)


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama2", "bytes"])
def test_what_comes_behind_an_eos_is_decoded_as_there(tmp_path, kind):
    """Of an answer that another id ends."""
    if kind == "t5":
        folders.write_spiece(tmp_path)
    elif kind == "gpt2":
        tokenizer = folders.byte_level(["<|endoftext|>", "<|pad|>"])
        names = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
        folders.write_tokenizer(tmp_path, tokenizer, **names)
    elif kind == "llama2":
        tokenizer = folders.sentence_piece_like(["<unk>", "<s>", "</s>"], "<s>", True)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        folders.write_tokenizer(tmp_path, tokenizer, **names)
    else:
        ByteTokenizer().save(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    begin, end = ours.encode("the sea shells"), ours.encode("she sells")
    special = [ours.eos_id, ours.pad_id, ours.unk_id]
    special += ours.sentinel_ids[:1] if kind == "t5" else []
    for between in ([i] for i in special):
        ids = [*begin, *between, *end, ours.eos_id]
        for shown in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=not shown)
            found = ours.decode(ids, special_tokens=shown, past_eos=True)
            assert found == expected, (between, shown)
    assert ours.decode([*begin, ours.eos_id, *end]) == ours.decode(begin)
