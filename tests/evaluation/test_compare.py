"""Bootstrap intervals and verdicts: those of SciPy, and of cases in which the answer is known."""

import dataclasses
import functools

import numpy as np
import pytest

from t5jax import metrics
from t5jax.data.batches.examples import EvalExample, EvalSet
from t5jax.evaluation import compare
from t5jax.evaluation.scores import Answers
from t5jax.metrics import likelihood
from t5jax.metrics.likelihood import Details, LogProb
from t5jax.metrics.statistics import Means, OfColumns, Recomputed, Sums, statistic_of


def task(targets, *metric_fns):
    examples = [EvalExample("", "", target, [], []) for target in targets]
    return EvalSet("task", examples, metric_fns, lambda text: text)


def says(predictions):
    return Answers(list(predictions), None, None)


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "from", "the", "dog"]


def texts(seed, n=40):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(4, 9))) for _ in range(n)]


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        *((fn, Means) for fn in (metrics.exact_match, metrics.accuracy, metrics.squad)),
        (metrics.token_f1, Means),
        (metrics.rouge, Means),
        *((fn, Sums) for fn in (metrics.bleu, metrics.char_bleu, metrics.chrf)),
        (functools.partial(metrics.chrf, word_order=2), Sums),
        *((fn, OfColumns) for fn in (metrics.f1_macro, metrics.f1_micro, metrics.matthews)),
        (functools.partial(metrics.f1_binary, positive="t1"), OfColumns),
        *((fn, OfColumns) for fn in (metrics.pearson, metrics.spearman)),
        (lambda targets, predictions: metrics.bleu(targets, predictions), Recomputed),
    ],
)
def test_a_resample_has_the_score_of_its_texts(fn, kind):
    targets, predictions = texts(0), texts(1)
    if kind is OfColumns:  # Classes, or numbers.
        of_numbers = fn in (metrics.pearson, metrics.spearman)
        sides = [np.random.default_rng(seed).integers(3, size=40).tolist() for seed in (0, 1)]
        targets, predictions = [[n if of_numbers else f"t{n}" for n in side] for side in sides]
    predictions[::3] = targets[::3]
    found = statistic_of(fn, targets, predictions)
    assert type(found) is kind
    assert found() == fn(targets, predictions)
    sample = np.random.default_rng(2).integers(40, size=40)
    drawn = [[side[i] for i in sample] for side in (targets, predictions)]
    assert found(sample) == pytest.approx(fn(*drawn))
    assert found(sample) != found()


