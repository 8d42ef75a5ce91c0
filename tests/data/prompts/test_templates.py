import math
import re
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pytest

from t5jax.data.prompts.templates import JinjaTemplate, Prompt, Template, promptsource

# --- Format strings -----------------------------------------------------------------------------


def test_a_format_renders_a_row():
    template = Template("{{{x}}} {y:.1f} {z[k][0]}", "{x}")
    row = {"x": "a{b}", "y": 2, "z": {"k": ["c"]}, "unused": None}
    assert template.render(row) == ("{a{b}} 2.0 c", "a{b}", "a{b} 2 c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{q", "expected '}' before end of string in '{q'"),
        ("q}", "Single '}' encountered in format string in 'q}'; write {{ for a brace"),
        ("{}", "{} in '{}' must be the name of a field"),
        ("{0}", "{0} in '{0}' must be the name of a field"),
        ('{"a": "{q}"}', '{"a"} in \'{"a": "{q}"}\' must be the name of a field; write {{ for a'),
        ("question", "'question' names no field; expected something like {question}"),
        ("{{q}}", "names no field"),
        ("", "'' names no field"),
    ],
)
def test_a_mistyped_format_is_found_when_it_is_made(text, message):
    with pytest.raises(ValueError, match="inputs of template .*" + re.escape(message)):
        Template(text, "{a}")
    with pytest.raises(ValueError, match="targets of template '{q}': .*" + re.escape(message)):
        Template("{q}", text)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "x"}, "there is no field 'a'; the row has q"),
        (
            {"q": None, "a": "y"},
            r"field 'q' is None, a NoneType; a template needs texts or numbers, so drop such rows "
            r"by Source.clean\(drop_missing\('q'\)\)",
        ),
        (
            {"q": ["x"], "a": "y"},
            r"field 'q' is \['x'\], a list; a template needs texts or numbers",
        ),
        ({"q": math.nan, "a": "y"}, "field 'q' is nan, so it is missing; drop such rows by Source"),
        ({"q": "x", "a": Decimal("nan")}, r"field 'a' is Decimal\('NaN'\), so it is missing"),
    ],
)
def test_a_row_that_does_not_fit_a_format_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        Template("{q}", "{a}").render(row)


# --- Jinja --------------------------------------------------------------------------------------


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


# --- PromptSource -------------------------------------------------------------------------------

YAML = r"""
dataset: weather
templates:
  11111111-0000: !Template
    answer_choices: dry ||| wet
    id: 11111111-0000
    jinja: "Is it {{\"dry\"}} or {{\"wet\"}} when {{text}}?\n|||\n{{answer_choices[label]\
      \ }}"
    metadata: !TemplateMetadata
      choices_in_prompt: true
      languages:
      - en
      metrics:
      - Accuracy
      original_task: true
    name: GPT-3 style
    reference: ''
  22222222-0000: !Template
    answer_choices: null
    id: 22222222-0000
    jinja: '{% if label == 1 %} Why wet, {{ ["sir", "madam"] | choice }}?

      ||| {{ text }} {% endif %}'
    metadata: !TemplateMetadata {}
    name: why
    reference: ''
"""


def test_a_promptsource_file_loads_as_it_is(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(YAML)
    style, why = promptsource(path)
    assert (style.name, why.name) == ("GPT-3 style", "why")
    assert style.render({"text": "it rains", "label": 1}) == (
        "Is it dry or wet when it rains?",
        "wet",
        "it rains",
    )
    assert style.answer_choices({"text": "it rains", "label": 1}) == ["dry", "wet"]
    assert why.render({"text": "it rains", "label": 0}).is_empty
    asked = {why.render({"text": "it rains", "label": 1}, n).inputs for n in range(20)}
    assert asked == {"Why wet, sir?", "Why wet, madam?"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n", "there are no templates; expected PromptSource's `templates:` mapping"),
        ("templates: {}\n", "there are no templates"),
        ("templates:\n  x: !Template {name: n}\n", "template 'x' has no text `jinja:`"),
        ("templates:\n  x: {name: n, jinja: 'a'}\n", r"template 'n' has no '\|\|\|' between"),
        ("a: [\n", "templates.yaml: while parsing"),
        ("x: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_damaged_promptsource_file_is_named(content, message, tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match="templates.yaml: ") as error:
        promptsource(path)
    assert re.search(message, str(error.value))


def test_a_missing_promptsource_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot read templates from .*/no.yaml: No such file"):
        promptsource(tmp_path / "no.yaml")


def test_rendering_needs_no_tensorflow():
    program = """
import sys
sys.modules |= dict.fromkeys(["tensorflow", "seqio", "tensorflow_datasets", "transformers"])
from t5jax.data.prompts import chat, fewshot, templates
row = {"instruction": "Say", "input": "a", "output": "b"}
few = fewshot.FewShot(chat.INSTRUCTION, [(0, row)], 1, form="{inputs}={targets};", seed=0)
print(few.render(row | {"input": "c"}, 0, "test").inputs.replace("\\n", ""))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "Saya=b;Sayc\n"


def test_columns_of_any_name():
    row = {"Review.Text": "good", "#1 String": "one", "2nd": 2, "a": {"b": "nested"}, "a.b": "own"}
    template = Template("{Review.Text}|{#1 String:>5}|{2nd:.1f}|{a[b]}", '{{"a": "{a.b}"}}')
    assert template.render(row) == ("good|  one|2.0|nested", '{"a": "own"}', "good one 2 nested")
    with pytest.raises(ValueError, match=r"no field '#2'; the row has .*; write {{ for a brace"):
        Template("{#2}", "{2nd}").render(row)
    with pytest.raises(ValueError, match=r"for Jinja, give 'Review.Text' another name"):
        JinjaTemplate("{{ Review.Text }} ||| x").render(row)
