"""A model in use: it answers alike everywhere, as a plain search and transformers do."""

import dataclasses

import jax
import numpy as np
import pytest

import t5jax
import tiny
from conformance.cases import random_params
from conformance.families import T5 as SMALL
from t5jax import pretrained, sharding
from t5jax.config import MeshConfig
from t5jax.convert import export_model
from t5jax.evaluation import evaluate_model
from t5jax.hf import io as hf_io
from t5jax.models import api
from t5jax.models.layers import Transposed
from t5jax.pretrained import Pretrained
from t5jax.tokenizers import ByteTokenizer
from tiny import one_device, trained_run  # noqa: F401

MODEL = dataclasses.replace(SMALL, vocab_size=384)
PARAMS = random_params(MODEL)
LOGITS = jax.jit(api.logits, static_argnums=0)
PROMPTS = ["a", "the longest of all of them", "b", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    hf_io.save_params(path, MODEL, PARAMS, tokenizer=ByteTokenizer())
    return path


def plain_answer(prompt, max_tokens):
    """Greedy search by the logits of the whole sequence, without a cache and batches."""
    tokenizer = ByteTokenizer()
    inputs = np.array([[*tokenizer.encode(prompt), 1]], np.int32)
    # One program: what comes behind a token does not change its logits.
    decoder = np.zeros((1, max_tokens), np.int32)
    answer = []
    while len(answer) < max_tokens and 1 not in answer:
        decoder[0, 1 : len(answer) + 1] = answer
        batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": decoder}
        answer.append(int(LOGITS(MODEL, PARAMS, batch)[0, len(answer)].argmax()))
    return tokenizer.decode(answer, special_tokens=False)


def test_answers_are_those_of_a_plain_search_in_any_batch(folder):
    model = t5jax.load(str(folder))
    expected = [plain_answer(prompt, 6) for prompt in PROMPTS]
    assert len(set(expected)) > 1, "all answers alike would prove little"
    assert model.generate(PROMPTS, max_tokens=6) == expected
    assert model.generate(PROMPTS, max_tokens=6, batch_size=1) == expected
    assert model.generate(PROMPTS, max_tokens=6, batch_size=3) == expected
    assert model.generate([]) == []


@pytest.mark.usefixtures("one_device")
def test_answers_on_eight_devices_for_a_number_of_prompts_that_they_do_not_divide(folder):
    one = t5jax.load(str(folder))
    expected = one.generate(PROMPTS[:3], max_tokens=6)
    mesh = tiny._make_mesh(MeshConfig(data=8))
    assert sharding.batch_parts(mesh, one.rules) == 8
    eight = Pretrained(MODEL, PARAMS, ByteTokenizer(), mesh)
    assert eight.generate(PROMPTS[:3], max_tokens=6) == expected


@pytest.mark.hf
def test_answers_are_those_of_transformers(folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [prompt for prompt in PROMPTS if prompt]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        ids = theirs.generate(**batch, max_new_tokens=6, do_sample=False)
    texts = [ByteTokenizer().decode(row[1:], special_tokens=False) for row in ids.tolist()]
    assert len(set(texts)) > 1, "all answers alike would prove little"
    assert t5jax.load(str(folder)).generate(prompts, max_tokens=6) == texts


@pytest.mark.hf
def test_scores_are_those_of_transformers(folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pairs = [("a", "yes"), ("a", "no"), ("the longest of all of them", "yes or no"), ("b", "")]
    model = t5jax.load(str(folder))
    for end in (False, True):
        found = model.score(*zip(*pairs, strict=True), end=end, batch_size=3)
        for (prompt, answer), score in zip(pairs, found, strict=True):
            labels = tokenizer(answer, add_special_tokens=end).input_ids
            assert score.tokens == labels
            if not labels:
                assert score.total == 0.0
                continue
            given = tokenizer(prompt, return_tensors="pt")
            with torch.no_grad():
                logits_TV = theirs(**given, labels=torch.tensor([labels])).logits[0]
            expected = torch.log_softmax(logits_TV, -1)[range(len(labels)), labels]
            np.testing.assert_allclose(score.log_probs, expected, rtol=1e-4)
            assert score.is_greedy.tolist() == (logits_TV.argmax(-1).numpy() == labels).tolist()


def test_prompts_and_answers_that_do_not_match(folder):
    model = t5jax.load(str(folder))
    with pytest.raises(ValueError, match="prompts and answers are 1 and 2; expected two lists"):
        model.score(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="expected two lists"):
        model.score("a", "b")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        model.score(["a"], ["\ud83d"])
    with pytest.raises(ValueError, match="expected a list of texts, or of lists of token ids"):
        model.generate("a")
    with pytest.raises(ValueError, match="expected a list of texts, or of lists of token ids"):
        model.generate([100, 1])
    with pytest.raises(ValueError, match="prompt 0 has no ids"):
        model.generate([[]])
    with pytest.raises(ValueError, match="expected a list of texts"):
        model.embed("a")
    assert model.generate([[100, 1]], max_tokens=3) == model.generate(["a"], max_tokens=3)


def test_dtype_of_a_loaded_model():
    run_dir = str(trained_run())
    full, half = pretrained.load(run_dir), pretrained.load(run_dir, dtype="bfloat16")
    assert (half.model.dtype, half.model.param_dtype) == ("bfloat16", "bfloat16")
    # On a CPU, kernels of float32 are transposed.
    wides, narrows = (
        jax.tree.map(
            lambda x: x.kernel() if isinstance(x, Transposed) else x,
            loaded.params,
            is_leaf=lambda x: isinstance(x, Transposed),
        )
        for loaded in (full, half)
    )
    for wide, narrow in zip(jax.tree.leaves(wides), jax.tree.leaves(narrows), strict=True):
        assert (wide.dtype, narrow.dtype) == ("float32", "bfloat16")
        np.testing.assert_array_equal(narrow, wide.astype("bfloat16"))
    with pytest.raises(ValueError, match="model.param_dtype is float16; activations .* overflow"):
        pretrained.load(run_dir, dtype="float16")


def test_a_loaded_model_is_measured_and_exported_as_the_one_in_its_files(tmp_path):
    run_dir = str(trained_run())
    loaded = pretrained.load(run_dir, dtype="bfloat16")
    options = {"split": "validation", "batch_size": 8, "num_examples": 3}
    measured = loaded.evaluate(**options)
    assert measured == evaluate_model(run_dir, dtype="bfloat16", **options)
    assert measured["capitals"]["num_examples"] == 3
    loaded.export(str(tmp_path / "loaded"))
    export_model(run_dir, str(tmp_path / "files"))
    weights = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("loaded", "files")]
    assert weights[0] == weights[1]
    by_hand = Pretrained(MODEL, PARAMS, ByteTokenizer(), loaded.mesh)
    with pytest.raises(ValueError, match="was not loaded from files"):
        by_hand.export(str(tmp_path / "by_hand"))
