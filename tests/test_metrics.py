"""Metrics: every number is worked out by hand in the test, or computed by the field's library."""

import functools
import inspect
import math
import random
import unicodedata

import numpy as np
import pytest

from t5jax import metrics

OF_TEXT = (metrics.token_f1, metrics.squad, metrics.bleu, metrics.chrf, metrics.rouge)
OF_VALUES = (metrics.exact_match, metrics.accuracy)
OF_LABELS = (metrics.f1_micro, metrics.f1_macro, metrics.matthews)
OF_NUMBERS = (metrics.pearson, metrics.spearman)
REFERENCED = OF_TEXT + OF_VALUES
ALL = (*REFERENCED, *OF_LABELS, metrics.f1_binary, *OF_NUMBERS, metrics.entity_f1)


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


@pytest.mark.parametrize(
    ("target", "prediction", "expected"),
    [
        ("का", "की", 0.0),  # One consonant, two vowel signs.
        ("यह का है", "यह की है", 200 / 3),
        ("คน", "คืน", 0.0),
        ("m² 5½", "m 5½", 50.0),
        ("می\u200cخواهم", "می خواهم", 0.0),  # A joiner within one word, against two words.
        ("so\u00adft", "soft", 100.0),
        ("ab\u200bcd", "ab cd", 100.0),  # Space of no width.
        ("good ❤\ufe0f", "good ☀\ufe0f", 100.0),  # Symbols are no words, nor what they leave.
    ],
)
def test_words_of_rouge_are_letters_marks_and_numbers(target, prediction, expected):
    assert metrics.rouge([target], [prediction])["rouge1"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "fn", [metrics.rouge, metrics.squad, metrics.token_f1, metrics.accuracy, metrics.exact_match]
)
def test_equivalent_texts_are_equal(fn):
    text = "Çà et là une école ộ"
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert composed != decomposed
    for one, other in ((composed, decomposed), (decomposed, composed)):
        assert set(fn([one], [other]).values()) == {100.0}


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
        fn(["1", "2"], ["1"])
    with pytest.raises(ValueError, match=r"no examples to score.*is the split empty"):
        fn([], [])


@pytest.mark.parametrize("fn", REFERENCED)
def test_unusable_references_are_refused(fn):
    with pytest.raises(ValueError, match="target 1 is an empty list; expected at least one"):
        fn(["a", []], ["a", "b"])
    with pytest.raises(ValueError, match=r"target 0 is \['a', None\]; expected a text"):
        fn([["a", None]], ["a"])


@pytest.mark.parametrize("fn", OF_TEXT)
def test_metrics_of_text_refuse_numbers(fn):
    with pytest.raises(ValueError, match=r"target 0 is 3; expected a text.*postprocess"):
        fn([3], ["3"])
    with pytest.raises(ValueError, match="prediction 0 is 3; expected a text"):
        fn(["3"], [3])


@pytest.mark.parametrize("fn", REFERENCED)
def test_scores_are_plain_floats_in_percent(fn):
    scores = fn(["the cat sat on the mat", "oh yes"], ["the cat sat on the mat", "oh yes"])
    assert all(type(value) is float and value == pytest.approx(100) for value in scores.values())


# --- Numbers, labels and tags -------------------------------------------------------------------


@pytest.mark.parametrize("fn", OF_VALUES)
def test_values_are_compared_as_postprocess_gives_them(fn):
    (name,) = fn(["a"], ["a"])
    assert fn([1, 0, 2, 1], [1, 0, None, -1]) == {name: 50.0}
    assert fn([1.5, np.int64(2)], [np.float32(1.5), 2]) == {name: 100.0}
    assert fn([[1, 2], [3]], [2, 1]) == {name: 50.0}  # Several references.
    assert fn([True, False], [True, True]) == {name: 50.0}
    tags = [["O", "PER"], ["O"]]
    assert fn(tags, [["O", "PER"], ["PER"]]) == {name: 50.0}
    assert fn(np.array([1, 2]), np.array([1, 3])) == {name: 50.0}


@pytest.mark.parametrize("fn", [*OF_VALUES, *OF_LABELS])
def test_targets_that_no_prediction_can_equal_are_refused(fn):
    with pytest.raises(ValueError, match=r"targets are numbers such as 3, and predictions texts"):
        fn([3, 4], ["3", "4"])
    with pytest.raises(ValueError, match="target 1 is None; expected a text, a number"):
        fn([1, None], [1, None])
    with pytest.raises(ValueError, match="target 0 is nan; expected a text, a number"):
        fn([math.nan], [1])


def drawn(values, seed, n=60):
    rng = random.Random(seed)
    targets = [rng.choice(values) for _ in range(n)]
    return targets, [t if rng.random() < 0.6 else rng.choice(values) for t in targets]


