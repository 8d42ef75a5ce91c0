"""Checkpoints: which stay, which is best, and what half-written or damaged ones do."""

import base64
import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from t5jax import checkpoint, checksums
from t5jax.architectures import T5Config
from t5jax.checkpoint import (
    Checkpoints,
    best_checkpoint,
    best_loss,
    latest_checkpoint,
)
from t5jax.checkpoint.damage import _checked
from t5jax.config import Config, InitConfig, OptimizerConfig, TrainConfig
from t5jax.convert import export_model
from t5jax.train_state import TrainState

CONFIG = Config(model=T5Config(d_model=16))


def state_of(step):
    params = {"w": jnp.arange(16.0).reshape(8, 2) + step, "b": jnp.full((3,), step, jnp.bfloat16)}
    return TrainState(jnp.int32(step), params, {"mu": params})


def save(run_dir, losses, keep=None):
    """Saves a checkpoint for each step; the value is its validation loss."""
    with Checkpoints(run_dir, keep=keep) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, state_of(step), {"at": step}, CONFIG, loss)


def restore(run_dir, step, shardings=None):
    shapes = jax.eval_shape(lambda: state_of(step))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = shardings or jax.tree.map(lambda _: one, shapes)
    with Checkpoints(run_dir) as checkpoints:
        return checkpoints.restore(run_dir / "checkpoints" / str(step), shapes, shardings)


def steps(run_dir):
    return sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir())


def assert_equal(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_round_trip_is_exact(tmp_path):
    save(tmp_path, {7: None})
    assert_equal(restore(tmp_path, 7), state_of(7))
    last = latest_checkpoint(tmp_path)
    assert last.name == "7"
    assert checkpoint.read_config(last) == CONFIG
    assert checkpoint.read_loop(last) == {"at": 7}


def test_restore_splits_over_a_mesh(tmp_path):
    save(tmp_path, {1: None})
    mesh = jax.make_mesh((8,), ("fsdp",))
    shapes = jax.eval_shape(lambda: state_of(1))
    shardings = jax.tree.map(
        lambda x: (
            jax.NamedSharding(mesh, jax.P("fsdp" if x.shape == (8, 2) else None))
            if x.shape
            else jax.NamedSharding(mesh, jax.P())
        ),
        shapes,
    )
    state = restore(tmp_path, 1, shardings)
    assert_equal(state, state_of(1))
    assert [s.data.shape for s in state.params["w"].addressable_shards] == [(1, 2)] * 8
    params = checkpoint.load_params(tmp_path / "checkpoints/1", shapes.params, shardings.params)
    assert_equal(params, state_of(1).params)
    assert params["w"].sharding == shardings.params["w"]


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (4, 1), (2, 2), (2, 1), (1, 2), (1, 1)])
def test_what_eight_devices_have_saved_any_number_goes_on_with(sizes, tmp_path):
    """Parameters and the optimizer's state have the same bits on each, in any shape of the mesh."""

    def shardings(sizes):
        devices = jax.devices()[: math.prod(sizes)]
        mesh = jax.make_mesh(sizes, ("fsdp", "model"), devices=devices)
        return jax.tree.map(
            lambda x: jax.NamedSharding(
                mesh, jax.P("fsdp", "model") if x.shape == (8, 4) else jax.P()
            ),
            shapes,
        )

    def state():
        params = {"w": jnp.arange(32.0).reshape(8, 4) / 3, "b": jnp.full((3,), 7, jnp.bfloat16)}
        return TrainState(jnp.int32(5), params, {"mu": jax.tree.map(jnp.negative, params)})

    shapes = jax.eval_shape(state)
    saved = jax.device_put(state(), shardings((4, 2)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, saved, {"at": 5, "iterator": {"row": 3}}, CONFIG)
        checkpoints.wait()
        last, damaged = checkpoint.newest_sound(tmp_path)
        restored = checkpoints.restore(last, shapes, shardings(sizes))
    assert damaged == []
    assert_equal(restored, state())
    assert len(restored.opt_state["mu"]["w"].sharding.device_set) == math.prod(sizes)
    assert checkpoint.read_loop(last)["iterator"] == {"row": 3}


def test_parameters_alone_are_read_in_another_dtype(tmp_path):
    save(tmp_path, {1: None})
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        "w": jax.ShapeDtypeStruct((8, 2), "bfloat16"),
        "b": jax.ShapeDtypeStruct((3,), "float32"),
    }
    params = checkpoint.load_params(tmp_path / "checkpoints/1", shapes, {"w": one, "b": one})
    expected = state_of(1).params
    assert_equal(
        params, {"w": expected["w"].astype("bfloat16"), "b": expected["b"].astype("float32")}
    )


