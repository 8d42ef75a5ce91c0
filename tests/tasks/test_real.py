"""The shipped tasks on the published files, wherever those lie beside the project."""

import dataclasses
import importlib.util
import itertools
import sys

import pytest

from t5jax.config import Config, DataConfig, EvalConfig, load_config
from t5jax.data import pipeline, registry
from t5jax.data.bridge.tf import seqio
from t5jax.data.bridge.vocabulary import building_for
from t5jax.data.run import Run
from t5jax.data.tasks.prompted import register_variant
from t5jax.metrics import compute
from t5jax.models import api  # noqa: F401  JAX before TensorFlow's threads.
from t5jax.monitor.log import read_metrics
from t5jax.tokenizers import ByteTokenizer
from tiny import one_device  # noqa: F401

REGISTRIES = (seqio.TaskRegistry, seqio.MixtureRegistry)


@pytest.fixture(scope="module")
def load(request):
    """Returns a function that runs a shipped task file on the published data."""
    root = request.config.rootpath
    data = (root / "../shared/data").resolve()
    if not (data / "tasks").is_dir():
        pytest.skip(f"the published files are not there: {data / 'tasks'} is absent")

    def forget(prefix):
        for found in REGISTRIES:
            for name in [n for n in found.names() if n.startswith(prefix)]:
                found.remove(name)

    def load(name):
        forget(name)  # Another test may have loaded it with the data elsewhere.
        spec = importlib.util.spec_from_file_location(name, root / f"tasks/{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T5JAX_DATA", str(data))
        yield load
    for name in ("gsm8k", "scitldr", "xquad"):
        forget(name)
        registry._loaded.discard((root / f"tasks/{name}.py").resolve())


def examples(name, split, **settings):
    register_variant(name)
    return list(seqio.TaskRegistry.get(name).source.examples(split, **settings))


def perfect(name, split, **data):
    """Returns the scores of predictions that are the rendered targets."""
    config = Config(
        data=DataConfig(mixture=name, **({"inputs_length": 4096, "targets_length": 2048} | data)),
        eval=EvalConfig(num_examples=50),
    )
    eval_set = pipeline.eval_sets(config, split, ByteTokenizer())[0]
    answers = [ByteTokenizer().decode(example.target_ids) for example in eval_set.examples]
    targets = [example.targets for example in eval_set.examples]
    predictions = [eval_set.postprocess(answer) for answer in answers]
    return eval_set, compute(targets, predictions, eval_set.metric_fns)


# --- GSM8K ----------------------------------------------------------------------------------------


def test_gsm8k_has_every_row_once(load):
    source = load("gsm8k").SOURCE
    rows = {split: list(source.rows(split)) for split in ("train", "validation", "test")}
    assert len(rows["train"]) + len(rows["validation"]) == 7473
    assert 490 <= len(rows["validation"]) <= 500
    assert len(rows["test"]) == 1319
    questions = [row["question"] for split in rows.values() for row in split]
    assert len(set(questions)) == len(questions)


def test_gsm8k_reads_under_both_templates(load):
    load("gsm8k")
    worked, number = examples("gsm8k", "test")[:2]
    assert worked["inputs"].startswith("Question: Janet’s ducks lay 16 eggs per day.")
    assert worked["inputs"].endswith("\nAnswer, step by step:")
    assert worked["targets"] == (
        "Janet sells 16 - 3 - 4 = 9 duck eggs a day.\n"
        "She makes 9 * 2 = $18 every day at the farmer’s market.\n#### 18"
    )
    assert number["inputs"].endswith("\nAnswer with a number:")
    assert number["targets"] == "3"
    everything = examples("gsm8k", "train") + examples("gsm8k", "test")
    assert len(everything) > 2 * 6900 + 1319
    assert not any("<<" in example["targets"] for example in everything)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,080", "1080"),
        ("it costs $2.50.", "2.5"),
        ("#### 18.00", "18"),
        ("#### -5", "-5"),
        ("2 apples and 3 pears", "3"),
        ("#### 100", "100"),
        ("none", ""),
    ],
)
def test_gsm8k_finds_the_final_number(text, number, load):
    assert load("gsm8k").final_number(text) == number


def test_gsm8k_is_measured_by_the_final_number(load):
    load("gsm8k")
    eval_set, scores = perfect("gsm8k", "test")
    assert scores == {"exact_match": 100.0}
    assert all(example.targets.lstrip("-").isdigit() for example in eval_set.examples[:20])
    assert eval_set.postprocess("First 7, then 9.\n#### 18.0") == "18"


