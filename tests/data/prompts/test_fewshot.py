import re

import pytest

from t5jax.data.prompts.fewshot import FewShot
from t5jax.data.prompts.format_strings import Template
from t5jax.data.prompts.jinja import JinjaTemplate
from t5jax.tokenizers import ByteTokenizer

TEMPLATE = Template("{q}?", "{a}")
FORM = "{inputs} {targets}\n"
ROWS = [{"q": f"q{i}", "a": f"a{i}"} for i in range(8)]


def shots(few: FewShot, row, number=0, split="test") -> list[int]:
    """Returns which of ROWS are in front of a row's prompt, in order."""
    prompt = few.render(row, number, split)
    *exemplars, last = prompt.inputs.split("\n")
    assert last == f"{row['q']}?"
    assert prompt.targets == row["a"]
    numbers = [int(re.fullmatch(r"q(\d+)\? a(\d+)", text)[1]) for text in exemplars]
    assert all(text == f"q{i}? a{i}" for i, text in zip(numbers, exemplars, strict=True))
    return numbers


def few_shot(shots=3, rows=ROWS, seed=0, template=TEMPLATE, **settings):
    return FewShot(template, list(enumerate(rows)), shots, form=FORM, seed=seed, **settings)


def test_exemplars_are_different_rows_and_never_the_row_itself():
    few = few_shot()
    for i, row in enumerate(ROWS):
        drawn = shots(few, row, i, "train")
        assert len(set(drawn)) == 3
        assert i not in drawn


def test_a_row_that_asks_the_same_is_no_exemplar_in_any_split():
    few = few_shot(shots=7)
    assert set(shots(few, ROWS[2] | {"a": "other"})) == {0, 1, 3, 4, 5, 6, 7}


def test_the_draw_depends_on_seed_split_and_row_alone():
    row = {"q": "new", "a": "x"}
    first = [shots(few_shot(), row, n) for n in range(30)]
    few = few_shot()
    assert [shots(few, row, n) for n in reversed(range(30))] == first[::-1]
    assert [shots(few_shot(seed=1), row, n) for n in range(30)] != first
    assert [shots(few_shot(), row, n, "dev") for n in range(30)] != first
    counts = [sum(drawn.count(i) for drawn in first) for i in range(8)]
    assert min(counts) >= 4  # 90 draws from 8: every row is drawn.


def test_as_many_exemplars_stay_as_the_inputs_have_room_for():
    row, tokenizer = {"q": "new", "a": "x"}, ByteTokenizer()
    # "new?" and eos take 5 tokens, "q1? a1\n" takes 7.
    for length, expected in [(4, 0), (5, 0), (11, 0), (12, 1), (18, 1), (19, 2), (26, 3), (99, 3)]:
        few = few_shot(tokenizer=tokenizer, inputs_length=length)
        drawn = shots(few, row)
        assert len(drawn) == expected
        assert drawn == shots(few_shot(), row)[:expected]


def test_one_that_is_too_long_leaves_room_for_others():
    rows = [*ROWS[:5], {"q": "long" * 20, "a": "a"}]
    row = {"q": "new", "a": "x"}
    few = few_shot(5, rows, tokenizer=ByteTokenizer(), inputs_length=40)
    counts = [len(shots(few, row, number)) for number in range(30)]
    assert set(counts) == {4, 5}  # The long one is drawn mostly, and left out.


class MergingTokenizer(ByteTokenizer):
    """Counts more for a whole than for its parts."""

    def encode(self, text):
        return super().encode(text + 5 * text.count("\n") * "x" if text.count("\n") > 1 else text)


# By its parts 26 holds three exemplars. Together and with eos, one makes 12, two make 29.
@pytest.mark.parametrize(("length", "expected"), [(26, 1), (28, 1), (29, 2)])
def test_the_whole_prompt_is_counted_not_only_its_parts(length, expected):
    row = {"q": "new", "a": "x"}
    few = few_shot(tokenizer=MergingTokenizer(), inputs_length=length)
    assert len(shots(few, row)) == expected


# "new?" takes 4 tokens, the exemplars 7 and 10, eos 1.
@pytest.mark.parametrize(("length", "expected"), [(14, {0}), (15, {0, 1}), (21, {0, 1}), (22, {2})])
def test_an_exemplar_takes_no_room_of_eos_from_a_shorter_one(length, expected):
    rows = [{"q": "q0", "a": "a0"}, {"q": "q1", "a": "a1234"}]
    few = few_shot(2, rows, tokenizer=ByteTokenizer(), inputs_length=length)
    drawn = [few.render({"q": "new", "a": "x"}, n, "test").inputs for n in range(20)]
    if expected == {2}:
        assert {text.count("?") - 1 for text in drawn} == {2}
    else:  # The short one alone, or in 15 tokens either of them: the one that is drawn first.
        assert {int(text.startswith("q1")) for text in drawn} == expected
        assert {text.count("?") - 1 for text in drawn} == {1}


def test_rows_that_the_template_leaves_out_are_no_exemplars():
    rows = [row | {"n": i} for i, row in enumerate(ROWS)]
    template = JinjaTemplate("{% if n % 2 %}{{ q }}? ||| {{ a }}{% endif %}")
    few = few_shot(4, rows, template=template)
    assert set(shots(few, {"q": "new", "a": "x", "n": 1})) == {1, 3, 5, 7}
    assert few.render({"q": "new", "a": "x", "n": 0}, 0, "test") == ("", "", "")


def test_too_few_training_rows_and_bad_ones_are_refused():
    message = "there are 2 training rows that can be exemplars for it; expected at least 3"
    with pytest.raises(ValueError, match=message):
        few_shot(rows=ROWS[:3]).render(ROWS[0], 0, "train")
    with pytest.raises(
        ValueError, match="exemplar, which is training row 1: there is no field 'a'"
    ):
        few_shot(2, [ROWS[0], {"q": "x"}]).render({"q": "new", "a": "x"}, 0, "test")
