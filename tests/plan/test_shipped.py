"""The steps of the shipped TPU configs: they fit, and compute and exchange what they did.

tests/golden/step_<name>.json has the facts of a compiled step, and a digest of the program that was
compiled. The same program compiles to the same step, so only a program that has changed is compiled
here: seconds for a config instead of minutes. To compile it and write its facts anew:

    T5JAX_UPDATE_GOLDEN=1 python -m pytest tests/plan/test_shipped.py -p no:xdist
"""

import ast
import base64
import hashlib
import importlib.metadata
import json
import os
import re
import warnings

import pytest

from golden import FOLDER
from t5jax import sharding, shipped
from t5jax.architectures import T5Config
from t5jax.batch import train_spec
from t5jax.config import Config, DataConfig, load_config, override
from t5jax.plan import hlo
from t5jax.plan.chips import libtpu_version
from t5jax.plan.cost import cost
from t5jax.plan.plan import compile_for, device_bytes
from t5jax.program import compiler_options, program
from tpu import needs_libtpu, squares, topology

pytestmark = needs_libtpu

STEPS = {
    "t5_base": ("t5_pretrain:base", "v5e:1x1"),
    "t5_large": ("t5_pretrain:large", "v5e:1x1"),
    "t5_c4": ("t5_c4", "v5e:2x4"),
    "ul2": ("ul2_pretrain", "v5e:2x4"),
    "flan": ("flan:t5_1_1_base", "v5e:2x4"),
    "byt5": ("byt5_finetune:byt5_base", "v5e:2x4"),
    "mt5": ("mt5_finetune:mt5_base", "v5e:2x4"),
    "t5_xxl": ("t5_pretrain:xxl", "v5p:4x4x4"),
    "gpt2_medium": ("gpt_pretrain:gpt2_medium", "v5e:2x2"),
    "llama3_8b": ("gpt_pretrain:llama3_8b", "v5p:2x2x4"),
}
# Of XXL, the four data groups have 128 rows each, as many as a target has tokens: these are the ids
# that the embedding looks up, and what it finds.
ROWS = {"s32[128,128]", "s32[128,512]", "bf16[128,128,256]", "bf16[128,512,256]"}
VERSIONS = {"jax": importlib.metadata.version("jax"), "libtpu": libtpu_version()}


def setup(name: str, changes=None):
    """Returns the lowered step of a config, its topology, and what depends on its shapes."""
    path, where = STEPS[name]
    config = override(load_config(path), changes or {})
    chips = topology(where)
    spec = train_spec(config, has_inputs=config.model.kind == "encoder_decoder")
    run = program(config, sharding.make_mesh(config.mesh, chips.devices))
    return run.lower(spec), chips, run.arguments(spec), config, spec


def digest(lowered) -> str:
    """Returns a hash of a program that does not depend on where its source lies."""
    options = json.dumps(compiler_options("tpu"), sort_keys=True)
    text = re.sub(r"\\22body\\22: \\22([^\\]+)\\22", _kernel, lowered.as_text())
    return hashlib.sha256(f"{options}\n{text}".encode()).hexdigest()


def _kernel(found: re.Match) -> str:
    """Returns a kernel's program as text: its bytecode names lines of source files."""
    from jax._src.lib import tpu
    from jax._src.lib.mlir import ir

    with ir.Context() as context:
        tpu.register_dialect(context)
        context.allow_unregistered_dialects = True
        return str(ir.Module.parse(base64.b64decode(found[1])))


def facts(lowered, chips, arguments, config, spec) -> dict:
    """Compiles a step, and returns what is known of it."""
    compiled = compile_for(lowered, chips)
    module = hlo.parse(text := compiled.as_text())
    found = cost(module, chips.chip, chips.shape)
    memory = compiled.memory_analysis()
    left = chips.chip.hbm - memory.temp_size_in_bytes - device_bytes(arguments)
    return {
        "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 3),
        "left_gib": round(left / 2**30, 3),
        "milliseconds": round(found.seconds * 1e3, 1),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "collectives": {
            f"{c.kind} {c.network}": {"count": c.count, "gib": round(c.bytes / 2**30, 3)}
            for c in sorted(found.collectives, key=lambda c: c.kind)
        },
        "squares": sorted(squares(module, spec.inputs_length, spec.decoder_length) - ROWS),
    }


def differences(golden: dict, found: dict) -> list[str]:
    """Returns in what facts differ by more than a change in passing would explain."""

    def near(name, tolerance):
        return abs(found[name] - golden[name]) <= tolerance * golden[name]

    wrong = [f"{found['squares']} have the size of scores"] if found["squares"] else []
    if found["left_gib"] < 0:
        wrong.append(f"{-found['left_gib']} GiB do not fit")
    for name, tolerance in (("temporaries_gib", 0.03), ("milliseconds", 0.03), ("kernels", 0)):
        if not near(name, tolerance):
            wrong.append(f"{name} were {golden[name]}, and are {found[name]}")
    before, now = golden["collectives"], found["collectives"]
    for kind in sorted({*before, *now}):
        was, has = before.get(kind), now.get(kind)
        same = was and has and was["count"] == has["count"]
        if not same or abs(was["gib"] - has["gib"]) > 0.01 * was["gib"]:
            wrong.append(f"{kind} was {was}, and is {has}")
    return wrong


