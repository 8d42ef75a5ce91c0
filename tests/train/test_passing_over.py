"""Batches with which training goes wrong are passed over, as if they had not been."""

import json
import math

import jax
import numpy as np
import pytest

import tiny
from hosts import by_address, run_hosts
from t5jax import sharding
from t5jax.batch import DECODER_LOSS_WEIGHTS, DECODER_TARGET_TOKENS
from t5jax.config import LoraConfig, to_json
from t5jax.data.batches.iterator import Batches
from t5jax.monitor import log
from t5jax.train import NonFiniteLoss, train
from t5jax.train.prefetch import Prefetch
from tiny import NO_EVAL, make_config, one_device, read_state  # noqa: F401

SECTIONS = {
    "train": {"steps": 6, "log_every": 2},
    "eval": NO_EVAL,
    "checkpoint": {"every": 2, "keep": 10},
}
_next = Batches.__next__


def spoil(patch, spoils, *numbers):
    """Changes some batches, counted from 1."""

    def changed(self):
        batch = _next(self)
        return spoils(dict(batch)) if self.state()["batches"] in numbers else batch

    patch.setattr(Batches, "__next__", changed)


def nan(batch):
    batch[DECODER_LOSS_WEIGHTS] = batch[DECODER_LOSS_WEIGHTS] * np.float32("nan")
    return batch


def leave_out(patch, *numbers):
    def without(self):
        while True:
            batch = _next(self)
            if self.state()["batches"] not in numbers:
                return batch

    patch.setattr(Batches, "__next__", without)


def assert_same_state(a, b, step):
    ours, theirs = read_state(a, step), read_state(b, step)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def interrupt_at(step, patch):
    fetch, calls = Prefetch.fetch, iter(range(1, 1000))

    def stop(self):
        if next(calls) > step:
            raise KeyboardInterrupt
        fetch(self)

    patch.setattr(Prefetch, "fetch", stop)


PACKED = {"data": {"pack": True, "inputs_length": 48, "targets_length": 24, "batch_size": 16}}


@pytest.mark.parametrize(
    ("action", "left_out", "sections"),
    [
        ("skip", (1, 6), PACKED | {"train": {"steps": 6, "microbatches": 2}}),
        ("rewind", (3, 4), {}),
        ("rewind", (1,), {}),  # To the beginning.
    ],
)
def test_it_ends_in_the_bits_of_a_run_without_the_batch(
    tmp_path, monkeypatch, capsys, action, left_out, sections
):
    sections = SECTIONS | sections | {"watch": {"on_nonfinite": action}}
    bad = left_out if action == "skip" else left_out[-1:]
    with monkeypatch.context() as patch:
        leave_out(patch, *left_out)
        train(make_config(tmp_path / "without", **sections))
    spoil(monkeypatch, nan, *bad)
    train(make_config(tmp_path / "whole", **sections))
    said = capsys.readouterr().err
    assert_same_state(tmp_path / "without", tmp_path / "whole", 6)
    assert said.count("loss is nan at step") == len(bad)
    assert f"bad_batches/{bad[0]:08d}.jsonl" in said
    losses = [
        [
            (line["step"], line["train/loss"])
            for line in tiny.read_metrics(run)
            if "train/loss" in line
        ]
        for run in (tmp_path / "without", tmp_path / "whole")
    ]
    assert losses[0] == losses[1]
    assert tiny.read_metrics(tmp_path / "whole")[-1]["train/passed_over"] == len(bad)

    if left_out == (1,):
        return
    # Stopped behind it, it does the same.
    config = make_config(tmp_path / "parts", **sections)
    with monkeypatch.context() as patch:
        interrupt_at(bad[0] + 1, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config)
    tiny.assert_same_bits(tmp_path / "whole", tmp_path / "parts", 6)


def test_the_batch_is_kept_as_text(tmp_path, monkeypatch):
    sections = SECTIONS | PACKED | {"train": {"steps": 2, "log_every": 100}}
    seen = []
    spoil(monkeypatch, lambda batch: seen.append(batch) or nan(batch), 2)
    with pytest.raises(
        NonFiniteLoss, match=r"loss is nan at step 2; .*/bad_batches/00000002.jsonl"
    ):
        train(make_config(tmp_path, **sections))
    path = tmp_path / "bad_batches" / "00000002.jsonl"
    about, *examples = map(json.loads, path.read_text().splitlines())
    assert (about["step"], about["batch"], about["what"]) == (2, 2, "loss is nan")
    assert {example["row"] for example in examples} == set(range(16))
    assert max(example["segment"] for example in examples) > 1  # Packed.
    numbers = [example["example"] for example in examples]
    assert len(set(numbers)) == len(numbers)
    for example in examples:
        assert example["inputs"].startswith("capitals: ")
        assert example["targets"] == example["inputs"].removeprefix("capitals: ").upper()
        assert example["target_ids"][-1] == 1
    row = [i for example in examples if example["row"] == 3 for i in example["target_ids"]]
    assert row == [i for i in seen[0][DECODER_TARGET_TOKENS][3] if i]


