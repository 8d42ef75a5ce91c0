"""Evaluation: every example counts once, and the numbers are those of a plain computation."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
import seqio

import tiny
from conformance.cases import random_params
from conformance.families import GPT2, change
from conformance.families import T5 as SMALL
from t5jax import evaluate, pretrained, sharding
from t5jax.config import AxisRules, MeshConfig
from t5jax.convert import export_model
from t5jax.data.batches.examples import EvalExample, EvalSet
from t5jax.evaluate import Evaluator, evaluate_model, mean_loss
from t5jax.metrics import exact_match
from t5jax.models import api
from t5jax.monitor import tables
from t5jax.tokenizers import ByteTokenizer
from tiny import TASK_FILE, one_device, trained_run  # noqa: F401

MODEL = dataclasses.replace(SMALL, vocab_size=384)
PARAMS = random_params(MODEL)
LOGITS = jax.jit(api.logits, static_argnums=0)


def eval_set(size=7, metric_fns=(exact_match,), postprocess=lambda text: text):
    rng = np.random.default_rng(0)
    examples = []
    for i in range(size):
        # Two pairs of lengths: each is a program of the plain computation.
        texts = ["".join(rng.choice(list("abc"), n)) for n in ((7, 3) if i % 3 else (2, 8))]
        ids = [[*ByteTokenizer().encode(text), 1] for text in texts]
        examples.append(EvalExample(texts[0], "copied", texts[1] if i else "copied", *ids))
    return EvalSet("letters", examples, metric_fns, postprocess)


def run(examples, batch_size, **options):
    mesh = sharding.make_mesh(MeshConfig())
    options = {"max_tokens": 5} | options
    with sharding.use_mesh(mesh):
        evaluator = Evaluator(
            MODEL, ByteTokenizer(), mesh, AxisRules(), batch_size=batch_size, **options
        )
        return evaluator.evaluate(PARAMS, examples)


def plain_sums(examples):
    """Negative log likelihood, tokens and hits, one example after the other, without padding."""
    nll, tokens, correct = 0.0, 0, 0
    for example in examples:
        inputs = np.array([example.input_ids], np.int32)
        targets = np.array(example.target_ids)
        decoder = np.array([[0, *example.target_ids[:-1]]], np.int32)
        batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": decoder}
        logits_TV = np.asarray(LOGITS(MODEL, PARAMS, batch), np.float64)[0]
        log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        nll -= log_p_TV[np.arange(len(targets)), targets].sum()
        correct += (logits_TV.argmax(-1) == targets).sum()
        tokens += len(targets)
    return nll, tokens, correct


def test_loss_is_that_of_a_plain_computation_and_does_not_depend_on_the_batch():
    examples = eval_set()
    nll, tokens, correct = plain_sums(examples.examples)
    results = [run(examples, batch_size) for batch_size in (1, 3, 64)]
    for result in results:
        assert result.sums["tokens"] == tokens
        assert result.sums["correct"] == correct
        assert result.sums["nll"] == pytest.approx(nll, rel=1e-5)
        assert result.scores["loss"] == pytest.approx(nll / tokens, rel=1e-5)
        assert result.scores["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
        assert result.scores["token_accuracy"] == pytest.approx(100 * correct / tokens)
        assert len(result.predictions) == 7
        assert result.predictions == results[0].predictions
        assert result.scores["exact_match"] == results[0].scores["exact_match"]


def test_an_empty_target_is_predicted_and_has_no_loss():
    examples = eval_set()
    rest = [*examples.examples[:2], *examples.examples[3:]]
    empty = dataclasses.replace(examples.examples[2], targets="", target_ids=[])
    with_empty = dataclasses.replace(examples, examples=[*rest, empty])
    result, others = run(with_empty, 64), run(dataclasses.replace(examples, examples=rest), 64)
    assert result.sums == pytest.approx(others.sums)
    assert result.predictions[:-1] == others.predictions
    assert len(result.predictions) == 7


def test_metrics_see_what_the_task_makes_of_a_prediction():
    """And the baselines, which are texts of the task, do not."""
    asked = []

    def copy(params, inputs):
        asked.append(params is PARAMS)
        return [ByteTokenizer().decode(ids) for ids in inputs]

    examples = eval_set(postprocess=lambda text: "copied")
    result = run(examples, 3, predict=copy)
    assert asked == [True]
    assert result.predictions == [example.inputs for example in examples.examples]
    # One target of 7 is what every prediction becomes; without that none is right.
    assert result.scores["exact_match"] == pytest.approx(100 / 7)
    plain = run(eval_set(), 3, predict=copy)
    assert plain.scores["exact_match"] == 0.0
    assert result.baselines == plain.baselines


def numbers(size=6):
    """An eval set as STS-B has it in T5: targets and predictions are numbers."""

    def postprocess(text, example=None):
        assert example["row"] in range(size)
        return float(text)

    def mean_error(targets, predictions):
        assert all(type(x) is float for x in [*targets, *predictions])
        return {"error": np.mean([abs(t - p) for t, p in zip(targets, predictions, strict=True)])}

    def details(targets, predictions):
        return {"pairs": seqio.metrics.Text("0"), "sum": seqio.metrics.Scalar(sum(predictions))}

    examples = []
    for i in range(size):
        target = 3.5 if i else 2.0
        ids = [[*ByteTokenizer().encode(text), 1] for text in ("asked", str(target))]
        source = str(i) if size == 6 else "no number"
        examples.append(EvalExample("asked", source, target, *ids, {"row": i}))
    return EvalSet("stsb", examples, [mean_error, details], postprocess)


def test_a_task_may_make_numbers_of_texts():
    """In its metrics, its baselines and its tables; and SeqIO's values of metrics are read."""
    result = run(numbers(), 8, predict=lambda params, inputs: ["3.5"] * len(inputs))
    scores = {name: result.scores[name] for name in ("error", "sum")}
    assert scores == pytest.approx({"error": 1.5 / 6, "sum": 21.0})
    # Copied: |2 - 0| + |3.5 - i| for i of 1 to 5.
    assert result.baselines["copy the input"] == pytest.approx({"error": 8.5 / 6, "sum": 15.0})
    assert result.baselines["most frequent target"] == pytest.approx(scores)
    table = tables.samples_markdown(["asked"], [numbers().examples[0].targets], ["3.5"])
    assert "target: `2.0`" in table


