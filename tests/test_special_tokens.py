"""Prompts, padding and ends of a text, as transformers has them for the same folder and text."""

import dataclasses
import functools
import json
import re
import shutil

import numpy as np
import pytest
import tokenizers

import t5jax
from command_line import fails, run
from folders import FOLDERS, LINES, edit, write_folder
from t5jax.architectures import T5Config, published
from t5jax.batch import BatchSpec
from t5jax.data.batches.converters import make_converter
from t5jax.data.batches.examples import EvalExample, EvalSet
from t5jax.data.prompts.chat import ChatTemplate
from t5jax.decoding import GenerationOptions
from t5jax.evaluation import Evaluator
from t5jax.pretrained import Pretrained
from t5jax.sharding import use_mesh
from t5jax.source import find
from t5jax.special_tokens import adapt, example_format, reconcile, trained_with
from t5jax.tokenizers import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from tiny import one_device  # noqa: F401

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("one_device")]
WRITERS = [name for name in FOLDERS if name not in ("bert", "pile_t5")]
PROMPTS = ["The quick brown fox", "What is the capital of France? It is", "sea"]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Returns the folder of a family, made once."""
    root = tmp_path_factory.mktemp("folders")

    @functools.cache
    def make(name):
        write_folder(root / name, name)
        return root / name

    return make


@pytest.fixture
def changed(made, tmp_path):
    """Returns a function that copies a family's folder, to change it."""
    return lambda name: shutil.copytree(made(name), tmp_path / name)


@functools.cache
def their_model(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def their_answers(folder, prompts, max_tokens, skip_special_tokens=True):
    model, tokenizer = their_model(folder)
    answers = []
    for prompt in prompts:
        batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**batch, max_new_tokens=max_tokens, do_sample=False)[0]
        ids = ids[1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
    return answers


def our_answers(capsys, folder, prompts, max_tokens, *options):
    capsys.readouterr()  # transformers shows its progress.
    args = ("infer", folder, "--prompt", *prompts, "--max-tokens", max_tokens, *options)
    status, out, err = run(capsys, *args)
    assert status == 0, err
    return out, err


@pytest.mark.parametrize("name", WRITERS)
def test_answers_are_those_of_transformers(name, made, capsys):
    folder = made(name)
    expected = their_answers(folder, PROMPTS, 12)
    assert len(set(expected)) == 3, "the prompts must matter"
    out, err = our_answers(capsys, folder, PROMPTS, 12)
    assert out == "".join(f"{answer}\n" for answer in expected)
    assert err == ""


def test_a_prompt_of_nothing_has_the_start_of_a_text_to_read(made, capsys):
    model, tokenizer = their_model(made("gpt2"))
    ids = model.generate(torch.tensor([[0]]), max_new_tokens=9, do_sample=False)[0, 1:]
    out, _ = our_answers(capsys, made("gpt2"), [""], 9)
    assert out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_a_start_that_is_written_in_the_prompt_is_not_repeated(made, capsys):
    expected = their_answers(made("gemma2"), PROMPTS, 12)
    out, _ = our_answers(capsys, made("gemma2"), [f"<bos>{x}" for x in PROMPTS], 12)
    assert out == "".join(f"{x}\n" for x in expected)


@pytest.mark.parametrize("name", ["t5", "gemma2"])
def test_a_conversation_is_read_as_by_transformers(name, changed):
    """The tokenizer ends a text with eos, or begins it with bos; this template does neither."""
    folder = changed(name)
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": PROMPTS[0]}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    source = find(str(folder))
    model = Pretrained(source.model, {}, source.tokenizer(), mesh=None)
    text = ChatTemplate().bind(model.tokenizer).prompt({"messages": messages})
    assert model.chat_prompt(text) == expected
    assert model.prompt(text) != expected, "what the tokenizer adds must matter"


# --- What ends a text -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_generation_config_says_what_ends_an_answer(name, changed, capsys):
    folder = changed(name)
    model, tokenizer = their_model(folder)
    batch = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**batch, max_new_tokens=12, do_sample=False)[0].tolist()
    start = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    ends = [tokenizer.eos_token_id, written[start + 3]]
    edit(folder / "generation_config.json", eos_token_id=ends)
    model.generation_config.eos_token_id = ends
    expected = their_answers(folder, PROMPTS, 12)
    out, err = our_answers(capsys, folder, PROMPTS, 12)
    assert (out, err) == ("".join(f"{x}\n" for x in expected), "")
    assert find(str(folder)).model.end_token_ids == tuple(ends)