def test_last_and_best_stay(tmp_path):
    save(tmp_path, {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: None, 6: math.inf, 7: math.nan}, keep=2)
    assert steps(tmp_path) == [2, 6, 7]
    # Another process knows the losses of this one's checkpoints.
    save(tmp_path, {8: 1.5, 9: 2.5, 10: None}, keep=2)
    assert steps(tmp_path) == [2, 9, 10]
    assert best_checkpoint(tmp_path).name == "2"
    save(tmp_path, {11: 0.5, 12: None, 13: None}, keep=1)
    assert steps(tmp_path) == [11, 13]
    assert best_checkpoint(tmp_path).name == "11"


@pytest.mark.parametrize(("loss", "left"), [(0.5, [2]), (3.0, [1, 2]), (math.nan, [1, 2])])
def test_a_loss_is_added_later(loss, left, tmp_path):
    """As if it had been saved with the checkpoint; the best one and the last stay."""
    save(tmp_path, {1: 1.0, 2: None}, keep=1)
    last = tmp_path / "checkpoints/2"
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.add_loss(2, loss)
    assert steps(tmp_path) == left
    assert checkpoint.is_evaluated(last)
    assert checkpoint.validation_loss(last) == (loss if loss < math.inf else math.inf)
    assert best_checkpoint(tmp_path).name == str(left[0])
    assert checksums.faults(last) == []
    assert sorted(checksums.others(last)) == ["_CHECKPOINT_METADATA", "commit_success.txt"]
    damage(last / "metrics/metrics", "flipped")
    with pytest.raises(ValueError, match=r"checkpoints/2/metrics/metrics (holds|is damaged)"):
        best_checkpoint(tmp_path)


def test_orbax_does_not_ask_whether_the_run_is_to_stop(tmp_path, monkeypatch):
    """Its numbers are not those of `distributed.StopRequest`."""

    def ask(number):
        raise AssertionError

    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", ask)
    save(tmp_path, {1: None, 2: None}, keep=1)
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: None}, 2),
        ({1: -1.0, 2: -3.0, 3: None}, 2),
        ({1: 1.0, 2: 1.0, 3: 2.0}, 2),  # Of equal losses the last.
        ({1: 0.0, 2: None}, 1),  # A loss of 0 is one.
        ({1: 1.0, 2: math.nan, 3: math.inf}, 1),  # These count as none.
        ({1: math.nan, 2: 1.0}, 2),
        ({1: math.inf, 2: None}, 2),
        ({9: None, 10: None}, 10),  # Without losses the last, by number.
    ],
)
def test_the_best_checkpoint_has_the_lowest_loss(losses, best, tmp_path):
    save(tmp_path, losses)
    assert steps(tmp_path) == list(losses)
    assert best_checkpoint(tmp_path).name == str(best)
    assert latest_checkpoint(tmp_path).name == str(max(losses))
    if losses[best] is None:
        with pytest.raises(ValueError, match="has no validation loss; train with eval.every"):
            best_loss(tmp_path)
    else:
        assert best_loss(tmp_path) == losses[best]


def test_half_written_checkpoints_are_not_seen(tmp_path):
    """What a kill leaves: Orbax renames a folder when it is whole."""
    save(tmp_path, {1: None})
    folder = tmp_path / "checkpoints"
    half = folder / "2.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    assert latest_checkpoint(tmp_path).name == best_checkpoint(tmp_path).name == "1"
    assert not checkpoint.is_checkpoint(half)
    save(tmp_path, {2: None})
    assert [p.name for p in sorted(folder.iterdir())] == ["1", "2"]
    assert_equal(restore(tmp_path, 2), state_of(2))


