"""Encoders: T5's alone, in and out of Hugging Face; a new head on a trained BERT; embeddings.

What is held against transformers is marked hf.
"""

import dataclasses
import json
from io import StringIO

import jax
import numpy as np
import pytest
import safetensors.numpy

import t5jax
from conformance.cases import HIDDEN, random_params
from conformance.families import BERT, GPT2, VARIANTS
from t5jax import checkpoint, sharding
from t5jax.architectures import BertConfig
from t5jax.cli import main
from t5jax.config import AxisRules, Config, MeshConfig
from t5jax.hf import io
from t5jax.models import api
from t5jax.pretrained import Pretrained
from t5jax.source import adopt, find
from t5jax.tokenizers import ByteTokenizer, load_tokenizer
from t5jax.train.initial import new_params
from tiny import one_device, trained_run  # noqa: F401

T5 = {
    "t5_1_0": VARIANTS["t5_1_0"],
    "t5_1_1": VARIANTS["t5_1_1"],
    "umt5": VARIANTS["umt5"],
    "ul2": VARIANTS["ul2"],
}
BYTES = {"vocab_size": 384}
TEXTS = ["a", "bc ab", "the longest of all of them", ""]
TOKENS = np.array([[5, 6, 7, 1, 0, 0], [9, 1, 0, 0, 0, 0], [8, 7, 6, 5, 4, 1]], "int32")
BATCH = {"encoder_input_tokens": TOKENS}


def encoder_part(params):
    """The parameters of a T5's encoder."""
    return {name: params[name] for name in ("token_embedder", "encoder")}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- T5's encoder -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["t5_1_0", "umt5"])
def test_export_of_the_encoder_alone(variant, tmp_path):
    model = dataclasses.replace(T5[variant], **BYTES)
    params = random_params(model)
    io.save_params(tmp_path / "whole", model, params, tokenizer=ByteTokenizer())
    folder = str(tmp_path / "alone")
    assert main(["export", str(tmp_path / "whole"), folder, "--encoder-only"]) == 0
    assert_same(io.load_params(folder, io.read_config(folder)), encoder_part(params))
    with pytest.raises(ValueError, match="holds t5, a model of kind encoder, which has no encoder"):
        find(folder).read(encoder_only=True)


def test_export_of_the_encoder_of_a_run(tmp_path):
    folder = str(tmp_path / "alone")
    assert main(["export", str(trained_run()), folder, "--encoder-only"]) == 0
    _, params = find(str(trained_run())).read()
    assert_same(io.load_params(folder, io.read_config(folder)), encoder_part(params))


# --- A new head ---------------------------------------------------------------------------------