def test_several_ends_in_the_config_of_a_t5(changed):
    folder = changed("t5")
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=[32, 1])
    assert find(str(folder)).model.end_token_ids == (1, 32)  # The tokenizer's first.


def test_without_an_eos_in_the_config_the_tokenizers_ends_a_text(changed, caplog):
    folder = changed("qwen3")
    (folder / "generation_config.json").unlink()
    for eos in (None, ...):
        edit(folder / "config.json", eos_token_id=eos)
        assert find(str(folder)).model.end_token_ids == (2,)
    assert not caplog.messages


def test_a_contradiction_is_named_and_an_answer_ends_as_in_transformers(changed, caplog):
    folder = changed("mistral")
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=0)
    source = find(str(folder))
    assert source.model.end_token_ids == (0,)
    # Training writes the tokenizer's, so that what it makes ends with that as well.
    assert trained_with(source.model, source.tokenizer()).end_token_ids == (2, 0)
    [message] = caplog.messages
    assert "the tokenizer ends a text with 2 ('</s>'), but config.json with 0" in message
    edit(folder / "config.json", eos_token_id=7)
    caplog.clear()
    content = {"eos_token_id": [2, 9], "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(content))
    assert find(str(folder)).model.end_token_ids == (2, 9)
    [message] = caplog.messages
    assert "eos_token_id is 2 and 9 in generation_config.json and 7 in config.json" in message


def test_a_small_vocabulary_does_not_have_the_ids_of_the_published_one(changed, capsys):
    folder = changed("gpt2")
    expected = their_answers(folder, PROMPTS, 12)
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=..., bos_token_id=..., pad_token_id=...)
    assert our_answers(capsys, folder, PROMPTS, 12)[0] == "".join(f"{x}\n" for x in expected)
    model = find(str(folder)).model
    assert (model.eos_token_id, model.pad_token_id, model.decoder_start_token_id) == (0, 0, 0)
    edit(folder / "config.json", eos_token_id=50256, bos_token_id=50256)
    assert find(str(folder)).model == model


def test_no_eos_stays_at_the_end_of_a_prompt(changed, capsys):
    """The tokenizer's eos is not that of config.json, which alone ends an answer."""
    folder = changed("mistral")
    edit(folder / "config.json", eos_token_id=0)
    edit(folder / "generation_config.json", eos_token_id=0)
    model = their_model(folder)[0]
    with torch.no_grad():  # So that it is written often.
        model.model.embed_tokens.weight[2] *= 3
        model.lm_head.weight[2] *= 3
    model.save_pretrained(folder)
    their_model.cache_clear()
    expected = their_answers(folder, PROMPTS, 12)
    shown = their_answers(folder, PROMPTS, 12, skip_special_tokens=False)
    assert shown != expected
    for option, texts in (((), expected), (("--special-tokens",), shown)):
        out, _ = our_answers(capsys, folder, PROMPTS, 12, *option)
        assert out == "".join(f"{x}\n" for x in texts)


def test_what_generation_config_leaves_out(changed, capsys):
    """It alone counts in transformers, which starts an answer with bos then."""
    folder = changed("t5")
    edit(folder / "generation_config.json", decoder_start_token_id=..., bos_token_id=5)
    expected = their_answers(folder, PROMPTS, 12)
    assert our_answers(capsys, folder, PROMPTS, 12)[0] == "".join(f"{x}\n" for x in expected)


def test_settings_in_config_json_count_without_a_generation_config(changed, capsys):
    folder = changed("umt5")
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", forced_bos_token_id=20)
    assert find(str(folder)).generation() == {"forced_bos_token_id": 20}


def test_the_tokenizer_of_a_folder_without_an_eos_takes_the_models(changed, tmp_path, capsys):
    folder = changed("llama")
    (folder / "tokenizer_config.json").unlink()
    edit(folder / "config.json", eos_token_id=[2, 1])
    expected = their_answers(folder, PROMPTS, 12)
    assert our_answers(capsys, folder, PROMPTS, 12)[0] == "".join(f"{x}\n" for x in expected)
    find(str(folder)).tokenizer().save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_id == 2