@pytest.mark.parametrize("part", ["state", "state/d", "state/manifest.ocdbt"])
def test_damaged_checkpoint_is_named(part, tmp_path):
    save(tmp_path, {1: None, 2: None})
    path = tmp_path / "checkpoints/2" / part
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(path.read_bytes()[:20])
    message = r"checkpoint .*/checkpoints/2 is damaged \(.*\); delete its folder to go on from the"
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints/2")
    assert_equal(restore(tmp_path, 1), state_of(1))


def test_a_truncated_array_is_damage_too(tmp_path):
    """Orbax hides what is wrong with it behind an error of its own."""
    params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}  # Too large for a manifest.
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, TrainState(jnp.int32(1), params, {}), {"at": 1}, CONFIG, None)
    for path in (tmp_path / "checkpoints/1/state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    shardings = {"w": jax.sharding.SingleDeviceSharding(jax.devices()[0])}
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match=r"checkpoints/1 is damaged \((DATA_LOSS|OUT_OF_RANGE)"):
        checkpoint.load_params(tmp_path / "checkpoints/1", shapes, shardings)


@pytest.mark.parametrize("part", ["config", "loop"])
def test_truncated_json_is_damage_too(part, tmp_path):
    save(tmp_path, {1: None})
    path = tmp_path / "checkpoints/1" / part / "metadata"
    path.write_text(path.read_text()[:-1])
    read = {"config": checkpoint.read_config, "loop": checkpoint.read_loop}[part]
    with pytest.raises(ValueError, match=r"checkpoints/1 is damaged"):
        read(tmp_path / "checkpoints/1")


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "d/1"),
        MemoryError(),
        ValueError("RESOURCE_EXHAUSTED: out of memory"),
        ValueError("Requested shape: (200,) is not compatible with the stored shape: (400,)"),
    ],
)
def test_what_says_nothing_about_the_files_is_not_called_damage(error, tmp_path, monkeypatch):
    save(tmp_path, {1: None})

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(ValueError, match=r"checkpoints/1 cannot be read: ") as caught:
        restore(tmp_path, 1)
    assert "damaged" not in str(caught.value)
    assert "delete" not in str(caught.value)


def test_a_state_of_another_network_is_not_called_damage(tmp_path):
    save(tmp_path, {1: None})
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {"w": jax.ShapeDtypeStruct((8, 2), "float32"), "c": jax.ShapeDtypeStruct((3,), "f4")}
    with pytest.raises(ValueError, match="has no parameters c, which its model has; it was saved"):
        checkpoint.load_params(tmp_path / "checkpoints/1", shapes, {"w": one, "c": one})
    config = tmp_path / "checkpoints/1/config/metadata"
    config.write_text(config.read_text().replace('"z_loss"', '"y_loss"'))
    with pytest.raises(
        ValueError, match=r"saved with another version .*loss.y_loss does not exist"
    ):
        checkpoint.read_config(tmp_path / "checkpoints/1")


@pytest.mark.parametrize(
    ("content", "what"), [("", "is empty"), ('{"loss":', "holds"), ("{}", "holds")]
)
def test_a_damaged_loss_names_its_file(content, what, tmp_path):
    save(tmp_path, {1: 1.0, 2: 2.0})
    path = tmp_path / "checkpoints/1/metrics/metrics"
    path.write_text(content)
    for ask in (best_checkpoint, best_loss, Checkpoints):
        with pytest.raises(
            ValueError, match=f"{path} {what}.* or delete the folder {path.parent}:"
        ):
            ask(tmp_path)
    shutil.rmtree(path.parent)  # As the message says.
    save(tmp_path, {3: 1.5})
    assert best_checkpoint(tmp_path).name == "3"


