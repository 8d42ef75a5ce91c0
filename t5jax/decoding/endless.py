"""JSON schemas that no finite text satisfies, since they refer to themselves without a way out.

Their grammars are valid: they have no first token, or an answer opens one brace after the other
until it has all the tokens that it may have.
"""

from typing import Any
from urllib.parse import unquote

_MOST_STEPS = 1_000_000  # A second; schemas of people need a thousandth of it.


def check_ends(schema: dict[str, Any]) -> None:
    """Raises ValueError if every value that a JSON schema describes contains itself.

    Args:
      schema: the schema. A reference to somewhere else than its own parts may be anything.
    """
    refs, num_parts = _references(schema)
    if len(refs) ** 2 * num_parts > _MOST_STEPS:
        return
    # A reference ends if its target does without it: what is not known to end yet does not count.
    ending: set[str] = set()
    targets = {ref: _target(schema, ref) for ref in refs}
    while True:
        more = {ref for ref, to in targets.items() if ref not in ending and _ends(to, ending)}
        if not more:
            break
        ending |= more
    if not _ends(schema, ending):
        loop = ", ".join(sorted(set(targets) - ending))
        raise ValueError(
            f"no answer can satisfy the json_schema: its references ({loop}) lead back to "
            'themselves in every case; give one a way out, such as {"anyOf": [{"$ref": ...}, '
            '{"type": "null"}]}, or leave its property out of "required"'
        )


def _references(schema: Any) -> tuple[set[str], int]:
    """Returns every $ref in a schema, and how many parts it has."""
    found: set[str] = set()
    rest, number = [schema], 0
    while rest:
        part = rest.pop()
        number += 1
        if isinstance(part, dict):
            if isinstance(ref := part.get("$ref"), str):
                found.add(ref)
            rest += part.values()
        elif isinstance(part, list):
            rest += part
    return found, number


def _target(schema: Any, ref: str) -> Any:
    """Returns what a reference names; True, which anything satisfies, if that is not known."""
    if not ref.startswith("#"):
        return True
    part = schema
    for step in ref[1:].split("/")[1:]:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and key.isdecimal() and int(key) < len(part):
            part = part[int(key)]
        elif isinstance(part, dict) and key in part:
            part = part[key]
        else:
            return True
    return part


def _ends(schema: Any, ending: set[str]) -> bool:
    """Returns whether some finite value satisfies a schema, if the references in `ending` do."""
    if not isinstance(schema, dict):
        return True
    if isinstance(ref := schema.get("$ref"), str) and ref not in ending:
        return False
    for name, enough in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        parts = schema.get(name)
        if isinstance(parts, list) and parts and not enough(_ends(x, ending) for x in parts):
            return False
    kinds = schema.get("type")
    needed: list[Any] = []
    if kinds in ("object", ["object"]) and isinstance(required := schema.get("required"), list):
        properties = schema.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        others = schema.get("additionalProperties")
        needed += [properties.get(name, others) for name in required if isinstance(name, str)]
    if kinds in ("array", ["array"]) and isinstance(least := schema.get("minItems"), int):
        first = schema.get("prefixItems")
        first = first if isinstance(first, list) else []
        needed += [*first, *([schema.get("items")] if least > len(first) else [])][: max(least, 0)]
    return all(_ends(x, ending) for x in needed)