def test_the_interval_is_scipys():
    from scipy import stats

    rng = np.random.default_rng(0)
    ours, theirs = rng.random(60) < 0.7, rng.random(60) < 0.5
    asked = task(["yes"] * 60, metrics.accuracy)
    answers = [says(np.where(hits, "yes", "no").tolist()) for hits in (ours, theirs)]
    intervals, found = compare.bootstrap(asked, answers[0], {"b": answers[1]}, resamples=4000)
    for hits, interval in (
        (100.0 * ours, intervals["accuracy"]),
        (100.0 * ours - 100.0 * theirs, found["b"]["accuracy"].difference),
    ):
        expected = stats.bootstrap(
            (hits,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        assert interval.value == pytest.approx(hits.mean())
        assert [interval.low, interval.high] == pytest.approx(list(expected), abs=1.7)


def test_verdicts():
    """The same examples for both: a difference that no unpaired test would see."""
    targets = [str(i) for i in range(50)]
    half = [t if i % 2 else "x" for i, t in enumerate(targets)]
    more = [t if i % 2 or i < 16 else "x" for i, t in enumerate(targets)]
    other = [t if i % 2 == 0 else "x" for i, t in enumerate(targets)]
    asked = task(targets, metrics.exact_match, metrics.bleu)

    def verdict(a, b, metric="exact_match"):
        _, found = compare.bootstrap(asked, says(a), {"b": says(b)}, resamples=300)
        return found["b"][metric].verdict

    assert verdict(more, half) == "better"
    assert verdict(half, more) == "worse"
    assert verdict(half, half) == verdict(half, other) == "not distinguishable"
    assert verdict(half, half, "bleu") == "not distinguishable"


def test_the_seed_decides_the_resamples():
    targets, predictions = texts(0), texts(1)
    asked = task(targets, metrics.token_f1)
    runs = [
        compare.bootstrap(asked, says(predictions), {}, resamples=50, seed=seed)[0]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_of_losses_the_lower_is_better():
    """With sums over tokens: long targets count more."""
    asked = task(["t"] * 40)
    sizes = np.random.default_rng(0).integers(1, 9, 40).tolist()

    def losses(per_token):
        found = [LogProb(-per_token * n, Details(n, n, 4 * n, n)) for n in sizes]
        return Answers(None, found, None)

    intervals, found = compare.bootstrap(asked, losses(1.0), {"b": losses(1.1)}, resamples=100)
    assert intervals["loss"].low == pytest.approx(1.0)
    assert {name: c.verdict for name, c in found["b"].items()} == {
        "loss": "better",
        "perplexity": "better",
        "token_accuracy": "not distinguishable",
    }

    def error(targets, predictions):
        return {"error": float(np.mean([p != "t" for p in predictions]))}

    error.lower_is_better = True
    asked = dataclasses.replace(asked, metric_fns=[error])
    wrong = says(["x"] * 20 + ["t"] * 20)
    _, found = compare.bootstrap(asked, says(["t"] * 40), {"b": wrong}, resamples=100)
    assert found["b"]["error"].verdict == "better"


def test_of_a_users_own_losses_the_lower_is_better():
    """Of a `functools.partial` and a metric of scores too, which are called as they are meant."""

    def wrong(targets, predictions, *, word):
        assert all(isinstance(text, str) for text in predictions), "targets are no predictions"
        return {"wrong": float(np.mean([text != word for text in predictions]))}

    def nats(targets, scores):
        return {"nats": -float(np.mean(scores))}

    wrong.lower_is_better = nats.lower_is_better = True
    asked = dataclasses.replace(
        task([["t", "u"]] * 40, functools.partial(wrong, word="t")), score_fns=[nats]
    )
    sides = [
        Answers([text] * 40, [LogProb(log_prob, Details(1, 1, 1, 1))] * 40, None)
        for text, log_prob in (("t", -1.0), ("x", -2.0))
    ]
    _, found = compare.bootstrap(asked, sides[0], {"b": sides[1]}, resamples=20)
    assert found["b"]["wrong"].verdict == found["b"]["nats"].verdict == "better"


def test_few_examples_show_nothing():
    for number, verdict in ((5, "not distinguishable"), (6, "better")):
        asked = task(["yes"] * number, metrics.exact_match)
        answers = [says([text] * number) for text in ("yes", "no")]
        intervals, found = compare.bootstrap(asked, answers[0], {"b": answers[1]}, resamples=20)
        against = found["b"]["exact_match"]
        assert against.verdict == verdict
        # An interval that excludes 0 would say something else.
        of_all = [intervals["exact_match"].low, against.difference.low, against.difference.high]
        np.testing.assert_array_equal(of_all, [np.nan if number < 6 else 100.0] * 3)
        assert compare.against_score(intervals["exact_match"], 0.0, False).verdict == verdict


def test_a_metric_that_cannot_score_a_resample():
    """As one that is undefined for a single class."""

    def needs_both(targets, predictions):
        if len(set(targets)) == 1:
            raise ValueError("only one class")
        return {"score": 100.0}

    asked = task(["yes"] * 9 + ["no"], needs_both, metrics.pearson)
    asked = dataclasses.replace(asked, metric_fns=[needs_both])
    intervals, _ = compare.bootstrap(asked, says(["yes"] * 10), {}, resamples=100)
    assert (intervals["score"].low, intervals["score"].high) == (100.0, 100.0)


def test_against_an_earlier_score():
    interval = compare.Interval(60.0, 55.0, 65.0)
    verdicts = {
        score: compare.against_score(interval, score, lower=False).verdict
        for score in (50.0, 55.0, 70.0)
    }
    assert verdicts == {50.0: "better", 55.0: "not distinguishable", 70.0: "worse"}
    assert compare.against_score(interval, 50.0, lower=True).verdict == "worse"


def test_perplexities_per_token_word_and_byte():
    """By hand: -6 nats of 3 tokens, 2 words, 12 bytes."""
    scores = [LogProb(-4.0, Details(2, 1, 8, 1)), LogProb(-2.0, Details(1, 1, 4, 1))]
    expected = {
        "loss": 2.0,
        "perplexity": np.exp(2),
        "word_perplexity": np.exp(3),
        "byte_perplexity": np.exp(0.5),
        "bits_per_byte": 0.5 / np.log(2),
        "token_accuracy": 200 / 3,
    }
    for name, value in expected.items():
        assert getattr(likelihood, name)(["a", "b"], scores) == {name: pytest.approx(value)}
