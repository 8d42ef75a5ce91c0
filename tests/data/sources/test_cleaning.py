"""Cleaning: what each step changes or drops, what it counts, and that steps compose."""

import math
import random
from collections import Counter

import pytest

from t5jax.data.sources.cleaning import (
    collapse_whitespace,
    drop_duplicates,
    drop_missing,
    drop_near_duplicates,
    length_between,
    lower,
    normalize_unicode,
    ratio_between,
    remove_control_characters,
    remove_special_characters,
)
from t5jax.data.sources.kinds import jsonl
from t5jax.data.sources.source import Source


def clean(rows, *steps):
    """Returns the rows that are left, and what was dropped."""
    dropped = Counter()
    source = Source({"train": lambda: rows}).clean(*steps)
    return list(source.rows("train", dropped)), dict(dropped)


def changed(text, step):
    (row,), dropped = clean([{"text": text}], step)
    assert dropped == {step.name: 0}
    return row["text"]


# --- Steps that change texts --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        (normalize_unicode(), "ﬁve ㎏ Ａ e\u0301", "five kg A é"),
        (normalize_unicode(form="NFC"), "ﬁve e\u0301", "ﬁve é"),
        (normalize_unicode(form="NFD"), "é", "e\u0301"),
        (lower(), "Paris ÄΣ", "paris äς"),
        (collapse_whitespace(), " two\r\n\u00a0lines\t\u2028", "two lines"),
        (remove_special_characters(), "cafe\u0301 @ 5 €, ok?", "cafe\u0301  5 , ok?"),
        (remove_special_characters(), "日本語。हिन्दी٣", "日本語हिन्दी٣"),
        (remove_special_characters(keep="€"), "(5 €)\n", "5 €\n"),
        (remove_control_characters(), "a\x00b\x1b\x7f\x85\r\nc\rd\te", "ab\nc\nd\te"),
        (remove_control_characters(), "\ufeffa\u200bb\ud800\ufffe\U0001ffff\ufdd0", "ab"),
        (
            remove_control_characters(),
            "👩\u200d🔬 می\u200cخواهم \u200fא",
            "👩\u200d🔬 می\u200cخواهم \u200fא",
        ),
    ],
)
def test_texts_are_changed(step, text, expected):
    assert changed(text, step) == expected
    assert changed(expected, step) == expected


def test_only_the_fields_that_are_named_are_changed_and_texts_within_them():
    row = {"q": "A", "refs": ["B", {"c": "C", "n": 1}], "n": None, "x": 2.5}
    assert clean([row], lower("refs"))[0] == [row | {"refs": ["b", {"c": "c", "n": 1}]}]
    assert clean([row], lower())[0] == [row | {"q": "a", "refs": ["b", {"c": "c", "n": 1}]}]
    assert row["q"] == "A", "the source's own row was changed"


@pytest.mark.parametrize(
    "step",
    [
        lower("q", "text"),
        normalize_unicode("text"),
        collapse_whitespace("text"),
        remove_control_characters("text"),
        remove_special_characters("text"),
        drop_duplicates("text"),
        drop_near_duplicates("text"),
        length_between("text", high=1),
        ratio_between("q", "text", high=1),
    ],
)
def test_a_missing_field_is_an_error_with_its_row(step):
    message = "split 'train', row 1: .*there is no field 'text'; the row has q"
    with pytest.raises(ValueError, match=message):
        clean([{"q": "a", "text": "b"}, {"q": "a"}], step)


# --- Steps that drop rows -----------------------------------------------------------------------


def test_rows_that_say_nothing_are_dropped():
    nothing = [None, "", " \n", math.nan, [], [""], {}, {"text": []}, [None, " "]]
    something = ["a", 0, False, 0.0, ["", "a"], {"text": ["a"]}]
    rows = [{"q": "x", "a": value} for value in nothing + something] + [{"q": "x"}]
    for step in (drop_missing("q", "a"), drop_missing("a")):
        left, dropped = clean(rows, step)
        assert [row["a"] for row in left] == something
        assert dropped == {step.name: 10}
    left, dropped = clean(rows, drop_missing())
    assert len(left) == 7, "the last row has all of its own fields"
    rows = [{"answers": {"text": ["a"]}}, {"answers": {"text": []}}, {"answers": None}]
    left, dropped = clean(rows, drop_missing("answers.text.0"))
    assert (left, dropped) == (rows[:1], {"drop_missing(answers.text.0)": 2})