def test_gsm8k_has_few_shot_variants_that_fit(load):
    load("gsm8k")
    tokenizer, lengths = ByteTokenizer(), {"inputs": 2000, "targets": 512}
    train = examples("gsm8k:number", "train")
    numbers = {e["inputs"] for e in train}
    counts = set()
    few = examples("gsm8k:number:8shot", "test", run=Run(tokenizer, lengths=lengths))
    zero = examples("gsm8k:number", "test")
    for example, plain in itertools.islice(zip(few, zero, strict=True), 300):
        assert len(tokenizer.encode(example["inputs"])) < 2000
        *exemplars, asked = example["inputs"].split("\n\n")
        assert (asked, example["targets"]) == (plain["inputs"], plain["targets"])
        assert len(set(exemplars)) == len(exemplars)
        assert {exemplar.rpartition("\n")[0] for exemplar in exemplars} <= numbers
        counts.add(len(exemplars))
    assert 8 in counts
    assert min(counts) >= 3


# --- SciTLDR --------------------------------------------------------------------------------------


def test_scitldr_has_several_references(load):
    load("scitldr")
    assert len(examples("scitldr", "train")) == 3 * 1992
    assert len(examples("scitldr", "validation")) == 619
    eval_set, scores = perfect("scitldr", "test")
    assert {len(example.targets) for example in eval_set.examples} <= {2, 3, 4}
    # The target is the first of the references, so it matches the best one.
    assert scores == pytest.approx({"rouge1": 100.0, "rouge2": 100.0, "rougeLsum": 100.0})
    other = [example.targets[-1] for example in eval_set.examples]
    targets = [example.targets for example in eval_set.examples]
    assert compute(targets, other, eval_set.metric_fns)["rouge1"] == pytest.approx(100.0)
    firsts = [example.targets[:1] for example in eval_set.examples]
    assert compute(firsts, other, eval_set.metric_fns)["rouge1"] < 60


def test_scitldr_reads_under_three_templates(load):
    load("scitldr")
    summarize, tldr, titled = examples("scitldr", "test")[:3]
    assert summarize["inputs"].startswith("Summarize in one sentence: Incremental class learning")
    assert tldr["inputs"].endswith("\nTL;DR:")
    assert titled["inputs"].endswith("\nWhat is the paper's point?")
    assert summarize["prompt_source"].startswith("Incremental class learning")


# --- XQuAD ----------------------------------------------------------------------------------------


def test_xquad_splits_by_article_and_alike_in_both_languages(load):
    module = load("xquad")
    titles, sizes = {}, {}
    for language, source in module.SOURCES.items():
        for split in ("train", "validation", "test", "all"):
            rows = list(source.rows(split))
            sizes[language, split] = len(rows)
            titles[language, split] = {row["title"] for row in rows}
    for split in ("train", "validation", "test", "all"):
        assert titles["en", split] == titles["de", split]
        assert sizes["en", split] == sizes["de", split]
    parts = [titles["en", split] for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 48
    assert sizes["en", "all"] == 1190
    assert sum(sizes["en", split] for split in ("train", "validation", "test")) == 1190
    assert min(map(len, parts)) >= 6


def test_xquad_is_measured_by_em_and_f1(load):
    load("xquad")
    first = examples("xquad_en", "all")[0]
    assert first["inputs"].startswith("The Panthers defense gave up just 308 points")
    assert first["inputs"].endswith(
        "\nQuestion: How many points did the Panthers defense surrender?\nAnswer:"
    )
    assert first["targets"] == "308"
    for name in ("xquad_en", "xquad_de"):
        eval_set, scores = perfect(name, "test")
        assert scores == {"em": 100.0, "f1": 100.0}
        assert all(isinstance(example.targets, list) for example in eval_set.examples)
        with building_for(Run(ByteTokenizer())):
            assert {"train", "all"} <= set(seqio.TaskRegistry.get(name).splits)


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "vocabulary", "vocab_size", "inputs_length", "targets_length"),
    [  # The first learns a vocabulary, as the config has it.
        ("gsm8k", "", 2048, 96, 64),
        ("scitldr", "bytes", 384, 96, 32),
        ("xquad", "bytes", 384, 96, 16),
    ],
)
def test_from_scratch_improves_the_validation_loss(
    name, vocabulary, vocab_size, inputs_length, targets_length, load, tmp_path, monkeypatch
):
    from t5jax.train import train

    monkeypatch.setenv("T5JAX_CACHE", str(tmp_path / "cache"))
    load(name)
    config = load_config("from_scratch")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size, d_model=32, d_ff=64),
        data=dataclasses.replace(
            config.data,
            mixture=name,
            vocabulary=vocabulary,
            inputs_length=inputs_length,
            targets_length=targets_length,
        ),
        run_dir=str(tmp_path / "run"),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=4),
        train=dataclasses.replace(config.train, steps=16),
        eval=dataclasses.replace(config.eval, every=8, num_examples=32),
    )
    monkeypatch.setattr(registry, "load_tasks", lambda files=(): None)  # The loaded ones stay.
    train(config)
    lines = read_metrics(config.run_dir)
    losses = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.05