@pytest.mark.parametrize("name", STEPS)
def test_a_shipped_step_is_the_one_whose_facts_are_golden(name):
    path = FOLDER / f"step_{name}.json"
    golden = json.loads(path.read_text()) if path.exists() else {}
    renew = os.environ.get("T5JAX_UPDATE_GOLDEN")
    assert golden or renew, f"T5JAX_UPDATE_GOLDEN=1 compiles the step and writes {path.name}"
    if golden and golden["versions"] != VERSIONS and not renew:
        pytest.skip(f"the facts are of {golden['versions']}")
    lowered, *rest = setup(name)
    program_now = digest(lowered)
    if golden and golden["program"] == program_now and golden["versions"] == VERSIONS:
        assert not golden["facts"]["squares"]
        assert golden["facts"]["left_gib"] > 0
        return
    found = facts(lowered, *rest)
    if renew:
        new = {"versions": VERSIONS, "program": program_now, "facts": found}
        path.write_text(json.dumps(new, indent=1) + "\n")
        return
    wrong = differences(golden["facts"], found)
    assert not wrong, f"the step of {STEPS[name][0]} has changed: {'; '.join(wrong)}. {__doc__}"
    warnings.warn(f"the program of {name} has changed, its facts have not. {__doc__}", stacklevel=1)


@pytest.mark.parametrize("name", STEPS)
def test_a_docstring_has_the_figures_of_the_step(name):
    path, where = STEPS[name]
    facts = json.loads((FOLDER / f"step_{name}.json").read_text())["facts"]
    text = ast.get_docstring(ast.parse(shipped.find("configs", path.split(":")[0]).read_text()))
    ms, gib = facts["milliseconds"], topology(where).chip.hbm / 2**30 - facts["left_gib"]
    assert re.search(rf"\b({ms:.0f}\sms|{ms / 1e3:.2f}\ss)\b", text), f"{ms} ms"
    assert re.search(rf"\b({gib:.1f}|{gib:.0f})\s(of|GiB)\b", text), f"{gib} GiB"


TINY = T5Config(
    vocab_size=128,
    d_model=64,
    d_kv=64,
    d_ff=64,
    num_heads=1,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dtype="bfloat16",
    dropout_rate=0.0,
    remat="full",
)


def test_a_digest_is_that_of_the_program_alone(monkeypatch):
    config = Config(model=TINY, data=DataConfig(inputs_length=32, targets_length=16, batch_size=4))
    chips = topology("v5e:2x2")

    def of(changes):
        run = program(override(config, changes), sharding.make_mesh(config.mesh, chips.devices))
        return digest(run.lower(train_spec(config)))

    first = of({})
    assert of({"run_dir": "elsewhere", "data.vocabulary": "another"}) == first
    assert of({"train.attention": "reference"}) != first
    monkeypatch.setattr("t5jax.models.t5.constrain", lambda x, *axes: x)
    assert of({}) != first


def test_facts_that_differ_are_named():
    golden = {
        "temporaries_gib": 2.0,
        "left_gib": 3.0,
        "milliseconds": 100.0,
        "kernels": 6,
        "collectives": {"all-gather ICI": {"count": 24, "gib": 1.0}},
        "squares": [],
    }
    assert differences(golden, golden | {"milliseconds": 102.0}) == []
    worse = golden | {
        "left_gib": -1.5,
        "collectives": {"all-reduce ICI": {"count": 24, "gib": 2.0}},
        "squares": ["pred[4,512,512]"],
    }
    assert differences(golden, worse) == [
        "['pred[4,512,512]'] have the size of scores",
        "1.5 GiB do not fit",
        "all-gather ICI was {'count': 24, 'gib': 1.0}, and is None",
        "all-reduce ICI was None, and is {'count': 24, 'gib': 2.0}",
    ]


def test_scores_are_noticed():
    text = """HloModule m

ENTRY %main (a: f32[]) -> f32[] {
  %a = bf16[32,12,512,64]{3,2,1,0} parameter(0)
  %b = bf16[32,114,12,512]{3,2,1,0} add(%a, %a)
  %c = (f32[4,512]{1,0}, pred[32,512,512]{2,1,0}) fusion(%a), kind=kLoop
}
"""
    expected = {"bf16[32,114,12,512]", "pred[32,512,512]"}
    assert squares(hlo.parse(text), 512, 114) == expected