def test_what_pads_is_said_by_config_json_and_the_tokenizer():
    raw, generation = {"pad_token_id": 3, "vocab_size": 9}, {"pad_token_id": 5}
    assert reconcile(raw, generation, None)["pad_token_id"] == 3
    assert reconcile({"vocab_size": 9}, generation, None)["pad_token_id"] == 5
    # A vocabulary without an id for it says nothing.
    model = T5Config(vocab_size=9, pad_token_id=3)
    vocabulary = {"a": 0, "b": 1, "</s>": 2}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "</s>"))
    assert adapt(model, HuggingFaceTokenizer({"tokenizer.json": words.to_str().encode()})) == model
    words.add_special_tokens(["<other>", "<pad>"])
    padding = HuggingFaceTokenizer({"tokenizer.json": words.to_str().encode()})
    assert adapt(model, padding) == dataclasses.replace(model, pad_token_id=4)


def test_the_eos_of_t5s_vocabularies_is_for_encoders_alone():
    bytes_ = ByteTokenizer()
    for model, expected in ((published("gpt2"), [5, 6]), (T5Config(), [5, 6, 1])):
        assert example_format(model, bytes_).prompt([5, 6, 1]).tolist() == expected


# --- Padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pads_with_eos", [False, True])
def test_padding_with_another_id_changes_neither_answers_nor_losses(pads_with_eos, changed):
    folder = changed("pile_t5")
    if pads_with_eos:  # As a vocabulary without an id for padding does.
        for file in ("config.json", "generation_config.json"):
            edit(folder / file, pad_token_id=2)
        edit(folder / "tokenizer_config.json", pad_token="</s>")
    tokenizer = their_model(folder)[1]
    targets = ["Paris", "It is the sea shore", "12"]
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    labels = tokenizer(targets, return_tensors="pt", padding=True)
    labels = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
    with torch.no_grad():
        expected = their_model(folder)[0](**batch, labels=labels).loss.item()

    loaded = t5jax.load(str(folder))
    encode = loaded.tokenizer.encode
    examples = [
        EvalExample(i, i, t, [*encode(i), 2], [*encode(t), 2])
        for i, t in zip(PROMPTS, targets, strict=True)
    ]
    options = {"batch_size": 4, "max_tokens": 8}
    evaluator = Evaluator(loaded.model, loaded.tokenizer, loaded.mesh, loaded.rules, **options)
    source = find(str(folder))
    _, params = source.read()
    with use_mesh(loaded.mesh, loaded.rules):
        result = evaluator.evaluate(params, EvalSet("task", examples, [], str))
    np.testing.assert_allclose(result.scores["loss"], expected, rtol=1e-5)