@pytest.mark.parametrize("labels", [("yes", "no", "may be"), (0, 1), (0, 1, 2, 3)])
def test_f1_and_matthews_agree_with_scikit_learn(labels):
    from sklearn import metrics as theirs

    targets, predictions = drawn(labels, seed=1)
    predictions[:3] = [-1, 9, -1] if isinstance(labels[0], int) else ["none", "", "none"]
    for average in ("micro", "macro"):
        score = theirs.f1_score(targets, predictions, average=average)
        found = getattr(metrics, f"f1_{average}")(targets, predictions)
        assert found == {f"f1_{average}": pytest.approx(100 * score)}
    found = metrics.f1_macro(targets, predictions, labels=labels)
    score = theirs.f1_score(targets, predictions, average="macro", labels=labels)
    assert found == {"f1_macro": pytest.approx(100 * score)}
    found = metrics.matthews(targets, predictions)
    assert found == {
        "matthews": pytest.approx(100 * theirs.matthews_corrcoef(targets, predictions))
    }
    # Of one class, whatever the others are.
    positive = labels[1]
    hits = [[x == positive for x in side] for side in (targets, predictions)]
    found = metrics.f1_binary(targets, predictions, positive=positive)
    assert found == {"f1_binary": pytest.approx(100 * theirs.f1_score(*hits))}


def test_f1_by_hand():
    # yes: 1 of 2 found, 1 of 2 right, F1 1/2; no: 1 of 2 found, 1 of 1, F1 2/3; maybe: F1 0.
    targets, predictions = ["yes", "yes", "no", "no"], ["yes", "maybe", "no ", "yes"]
    assert metrics.f1_macro(targets, predictions)["f1_macro"] == pytest.approx(700 / 18)
    both = functools.partial(metrics.f1_macro, labels=("yes", "no"))
    assert both(targets, predictions)["f1_macro"] == pytest.approx(700 / 12)
    assert metrics.f1_micro(targets, predictions) == {"f1_micro": 50.0}
    found = metrics.f1_binary(targets, predictions, positive="no")
    assert found == {"f1_binary": pytest.approx(200 / 3)}


def test_matthews_by_hand():
    # TP 2, TN 1, FP 1, FN 0: (2 - 0) / sqrt(3 * 2 * 2 * 1).
    found = metrics.matthews([1, 1, 0, 0], [1, 1, 0, 1])["matthews"]
    assert found == pytest.approx(100 * 2 / 12**0.5)
    assert metrics.matthews(["a", "a"], ["a", "a"]) == {"matthews": 0.0}
    assert metrics.matthews([0, 1], [1, 0])["matthews"] == pytest.approx(-100)


def test_labels_are_one_each():
    with pytest.raises(ValueError, match="not defined for several references"):
        metrics.f1_macro([["a", "b"]], ["a"])
    assert metrics.f1_micro([["a"], ["b"]], ["a", "b"]) == {"f1_micro": 100.0}
    with pytest.raises(ValueError, match=r"lists, such as \['O'\].*there is entity_f1"):
        metrics.matthews([["O"]], [["O"]])


def test_f1_of_a_class_that_is_none():
    with pytest.raises(ValueError, match=r"class 1, which is no target; there are 'n', 'y'; name "):
        metrics.f1_binary(["y", "n"], ["y", "n"])
    with pytest.raises(ValueError, match=r"partial\(f1_binary, positive='y'\)"):
        metrics.f1_binary(["y"], ["y"])
    # A part of a split may lack it.
    assert metrics.f1_binary([0, 0], [0, 1]) == {"f1_binary": 0.0}
    # 1 is the text "1" too: precision 1, recall 1/2.
    texts = ["1", "0", "1"], ["1", "0", "other"]
    assert metrics.f1_binary(*texts) == {"f1_binary": pytest.approx(200 / 3)}
    assert metrics.f1_binary(["0"], ["0"]) == {"f1_binary": 0.0}


def test_correlations_agree_with_scipy():
    from scipy import stats

    rng = random.Random(0)
    targets = [round(rng.uniform(0, 5) * 5) / 5 for _ in range(40)]
    predictions = [t + rng.gauss(0, 1) for t in targets]
    texts = [f" {p:.1f}" for p in predictions]
    found = metrics.pearson(targets, predictions)
    assert found == {"pearson": pytest.approx(100 * stats.pearsonr(targets, predictions)[0])}
    rounded = [float(text) for text in texts]
    for given in (rounded, texts, np.array(rounded)):
        found = metrics.spearman(targets, given)
        assert found == {"spearman": pytest.approx(100 * stats.spearmanr(targets, rounded)[0])}


def test_correlations_by_hand():
    assert metrics.pearson([1, 2, 3], [30, 20, 10]) == {"pearson": pytest.approx(-100)}
    # Ranks 1 2 3 against 1 3 2: 1 - 6 * 2 / (3 * 8).
    assert metrics.spearman(["1", "2", "3"], ["0", "9.5", "2"]) == {"spearman": pytest.approx(50)}
    # What is no number counts as -1, or as said.
    for word in ("none", "nan", None, ""):
        assert metrics.spearman([0, 1, 2], [word, 1, 2]) == {"spearman": pytest.approx(100)}
    highest = functools.partial(metrics.spearman, default=9)
    assert highest([2, 1, 0], ["none", 1, 0]) == {"spearman": pytest.approx(100)}


