import math
import re
from decimal import Decimal

import pytest

from t5jax.data.prompts.format_strings import Template


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


def test_columns_of_any_name():
    row = {"Review.Text": "good", "#1 String": "one", "2nd": 2, "a": {"b": "nested"}, "a.b": "own"}
    template = Template("{Review.Text}|{#1 String:>5}|{2nd:.1f}|{a[b]}", '{{"a": "{a.b}"}}')
    assert template.render(row) == ("good|  one|2.0|nested", '{"a": "own"}', "good one 2 nested")
    with pytest.raises(ValueError, match=r"no field '#2'; the row has .*; write {{ for a brace"):
        Template("{#2}", "{2nd}").render(row)