def test_vectors_of_texts(made):
    folder = made("bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    vectors = t5jax.load(str(folder)).embed(PROMPTS)
    for prompt, vector in zip(PROMPTS, vectors, strict=True):
        with torch.no_grad():
            x = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(vector, x.mean(0), atol=1e-5)


# --- An answer is text ----------------------------------------------------------------------------


def test_special_tokens_are_shown_where_they_are_asked_for(made, capsys):
    shown, _ = our_answers(capsys, made("t5"), LINES, 12, "--special-tokens")
    assert "<extra_id_" in shown
    theirs = their_answers(made("t5"), LINES, 12, skip_special_tokens=False)
    assert shown == "".join(f"{x.removesuffix('</s>')}\n" for x in theirs)
    left_out, _ = our_answers(capsys, made("t5"), LINES, 12)
    assert left_out == "".join(f"{x}\n" for x in their_answers(made("t5"), LINES, 12))
    assert "<extra_id_" not in left_out


# --- Ids and positions that the model does not have -----------------------------------------------


def test_a_special_token_may_exceed_the_embedding_until_it_is_read(changed, capsys):
    """As the token of images in Gemma 3's vocabulary does."""
    folder = changed("gemma3")
    expected = their_answers(folder, PROMPTS, 12)
    add_token(folder, "<image>", special=True)
    assert our_answers(capsys, folder, PROMPTS, 12)[0] == "".join(f"{x}\n" for x in expected)
    message = fails(capsys, "infer", folder, "--prompt", "sea", "an <image> of it")
    assert "prompt 1 has id" in message
    assert "('<image>'), but model.vocab_size is" in message
    with pytest.raises(ValueError, match=r"an example has id \d+, but model.vocab_size is"):
        train_batch(folder, "an <image> of it")
    assert train_batch(folder, "a view of it")


@pytest.mark.parametrize("command", ["infer", "embed"])
def test_a_vocabulary_that_exceeds_the_embedding_is_refused(command, changed, capsys):
    folder = changed("gemma3" if command == "infer" else "bert")
    if command == "infer":
        add_token(folder, "shore", special=False)
    else:
        (folder / "vocab.txt").open("a").write("shore\n")
    option = "--prompt" if command == "infer" else "--text"
    message = fails(capsys, command, folder, option, "sea")
    assert re.search(r"has \d+ ids, but model.vocab_size is \d+: texts may have ids", message)


def test_special_tokens_that_are_named_but_not_in_the_vocabulary(changed, caplog):
    """They get new ids, as in transformers, which may be beyond the embedding."""
    folder = changed("mistral")
    edit(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    source = find(str(folder))
    assert "eos_token is '<|im_end|>', which is not in the vocabulary" in caplog.messages[0]
    with pytest.raises(ValueError, match=r"whose id \d+ has no embedding: .*name a token of the"):
        trained_with(source.model, source.tokenizer())
    edit(folder / "tokenizer_config.json", eos_token="</s>", unk_token="<nothing>")
    caplog.clear()
    find(str(folder))
    [message] = caplog.messages
    assert "unk_token is '<nothing>', which is not in the vocabulary; it gets the id" in message


def add_token(folder, text, special):
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    number = len(content["model"]["vocab"])
    content["added_tokens"] += [{"id": number, "content": text, "special": special, **flags}]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def train_batch(folder, text):
    """The batch of one example, as training and evaluation read it."""
    model, tokenizer = find(str(folder)).model, find(str(folder)).tokenizer()
    form = example_format(model, tokenizer)
    ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int32)
    convert = make_converter(BatchSpec(1, 32, 32, kind="decoder"), form)
    return convert([[{"inputs": ids, "targets": ids}]])


def test_positions_that_the_model_did_not_learn_are_refused(made, capsys):
    folder = made("gpt2")
    message = fails(capsys, "infer", folder, "--prompt", "sea", "--max-tokens", 120)
    assert "120 more are to be written, but this gpt2 has 96 positions" in message
    message = fails(capsys, "infer", folder, "--prompt", "sea " * 99, "--max-tokens", 2)
    assert "has 96 positions; shorten the prompt" in message


# --- Folders of weights alone -----------------------------------------------------------------


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def apart(changed, tmp_path):
    """Returns a function that makes a folder of a family's weights, and one of its tokenizer."""

    def separate(name):
        folder, tokenizer = changed(name), tmp_path / "tokenizer"
        tokenizer.mkdir()
        for file in TOKENIZER_FILES:
            (folder / file).rename(tokenizer / file)
        return folder, tokenizer

    return separate


def test_weights_alone_take_what_ends_a_text_from_the_vocabulary(apart, caplog):
    folder, tokenizer = apart("qwen3")
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=..., bos_token_id=...)
    assert find(str(folder), str(tokenizer)).model.end_token_ids == (2,)
    with pytest.warns(UserWarning, match="names no eos_token_id; 0 is taken"):
        find(str(folder))


def test_weights_alone_are_exported_alone(apart, tmp_path, capsys):
    folder, tokenizer = apart("llama")
    assert run(capsys, "export", folder, tmp_path / "out")[0] == 0
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    message = fails(capsys, "infer", tmp_path / "out", "--prompt", "sea")
    assert "holds no tokenizer; expected spiece.model" in message
    for file in TOKENIZER_FILES:  # The remedy.
        shutil.copy(tokenizer / file, tmp_path / "out")
    assert our_answers(capsys, tmp_path / "out", ["sea"], 3)


# --- What is exported -----------------------------------------------------------------------------


def test_generation_config_goes_out_as_it_came(changed, tmp_path, capsys):
    folder, out = changed("llama"), tmp_path / "out"
    loaded = {"eos_token_id": [1, 2, 9], "temperature": 0.6, "top_p": 0.9, "max_length": 77}
    (folder / "generation_config.json").write_text(json.dumps(loaded | {"do_sample": True}))
    assert run(capsys, "import", folder, tmp_path / "run")[0] == 0
    assert run(capsys, "export", tmp_path / "run", out)[0] == 0
    written = json.loads((out / "generation_config.json").read_text())
    assert written == loaded | {"do_sample": True, "bos_token_id": 0, "pad_token_id": 2}
    assert find(str(out)).model == find(str(folder)).model


def test_settings_that_are_not_implemented_are_named(changed, caplog):
    folder = changed("gpt2")
    edit(folder / "generation_config.json", typical_p=0.4, repetition_penalty=1.0, temperature=0.6)
    assert t5jax.load(str(folder)).options() == GenerationOptions()
    assert caplog.messages == [
        "generation_config.json sets typical_p 0.4, which is not implemented; its own answers "
        "differ"
    ]
