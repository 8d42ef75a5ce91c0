"""Schemas that lead back to themselves without a way out."""

import re

import pytest

from t5jax.decoding.endless import check_ends

ITSELF = {"$ref": "#"}
WITHOUT_END = {
    "a reference to itself": (ITSELF, "#"),
    "two to each other": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "#/$defs/a, #/$defs/b",
    ),
    "each choice": ({"anyOf": [ITSELF, {"oneOf": [ITSELF]}]}, "#"),
    "one of all": ({"allOf": [{"type": "object"}, ITSELF]}, "#"),
    "a required property": (
        {"type": "object", "properties": {"next": ITSELF}, "required": ["next"]},
        "#",
    ),
    "any required property": (
        {"type": "object", "additionalProperties": ITSELF, "required": ["next"]},
        "#",
    ),
    "an item": ({"type": "array", "items": ITSELF, "minItems": 1}, "#"),
    "the second item": (
        {"type": ["array"], "prefixItems": [{}, {"$ref": "#/$defs/a~1b%20c"}], "minItems": 2}
        | {"$defs": {"a/b c": ITSELF}},
        "#, #/$defs/a~1b%20c",
    ),
}
WITH_AN_END = {
    "a choice": {"anyOf": [ITSELF, {"type": "null"}]},
    "an optional property": {"type": "object", "properties": {"next": ITSELF}},
    "perhaps no object": {
        "type": ["object", "null"],
        "properties": {"next": ITSELF},
        "required": ["next"],
    },
    "perhaps no item": {"type": "array", "items": ITSELF},
    "not the item behind": {"type": "array", "prefixItems": [{}], "items": ITSELF, "minItems": 1},
    "elsewhere": {"$ref": "https://example.com/schema"},
    "what llguidance refuses": {"$ref": "#/nowhere", "anyOf": 3, "type": "object", "required": {}},
    "a property of that name": {"type": "object", "properties": {"$ref": {"type": "string"}}},
}


@pytest.mark.parametrize("case", WITHOUT_END)
def test_without_a_way_out_there_is_no_answer(case):
    schema, loop = WITHOUT_END[case]
    with pytest.raises(ValueError, match=rf"its references \({re.escape(loop)}\) lead back"):
        check_ends(schema)


@pytest.mark.parametrize("case", WITH_AN_END)
def test_with_one_there_is(case):
    check_ends(WITH_AN_END[case])


def test_work_is_bounded():
    chain = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(5000)}
    check_ends({"$ref": "#/$defs/a0", "$defs": chain})