@pytest.mark.parametrize("name", ["t5[v2]", "a[b]/run", "a\\b", "t5*", "why?"])
def test_orbax_would_lose_arrays_below_some_names(name, tmp_path):
    """It globs the path of a checkpoint while it writes; reading is sound but for a backslash."""
    with pytest.raises(ValueError, match=r"checkpoints cannot be written below .*; choose another"):
        checkpoint.create_run_dir(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="checkpoints cannot be written below"):
        Checkpoints(tmp_path / name)
    save(tmp_path / "plain", {1: None})
    shutil.copytree(tmp_path / "plain", tmp_path / name)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: state_of(1).params)
    shardings = jax.tree.map(lambda _: one, shapes)
    copied = tmp_path / name / "checkpoints/1"
    if "\\" in name:
        with pytest.raises(ValueError, match="takes a backslash for a slash; rename the folder"):
            checkpoint.load_params(copied, shapes, shardings)
    else:
        assert_equal(checkpoint.load_params(copied, shapes, shardings), state_of(1).params)
    # The remedy: a link whose path has none of them.
    (tmp_path / "link").symlink_to(tmp_path / name)
    save(tmp_path / "link", {2: None})
    assert_equal(
        checkpoint.load_params(tmp_path / "link/checkpoints/2", shapes, shardings),
        state_of(2).params,
    )


def test_run_without_a_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="has no finished checkpoint yet; wait for the first, or"):
        best_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["/proc/t5jax", "file/run"])
def test_folder_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run folder .* cannot be written \(.*\); choose another"):
        checkpoint.create_run_dir(tmp_path / place)  # An absolute place stays what it is.


def test_a_store_of_another_kind_is_no_folder_here(tmp_path, monkeypatch):
    """Path("s3://bucket") would be a folder "s3:" of a disk that may not outlive the machine."""
    monkeypatch.chdir(tmp_path)
    for place in ("s3://bucket/run", Path("s3://bucket/run")):
        with pytest.raises(ValueError, match=r"the run's folder is .*; expected a path of this ma"):
            checkpoint.create_run_dir(place)
    with pytest.raises(ValueError, match=r"the folder to write is .*; expected a path of this ma"):
        export_model("model", "s3://bucket/out", format="ctranslate2")
    with pytest.raises(ValueError, match="the run's folder is empty; expected a path"):
        checkpoint.create_run_dir("")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_be_written_is_made_and_stays_empty(tmp_path):
    run_dir = checkpoint.create_run_dir(tmp_path / "runs" / "new")
    assert run_dir.is_dir()
    assert list(run_dir.iterdir()) == []


# --- Going on with another config -----------------------------------------------------------------

ADAFACTOR = OptimizerConfig(name="adafactor")
ADAMW = OptimizerConfig(name="adamw")


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ({"model": T5Config(d_ff=8)}, {"model": T5Config()}, "model.d_ff was 8 and is 1024"),
        ({}, {"init": InitConfig("x")}, "init.model was '' and is 'x'"),
        ({}, {"train": TrainConfig(seed=3)}, "train.seed was 0 and is 3"),
        ({}, {"optimizer": ADAMW}, "optimizer.name was 'adafactor' and is 'adamw'"),
        (
            {"optimizer": dataclasses.replace(ADAFACTOR, b1=0.9)},
            {"optimizer": ADAFACTOR},
            "optimizer.b1 was 0.9 and is None",
        ),
        (
            {"optimizer": ADAMW},
            {"optimizer": dataclasses.replace(ADAMW, weight_decay=0.1)},
            "optimizer.weight_decay was None and is 0.1",
        ),
    ],
)
def test_what_a_run_keeps(was, now, message):
    with pytest.raises(ValueError, match=f"cannot go on: {message}; set it back, or begin a new"):
        checkpoint.check_same_run(Config(**was), Config(**now))


@pytest.mark.parametrize(
    "now",
    [
        {"model": T5Config(dtype="bfloat16", scan_layers=False, remat="full", dropout_rate=0.2)},
        {"train": TrainConfig(steps=5, log_every=1, microbatches=2)},
        {"optimizer": dataclasses.replace(ADAMW, learning_rate=1.0, b1=0.5, warmup_steps=3)},
    ],
)
def test_what_a_run_may_change(now):
    checkpoint.check_same_run(Config(optimizer=ADAMW), Config(**{"optimizer": ADAMW} | now))