def test_a_baseline_that_the_task_cannot_read_is_left_out():
    result = run(numbers(5), 8, predict=lambda params, inputs: ["3.5"] * len(inputs))
    assert list(result.baselines) == ["most frequent target"]
    assert result.error == ""


def test_the_most_frequent_tags_are_those_of_a_text_where_none_can_be_copied():
    def tags(text):
        assert text != "copied"
        return text.split()

    ids = [[*ByteTokenizer().encode(text), 1] for text in ("asked", "O")]
    targets = [["O"], ["O"], ["O", "O", "O", "B"]]
    examples = [EvalExample("asked", "copied", target, *ids) for target in targets]
    predict = lambda params, inputs: ["B"] * len(inputs)  # noqa: E731
    found = run(EvalSet("ner", examples, (exact_match,), tags), 8, predict=predict)
    assert found.baselines == {"most frequent target": {"exact_match": pytest.approx(200 / 3)}}


def test_an_error_of_a_task_names_its_function_and_the_text():
    result = run(numbers(), 8, predict=lambda params, inputs: ["half"] * len(inputs))
    assert re.match(
        r"task stsb: postprocess postprocess fails on the prediction 'half': could not convert "
        rf"string to float: 'half' \({__file__}, line \d+\)",
        result.error,
    )
    assert set(result.scores) == {"loss", "perplexity", "token_accuracy"}


def test_an_example_without_an_answer_counts_for_nothing():
    """As a SeqIO task with add_eos=False may have it."""
    with_one = eval_set()
    empty = dataclasses.replace(with_one.examples[0], target_ids=[], targets="")
    with_one.examples.append(empty)
    result, without = run(with_one, 4), run(eval_set(), 4)
    assert result.sums == pytest.approx(without.sums)
    assert len(result.predictions) == 8
    alone = run(EvalSet("empty", [empty], (exact_match,), lambda text: text), 4)
    assert math.isnan(alone.scores["loss"])
    no_inputs = [dataclasses.replace(e, input_ids=[]) for e in with_one.examples]
    result = run(dataclasses.replace(with_one, examples=no_inputs, metric_fns=()), 4)
    assert math.isfinite(result.scores["loss"])


