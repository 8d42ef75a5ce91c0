"""Every kind of model through the loop: it learns, goes on in the same bits, is measured and used.

T5 is in test_train.py, whose properties of the loop are not shown again here.
"""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import hashed
import tiny
from conformance.cases import random_params
from conformance.families import GPT2, LLAMA, T5GEMMA
from t5jax import pretrained
from t5jax.architectures import BertConfig, GPTConfig
from t5jax.config import InitConfig, load_config
from t5jax.convert import export_model
from t5jax.evaluation import evaluate_model
from t5jax.hf import io as hf_io
from t5jax.models import api
from t5jax.monitor import log
from t5jax.source import find
from t5jax.tokenizers import ByteTokenizer
from t5jax.train import train
from tiny import assert_same_bits, make_config, read_metrics

one_device = tiny.one_device
pytestmark = pytest.mark.slow

BYTES = {"vocab_size": 384, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
GPT = {
    name: dataclasses.replace(model, scan_layers=False, **BYTES)
    for name, model in {
        "gpt2": GPT2,
        "llama": LLAMA,
    }.items()
}
BERT = BertConfig(
    vocab_size=16,
    d_model=16,
    d_ff=32,
    num_layers=2,
    num_heads=2,
    max_positions=32,
    cls_token_id=2,
    eos_token_id=3,
    scan_layers=False,
)
HEADS = {
    "first_letter": {
        "head": "sequence_classification",
        "labels": tuple(f"letter {x}" for x in "abcd"),
    },
    "letters": {"head": "token_classification", "labels": tuple("abcd")},
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> str:
    """A WordPiece vocabulary whose words are split into letters."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path.write_text("\n".join([*special, *"abcd", *(f"##{x}" for x in "abcd")]) + "\n")
    return str(path)


def config_of(model, run_dir, **sections):
    return dataclasses.replace(make_config(run_dir, **sections), model=model)


def losses(run_dir) -> list[float]:
    return [x["train/loss"] for x in log.read_metrics(run_dir) if "train/loss" in x]


LONG = {
    "train": {"steps": 60, "log_every": 10},
    "eval": {"every": 30, "num_examples": 4, "num_samples": 1},
    "checkpoint": {"every": 30},
}


def assert_goes_on_in_the_same_bits(whole):
    """Trains the second half once more."""
    again = dataclasses.replace(whole, run_dir=f"{whole.run_dir}_again")
    shutil.copytree(whole.run_dir, again.run_dir)
    shutil.rmtree(f"{again.run_dir}/checkpoints/60")
    train(again)
    assert_same_bits(whole.run_dir, again.run_dir, 60)


@pytest.mark.parametrize("name", GPT)
def test_a_decoder_learns_and_writes(name, tmp_path):
    packs = name == "llama"
    data = {"pack": True, "inputs_length": 24} if packs else {}
    whole = config_of(GPT[name], tmp_path / "whole", data=data, **LONG)
    train(whole)
    assert losses(whole.run_dir)[-1] < losses(whole.run_dir)[0] - 0.5
    if packs:
        return
    model = pretrained.load(whole.run_dir)
    prompts = ["capitals: ab", "capitals: abcd", "c"]
    answers = model.generate(prompts, max_tokens=5)
    assert len(set(answers)) > 1
    # A row does not depend on those beside it, though shorter ones are padded.
    assert model.generate(prompts, max_tokens=5, batch_size=1) == answers
    model.export(str(tmp_path / "hf"))
    assert pretrained.load(str(tmp_path / "hf")).generate(prompts, max_tokens=5) == answers


def test_a_decoders_inputs_see_one_another_where_the_run_says_so(tmp_path):
    causal = config_of(GPT["gpt2"], tmp_path / "causal", train={"steps": 2}, eval={"every": 2})
    prefix = dataclasses.replace(
        causal,
        run_dir=str(tmp_path / "prefix"),
        data=dataclasses.replace(causal.data, prefix_lm=True),
    )
    train(causal)
    train(prefix)
    assert losses(causal.run_dir) != losses(prefix.run_dir)
    assert pretrained.load(prefix.run_dir).prefix_lm
    # Measured as it is trained.
    for run_dir in (causal.run_dir, prefix.run_dir):
        (table,) = evaluate_model(run_dir, split="validation", batch_size=8).values()
        (logged,) = (x for x in read_metrics(run_dir) if "validation/loss" in x)
        assert table["model"]["loss"] == pytest.approx(logged["validation/loss"], rel=1e-5)


@pytest.mark.parametrize("task", HEADS)
def test_an_encoder_learns_classes_and_goes_on(task, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.random, "key", hashed.jax_key)  # Its accuracy is that of one beginning.
    model, packs = dataclasses.replace(BERT, **HEADS[task]), task == "letters"
    data = {"mixture": task, "vocabulary": vocabulary, "pack": packs}
    evaluation = LONG["eval"] | {"num_examples": None}
    whole = config_of(model, tmp_path / "whole", **LONG | {"data": data, "eval": evaluation})
    train(whole)
    # A word's first piece says it all; of two words, the last letter has to be found.
    *_, scores = (x for x in read_metrics(whole.run_dir) if f"validation/{task}/accuracy" in x)
    least = {"first_letter": 60, "letters": 15}[task]
    assert scores[f"validation/{task}/accuracy"] > least
    assert losses(whole.run_dir)[-1] < losses(whole.run_dir)[0] - 0.3
    if packs:
        assert_goes_on_in_the_same_bits(whole)
    table = evaluate_model(whole.run_dir, split="validation", batch_size=8)
    np.testing.assert_allclose(
        table[task]["model"]["accuracy"], scores[f"validation/{task}/accuracy"]
    )
    with pytest.raises(ValueError, match="bert is an encoder and writes no text"):
        pretrained.load(whole.run_dir).generate(["a"])


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            dataclasses.replace(BERT, head="none"),
            {},
            "this bert is an encoder without a head",
        ),
        (BERT, {}, r"task first_letter \(inputs and targets\) is for another model"),
        (
            dataclasses.replace(BERT, head="sequence_classification", labels=("letter a", "b")),
            {},
            "'letter [bcd]' is not a class of the model",
        ),
        (
            dataclasses.replace(BERT, **HEADS["first_letter"]),
            {"vocabulary": "bytes"},
            "has no token that begins a text",
        ),
    ],
)
def test_what_an_encoder_cannot_learn(model, data, message, vocabulary, tmp_path):
    data = {"mixture": "first_letter", "vocabulary": vocabulary} | data
    if data["vocabulary"] == "bytes":
        model = dataclasses.replace(model, vocab_size=384, eos_token_id=1)
    with pytest.raises(ValueError, match=message):
        train(config_of(model, tmp_path, data=data, eval={"every": 0}))


def test_a_text_longer_than_the_learned_positions(tmp_path):
    model = dataclasses.replace(GPT["gpt2"], max_positions=20)
    assert isinstance(model, GPTConfig)
    with pytest.raises(ValueError, match="max_positions"):
        train(config_of(model, tmp_path, eval={"every": 0}))


def test_the_tokenizers_eos_is_the_one_to_train_with(tmp_path):
    # As Llama 3's chat models: several ids end a text, and the tokenizer's is not the first.
    model = dataclasses.replace(GPT["llama"], eos_token_id=5, more_eos_token_ids=(1, 7))
    hf_io.save_params(tmp_path / "hf", model, random_params(model), tokenizer=ByteTokenizer())
    found = find(str(tmp_path / "hf")).model
    assert (found.eos_token_id, found.more_eos_token_ids) == (1, (5, 7))
    assert found.answer([9, 8, 7, 6, 1]) == [9, 8]


def test_t5gemma_is_fine_tuned_from_a_folder(tmp_path):
    model = dataclasses.replace(T5GEMMA, vocab_size=384, d_model=24, decoder_d_model=16)
    params = jax.jit(api.init_params, static_argnums=0)(model, jax.random.key(0))
    hf_io.save_params(tmp_path / "source", model, params, tokenizer=ByteTokenizer())
    config = load_config("t5gemma_finetune")
    run_dir = tmp_path / "run"

    def section(name, **fields):
        return {name: dataclasses.replace(getattr(config, name), **fields)}

    config = dataclasses.replace(
        config,
        run_dir=str(run_dir),
        init=InitConfig(model=str(tmp_path / "source")),
        **section(
            "data",
            mixture="capitals",
            task_files=(tiny.TASK_FILE,),
            inputs_length=16,
            targets_length=8,
            batch_size=8,
            pack=True,
        ),
        **section("optimizer", learning_rate=1e-2, warmup_steps=5),
        **section("train", steps=30, log_every=10),
        **section("eval", every=0, patience=None),
        **section("checkpoint", every=30),
        **section("watch", norms=False),  # Less to compile.
    )
    train(config)
    losses = [line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line]
    assert losses[0] > 4
    assert losses[-1] < losses[0] - 1
    tuned = pretrained.load(str(run_dir))
    trained = dataclasses.replace(model, dropout_rate=0.1, scan_layers=False)
    assert tuned.model == trained
    assert len(tuned.generate(["capitals: abc", "capitals: d"], max_tokens=5)) == 2
    # And it goes back to a folder as it is.
    export_model(str(run_dir), str(tmp_path / "tuned"))
    again = hf_io.load_params(tmp_path / "tuned", model)
    np.testing.assert_array_equal(
        again["decoder"]["layers"]["cross_attention"]["key"]["kernel"][1],
        tuned.params["decoder"]["layers"][1]["cross_attention"]["key"]["kernel"].kernel(),
    )
