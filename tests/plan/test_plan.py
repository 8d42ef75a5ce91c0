"""`t5jax plan` with libtpu's compiler, which needs no TPU."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from command_line import fails, run
from t5jax import sharding
from t5jax.architectures import T5Config
from t5jax.batch import train_spec
from t5jax.config import Config, DataConfig, MeshConfig, override, to_json
from t5jax.plan import compiled, plan, search
from t5jax.plan.chips import CHIPS, Topology, _parse, find_topology
from t5jax.plan.cost import Cost
from t5jax.program import program
from tpu import needs_libtpu

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
    found = json.loads(out)
    assert (found["num_devices"], found["mesh"]["fsdp"]) == (4, 4)
    assert found["fits"]
    D, HK, F, V = 128, 128, 256, 384
    layer = 4 * D * HK + 3 * D * F
    params = 2 * V * D + 2 * layer + 4 * D * HK + 2 * 2 * 32 + 7 * D
    assert found["num_params"] == params
    memory = found["memory"]
    # Float32 in quarters; the tables of biases, which have no axis to shard, whole.
    assert memory["parameters"] == 4 * ((params - 2 * 2 * 32) // 4 + 2 * 2 * 32)
    assert memory["batch"] == 8 // 4 * (32 + 3 * 16) * 4
    assert memory["left"] == memory["available"] - memory["needed"]
    assert found["tokens"] == 8 * (32 + 16)
    assert found["mfu"] == pytest.approx(found["flops"] / (found["seconds"] * 4 * 197e12))
    networks = {(c["kind"], c["network"]) for c in found["cost"]["collectives"]}
    assert ("all-gather", "ICI") in networks
    assert all(network == "ICI" for _, network in networks)
    places = [o["place"] for o in found["cost"]["operations"]]
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
@pytest.mark.slow
def test_a_search_and_a_plan_of_decoding(config, capsys):
    # Without the kernels, which take long to compile.
    here = ("plan", config, "--topology", "v5e:2x2", "--json", "--train.attention", "reference")
    options = ("--search", "--remats", "none", "--max-compiles", 1)
    status, out, err = run(capsys, *here, *options)
    assert status == 0, err
    best, *others = json.loads(out)
    assert (best["reason"], best["plan"]["what"]) == ("", "train")
    assert best["plan"]["seconds"] > 0
    assert {t["reason"] for t in others if t["changes"]["mesh.model"] == 1} == {
        "not compiled: 1 programs were (--max-compiles)"
    }

    status, out, err = run(capsys, *here, "--decode", "--rows", 8)
    assert status == 0, err
    found = json.loads(out)
    assert (found["what"], found["rows"], found["tokens"], found["flops"]) == ("decode", 8, 8, 0)
    # Two rows a device: keys and values of 32 tokens of input and 16 to write, two heads of 64 in
    # bfloat16; beside them, masks and positions.
    kept = 2 * (2 * (32 + 16) * 2 * 64 * 2)
    assert kept < found["memory"]["batch"] < 1.01 * kept


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
        (("v5e:2x2", "--rows", "4"), "without --decode or --serve it has no effect"),
        (("v5e:2x2", "--serve", "--decode"), "--serve and --decode do not go together"),
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


@pytest.fixture
def compiled_here(tmp_path):
    """Nothing comes from the cache: a CPU's program from there cannot be serialized again."""
    folder = jax.config.jax_compilation_cache_dir
    compilation_cache.set_cache_dir(str(tmp_path / "programs"))
    compilation_cache.reset_cache()
    yield
    compilation_cache.set_cache_dir(folder)
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("compiled_here")
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


# --- Searching, with a compiler that adds up ------------------------------------------------------


@pytest.fixture
def compiles(monkeypatch):
    """Lists what is compiled: a step as long as fsdp is wide, some GiB a row."""
    tried = []

    def plan_step(config, topology, spec):
        tried.append(config)
        rows = spec.batch_size // config.train.microbatches // 4
        per_row = dict(zip(search.REMATS, (8, 6, 4, 3, 2), strict=True))[config.model.remat]
        memory = plan.Memory(0, 0, 0, rows * per_row * 2**30, 0, 15 * 2**30)
        seconds = config.mesh.fsdp * (1 if config.model.remat == "none" else 2)
        cost = Cost(seconds, 0, 0, [], [], [])
        mesh = dict(data=1)
        found = plan.Plan(
            topology.title, 4, mesh, "", "", "train", spec.batch_size, 100, {}, 0, memory, cost,
            1, 1.0,
        )  # fmt: skip
        return found, None

    monkeypatch.setattr(search, "plan_step", plan_step)
    return tried


def four_devices(slices=1):
    return Topology("v5e:2x2", CHIPS["v5e"], (2, 2), slices, tuple(jax.devices()[:4]))


def test_a_search_ranks_what_fits_and_compiles_nothing_impossible(compiles):
    config = override(TINY, {"model.num_heads": 1, "model.d_kv": 128})
    trials = search.search(config, four_devices(), train_spec(config), remats=("none", "full"))
    # One head cannot be divided: no mesh with tensor parallelism is compiled.
    assert len(compiles) == 6
    best = trials[0]
    assert (best.changes["mesh.fsdp"], best.changes["model.remat"]) == (1, "full")
    rejected = {
        (t.changes["mesh.fsdp"], t.changes["model.remat"]): t.reason
        for t in trials
        if t.changes["mesh.model"] == 1 and t.reason
    }
    assert rejected == {(n, "none"): "1.00 GiB too much" for n in (1, 2, 4)}
    divided = [t.reason for t in trials if t.changes["mesh.model"] > 1]
    assert len(divided) == 6
    assert all("is not divisible by the" in reason for reason in divided)


def test_a_search_stops_at_its_limit(compiles):
    spec = train_spec(TINY)
    trials = search.search(TINY, four_devices(), spec, remats=("none",), max_compiles=2)
    assert len(compiles) == 2
    # Of the other four meshes one is impossible: two heads are not divided by four.
    assert sum("not compiled: 2 programs were" in t.reason for t in trials) == 3
    assert len(trials) == 6


def test_the_nearest_config_that_fits(compiles):
    config = override(TINY, {"data.batch_size": 64})
    spec = dataclasses.replace(train_spec(config))
    found = search.nearest(config, four_devices(), spec)
    # 16 rows a device are too many under each policy; in four parts 4 are not.
    assert found.changes == {"model.remat": "full", "train.microbatches": 4}
    assert search.describe_changes(found.changes) == "--model.remat full --train.microbatches 4"
    assert [c.model.remat for c in compiles] == [*search.REMATS[1:], "full", "full"]