def test_spikes_are_skipped(tmp_path, monkeypatch, capsys):
    def never_seen(batch):
        batch[DECODER_TARGET_TOKENS] = np.where(
            batch[DECODER_LOSS_WEIGHTS] > 0, 380, batch[DECODER_TARGET_TOKENS]
        ).astype(np.int32)
        return batch

    spoil(monkeypatch, never_seen, 27)
    sections = SECTIONS | {
        "train": {"steps": 28, "log_every": 7},
        "checkpoint": {"every": 100},
        "watch": {"on_spike": "skip", "spike_threshold": 2.0, "spike_window": 20},
    }
    train(make_config(tmp_path, **sections))
    said = capsys.readouterr().err
    assert said.count("passed over") == 1
    assert "is above" in said
    assert "at step 27: passed over (1 of at most 20)" in said
    last = tiny.read_loop(tmp_path, 28)
    assert last["iterator"]["batches"] == 29
    assert len(last["guard"]["losses"]) == 21
    assert last["guard"]["passed_over"] == 1


def test_it_stops_where_too_many_are_passed_over(tmp_path, monkeypatch):
    spoil(monkeypatch, nan, 3, 4, 5)
    sections = SECTIONS | {"watch": {"on_nonfinite": "skip", "most_passed_over": 2}}
    with pytest.raises(NonFiniteLoss, match="passed over 2 before"):
        train(make_config(tmp_path, **sections))
    steps = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert steps == ["2"]
    again = SECTIONS | {"watch": {"on_nonfinite": "skip", "most_passed_over": 3}}
    train(make_config(tmp_path, **again))
    assert all(np.isfinite(x).all() for x in read_state(tmp_path, 6).values())


def test_with_an_adapter(tmp_path, monkeypatch):
    base = tiny.trained_run()  # With all of its batches.
    spoil(monkeypatch, nan, 2)
    sections = SECTIONS | {"init": {"model": str(base)}}
    sections["train"] = {"steps": 2, "log_every": 1}
    sections["watch"] = {"on_nonfinite": "skip"}
    config = make_config(tmp_path, **sections)
    train(type(config)(**vars(config) | {"adapter": LoraConfig(rank=2)}))
    losses = [line.get("train/loss") for line in log.read_metrics(tmp_path)]
    assert all(loss is None or math.isfinite(loss) for loss in losses)
    assert tiny.read_loop(tmp_path, 2)["iterator"]["batches"] == 3


SPOILS = """
import numpy as np

from t5jax.data.batches.iterator import Batches

take = Batches.__next__


def spoiled(self):
    batch = dict(take(self))
    if self.state()["batches"] == 3:
        weights = batch["decoder_loss_weights"]
        batch["decoder_loss_weights"] = weights * np.float32("nan")
    return batch


Batches.__next__ = spoiled
"""


@pytest.mark.slow(seconds=20)
def test_several_hosts_decide_alike(tmp_path, monkeypatch):
    """Each has half of the rows; the run goes back to step 2 and on without batch 3."""

    def two_devices(*config):
        return tiny._make_mesh(*config, devices=jax.devices()[:2])

    monkeypatch.setattr(sharding, "make_mesh", two_devices)
    tasks = tmp_path / "spoils.py"
    tasks.write_text(SPOILS)
    sections = SECTIONS | {
        "train": {"steps": 4, "log_every": 1},
        "data": {"task_files": (tiny.TASK_FILE, str(tasks))},
        "watch": {"on_nonfinite": "rewind"},
    }
    config = tmp_path / "config.json"
    config.write_text(to_json(make_config(tmp_path / "several", **sections)))
    ended = run_hosts(["train", str(config)], by_address(2))
    assert [e.status for e in ended] == [0, 0], [e.err for e in ended]
    assert ended[0].err.count("going back to the last checkpoint (1 of at most 20)") == 1
    with monkeypatch.context() as patch:
        spoil(patch, nan, 3)
        alone = sections | {"data": {}}
        train(make_config(tmp_path / "one", **alone))
    tiny.assert_same_bits(tmp_path / "several", tmp_path / "one", 4)
    kept = [
        (tmp_path / run / "bad_batches" / "00000003.jsonl").read_text().splitlines()
        for run in ("several", "one")
    ]
    assert kept[0][1:] == kept[1][1:]
    assert len(kept[0]) == 1 + 8
