import math

import numpy as np
import pytest

from t5jax.data.prompts.jinja import JinjaTemplate
from t5jax.data.prompts.template import Prompt


def test_jinja_renders_fields_conditions_loops_and_choices():
    template = JinjaTemplate(
        "{% if title is defined %}{{ title }}: {% endif %}{{ lines | join(' ') }}\n"
        "{% for c in answer_choices %}({{ loop.index }}) {{ c }} {% endfor %}\n"
        "||| {{ answer_choices[label] }}",
        choices="no ||| yes, {{ who }}",
    )
    row = {"lines": ["a", "b"], "who": "Ann", "label": 1}
    assert template.render(row)[:2] == ("a b\n(1) no (2) yes, Ann", "yes, Ann")
    assert template.render(row | {"title": "T"}).inputs.startswith("T: a b")


def test_choices_that_are_drawn_are_those_of_the_prompt():
    words = "{{ ['a', 'b', 'c', 'd'] | choice }}"
    template = JinjaTemplate("q ||| {{ answer_choices[0] }}", choices=f"{words} ||| no")
    drawn = [template.render({}, number).targets for number in range(20)]
    assert [template.answer_choices({}, number)[0] for number in range(20)] == drawn
    assert len(set(drawn)) > 1


def test_the_values_in_a_jinja_prompt_are_told_from_its_words():
    template = JinjaTemplate("Q: {{ q }} {{ 'now' }} {{ n + 1 }} ||| {{ a }}")
    assert template.render({"q": "what", "n": 1, "a": "x"}) == Prompt(
        "Q: what now 2", "x", "what 2"
    )


def test_a_separator_in_a_row_stays_text():
    row = {"q": "a ||| b", "a": ["|||"]}
    assert JinjaTemplate("{{ q }} ||| {{ a[0] }}").render(row)[:2] == ("a ||| b", "|||")
    in_a_block = "{% for x in a %}{{ x }}{% endfor %} {% if q %}ask {{ q }} ||| yes{% endif %}"
    assert JinjaTemplate(in_a_block).render(row)[:2] == ("||| ask a ||| b", "yes")


def test_a_condition_leaves_a_row_out():
    template = JinjaTemplate("{% if label >= 0 %}{{ q }} ||| {{ label }}{% endif %}")
    assert template.render({"q": "x", "label": -1}).is_empty
    assert not template.render({"q": "x", "label": 0}).is_empty
    assert JinjaTemplate("{{ q }} ||| {{ a }}").render({"q": "x", "a": " "}).is_empty


def test_a_drawn_choice_depends_on_the_row_number_alone():
    template = JinjaTemplate("{{ words | choice }} {{ words | choice }} ||| {{ a }}")
    row = {"words": list("abcdefgh"), "a": "x"}
    drawn = [template.render(row, number).inputs for number in range(40)]
    assert drawn == [template.render(row, number).inputs for number in range(40)]
    assert len(set(drawn)) > 20
    assert any(text[0] != text[2] for text in drawn)


def test_the_most_frequent_items_are_all_given():
    template = JinjaTemplate(
        "{{ words | most_frequent | join('+') }} ||| {{ [] | most_frequent }}x"
    )
    with pytest.raises(ValueError, match=r"it prints \[\], a list; expected a text or a number"):
        template.render({"words": ["b", "a", "b", "c", "a"]})
    template = JinjaTemplate("{{ words | most_frequent | join('+') }} ||| x")
    assert template.render({"words": ["b", "a", "b", "c", "a"]}).inputs == "b+a"