def test_what_a_run_goes_on_with_otherwise_is_named():
    was = Config(optimizer=ADAMW)
    rate = dataclasses.replace(ADAMW, learning_rate=1.0)
    now = Config(
        model=T5Config(dropout_rate=0.2),
        optimizer=rate,
        train=TrainConfig(steps=5),
    )
    assert checkpoint.changed_settings(was, was) == []
    assert checkpoint.changed_settings(was, now) == [
        f"model.dropout_rate was {was.model.dropout_rate} and is 0.2",
        f"optimizer.learning_rate was {ADAMW.learning_rate} and is 1.0",
    ]


def test_an_imported_state_takes_any_seed_and_keeps_the_rest():
    seeded = Config(train=TrainConfig(seed=3))
    checkpoint.check_same_run(Config(), seeded, begun=False)
    with pytest.raises(ValueError, match="optimizer.name was 'adafactor' and is 'adamw'; set"):
        checkpoint.check_same_run(
            Config(), dataclasses.replace(seeded, optimizer=ADAMW), begun=False
        )


def test_metrics_file_is_what_orbax_writes(tmp_path):
    save(tmp_path, {1: 2.5})
    written = tmp_path / "checkpoints/1/metrics/metrics"
    assert json.loads(written.read_text()) == {"loss": 2.5}


# --- Checksums ------------------------------------------------------------------------------------


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("two")
    save(run_dir, {1: 1.0, 2: 2.0})
    return run_dir


@pytest.mark.parametrize("how", ["flipped", "cut", "removed"])
def test_every_file_of_a_checkpoint_that_changes_is_named(how, two, tmp_path):
    """Orbax notices neither a wrong loss nor a bit of a small array."""
    files = [p.relative_to(two) for p in (two / "checkpoints/2").rglob("*") if p.is_file()]
    named = []
    for number, file in enumerate(files):
        run_dir = tmp_path / str(number)
        shutil.copytree(two, run_dir)
        damage(run_dir / file, how)
        below = file.relative_to("checkpoints/2").as_posix()
        if below in ("_CHECKPOINT_METADATA", "commit_success.txt"):  # Not needed on a disk.
            checkpoint.check(run_dir / "checkpoints/2")
            assert_equal(restore(run_dir, 2), state_of(2))
            continue
        if below == checksums.FILE and how == "removed":  # As an earlier version leaves it.
            with pytest.warns(UserWarning, match="has no checksums.json, since an earlier version"):
                last, said = checkpoint.newest_sound(run_dir)
            assert (last.name, said) == ("2", [])
            continue
        message = rf"checkpoint .*/2 is damaged: {below}.*; .*, such as .*/checkpoints/1$"
        with pytest.raises(ValueError, match=message):
            checkpoint.check(run_dir / "checkpoints/2")
        last, (said,) = checkpoint.newest_sound(run_dir)
        assert last.name == "1"
        assert f"is damaged: {below}" in said
        assert said.endswith(f"it now lies in {run_dir}/checkpoints/2.damaged")
        named.append(below)
        if number % 8 == 0:  # The run goes on, and writes that step anew.
            save(run_dir, {2: None}, keep=1)
            assert steps_and_others(run_dir) == ["1", "2", "2.damaged"]
    assert {"config/metadata", "loop/metadata", "metrics/metrics", "state/_METADATA"} <= {*named}
    assert len(named) > 12


def steps_and_others(run_dir):
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_files_of_others_keep_a_checkpoint(two, tmp_path):
    """Nothing is deleted that no run has written."""
    run_dir = shutil.copytree(two, tmp_path / "run")
    (run_dir / "checkpoints/1/notes").mkdir()
    (run_dir / "checkpoints/1/notes/mine.txt").write_text("mine")
    with pytest.warns(UserWarning, match=r"checkpoints/1 is kept, since it .*: notes/mine\.txt;"):
        save(run_dir, {3: 0.1, 4: None}, keep=1)
    assert steps(run_dir) == [1, 3, 4]
    shutil.rmtree(run_dir / "checkpoints/1/notes")  # As it says.
    save(run_dir, {5: None}, keep=1)
    assert steps(run_dir) == [3, 5]