def test_prompts_are_read_before_anything_is_computed():
    model = change(GPT2, vocab_size=384, max_positions=16)
    mesh = sharding.make_mesh(MeshConfig())
    examples = [dataclasses.replace(eval_set(1).examples[0], input_ids=[5] * 12)]
    asked = EvalSet("long", examples, [exact_match], lambda text: text)

    def check(max_tokens, **options):
        options |= {"batch_size": 8, "max_tokens": max_tokens}
        Evaluator(model, ByteTokenizer(), mesh, AxisRules(), **options).check(asked)

    check(5)  # The last token is written, but not read.
    with pytest.raises(ValueError, match=r"task long: prompt 0 .*at most 5 tokens \(max_tokens\)"):
        check(6)
    check(6, predict=lambda params, ids: ids)  # Another engine has other limits.


def test_a_metric_that_cannot_score_a_few_is_tried_on_all():
    """As one that needs both classes, of a table that is sorted by class."""
    asked = []

    def needs_both(targets, predictions):
        assert targets == predictions
        asked.append(len(targets))
        if len(targets) < 130:
            raise ValueError("only one class")
        return {"score": 1.0}

    examples = [dataclasses.replace(eval_set(1).examples[0], targets="copied") for _ in range(130)]
    ids = [*ByteTokenizer().encode("copied"), 1]
    examples = [dataclasses.replace(e, target_ids=ids) for e in examples]
    mesh = sharding.make_mesh(MeshConfig())
    evaluator = Evaluator(MODEL, ByteTokenizer(), mesh, AxisRules(), batch_size=8, max_tokens=5)
    evaluator.check(EvalSet("sorted", examples, [needs_both], lambda text: text))
    assert asked == [44, 130]
    with pytest.raises(ValueError, match=r"task few: metric needs_both fails: only one class"):
        evaluator.check(EvalSet("few", examples[:9], [needs_both], lambda text: text))


def test_a_loss_beyond_all_bounds_has_a_perplexity(monkeypatch):
    sums = {"nll": 4000.0, "tokens": 5.0, "correct": 1.0, "loss": 4000.0}
    monkeypatch.setattr(Evaluator, "_sum_losses", lambda *_: sums)
    scores = run(eval_set(), 8, generate=False).scores
    assert scores == {"loss": 800.0, "perplexity": math.exp(700), "token_accuracy": 20.0}


def test_baselines_are_of_the_task_and_not_of_the_model():
    baselines = run(eval_set(), 8).baselines
    assert {name: scores["exact_match"] for name, scores in baselines.items()} == pytest.approx(
        {"copy the input": 100 / 7, "most frequent target": 100 / 7}
    )


def test_eight_devices_measure_what_one_does():
    expected = run(eval_set(), 8)
    mesh = tiny._make_mesh(MeshConfig(data=4, fsdp=2))
    with sharding.use_mesh(mesh):
        evaluator = Evaluator(MODEL, ByteTokenizer(), mesh, AxisRules(), batch_size=8, max_tokens=5)
        result = evaluator.evaluate(PARAMS, eval_set())
    assert result.predictions == expected.predictions
    assert result.scores == pytest.approx(expected.scores, rel=1e-5)
    with pytest.raises(ValueError, match=r"eval.batch_size 3 is not divisible by data x fsdp = 8"):
        Evaluator(MODEL, ByteTokenizer(), mesh, AxisRules(), batch_size=3, max_tokens=5)


def test_without_generation_or_metrics_the_loss_alone():
    for result in (run(eval_set(), 8, generate=False), run(eval_set(metric_fns=()), 8)):
        assert set(result.scores) == {"loss", "perplexity", "token_accuracy"}
        assert result.predictions == []
        assert result.baselines == {}


def test_max_tokens_limits_predictions():
    short, long = run(eval_set(), 8, max_tokens=1), run(eval_set(), 8, max_tokens=6)
    tokenizer = ByteTokenizer()
    assert all(len(tokenizer.encode(text)) <= 1 for text in short.predictions)
    assert any(len(tokenizer.encode(text)) > 1 for text in long.predictions)


