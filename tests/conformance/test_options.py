"""No option is dead: another value of any field changes what is computed, or is refused.

Nothing runs here: what is compared are shapes of parameters and traced programs.
"""

import dataclasses
import itertools
import types
import typing
from typing import Any, Literal

import jax
import numpy as np
import pytest

from conformance.cases import ALONE, pack, random_examples
from conformance.families import FAST, VARIANTS, change
from t5jax import batch as features
from t5jax import decoding
from t5jax.hf import io
from t5jax.models import api

pytestmark = pytest.mark.filterwarnings("ignore:a Llama whose heads")

# What only the checkpoint's file says: whose it is, and how long texts were in training where no
# position is learned.
SAID = {"family": FAST, "max_positions": [v for v in FAST if not v.startswith(("gpt2", "bert"))]}
# Fixed by the family, so that every other value is refused.
FIXED = {"family", "position", "norm", "norm_plus_one", "qk_norm", "post_norms", "scale_embedding"}
# Values that need those of other fields with them.
WITH = {
    "rope_scaling": {"rope_scaling": "none", "rope_scaling_factor": None},
    "head": {"head": "token_classification", "labels": ("a", "b")},
}


def fields_of(model) -> dict[str, Any]:
    """Returns each field's type."""
    hints = typing.get_type_hints(type(model))
    return {field.name: hints[field.name] for field in dataclasses.fields(model)}


def candidates(model, field, kind):
    """Yields changes that give a field other values."""
    value = getattr(model, field)
    if field in WITH:
        yield WITH[field]
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    options = typing.get_args(kind) if is_union else (kind,)
    for option in options:
        inner = typing.get_args(option)
        if typing.get_origin(option) is Literal:
            values = inner
        elif typing.get_origin(option) is tuple and typing.get_origin(inner[0]) is Literal:
            values = [
                x for n in (1, 2) for x in itertools.product(typing.get_args(inner[0]), repeat=n)
            ]
        else:
            number = value if isinstance(value, (int, float)) else 1
            values = {
                bool: [not value],
                int: [number + 1, 2 * number, 3 * number, 7, 8],
                float: [number * 2 or 0.25, number / 4],
                types.NoneType: [None],
                tuple[int, ...]: [(7,)],
                tuple[str, ...]: [("x", "y"), ("x", "y", "z", "zz")],
            }[option]
        yield from ({field: x} for x in values if x != value)


def accepted(model, field, kind):
    """Yields the descriptions that are not refused: of numbers one, of choices all."""
    for changes in candidates(model, field, kind):
        try:
            other = change(model, **changes)
        except ValueError:
            continue
        if other != model:
            yield other
        if not isinstance(changes[field], (str, tuple)):
            return


def answers(model) -> str:
    """What a description is asked by others than its network."""
    asked = (
        "start_token_id",
        "prompt_start",
        "prompt_end",
        "end_token_ids",
        "tokenizer_ids",
        "longest_row",
    )
    return str([getattr(model, name) for name in asked])


def text_of(function, *args) -> list:
    """Returns a program's operations, in order, with their constants; quicker than its text."""
    found: list = []

    def walk(jaxpr, consts):
        number = {var: i for i, var in enumerate((*jaxpr.constvars, *jaxpr.invars))}
        found.extend(np.asarray(x).tobytes() for x in consts if not isinstance(x, jax.core.Tracer))
        for equation in jaxpr.eqns:
            found.append(equation.primitive.name)
            for x in equation.invars:
                literal = hasattr(x, "val")
                found.append(np.asarray(x.val).tobytes() if literal else number.get(x))
            for x in equation.outvars:
                number[x] = len(number)
                found.append(str(x.aval))
            inner = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
            for value in inner:
                if hasattr(value, "eqns"):
                    walk(getattr(value, "jaxpr", value), getattr(value, "consts", ()))
                elif isinstance(value, (bool, int, float, str, np.dtype)):
                    found.append(str(value))

    closed = jax.make_jaxpr(function)(*args)
    walk(closed.jaxpr, closed.consts)
    return found


def initial(model) -> list:
    return text_of(lambda: api.init_params(model, jax.random.key(0)))


def forward(model) -> list:
    batch = pack(model, random_examples(model), ALONE)
    batch = {name: x[:2] for name, x in batch.items() if not name.endswith("segment_ids")}

    def run(params, key):
        x = api.hidden(model, params, batch, dropout_rng=key)
        return api.unembed(model, params, x) if model.num_outputs else x

    return text_of(run, api.param_shapes(model), jax.random.key(0))


def writing(model) -> list:
    if model.kind == "encoder":
        return []
    batch = features.prompt_batch([[5, 6, 7]], model.kind, 2, 4)
    return text_of(lambda p: decoding.greedy(model, p, batch, 3), api.param_shapes(model))


OBSERVATIONS = (answers, initial, forward, writing)


# Those left out have the fields of t5_1_0 and of mistral, of the same networks.
@pytest.mark.parametrize("variant", [v for v in FAST if v not in ("umt5", "qwen3_local")])
def test_another_value_changes_what_is_computed_or_is_refused(variant):
    model = VARIANTS[variant]
    before: dict[Any, Any] = {}
    dead = []
    for field, kind in fields_of(model).items():
        for other in accepted(model, field, kind):
            if variant in SAID.get(field, ()):
                said, before_said = (io._table(m).write_config(m) for m in (other, model))
                assert said != before_said, field
                continue
            for observe in OBSERVATIONS:
                if observe not in before:
                    before[observe] = observe(model)
                if observe(other) != before[observe]:
                    break
            else:
                dead.append((field, getattr(other, field)))
    assert not dead


def test_every_field_takes_another_value_in_some_variant():
    taken: dict[type, set[str]] = {}
    for variant in FAST:
        model = VARIANTS[variant]
        hints = fields_of(model)
        found = {
            field for field in hints if any(True for _ in accepted(model, field, hints[field]))
        }
        taken.setdefault(type(model), set()).update(found)
    for kind, fields in taken.items():
        writes = any(type(m) is kind and m.kind != "encoder" for m in VARIANTS.values())
        refused = FIXED if writes else FIXED | {"kv_cache"}
        assert {field.name for field in dataclasses.fields(kind)} - fields <= refused, kind
