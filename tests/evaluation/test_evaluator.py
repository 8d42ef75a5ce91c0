"""Evaluation: every example counts once, and the numbers are those of a plain computation."""

import dataclasses
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
from t5jax import sharding
from t5jax.config import AxisRules, MeshConfig
from t5jax.data.batches.examples import EvalExample, EvalSet
from t5jax.evaluation import Evaluator, mean_loss
from t5jax.evaluation.baselines import trivial_answers
from t5jax.evaluation.scores import Answer, Answers, score
from t5jax.metrics import exact_match, rank_accuracy
from t5jax.models import api
from t5jax.monitor import tables
from t5jax.tokenizers import ByteTokenizer
from tiny import one_device  # noqa: F401

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


def sums(result):
    """Negative log likelihood, tokens and hits of all examples."""
    rows = [(-a.log_prob, a.num_tokens, a.num_correct) for a in result.answers]
    return tuple(map(sum, zip(*rows, strict=True)))


def baselines(examples, result):
    """The scores of the trivial predictors."""
    model = Answers.of(examples, result.answers)
    answers = {kind: trivial_answers(kind, examples, model) for kind in ("copy", "majority")}
    return {kind: score(examples, found) for kind, found in answers.items() if found}


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
        assert sums(result)[1:] == (tokens, correct)
        assert sums(result)[0] == pytest.approx(nll, rel=1e-5)
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
    assert sums(result) == pytest.approx(sums(others))
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
    assert baselines(eval_set(), plain) == {
        name: {"exact_match": pytest.approx(100 / 7)} for name in ("copy", "majority")
    }


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
    found = baselines(numbers(), result)
    assert found["copy"] == pytest.approx({"error": 8.5 / 6, "sum": 15.0})
    assert found["majority"] == pytest.approx(scores)
    table = tables.samples_markdown(["asked"], [numbers().examples[0].targets], ["3.5"])
    assert "target: `2.0`" in table


def test_a_baseline_that_the_task_cannot_read_is_left_out():
    result = run(numbers(5), 8, predict=lambda params, inputs: ["3.5"] * len(inputs))
    assert list(baselines(numbers(5), result)) == ["majority"]
    assert result.error == ""


def test_the_most_frequent_tags_are_those_of_a_text_where_none_can_be_copied():
    def tags(text):
        assert text != "copied"
        return text.split()

    ids = [[*ByteTokenizer().encode(text), 1] for text in ("asked", "O")]
    targets = [["O"], ["O"], ["O", "O", "O", "B"]]
    examples = [EvalExample("asked", "copied", target, *ids) for target in targets]
    predict = lambda params, inputs: ["B"] * len(inputs)  # noqa: E731
    ner = EvalSet("ner", examples, (exact_match,), tags)
    found = baselines(ner, run(ner, 8, predict=predict))
    assert found == {"majority": {"exact_match": pytest.approx(200 / 3)}}


def test_an_error_of_a_task_names_its_function_and_the_text():
    result = run(numbers(), 8, predict=lambda params, inputs: ["half"] * len(inputs))
    assert re.match(
        r"task stsb: postprocess postprocess fails on the prediction 'half' for the inputs "
        rf"'.+': could not convert string to float: 'half' \({__file__}, line \d+\)",
        result.error,
    )
    assert set(result.scores) == {"loss", "perplexity", "token_accuracy"}


def test_an_example_without_an_answer_counts_for_nothing():
    """As a SeqIO task with add_eos=False may have it."""
    with_one = eval_set()
    empty = dataclasses.replace(with_one.examples[0], target_ids=[], targets="")
    with_one.examples.append(empty)
    result, without = run(with_one, 4), run(eval_set(), 4)
    assert sums(result) == pytest.approx(sums(without))
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


def test_a_loss_beyond_all_bounds_has_a_perplexity():
    one = dataclasses.replace(eval_set(1), metric_fns=())
    scores = score(one, Answers.of(one, [Answer(-4000.0, 5, 1, 4, 1)]))
    assert scores == {"loss": 800.0, "perplexity": math.exp(700), "token_accuracy": 20.0}


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
        assert baselines(dataclasses.replace(eval_set(), metric_fns=()), result) == {}


def test_max_tokens_limits_predictions():
    short, long = run(eval_set(), 8, max_tokens=1), run(eval_set(), 8, max_tokens=6)
    tokenizer = ByteTokenizer()
    assert all(len(tokenizer.encode(text)) <= 1 for text in short.predictions)
    assert any(len(tokenizer.encode(text)) > 1 for text in long.predictions)


def test_mean_loss_weighs_tokens():
    one, two = run(eval_set(2), 8), run(eval_set(7), 8)
    expected = (sums(one)[0] + sums(two)[0]) / (sums(one)[1] + sums(two)[1])
    assert mean_loss([one, two]) == pytest.approx(expected)
    assert mean_loss([one, two]) != pytest.approx((one.scores["loss"] + two.scores["loss"]) / 2)