def test_damage_of_an_earlier_checkpoint_does_not_stop_a_run(two, tmp_path):
    run_dir = shutil.copytree(two, tmp_path / "run")
    damage(run_dir / "checkpoints/1/metrics/metrics", "flipped")
    with pytest.raises(ValueError, match=r"checkpoints/1/metrics/metrics"):
        best_checkpoint(run_dir)
    last, (said,) = checkpoint.newest_sound(run_dir)
    assert last.name == "2"
    assert "checkpoints/1 is damaged: metrics/metrics" in said
    assert best_checkpoint(run_dir).name == "2"


def test_a_run_of_which_nothing_is_whole_is_left_as_it_is(two, tmp_path):
    run_dir = shutil.copytree(two, tmp_path / "run")
    for step in (1, 2):
        damage(run_dir / f"checkpoints/{step}/state/_METADATA", "cut")
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole: .*state/_METADATA has"):
        checkpoint.newest_sound(run_dir)
    assert steps_and_others(run_dir) == ["1", "2"]


def test_what_cannot_be_read_is_not_called_damage(two, monkeypatch):
    def refuse(file):
        raise PermissionError(13, "Permission denied", str(file))

    _checked.clear()
    monkeypatch.setattr(checksums, "crc32c", refuse)
    with pytest.raises(ValueError, match=r"checkpoints/2 cannot be read: Permission denied: ") as e:
        checkpoint.newest_sound(two)
    assert "damaged" not in str(e.value)
    assert steps_and_others(two) == ["1", "2"]


def test_a_copy_is_read_with_what_copying_leaves_beside_it(two, tmp_path):
    """cp -r and gsutil give other times, and leave temporary files."""
    run_dir = tmp_path / "run"
    shutil.copytree(two, run_dir, copy_function=shutil.copyfile)
    (run_dir / "checkpoints/2/state/d/x_.gstmp").write_bytes(b"half")
    (run_dir / "checkpoints/2/.DS_Store").write_bytes(b"")
    (run_dir / "checkpoints/2/.metrics.host.1_2-12345678").mkdir()  # Of a killed `add_loss`.
    (run_dir / "checkpoints/2/.metrics.host.1_2-12345678/metrics").write_bytes(b"half")
    others = {"3_.gstmp": b"", ".DS_Store": b"", "notes.txt": b"mine"}
    for name, content in others.items():
        (run_dir / "checkpoints" / name).write_bytes(content)
    (run_dir / "checkpoints/backup-2").mkdir()
    last, said = checkpoint.newest_sound(run_dir)
    assert (last.name, said) == ("2", [])
    assert_equal(restore(run_dir, 2), state_of(2))
    save(run_dir, {3: 0.5, 4: None}, keep=1)
    # What is not the run's own stays.
    assert steps_and_others(run_dir) == sorted(["3", "4", "backup-2", *others])


@pytest.mark.parametrize("name", ["../../1/config/metadata", "/etc/passwd"])
def test_no_file_outside_of_the_folder_is_looked_at(name, two, tmp_path):
    folder = shutil.copytree(two / "checkpoints/2", tmp_path / "2")
    files = {name: [1, "AAAAAA=="]}
    content = {"files": files, "crc32c": checksums._of_listing(files)}
    (folder / checksums.FILE).write_text(json.dumps(content))
    assert checksums.faults(folder) == ["checksums.json is damaged itself"]


def test_a_checksum_is_that_of_the_standard(tmp_path):
    """RFC 3720, appendix B.4: 32 bytes of zeros have 8a9136aa."""
    (tmp_path / "zeros").write_bytes(bytes(32))
    assert base64.b64decode(checksums.crc32c(tmp_path / "zeros")).hex() == "8a9136aa"