LABELS = ("x", "y")
ASKED = BertConfig(head="sequence_classification", labels=LABELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of BERT under each head, and of each a run."""
    path, found = tmp_path_factory.mktemp("bert"), {}
    for name in ("masked_lm", "sequence_classification"):
        model = VARIANTS[f"bert_{name}"]
        params = random_params(model)
        io.save_params(path / name, model, params)
        run_dir = checkpoint.create_run_dir(path / f"{name}_run")
        with checkpoint.Checkpoints(run_dir) as checkpoints:
            checkpoints.save_params(params, Config(model=model))
        found[name] = (path / name, run_dir, params)
    return found


def started(source, asked=ASKED):
    """The model and the parameters that a run starts from, and the seed's."""
    model = adopt(asked, source, "x")
    seed = jax.jit(api.init_params, static_argnums=0)(model, jax.random.key(3))
    shardings = sharding.param_shardings(
        api.param_axes(model), seed, sharding.make_mesh(), AxisRules()
    )
    return model, source.params(model, shardings, new_params(source, model, seed)), seed


@pytest.mark.parametrize("place", [0, 1], ids=["folder", "run"])
def test_a_masked_lm_becomes_a_classifier(place, folders, capsys):
    found = folders["masked_lm"]
    model, params, seed = started(find(str(found[place])))
    assert model.labels == LABELS
    assert jax.tree.structure(params) == jax.tree.structure(api.param_shapes(model))
    new = {"pooler", "classifier"}
    for name, value in params.items():
        assert_same(value, seed[name] if name in new else found[2][name])
    said = " ".join(capsys.readouterr().err.split())
    expected = "new, as the seed has them: classifier/bias, classifier/kernel, pooler/bias, pooler/"
    assert expected in said


def test_the_pooler_that_lies_beside_a_masked_lm_is_taken(folders, tmp_path):
    folder, _, params = folders["masked_lm"]
    classifier = folders["sequence_classification"][2]
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    kernel, bias = (np.asarray(classifier["pooler"][name]) for name in ("kernel", "bias"))
    tensors |= {"bert.pooler.dense.weight": np.ascontiguousarray(kernel.T)}
    tensors |= {"bert.pooler.dense.bias": bias}
    tensors |= {"cls.seq_relationship.weight": np.ones((2, 21), "float32")}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    source = find(str(tmp_path))
    assert source.model == BERT
    _, started_from, seed = started(source)
    assert_same(started_from["pooler"], classifier["pooler"])
    assert_same(started_from["encoder"], params["encoder"])
    assert_same(started_from["classifier"], seed["classifier"])


@pytest.mark.parametrize("place", [0, 1], ids=["folder", "run"])
def test_a_classifier_keeps_what_is_its_own(place, folders):
    found = folders["sequence_classification"]
    source = find(str(found[place]))
    model, params, _ = started(source, BertConfig())
    assert model.labels == VARIANTS["bert_sequence_classification"].labels
    assert_same(params, found[2])
    # Other classes: the pooler stays, the classifier is new.
    model, params, seed = started(source)
    assert_same(params["pooler"], found[2]["pooler"])
    assert_same(params["classifier"], seed["classifier"])
    # A tagger's classifier has the same name, and means something else.
    tagger = dataclasses.replace(ASKED, head="token_classification", labels=model.labels)
    model, params, seed = started(source, tagger)
    assert set(params) == set(found[2]) - {"pooler"}
    assert_same(params["classifier"], seed["classifier"])


def test_what_a_new_head_does_not_excuse(folders, tmp_path):
    folder = folders["masked_lm"][0]
    source = find(str(folder))
    with pytest.raises(ValueError, match="^model.d_ff is 7, in x it is 34; leave it out"):
        adopt(dataclasses.replace(ASKED, d_ff=7), source, "x")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    tensors["surprise"] = np.ones(3, "float32")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    message = r"missing: bert.encoder.layer.\{1\}.*bias \[21\]; tensors unexpected: surprise \[3\]"
    with pytest.raises(ValueError, match=message):
        started(find(str(tmp_path)))


# --- Embeddings ---------------------------------------------------------------------------------

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{x}" for x in "abcde")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: a whole T5, and BERT with a pooler."""
    path = tmp_path_factory.mktemp("models")
    t5 = dataclasses.replace(T5["t5_1_1"], **BYTES)
    io.save_params(path / "t5", t5, random_params(t5), tokenizer=ByteTokenizer())
    io.save_params(path / "t5_encoder", t5.encoder_alone(), encoder_part(random_params(t5)),
                   tokenizer=ByteTokenizer())  # fmt: skip
    (path / "vocab.txt").write_text("\n".join(PIECES))
    bert = VARIANTS["bert_pooler"]
    io.save_params(
        path / "bert",
        bert,
        random_params(bert),
        tokenizer=load_tokenizer(path / "vocab.txt"),
    )
    return {name: str(path / name) for name in ("t5", "t5_encoder", "bert")}


ENCODE = jax.jit(api.encode, static_argnums=0)


def plain_embedding(model, params, ids, pooling):
    """One text by itself, without padding."""
    batch = {"encoder_input_tokens": np.array([ids], "int32")}
    if pooling == "pooler":
        return np.asarray(HIDDEN(model, params, batch))[0, 0]
    x_SD = np.asarray(ENCODE(model, params, batch))[0]
    return {"mean": x_SD.mean(axis=0), "max": x_SD.max(axis=0), "first": x_SD[0]}[pooling]


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("t5", "mean"), ("t5", "max"), ("bert", "mean"), ("bert", "first"), ("bert", "pooler")],
)
def test_embeddings_are_those_of_each_text_alone_in_any_batch(name, pooling, models):
    source = find(models[name])
    _, params = source.read()
    model, tokenizer = source.model, source.tokenizer()
    texts = TEXTS if name == "t5" else ["ab", "f g h", "abcde j i h g f a b c d e", ""]
    start = [2] if name == "bert" else []
    expected = [
        plain_embedding(model, params, [*start, *tokenizer.encode(text), tokenizer.eos_id], pooling)
        for text in texts
    ]
    assert np.std(expected, axis=0).mean() > 0.05, "all texts alike would prove little"
    loaded = t5jax.load(models[name])
    for batch_size in (32, 3):
        got = loaded.embed(texts, pooling=pooling, batch_size=batch_size)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)
    assert loaded.embed([]).shape == (0, model.d_model)


def test_an_encoder_embeds_as_its_whole_model_does(models):
    whole, alone = (t5jax.load(models[name]).embed(TEXTS) for name in ("t5", "t5_encoder"))
    np.testing.assert_allclose(alone, whole, atol=1e-5)
    with pytest.raises(ValueError, match="t5 is an encoder and writes no text; `t5jax embed`"):
        t5jax.load(models["t5_encoder"]).generate(["a"])


