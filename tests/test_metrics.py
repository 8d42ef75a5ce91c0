"""Metrics: every number is worked out by hand in the test."""

import math

import pytest

from t5jax import metrics

ALL = (
    metrics.exact_match,
    metrics.accuracy,
    metrics.token_f1,
    metrics.squad,
    metrics.bleu,
    metrics.rouge,
)


def test_exact_match_is_to_the_character():
    targets = ["a b", "c", ["x", "y"], ["x", "y"]]
    assert metrics.exact_match(targets, ["a b", "C", "y", "z"]) == {"exact_match": 50.0}
    assert metrics.exact_match(["a"], ["a "]) == {"exact_match": 0.0}
    # A prediction that is part of the target is not the target.
    assert metrics.exact_match(["abc"], ["b"]) == {"exact_match": 0.0}


def test_accuracy_strips_spaces_but_keeps_case():
    targets = ["yes", " no", ["true", "yes"], "yes"]
    assert metrics.accuracy(targets, ["yes ", "no", "yes", "Yes"]) == {"accuracy": 75.0}


def test_token_f1_takes_the_best_reference():
    # Words: [cat, sat] against [cat, ran, off]: 1 shared, P 1/3, R 1/2, F1 2/5.
    # Against [black, cat]: 1 shared, P 1/3, R 1/2, too; against [cat, ran]: P 2/3, R 1, F1 4/5.
    one = metrics.token_f1(["The cat sat."], ["a cat ran off"])
    assert one == {"token_f1": pytest.approx(40.0)}
    several = metrics.token_f1([["The cat sat.", "cat ran"]], ["a cat ran off"])
    assert several == {"token_f1": pytest.approx(80.0)}
    # A word said twice counts as often as the reference has it: 1 shared, P 1/2, R 1; 3 shared.
    assert metrics.token_f1(["cat"], ["cat cat"])["token_f1"] == pytest.approx(200 / 3)
    assert metrics.token_f1(["very very good"], ["very very good"]) == {"token_f1": 100.0}
    # Precision and recall are not the same: 1 shared, P 1, R 1/3.
    assert metrics.token_f1(["one two three"], ["one"])["token_f1"] == pytest.approx(50.0)


def test_squad_normalises_case_punctuation_articles_and_spaces():
    assert metrics.squad(["The  U.S. Navy"], ["us navy!"]) == {"em": 100.0, "f1": 100.0}
    assert metrics.squad(["an apple"], ["apple"]) == {"em": 100.0, "f1": 100.0}
    # Punctuation goes first, and leaves no space: "a.b" is one word, and holds no article.
    assert metrics.squad(["a.b"], ["ab"]) == {"em": 100.0, "f1": 100.0}
    # "another" holds an article, and is none.
    assert metrics.squad(["another"], ["other"]) == {"em": 0.0, "f1": 0.0}
    half = metrics.squad([["one two"], "three"], ["one", "three"])
    assert half == {"em": 50.0, "f1": pytest.approx(100 * (2 / 3 + 1) / 2)}


def test_bleu_is_the_product_of_clipped_precisions():
    # 6 words each: 1-grams 5/6 match, 2-grams 3/5, 3-grams 2/4, 4-grams 1/3; no brevity penalty.
    score = metrics.bleu(["the cat sat on a mat"], ["the cat sat on the mat"])["bleu"]
    assert score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_bleu_pays_for_short_predictions_over_the_corpus():
    # 4 + 4 words for 4 + 6: every n-gram matches, exp(1 - 10/8).
    score = metrics.bleu(["a b c d", "e f g h i j"], ["a b c d", "e f g h"])["bleu"]
    assert score == pytest.approx(100 * math.exp(-0.25))


def test_bleu_with_references_of_different_number():
    targets = [["x x x x x", "a b c d e"], "f g h i", ["q", "r", "j k l m"]]
    assert metrics.bleu(targets, ["a b c d e", "f g h i", "j k l m"]) == {"bleu": 100.0}
    # Transposed by mistake, the second text would be a reference of the first.
    targets = [["a b c d", "e f g h"], ["i j k l", "m n o p"]]
    assert metrics.bleu(targets, ["e f g h", "i j k l"]) == {"bleu": 100.0}
    assert metrics.bleu(targets, ["i j k l", "e f g h"]) == {"bleu": 0.0}


def test_char_bleu_counts_characters():
    # 1-grams 4/5, 2-grams 2/4, 3-grams 1/3, 4-grams 0/2, smoothed to 1/4 (half of one).
    score = metrics.char_bleu(["abcde"], ["abcxe"])["char_bleu"]
    assert score == pytest.approx(100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25)
    assert metrics.char_bleu(["1984", "7"], ["1984", "7"]) == {"char_bleu": 100.0}


def test_bleu_tokenizes_unicode_punctuation():
    # "intl" cuts the quotes from the word; 13a leaves „Haus“ whole, and finds 2 words of 3.
    score = metrics.bleu(["„ Haus “ ist groß"], ["„Haus“ ist groß"])["bleu"]
    assert score == 100.0


def test_rouge_of_one_sentence():
    # Reference the cat sat on the mat (6), prediction the cat lay on a mat (6): 4 shared words,
    # F1 2/3; of 5 and 5 pairs only "the cat", 1/5; common subsequence the-cat-on-mat, 2/3.
    scores = metrics.rouge(["The cat sat on the mat"], ["the cat lay on a mat"])
    assert scores == pytest.approx({"rouge1": 200 / 3, "rouge2": 20.0, "rougeLsum": 200 / 3})