# --- Answer choices -------------------------------------------------------------------------------


def test_choices_are_ranked_by_the_probability_of_the_whole_answer():
    """As the plain computation has it, with what ends a text."""
    choices = ("ab", "cab", "b", "caba")
    given = eval_set(3)
    examples = [dataclasses.replace(e, choices=choices) for e in given.examples[1:]]
    asked = dataclasses.replace(given, examples=examples, score_fns=[rank_accuracy])
    encode = ByteTokenizer().encode
    expected = [
        [-plain_sums([dataclasses.replace(e, target_ids=[*encode(c), 1])])[0] for c in choices]
        for e in examples
    ]
    answers = run(asked, 8).answers
    np.testing.assert_allclose([a.choices for a in answers], expected, rtol=1e-5)
    best = [choices[np.argmax(row)] for row in expected]
    sizes = np.array([len(choice) for choice in choices])
    by_length = [choices[np.argmax(row / sizes)] for row in np.array(expected)]
    assert best != by_length, "it would not show which is which"
    for name, picked in (("rank_accuracy", best), ("rank_accuracy_norm", by_length)):
        right = [
            dataclasses.replace(e, targets=text) for e, text in zip(examples, picked, strict=True)
        ]
        found = dataclasses.replace(asked, examples=right)
        assert score(found, Answers.of(found, answers))[name] == 100.0
    without = dataclasses.replace(asked, score_fns=())
    assert {a.choices for a in run(without, 8).answers} == {()}, "what nobody wants to know"


def test_a_decoders_choices_have_no_end():
    """As in lm-evaluation-harness: a decoder may not have learned that an answer ends."""
    model = change(GPT2, vocab_size=384, max_positions=64)
    params, mesh = random_params(model), sharding.make_mesh(MeshConfig())
    example = dataclasses.replace(eval_set(1).examples[0], choices=("ab", "c"))
    asked = dataclasses.replace(eval_set(1), examples=[example], score_fns=[rank_accuracy])
    with sharding.use_mesh(mesh):
        options = {"batch_size": 8, "max_tokens": 2}
        evaluator = Evaluator(model, ByteTokenizer(), mesh, AxisRules(), **options)
        found = evaluator.evaluate(params, asked).answers[0].choices
    prompt = example.input_ids[:-1]  # A decoder goes on with the prompt.
    for choice, log_prob in zip(example.choices, found, strict=True):
        ids = np.array([[model.start_token_id, *prompt, *ByteTokenizer().encode(choice)]], np.int32)
        ids = ids if model.prompt_start else ids[:, 1:]
        logits_TV = np.asarray(LOGITS(model, params, {"decoder_input_tokens": ids}), np.float64)[0]
        log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        n = len(ByteTokenizer().encode(choice))
        expected = sum(log_p_TV[t - 1, ids[0, t]] for t in range(ids.shape[1] - n, ids.shape[1]))
        assert log_prob == pytest.approx(expected, rel=1e-5)


def test_choices_are_checked_before_anything_is_computed():
    asked = dataclasses.replace(eval_set(2), score_fns=[rank_accuracy])
    mesh = sharding.make_mesh(MeshConfig())
    evaluator = Evaluator(MODEL, ByteTokenizer(), mesh, AxisRules(), batch_size=8, max_tokens=5)
    with pytest.raises(ValueError, match=r"letters: metric rank_accuracy .*no answer choices"):
        evaluator.check(asked)


@pytest.mark.parametrize(
    ("kind", "choices", "message"),
    [
        ("decoder", ("ab", ""), "letters: the answer choice '' has no tokens"),
        ("encoder_decoder", ("x", "y"), "of 2 of 2 examples no answer choice is the target"),
    ],
)
def test_choices_of_which_none_is_right_or_one_always_wins(kind, choices, message):
    model = {"decoder": change(GPT2, vocab_size=384, max_positions=64), "encoder_decoder": MODEL}
    given = eval_set(2)
    examples = [dataclasses.replace(e, choices=choices) for e in given.examples]
    asked = dataclasses.replace(given, examples=examples, score_fns=[rank_accuracy])
    options = {"batch_size": 8, "max_tokens": 5}
    mesh = sharding.make_mesh(MeshConfig())
    evaluator = Evaluator(model[kind], ByteTokenizer(), mesh, AxisRules(), **options)
    with pytest.raises(ValueError, match=message):
        evaluator.check(asked)


def test_a_target_that_is_no_choice_counts_as_wrong_and_is_said(caplog):
    given = eval_set(2)
    choices = (given.examples[0].targets, "x")
    examples = [dataclasses.replace(e, choices=choices) for e in given.examples]
    asked = dataclasses.replace(given, examples=examples, score_fns=[rank_accuracy])
    mesh = sharding.make_mesh(MeshConfig())
    Evaluator(MODEL, ByteTokenizer(), mesh, AxisRules(), batch_size=8, max_tokens=5).check(asked)
    assert "of 1 of 2 examples no answer choice is the target" in caplog.text