@pytest.mark.usefixtures("one_device")
def test_embeddings_on_eight_devices_for_a_number_of_texts_that_they_do_not_divide(models):
    from tiny import _make_mesh

    one = t5jax.load(models["t5"])
    eight = Pretrained(
        dataclasses.replace(T5["t5_1_1"], **BYTES),
        random_params(dataclasses.replace(T5["t5_1_1"], **BYTES)),
        ByteTokenizer(),
        _make_mesh(MeshConfig(data=8)),
    )
    np.testing.assert_allclose(eight.embed(TEXTS[:3]), one.embed(TEXTS[:3]), atol=1e-5)


def test_texts_that_are_cut(models):
    bert = t5jax.load(models["bert"])
    long = " ".join("abcdefghij" * 4)
    with pytest.raises(
        ValueError, match=r"text 1 has 42 tokens, but this bert has 29 positions; c"
    ):
        bert.embed(["a", long])
    # [CLS], 3 letters and [SEP], and the row is no longer than there are positions.
    cut = bert.embed([long], max_length=5)
    np.testing.assert_allclose(cut, bert.embed(["a b c"]), atol=1e-5)
    assert bert.embed([long], max_length=29).shape == (1, 21)
    np.testing.assert_allclose(bert.embed(["a b c"], max_length=5), cut, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "t5",
            {"pooling": "pooler"},
            "pooling is pooler, but this t5, whose head is seq2seq_lm, has",
        ),
        ("bert", {"pooling": "meen"}, "pooling is 'meen'; expected one of mean, .*mean mean?"),
        ("bert", {"max_length": 2}, "max_length is 2; it must be at least 3"),
    ],
)
def test_embeddings_that_there_are_not(name, options, message, models):
    with pytest.raises(ValueError, match=message):
        t5jax.load(models[name]).embed(["a"], **options)


def test_a_decoder_has_none(models):
    model = Pretrained(GPT2, {}, ByteTokenizer(), sharding.make_mesh())
    with pytest.raises(ValueError, match="gpt2 is a decoder alone and has no encoder; embed with"):
        model.embed(["a"])


def test_the_command_writes_lines_or_a_file(models, tmp_path, capsys, monkeypatch):
    expected = t5jax.load(models["bert"]).embed(["a b", "f"], pooling="max")
    args = ["embed", "--model", models["bert"], "--pooling", "max"]
    assert main([*args, "--text", "a b", "f"]) == 0
    out = capsys.readouterr().out
    printed = np.array([json.loads(line) for line in out.splitlines()], "float32")
    np.testing.assert_array_equal(printed, expected)
    monkeypatch.setattr("sys.stdin", StringIO("a b\nf\n"))
    assert main([*args, "--output", str(tmp_path / "x.npy")]) == 0
    assert capsys.readouterr().out == ""
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--output", "x.txt", "--text", "a"], "--output x.txt: expected a file that ends in .npy"),
        (["--output", "absent/x.npy", "--text", "a"], "in a folder that exists"),
        (["--batch-size", "0", "--text", "a"], "--batch-size is 0; it must be at least 1"),
        ([], "there is no text; give --text TEXT, or lines on standard input"),
    ],
)
def test_what_the_command_refuses(args, message, models, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", StringIO(""))
    assert main(["embed", "--model", models["bert"], *args]) == 1
    assert message in capsys.readouterr().err


# --- Against transformers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="transformers' models run on torch")
    found = pytest.importorskip("transformers", reason="what is compared with")
    found.utils.logging.disable_progress_bar()
    found.utils.logging.set_verbosity_error()
    return found


@pytest.mark.hf
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_embeddings_are_transformers(name, transformers, models):
    import torch

    if name == "bert":
        theirs = transformers.AutoModel.from_pretrained(models["bert"]).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(models["bert"])
        texts = ["ab", "f g h", "abcde j i h g f a b c d e"]
    else:
        theirs = transformers.T5EncoderModel.from_pretrained(models["t5_encoder"]).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(models["t5_encoder"])
        texts = TEXTS[:3]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = theirs(**inputs)
    mask = inputs["attention_mask"][..., None]
    expected = {
        "mean": (output.last_hidden_state * mask).sum(1) / mask.sum(1),
        "first": output.last_hidden_state[:, 0],
        "max": output.last_hidden_state.masked_fill(mask == 0, -torch.inf).amax(1),
    }
    if name == "bert":
        expected["pooler"] = output.pooler_output
    loaded = t5jax.load(models[name])
    for pooling, vectors in expected.items():
        ours = loaded.embed(texts, pooling=pooling)
        np.testing.assert_allclose(ours, vectors.numpy(), atol=1e-4, rtol=1e-4, err_msg=pooling)