def test_mean_loss_weighs_tokens():
    one, two = run(eval_set(2), 8), run(eval_set(7), 8)
    expected = (one.sums["nll"] + two.sums["nll"]) / (one.sums["tokens"] + two.sums["tokens"])
    assert mean_loss([one, two]) == pytest.approx(expected)
    assert mean_loss([one, two]) != pytest.approx((one.scores["loss"] + two.scores["loss"]) / 2)


# --- `t5jax eval` ---------------------------------------------------------------------------------

OPTIONS = {"split": "validation", "batch_size": 8}


def test_run_checkpoint_and_export_measure_the_same(tmp_path, capsys):
    run_dir = trained_run()
    capsys.readouterr()  # Of the training, where this test is the first to need it.
    scores = tmp_path / "scores.json"
    of_run = evaluate_model(str(run_dir), **OPTIONS | {"json": scores, "num_samples": 2})
    out, err = capsys.readouterr()
    assert "exact_match" in out
    assert "prediction" not in out
    assert err.count("  prediction ") == 2
    assert json.loads(scores.read_text()) == of_run
    assert of_run["capitals"]["num_examples"] == 11

    # What the loop measured at the checkpoint that is best, the last one here.
    logged = [line for line in tiny.read_metrics(run_dir) if "validation/loss" in line][-1]
    for name, value in of_run["capitals"]["model"].items():
        assert value == pytest.approx(logged[f"validation/capitals/{name}"], rel=1e-6)

    # From Python the scores are returned, and nothing is printed.
    capsys.readouterr()
    assert pretrained.load(str(run_dir)).evaluate(**OPTIONS) == of_run
    assert capsys.readouterr().out == ""
    assert evaluate_model(str(run_dir / "checkpoints/10"), **OPTIONS) == of_run
    assert evaluate_model(str(run_dir / "checkpoints/5"), **OPTIONS) != of_run

    options = {"dtype": "float32", "max_shard_bytes": 10**9, "overwrite": False}
    export_model(str(run_dir), str(tmp_path / "hf"), **options)
    given = {"mixture": "capitals", "inputs_length": 16, "max_tokens": 8}
    assert evaluate_model(str(tmp_path / "hf"), **OPTIONS | given) == of_run


def test_options_of_eval_count():
    run_dir, few = str(trained_run()), OPTIONS | {"num_examples": 3}
    (full,) = evaluate_model(run_dir, **few).values()
    assert full["num_examples"] == 3
    for option, value in {
        "dtype": "bfloat16",
        "inputs_length": 4,
        "max_tokens": 2,
        "split": "train",
    }.items():
        (other,) = evaluate_model(run_dir, **few | {option: value}).values()
        assert other["model"]["loss"] != full["model"]["loss"], option
        if option == "dtype":
            assert other["model"]["loss"] == pytest.approx(full["model"]["loss"], rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": "capitols"}, r"'capitols', which no task file registers; did you mean capi"),
        ({"split": "test"}, r"capitals has no split 'test'; there are train, validation"),
        ({"max_tokens": 0}, r"targets_length is 0; it must be at least 1"),
        ({"inputs_length": 0}, r"inputs_length is 0; it must be at least 1"),
        ({"num_examples": 0}, r"num_examples is 0; it must be at least 1"),
        ({"json": "/proc/none/scores.json"}, r"--json .*: there is no folder /proc/none; make it"),
        ({"task_files": ("absent.py",)}, r"there is no file absent.py"),
    ],
)
def test_options_of_eval_that_cannot_work(changes, message):
    if "json" in changes:
        changes = {"json": evaluate.Path(changes["json"])}
    with pytest.raises(ValueError, match=message):
        evaluate_model(str(trained_run()), **OPTIONS | changes)


def test_a_model_that_was_trained_on_nothing_needs_a_task(tmp_path):
    options = {"dtype": "float32", "max_shard_bytes": 10**9, "overwrite": False}
    export_model(str(trained_run()), str(tmp_path / "hf"), **options)
    with pytest.raises(ValueError, match=r"does not say what it was trained on; give --mixture"):
        evaluate_model(str(tmp_path / "hf"), **OPTIONS)
