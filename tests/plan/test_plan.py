"""`t5jax plan` with libtpu's compiler, which needs no TPU."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from command_line import fails, run
from t5jax import sharding
from t5jax.architectures import T5Config
from t5jax.batch import train_spec
from t5jax.config import Config, DataConfig, MeshConfig, override, to_json
from t5jax.plan import compiled
from t5jax.plan.chips import CHIPS, _parse, find_topology
from t5jax.program import program

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="without the extra `plan`"
)
TINY = Config(
    model=T5Config(
        vocab_size=384,
        d_model=128,
        d_kv=64,
        d_ff=256,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dtype="bfloat16",
        dropout_rate=0.0,
    ),
    data=DataConfig(inputs_length=32, targets_length=16, batch_size=8),
    mesh=MeshConfig(data=1, fsdp=4),
)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(to_json(TINY))
    return path


@needs_libtpu
def test_a_plan_and_its_file(config, capsys, tmp_path):
    file = tmp_path / "step"
    status, out, err = run(
        capsys, "plan", config, "--topology", "v5e:2x2", "--json", "--save", file
    )
    assert status == 0, err
    plan = json.loads(out)
    assert (plan["num_devices"], plan["mesh"]["fsdp"]) == (4, 4)
    assert plan["fits"]
    D, HK, F, V = 128, 128, 256, 384
    layer = 4 * D * HK + 3 * D * F
    params = 2 * V * D + 2 * layer + 4 * D * HK + 2 * 2 * 32 + 7 * D
    assert plan["num_params"] == params
    memory = plan["memory"]
    # Float32 in quarters; the tables of biases, which have no axis to shard, whole.
    assert memory["parameters"] == 4 * ((params - 2 * 2 * 32) // 4 + 2 * 2 * 32)
    assert memory["batch"] == 8 // 4 * (32 + 3 * 16) * 4
    assert memory["left"] == memory["available"] - memory["needed"]
    assert plan["tokens"] == 8 * (32 + 16)
    assert plan["mfu"] == pytest.approx(plan["flops"] / (plan["seconds"] * 4 * 197e12))
    networks = {(c["kind"], c["network"]) for c in plan["cost"]["collectives"]}
    assert ("all-gather", "ICI") in networks
    assert all(network == "ICI" for _, network in networks)
    places = [o["place"] for o in plan["cost"]["operations"]]
    assert "optimizer" in places
    assert any(p.startswith("encoder/layers/mlp") for p in places)
    assert "libtpu" not in err  # Quiet.

    # Not for these devices, nor for this config.
    message = fails(
        capsys, "train", config, "--compiled", file, "--mesh.fsdp", "1", "--mesh.data", "-1",
        "--data.mixture", "capitals", "--data.task-files", "tests/tiny_task.py",
        "--run-dir", tmp_path / "run", "--data.inputs-length", "64",
    )  # fmt: skip
    assert "does not suit this run" in message
    assert "device was TPU v5 lite, and is cpu" in message
    assert "data.inputs_length was 32, and is 64" in message


@needs_libtpu
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("v9:2x2",), "no chip 'v9'; known are v4, v5e"),
        (("v5e",), "is 'v5e'; expected a chip and the shape of a slice in chips, such as v5e:2x2"),
        (
            ("v5p:4x4",),
            "has 2 dimensions; a slice of v5p has 3, each at least 1, such as v5p:2x2x1",
        ),
        (("v5e:3x3",), "--topology v5e:3x3 does not exist"),
        (("v5e:2x2", "--mesh.fsdp", "3"), "sequence x model = 1 x 3 x 1 x 1 does not fit 4"),
        (("v5e:2x2", "--data.batch-size", "6"), "6 is not divisible by data x fsdp = 4 devices"),
        (
            ("v5e:2x2", "--model.d-ff", "40000000", "--no-nearest"),
            "the arguments of a step need 29.50 GiB per device (parameters 28.61, ",
        ),
        (("v5e:2x2", "--rows", "4"), "without --decode it has no effect"),
        (("v5e:2x2", "--remats", "full"), "--remats has no effect without --search"),
    ],
)
def test_bad_input(config, capsys, options, message):
    assert message in fails(capsys, "plan", config, "--topology", *options)


def test_topologies_by_their_other_names():
    assert _parse("v5litepod=4x4")[0].name == "v5e"
    assert _parse("7x:2x2x1") == (CHIPS["tpu7x"], (2, 2, 1))


def test_without_libtpu_or_with_another(monkeypatch):
    monkeypatch.setattr("t5jax.plan.chips._wanted_libtpu", lambda: "==0.0.1.*")
    monkeypatch.setattr("t5jax.plan.chips.libtpu_version", lambda: None)
    with pytest.raises(ValueError, match=r"not installed.*pip install \"libtpu==0.0.1.\*\""):
        find_topology("v5e:2x2")
    monkeypatch.setattr("t5jax.plan.chips.libtpu_version", lambda: "0.0.2")
    with pytest.raises(ValueError, match=r"libtpu is 0.0.2, but jax .*pip install \"libtpu==0.0.1"):
        find_topology("v5e:2x2")


def test_a_saved_step_computes_the_same(tmp_path):
    config = override(TINY, {"mesh.fsdp": 2, "model.dtype": "float32"})
    run = program(config, sharding.make_mesh(config.mesh, jax.devices()[:2]))
    spec = train_spec(config)
    compiled.save(
        tmp_path / "step", run.lower(spec).compile(), config, spec, list(run.mesh.devices.flat)
    )
    loaded = compiled.load(str(tmp_path / "step"), run, config, spec)
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(1, 384, shape).astype(dtype)
        for name, (shape, dtype) in spec.features().items()
    }
    losses = []
    for each in (run, loaded):
        with each.use():
            state = each.create(jax.random.key(0))
            rows = sharding.shard_batch(batch, each.mesh, each.rules)
            state, metrics = each.step(state, rows)
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1]

    # What does not change the step may differ; what does is named.
    compiled.load(str(tmp_path / "step"), run, override(config, {"run_dir": "other"}), spec)
    other = override(config, {"optimizer.learning_rate": 0.5})
    with pytest.raises(ValueError, match=r"optimizer.learning_rate was 0.001, and is 0.5. Plan it"):
        compiled.load(str(tmp_path / "step"), run, other, spec)
    (tmp_path / "text").write_text("{}")
    with pytest.raises(ValueError, match=r"is no compiled step"):
        compiled.load(str(tmp_path / "text"), run, config, spec)