def test_the_first_of_equal_rows_stays():
    rows = [{"q": q, "n": n} for q, n in [("a", 0), ("b", 0), ("a", 1), ("A", 0), ("a", 0)]]
    left, dropped = clean(rows, drop_duplicates("q"))
    assert left == [rows[0], rows[1], rows[3]]
    assert dropped == {"drop_duplicates(q)": 2}
    assert clean(rows, drop_duplicates())[0] == rows[:4]
    assert clean(rows, lower("q"), drop_duplicates("q"))[0] == [rows[0], rows[1]]


def test_equal_means_equal_in_every_field_and_of_one_type():
    rows = [{"a": "x", "b": "yz"}, {"a": "xy", "b": "z"}, {"a": 1, "b": 1}, {"a": "1", "b": "1"}]
    rows += [{"a": ["x"], "b": {"c": 1, "d": 2}}, {"a": ["x"], "b": {"d": 2, "c": 1}}]
    assert clean(rows, drop_duplicates("a", "b"))[0] == rows[:5]


def test_each_pass_over_a_source_begins_anew():
    source = Source({"train": lambda: [{"q": "a"}, {"q": "a"}]})
    for step in (drop_duplicates("q"), drop_near_duplicates("q")):
        cleaned = source.clean(step)
        assert len(list(cleaned.rows("train"))) == len(list(cleaned.rows("train"))) == 1