def test_a_template_cannot_change_a_row():
    row = {"words": ["a"]}
    template = JinjaTemplate("{{ words.append('b') or '' }}{{ words | join }} ||| x")
    assert template.render(row).inputs == template.render(row).inputs == "ab"
    assert row == {"words": ["a"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ q }}", r"template '{{ q }}' has no '\|\|\|' between prompt and answer"),
        ("a\n{{ q ||| b", "line 2: expected token"),
        ("{{ q | nothing }} ||| b", "line 1: No filter named 'nothing'"),
        ("{% if q %} ||| b", "line 1: Unexpected end of template"),
    ],
)
def test_a_mistyped_jinja_text_is_found_when_it_is_made(text, message):
    with pytest.raises(ValueError, match=message):
        JinjaTemplate(text)
    with pytest.raises(ValueError, match="template 'short', line 1: unexpected '}'"):
        JinjaTemplate("{{ q }} ||| a", name="short", choices="{{ } }}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ qq }} ||| a", "missing field: 'qq' is undefined; the row has q, n"),
        ("{{ q.x }} ||| a", "missing field: 'str object' has no attribute 'x'; the row has q, n"),
        ("{{ n }} ||| a", "it prints None, a NoneType; expected a text"),
        ("{{ q / 2 }} ||| a", "TypeError: unsupported operand"),
        ("{{ q.__class__.__mro__ }} ||| a", "access to attribute '__class__' of 'str' object"),
        ("{{ q }} ||| a ||| b", "it renders 3 parts; expected a prompt and an answer"),
    ],
)
def test_a_row_that_does_not_fit_a_jinja_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        JinjaTemplate(text).render({"q": "x", "n": None})


CHOOSING = [
    JinjaTemplate("{{ text }} ||| {{ answer_choices[label] }}", choices="no ||| yes"),
    JinjaTemplate("{{ text }} ||| {{ ('no', 'yes')[label] }}"),
    JinjaTemplate("{{ text }} ||| {% set all = ['no', 'yes'] %}{{ all[label + 0] }}"),
]


@pytest.mark.parametrize("template", CHOOSING[:2])
@pytest.mark.parametrize("label", [1, "1", " 1", 1.0, True, np.int64(1)])
def test_a_label_may_be_a_number_or_its_text(template, label):
    assert template.render({"text": "x", "label": label}).targets == "yes"


@pytest.mark.parametrize("template", CHOOSING)
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-1, "the number of a choice is -1, which often says that a row has no label; expected 0"),
        (2, r"the number of a choice is 2; expected 0 to 1, for \['no', 'yes'\]; drop such rows"),
        (0.5, "the number of a choice is 0.5; expected a whole number from 0 to 1"),
        (math.nan, "the number of a choice is nan; expected a whole number from 0 to 1"),
    ],
)
def test_a_label_that_is_no_choice_is_refused(template, label, message):
    with pytest.raises(ValueError, match=message):
        template.render({"text": "x", "label": label})


@pytest.mark.parametrize("label", ["-1", "yes", "", None])
def test_a_text_that_is_no_choice_is_refused(label):
    for template in CHOOSING[:2]:
        with pytest.raises(ValueError, match=f"the number of a choice is {label!r}"):
            template.render({"text": "x", "label": label})


def test_places_that_a_template_says_itself_are_pythons():
    template = JinjaTemplate("{{ words[-1] }} {{ words[:n][0] }} {{ t[k] }} ||| {{ words[0][i] }}")
    row = {"words": ["ab", "cd"], "n": -1, "t": {-1: "y"}, "k": -1, "i": -1}
    assert template.render(row)[:2] == ("cd ab y", "b")
    with pytest.raises(ValueError, match="missing field: 'label' is undefined; the row has text"):
        CHOOSING[0].render({"text": "x"})


def test_a_number_that_is_missing_is_not_printed():
    template = JinjaTemplate("{{ q }} ||| {{ a }}")
    with pytest.raises(ValueError, match="a value that it prints is .*nan.*, so it is missing"):
        template.render({"q": "x", "a": np.float32("nan")})


def test_a_field_may_not_hide_behind_the_choices():
    row = {"answer_choices": ["c"], "q": "x"}
    assert JinjaTemplate("{{ q }} ||| {{ answer_choices[0] }}").render(row).targets == "c"
    with pytest.raises(ValueError, match="the row has a field 'answer_choices'.*rename the field"):
        JinjaTemplate("{{ q }} ||| a", choices="a ||| b").render(row)


def test_a_column_that_is_no_name_in_jinja_is_named():
    with pytest.raises(ValueError, match=r"for Jinja, give 'Review.Text' another name"):
        JinjaTemplate("{{ Review.Text }} ||| x").render({"Review.Text": "good"})