def test_rouge_lsum_compares_sentence_by_sentence():
    # In exchanged order the words agree, and so does each sentence; over the whole text the
    # common subsequence would be one sentence of two, 50.
    expected = {"rouge1": 100.0, "rougeLsum": 100.0, "rouge2": 200 / 3}
    pairs = [
        ("cats sleep. dogs bark.", "dogs bark. cats sleep."),
        ("cats sleep\ndogs bark", "dogs bark\ncats sleep"),
        ("cats sleep! dogs bark?", "dogs bark? cats sleep!"),
        ("cats sleep. dogs bark.\n", "dogs bark. cats sleep.\n"),  # Still a text of one line.
    ]
    for target, prediction in pairs:
        assert metrics.rouge([target], [prediction]) == pytest.approx(expected)


def test_rouge_takes_the_best_reference_and_the_mean_of_examples():
    scores = metrics.rouge([["no", "good day"], "x"], ["good day", "y"])
    assert scores == pytest.approx({"rouge1": 50.0, "rouge2": 50.0, "rougeLsum": 50.0})


def test_rouge_agrees_with_rouge_score_on_ascii():
    from rouge_score import rouge_scorer

    target = "It's the 3rd time_out; e-mails of Mr. X cost 5,000.50 dollars!"
    prediction = "Its third time out: emails by Mr X cost 5,000 dollars."
    theirs = rouge_scorer.RougeScorer(["rouge1", "rouge2"]).score(target, prediction)
    ours = metrics.rouge([target], [prediction])
    assert 0 < ours["rouge2"] < ours["rouge1"] < 100
    for name, score in theirs.items():
        assert ours[name] == pytest.approx(100 * score.fmeasure)


def test_rouge_counts_letters_of_other_alphabets():
    assert metrics.rouge(["Кошка спит"], ["кошка ест"])["rouge1"] == pytest.approx(50.0)
    assert metrics.rouge(["über"], ["ber"])["rouge1"] == 0.0


def test_empty_texts():
    assert metrics.exact_match([""], [""]) == {"exact_match": 100.0}
    assert metrics.accuracy([""], [" "]) == {"accuracy": 100.0}
    assert metrics.token_f1(["", "the", "cat"], ["", "", ""])["token_f1"] == pytest.approx(200 / 3)
    assert metrics.squad(["cat"], [""]) == {"em": 0.0, "f1": 0.0}
    assert metrics.bleu([""], [""]) == {"bleu": 0.0}
    assert metrics.bleu(["a b c d"], [""]) == {"bleu": 0.0}
    assert metrics.rouge([""], [""]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeLsum": 0.0}
    assert metrics.rouge(["cat"], [""]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeLsum": 0.0}


@pytest.mark.parametrize("fn", ALL)
def test_unusable_examples_are_refused(fn):
    with pytest.raises(ValueError, match="2 targets for 1 predictions"):
        fn(["a", "b"], ["a"])
    with pytest.raises(ValueError, match=r"no examples to score.*is the split empty"):
        fn([], [])
    with pytest.raises(ValueError, match="target 1 is an empty list; expected at least one"):
        fn(["a", []], ["a", "b"])
    with pytest.raises(ValueError, match=r"target 0 is 3; expected a text.*postprocess_fn"):
        fn([3], ["3"])
    with pytest.raises(ValueError, match=r"target 0 is \['a', None\]; expected a text"):
        fn([["a", None]], ["a"])
    with pytest.raises(ValueError, match="prediction 0 is 3; expected a text"):
        fn(["3"], [3])


@pytest.mark.parametrize("fn", ALL)
def test_scores_are_plain_floats_in_percent(fn):
    scores = fn(["the cat sat on the mat", "oh yes"], ["the cat sat on the mat", "oh yes"])
    assert all(type(value) is float and value == pytest.approx(100) for value in scores.values())


def test_compute_joins_scores_and_refuses_a_name_twice():
    fns = (metrics.exact_match, metrics.squad)
    scores = metrics.compute(["The cat"], ["cat"], fns)
    assert scores == {"exact_match": 0.0, "em": 100.0, "f1": 100.0}
    with pytest.raises(ValueError, match="two metrics return a score named exact_match"):
        metrics.compute(["a"], ["a"], (metrics.exact_match, metrics.exact_match))


def test_baselines():
    sources, targets = ["yes", "b", "c", "d"], ["yes", ["no", "nay"], "no", "yes"]
    train_targets = ["yes", "no", ["no", "yes"], "no"]
    fns = (metrics.exact_match,)
    assert metrics.baselines(sources, targets, train_targets, fns) == {
        "copy the input": {"exact_match": 25.0},
        "most frequent target": {"exact_match": 50.0},
    }
    # no: 2 of 3 in these, and first of the equally frequent in the next.
    frequent = metrics.baselines(["", "", ""], ["a", "no", "no"], ["no", "a", "no"], fns)
    assert frequent["most frequent target"] == {"exact_match": pytest.approx(200 / 3)}
    # Every reference counts, not the first of each target alone: b twice.
    several = [["a", "b"], ["c", "b"], ["d"]]
    frequent = metrics.baselines(["", "", ""], several, several, fns)
    assert frequent["most frequent target"] == {"exact_match": pytest.approx(200 / 3)}
    frequent = metrics.baselines(["", "", ""], ["a", "no", "no"], ["a", "no"], fns)
    assert frequent["most frequent target"] == {"exact_match": pytest.approx(100 / 3)}
    with pytest.raises(ValueError, match="no examples to score"):
        metrics.baselines(["a"], ["a"], [], fns)
    with pytest.raises(ValueError, match="1 targets for 2 predictions"):
        metrics.baselines(["a", "b"], ["a"], ["a"], fns)


def test_seqio_takes_them_as_metric_functions():
    # SeqIO recognises a metric of predictions by the names of its positional arguments.
    import inspect

    for fn in ALL:
        assert list(inspect.signature(fn).parameters) == ["targets", "predictions"]