def test_correlations_that_are_undefined_are_nan():
    for fn in OF_NUMBERS:
        for targets, predictions in [([1, 2], [3, 3]), ([1, 1], [2, 3]), ([1], [1])]:
            (score,) = fn(targets, predictions).values()
            assert math.isnan(score)


@pytest.mark.parametrize("target", ["high", None, math.nan, [1, 2]])
def test_targets_of_correlations_are_numbers(target):
    for fn in OF_NUMBERS:
        with pytest.raises(ValueError, match="target 1 is .*; expected a number"):
            fn([1, target], [1, 2])


def test_entities_agree_with_seqeval():
    from seqeval import metrics as theirs

    tags = ("O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-LOC", "S-PER")
    pairs = [drawn(tags, seed, n=12) for seed in range(20)]
    targets, predictions = [list(side) for side in zip(*pairs, strict=True)]
    expected = {
        "entity_precision": pytest.approx(100 * theirs.precision_score(targets, predictions)),
        "entity_recall": pytest.approx(100 * theirs.recall_score(targets, predictions)),
        "entity_f1": pytest.approx(100 * theirs.f1_score(targets, predictions)),
    }
    assert 20 < metrics.entity_f1(targets, predictions)["entity_f1"] < 80
    assert metrics.entity_f1(targets, predictions) == expected
    texts = [[" ".join(tags) for tags in side] for side in (targets, predictions)]
    assert metrics.entity_f1(*texts) == expected


def test_entities_by_hand():
    # Of 3 entities 1 is found as a whole; of 2 predicted ones 1 is right.
    targets = ["B-PER I-PER O B-LOC", "B-LOC O"]
    found = metrics.entity_f1(targets, ["B-PER I-PER O B-PER", "O O"])
    assert found == {
        "entity_precision": 50.0,
        "entity_recall": pytest.approx(100 / 3),
        "entity_f1": pytest.approx(40.0),
    }
    # A generated answer may have too many or too few.
    assert metrics.entity_f1(["B-PER O"], ["B-PER O B-PER B-PER"])["entity_f1"] == 100.0
    assert metrics.entity_f1(["B-PER O B-LOC"], ["B-PER"])["entity_recall"] == 50.0
    assert metrics.entity_f1(["O O"], ["O O"])["entity_f1"] == 0.0


def test_entities_need_tags():
    with pytest.raises(ValueError, match="target 1 has the tag 'PER'; expected O, or a tag that b"):
        metrics.entity_f1(["O", "O PER"], ["O", "O O"])
    with pytest.raises(ValueError, match="prediction 0 is 3; expected a list of tags, or a text"):
        metrics.entity_f1(["O"], [3])


def test_chrf_agrees_with_sacrebleu():
    from sacrebleu.metrics.chrf import CHRF

    targets = [["the cat sat on a mat", "a cat sat"], "Übung macht den Meister"]
    predictions = ["the cat is on the mat", "Übung macht Meister"]
    references = [["the cat sat on a mat", "Übung macht den Meister"], ["a cat sat", None]]
    for order in (0, 2):
        expected = CHRF(word_order=order).corpus_score(predictions, references).score
        fn = functools.partial(metrics.chrf, word_order=order)
        assert 40 < expected < 90
        assert fn(targets, predictions) == {"chrf": pytest.approx(expected)}


# --- Several metrics, and baselines -------------------------------------------------------------


def test_compute_joins_scores_and_refuses_a_name_twice():
    fns = (metrics.exact_match, metrics.squad)
    scores = metrics.compute(["The cat"], ["cat"], fns)
    assert scores == {"exact_match": 0.0, "em": 100.0, "f1": 100.0}
    with pytest.raises(ValueError, match="two metrics return a score named exact_match"):
        metrics.compute(["a"], ["a"], (metrics.exact_match, metrics.exact_match))


def test_most_frequent_target():
    assert metrics.most_frequent(["yes", "no", ["no", "yes"], "no"]) == "no"
    # The first of those that are equally frequent.
    assert metrics.most_frequent(["a", "no"]) == "a"
    # Every reference counts, not the first of each target alone.
    assert metrics.most_frequent([["a", "b"], ["c", "b"], ["d"]]) == "b"
    assert metrics.most_frequent([1, 1, 0]) == 1
    assert metrics.most_frequent([["O", "B-PER"], ["O"], ["O"]], lists=True) == ["O"]
    with pytest.raises(ValueError, match="no examples to score"):
        metrics.most_frequent([])


def test_seqio_takes_them_as_metric_functions():
    # SeqIO recognises a metric of predictions by the names of its arguments without a default.
    for fn in ALL:
        needed = [p for p in inspect.signature(fn).parameters.values() if p.default is p.empty]
        assert [p.name for p in needed] == ["targets", "predictions"]