def test_near_duplicates_are_dropped_in_a_text_of_any_script():
    rows = [
        {"text": "A cat sat on the mat in the sun, and it slept there all day long."},
        {"text": "a cat  sat on the mat in the sun, and it slept there all day long!"},
        {"text": "A dog ran after the ball on the beach, and came back quite wet."},
        {"text": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"},
        {"text": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ！"},
        {"text": ""},
        {"text": "cat"},
        {"text": "Cat"},
    ]
    left, dropped = clean(rows, drop_near_duplicates("text"))
    assert left == [rows[i] for i in (0, 2, 3, 5, 6)]
    assert dropped == {"drop_near_duplicates(text, threshold=0.8, shingle=5, num_perm=128)": 3}


def jaccard(a, b, shingle=5):
    a, b = ({text[i : i + shingle] for i in range(len(text) - shingle + 1)} for text in (a, b))
    return len(a & b) / len(a | b)


def test_near_duplicates_are_those_above_the_threshold():
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    wrong = 0
    for _ in range(60):
        text = "".join(rng.choices(letters, k=300))
        other = list(text)
        for place in rng.sample(range(300), rng.choice([1, 2, 15, 20])):
            other[place] = rng.choice(letters)
        other = "".join(other)
        share = jaccard(text, other)
        assert share > 0.9 or share < 0.7, "the pairs are chosen away from the threshold"
        _, dropped = clean([{"t": text}, {"t": other}], drop_near_duplicates("t"))
        wrong += sum(dropped.values()) != (share > 0.8)
    assert wrong <= 1  # MinHash estimates: the error is 1 / sqrt(128) = 0.09.


def test_near_duplicates_are_the_same_in_every_pass():
    rng = random.Random(1)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    rows = [{"t": " ".join(rng.choices(words, k=12))} for _ in range(100)]
    step = drop_near_duplicates("t", threshold=0.6)
    left, dropped = clean(rows, step)
    assert 0 < len(left) < 100
    assert clean(rows, step) == (left, dropped)
    assert sum(dropped.values()) == 100 - len(left)
    assert clean(left, step)[0] == left, "what is left has no near duplicates"


def test_lengths_are_bounded_on_both_sides():
    rows = [{"q": "x" * n, "refs": ["ab", "c d"]} for n in range(6)]
    left, dropped = clean(rows, length_between("q", low=2, high=4))
    assert left == rows[2:5]
    assert dropped == {"length_between(q, low=2, high=4, unit='characters')": 3}
    assert clean(rows, length_between("q", "refs", low=5))[0] == rows[5:]
    assert clean(rows, length_between("refs", low=3, high=3, unit="words"))[0] == rows
    with pytest.raises(ValueError, match="no rows left of 6: length_between.* dropped 6"):
        clean(rows, length_between("refs", high=2, unit="words"))


def test_ratios_are_bounded_and_nothing_is_divided_by_zero():
    rows = [{"de": "x" * n, "en": "y" * m} for n, m in [(1, 2), (2, 2), (5, 2), (1, 0), (0, 2)]]
    left, dropped = clean(rows, ratio_between("de", "en", low=0.5, high=2))
    assert left == rows[:2]
    assert dropped == {"ratio_between(de, en, low=0.5, high=2, unit='characters')": 3}
    assert clean(rows, ratio_between("de", "en", high=2.5))[0] == [rows[i] for i in (0, 1, 2, 4)]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: length_between("q"), "low is 0 and high is inf, which keep every row; set low"),
        (lambda: length_between("q", low=3, high=2), "low is 3 and high is 2, which keep no row"),
        (lambda: length_between("q", low=1, unit="tokens"), "'tokens'; expected characters or wo"),
        (lambda: ratio_between("q", "a"), "ratio_between: low is 0 and high is inf"),
        (lambda: normalize_unicode(form="NFX"), "form is 'NFX'; expected one of NFC, NFKC, NFD"),
        (lambda: drop_near_duplicates("q", threshold=80), "threshold is 80; expected a share"),
        (lambda: drop_near_duplicates("q", shingle=0), "shingle is 0 and num_perm 128; expected"),
        (lambda: drop_missing(["q", "a"]), r"\['q', 'a'\] is not the name of a field; expected t"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_at_once(step, message):
    with pytest.raises(ValueError, match=message):
        step()


# --- Together -----------------------------------------------------------------------------------


def test_steps_count_apart_and_what_is_left_and_dropped_is_all_there_was():
    rows = [
        {"q": "What is\x00  two and two?", "a": "4"},
        {"q": "WHAT IS TWO AND TWO?", "a": "four"},
        {"q": "What is two and two??", "a": "4"},
        {"q": None, "a": "5"},
        {"q": "Why is the sky above us so very blue?", "a": " "},
        {"q": "Which of these is a very very long one of many words?", "a": "6"},
        {"q": "How many days has a week?", "a": "7"},
    ]
    steps = [
        drop_missing("q", "a"),
        remove_control_characters("q"),
        collapse_whitespace("q"),
        lower("q"),
        length_between("q", high=10, unit="words"),
        drop_duplicates("q"),
        drop_near_duplicates("q"),
    ]
    left, dropped = clean(rows, *steps)
    expected = [
        {"q": "what is two and two?", "a": "4"},
        {"q": "how many days has a week?", "a": "7"},
    ]
    assert left == expected
    assert list(dropped) == [step.name for step in steps], "in the order of the steps"
    assert list(dropped.values()) == [2, 0, 0, 0, 1, 1, 1]
    assert len(left) + sum(dropped.values()) == len(rows)


def test_real_rows_are_counted(request):
    path = request.config.rootpath.parent / "shared/data/tasks/gsm8k.test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    source = jsonl({"test": path}).clean(
        length_between("question", high=60, unit="words"), drop_duplicates("question")
    )
    questions = [row["question"] for row in jsonl({"test": path}).rows("test")]
    short = [question for question in questions if len(question.split()) <= 60]
    dropped = Counter()
    assert len(list(source.rows("test", dropped))) == len(set(short))
    assert list(dropped.values()) == [len(questions) - len(short), len(short) - len(set(short))]
    assert 0 < len(short) < len(questions)
