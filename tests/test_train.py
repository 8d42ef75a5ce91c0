"""The loop: it learns, goes on in the same bits wherever it was stopped, and says what it does."""

import dataclasses
import itertools
import math
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import tiny
from t5jax import checkpoint, distributed, pretrained, sharding
from t5jax.batch import BatchSpec
from t5jax.cli import START_AGAIN, main
from t5jax.config import (
    AxisRules,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    InitConfig,
    MeshConfig,
    TrainConfig,
    from_json,
    to_json,
)
from t5jax.convert import export_model, import_model
from t5jax.data import pipeline, registry
from t5jax.data.batches.examples import Taken
from t5jax.evaluation import Evaluator, evaluate_model
from t5jax.monitor import log, progress
from t5jax.source import find
from t5jax.train import LoopState, NonFiniteLoss, evaluations, train
from t5jax.train.prefetch import Fetched, Prefetch
from t5jax.train.reports import Reports
from tiny import (
    NO_EVAL,
    assert_same_bits,
    eight_devices,  # noqa: F401
    make_config,
    one_device,  # noqa: F401
    read_loop,
    read_state,
    trained_run,
)


def interrupt_at(step, monkeypatch):
    """Makes the loop stop as by Ctrl-C when it fetches the batch after `step`."""
    fetch, calls = Prefetch.fetch, iter(range(1, 1_000_000))

    def stop(self):
        if next(calls) > step:
            raise KeyboardInterrupt
        fetch(self)

    monkeypatch.setattr(Prefetch, "fetch", stop)


# --- It trains, and leaves what it promises -------------------------------------------------------


def test_loss_falls_and_metrics_have_each_step_once():
    lines = log.read_metrics(trained_run())
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert list(losses) == [2, 4, 6, 8, 10]
    assert losses[2] > 5  # Random: log(384) is 5.95.
    assert losses[10] < losses[2] - 1.5
    evaluated = [line["step"] for line in lines if "validation/loss" in line]
    assert evaluated == [5, 10]
    rates = [line for line in lines if "train/tokens_per_second" in line]
    assert [line["step"] for line in rates] == [2, 4, 6, 8, 10]
    assert all(line["train/steps_per_second"] > 0 for line in rates)
    for line in rates:  # Every row has a prompt of 11 to 14 bytes and eos, and an answer.
        assert 8 * 13 < line["train/tokens_per_second"] / line["train/steps_per_second"] < 8 * 21


def test_reported_loss_is_nll_and_z_loss():
    for line in log.read_metrics(trained_run()):
        if "train/loss" in line:
            # z_loss is 1e-4 times log(Z)^2 of at least log(384)^2, roughly.
            assert 1e-4 < line["train/loss"] - line["train/nll"] < 1e-2
            assert line["train/learning_rate"] == pytest.approx(1e-2)


def test_folder_of_a_run():
    run_dir = trained_run()
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    events = list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert any(b"train/loss" in path.read_bytes() for path in events)
    assert from_json((run_dir / "t5jax_config.json").read_text()).model == tiny.TINY.model
    model = pretrained.load(str(run_dir))
    assert model.tokenizer.encode("ab") == [100, 101]
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["10", "5"]


def test_what_a_person_sees(tmp_path, capsys):
    config = make_config(tmp_path, train={"steps": 2}, eval={"every": 2, "num_samples": 2})
    train(config)
    out, err = capsys.readouterr()
    assert out == ""
    assert "parameters on 1 cpu device" in err
    assert "step 2/2, loss" in err
    assert "step 2: validation loss" in err
    assert err.count("  prediction ") == err.count("  input  ") == 2
    assert "  capitals: perplexity " in err
    assert "exact_match 0.00" in err
    assert re.search(
        r"^[0-9.]+ s: steps [0-9.]+ %, waiting for input .*, other [0-9.]+ %$", err, re.M
    )
    assert f"done: {tmp_path}" in err
    samples = [line for line in log.read_metrics(tmp_path) if "validation/capitals/samples" in line]
    assert samples[0]["validation/capitals/samples"].count("prediction") == 2

    train(config)  # Again: there is nothing to do.
    err = capsys.readouterr().err
    assert "step 2 is reached, train.steps is 2; raise it to go on" in err
    assert "reading tasks" not in err


def test_how_often_and_how_much_is_measured(tmp_path):
    sections = {
        "train": {"steps": 5, "log_every": 2},
        "eval": {"every": 3, "num_examples": 2, "max_tokens": 1, "num_samples": 3},
        "checkpoint": {"every": 4, "keep": 3},
    }
    train(make_config(tmp_path, **sections))
    lines = log.read_metrics(tmp_path)
    # The last step has a line, an evaluation and a checkpoint of its own.
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 5]
    assert [line["step"] for line in lines if "validation/loss" in line] == [3, 5]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4", "5"]
    samples = [line[key] for line in lines for key in line if key.endswith("/samples")]
    predictions = [re.findall("- prediction: `(.*)`", text) for text in samples]
    assert [len(texts) for texts in predictions] == [2, 2]
    for text in itertools.chain(*predictions):  # One id at most.
        assert re.fullmatch(r".?|<extra_id_\d+>", text)


def test_what_is_reported_does_not_change_the_run(tmp_path):
    for every in (1, 2):
        changes = {"train": {"steps": 3, "log_every": every}, "watch": {"norms": True}}
        train(make_config(tmp_path / str(every), eval=NO_EVAL, **changes))
    ours, theirs = (read_state(tmp_path / name, 3) for name in "12")
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    often, seldom = (
        {line["step"]: line for line in log.read_metrics(tmp_path / name)} for name in "12"
    )
    norms = [name for name in seldom[2] if "norm/" in name or "ratio/" in name]
    assert len(norms) == 3 * 11
    assert [often[2][name] for name in norms] == [seldom[2][name] for name in norms]


# --- Pieces of the loop ---------------------------------------------------------------------------


def after_losses(*losses):
    state = LoopState()
    for step, loss in enumerate(losses, start=1):
        state.add(step, loss)
    return state


def test_an_equal_loss_is_no_better():
    state = after_losses(2.0, 2.0, 2.0)
    assert (state.best_step, state.best_loss, state.evaluations_since_best) == (1, 2.0, 2)
    assert [state.stops(patience) for patience in (None, 1, 2, 3)] == [False, True, True, False]
    assert state.reason() == "2 evaluations without a loss below 2.0000"


@pytest.mark.parametrize(
    ("losses", "best_step", "since"),
    [
        ((3.0, 2.0, 2.5, 1.0), 4, 0),
        ((3.0, math.nan, math.inf), 1, 2),
        ((math.nan, 3.0, -math.inf), 2, 1),
        ((0.0, 1.0), 1, 1),  # A loss of 0 is one.
    ],
)
def test_the_best_loss_is_finite_and_the_lowest(losses, best_step, since):
    state = after_losses(*losses)
    assert (state.best_step, state.evaluations_since_best) == (best_step, since)
    assert state.best_loss == losses[best_step - 1]


def test_without_a_finite_loss_there_is_no_best():
    state = after_losses(math.nan)
    assert (state.best_step, state.best_loss) == (0, None)
    assert state.reason() == "1 evaluations without a loss that is finite"


class Recorder:
    """A writer and a bar that keep what they are told."""

    def __init__(self):
        self.lines, self.updates, self.kept = [], [], []

    def write_scalars(self, step, scalars):
        self.lines.append((step, scalars))

    def update(self, step, **values):
        self.updates.append((step, values))


def make_reports(sums, start=0, **fields):
    recorder = Recorder()
    config = make_config("unused", train={"steps": 5, "log_every": 2} | fields)
    speed = progress.Throughput(iter(range(100)).__next__)
    state = LoopState(sums=sums)

    def keep(batch, about):
        recorder.kept.append((batch.number, about))
        return Path("somewhere")

    made = Reports(config, recorder, recorder, speed, lambda n: 10.0 * n, state, start, keep)
    return made, recorder, state


def sums_of(loss, nll, correct, tokens, grad_norm):
    return {"loss": loss, "nll": nll, "correct": correct, "tokens": tokens, "grad_norm": grad_norm}


def fetched(number, num_tokens=1):
    return Fetched({}, num_tokens, Taken([], {}, {}), {"batches": number})


def test_a_line_has_the_means_of_the_steps_since_the_last_one():
    reports, recorder, state = make_reports({})
    reports.add(sums_of(8.0, 6.0, 1.0, 4.0, 1.0), fetched(1, 100))
    reports.add(sums_of(4.0, 3.0, 4.0, 12.0, 4.0), fetched(2, 50))
    # A step is read when the next one is under way.
    assert (recorder.updates, recorder.lines) == ([(1, {})], [])
    reports.add(sums_of(2.0, 1.0, 3.0, 4.0, 2.0), fetched(3, 70))
    # Per token of both steps, not a mean of means; the rate is that of the update before step 2.
    expected = {
        "train/loss": 12 / 16,
        "train/nll": 9 / 16,
        "train/token_accuracy": 100 * 5 / 16,
        "train/grad_norm": 2.5,
        "train/learning_rate": 10.0,
        "train/target_tokens": 16,
        "train/steps_per_second": 1.0,
        "train/tokens_per_second": 50.0,  # The first step is that of the compilation.
    }
    assert recorder.lines == [(2, expected)]
    assert recorder.updates[1:] == [(2, {"loss": 12 / 16, "tokens_per_second": 50.0, "mfu": None})]
    reports.flush()
    reports.save(fetched(3))
    # What a checkpoint of step 3 remembers for the line of step 4.
    assert state.sums == sums_of(2.0, 1.0, 3.0, 4.0, 2.0) | {"steps": 1}
    assert (state.target_tokens, state.iterator) == (20, {"batches": 3})
    again, recorder, state = make_reports(state.sums, start=3)
    again.add(sums_of(4.0, 3.0, 1.0, 4.0, 4.0), fetched(4, 10))
    again.add(sums_of(1.0, 1.0, 0.0, 0.0, 0.0), fetched(5, 10))
    again.flush()
    assert [step for step, _ in recorder.lines] == [4, 5]  # The last step has a line too.
    line = recorder.lines[0][1]
    assert line["train/loss"] == 6 / 8
    assert line["train/token_accuracy"] == 50.0
    assert line["train/grad_norm"] == 3.0
    assert recorder.lines[1][1]["train/loss"] == 1.0  # Without a token nothing is divided by 0.


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_stops_the_run(name, value):
    reports, recorder, _ = make_reports({}, start=1)
    reports.add(sums_of(1.0, 1.0, 1.0, 1.0, 1.0) | {name: value}, fetched(2))
    with pytest.raises(NonFiniteLoss, match=f"{name} is {value} at step 2; the last good"):
        reports.flush()
    assert recorder.lines == []
    assert [(number, about["what"]) for number, about in recorder.kept] == [
        (2, f"{name} is {value}")
    ]


class Iterator:
    """Batches of this process, which has half of the rows."""

    spec = BatchSpec(4, 3, 2)

    def __init__(self):
        self.step = 0

    def __next__(self):
        self.step += 1
        inputs = np.full((2, 3), self.step, np.int32)
        return {"encoder_input_tokens": inputs, "decoder_target_tokens": inputs[:, :2] * 0 + 1}

    def state(self):
        return {"batches": self.step}

    def taken(self):
        return Taken([[4 * self.step + i] for i in range(4)], {}, {})


def test_a_batch_comes_with_the_position_after_it_and_the_tokens_of_all_processes():
    batches = Prefetch(Iterator(), sharding.make_mesh(MeshConfig()), AxisRules())
    for step in (1, 2):
        batch = next(batches)
        batches.fetch()
        assert np.asarray(batch.arrays["encoder_input_tokens"]).tolist() == [[step] * 3] * 2
        assert batch.num_tokens == 2 * (6 + 4)
        assert batch.number == step
        assert batch.taken.numbers[0] == [4 * step]


# --- Going on -------------------------------------------------------------------------------------


def test_resumed_run_ends_in_the_same_bits(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(8, patch)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(tmp_path))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["5"]
    train(make_config(tmp_path))
    err = capsys.readouterr().err
    assert "going on from step 5" in err
    assert "falls until" not in err
    assert "otherwise" not in err
    assert_same_bits(tmp_path, trained_run(), 10)
    assert tiny.read_metrics(tmp_path) == tiny.read_metrics(trained_run())


def test_resume_with_packing_microbatches_and_another_optimizer(tmp_path, monkeypatch, capsys):
    """Packed rows hold examples whose number is not the number of rows."""
    sections = {
        "data": {"pack": True, "inputs_length": 48, "targets_length": 24, "batch_size": 16},
        "optimizer": {
            "name": "adafactor",
            "b1": 0.9,
            "clip_norm": 1.0,
            "weight_decay": 0.1,
            "schedule": "linear",
        },
        "train": {"steps": 6, "log_every": 4, "microbatches": 2},
        "eval": NO_EVAL,
        "checkpoint": {"every": 3},
    }
    train(make_config(tmp_path / "whole", **sections))
    config = make_config(tmp_path / "parts", **sections)
    with monkeypatch.context() as patch:
        interrupt_at(4, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config)
    assert "falls until" not in capsys.readouterr().err  # It falls as it did.
    assert_same_bits(tmp_path / "whole", tmp_path / "parts", 6)
    # The line of step 4 has the mean of steps 1 to 4, though a start lies between them.
    metrics = tiny.read_metrics(tmp_path / "parts")
    assert metrics == tiny.read_metrics(tmp_path / "whole")
    assert [line["step"] for line in metrics] == [4, 6]


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "muon", "learning_rate": 1e-2, "ema": 0.5, "schedule": "wsd", "decay_steps": 2},
        {"name": "schedule_free", "learning_rate": 3e-2, "warmup_steps": 2},
    ],
    ids=["muon_ema", "schedule_free"],
)
def test_averages_are_resumed_evaluated_and_exported(tmp_path, monkeypatch, optimizer):
    sections = {
        "optimizer": optimizer,
        "train": {"steps": 4, "log_every": 2},
        "eval": {"every": 4, "generate": False},
        "checkpoint": {"every": 2},
    }
    config = make_config(tmp_path / "parts", **sections)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config)
    train(make_config(tmp_path / "whole", **sections))
    assert_same_bits(tmp_path / "whole", tmp_path / "parts", 4)

    state = read_state(tmp_path / "whole", 4)
    path = "['decoder']['layers']['mlp']['wo']['kernel']"
    trained, averaged = (state.get(p + path) for p in ("['params']", "['opt_state']['average']"))
    source = find(str(tmp_path / "whole"))
    read = source.read()[1]["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    # Schedule-free's parameters are the average.
    np.testing.assert_array_equal(read, trained if averaged is None else averaged)
    assert (averaged is None) == (optimizer["name"] == "schedule_free")
    assert averaged is None or np.abs(averaged - trained).max() > 1e-4
    # The loss that training reported is that of the parameters that are read.
    scores = evaluate_model(source, split="validation", show=False, resamples=0, batch_size=8)
    loss = tiny.read_metrics(tmp_path / "whole")[-1]["validation/loss"]
    assert scores["capitals"]["model"]["loss"] == pytest.approx(loss, rel=1e-5)
    other = {"ema": None, "decay_steps": None, "schedule": "constant"} if "ema" in optimizer else {}
    other = sections | {"optimizer": {"name": "adamw"} if not other else optimizer | other}
    with pytest.raises(ValueError, match=r"optimizer\.(ema|name) was"):
        train(make_config(tmp_path / "whole", **other))


@pytest.mark.slow
@pytest.mark.usefixtures("eight_devices")
def test_run_goes_on_with_another_mesh(tmp_path, capsys):
    """One device, then eight that split parameters and batch."""
    run_dir = trained_run(copy_to=tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / "10")
    mesh = MeshConfig(data=2, fsdp=2, model=2)
    evaluation = {"every": 10, "generate": False}
    train(dataclasses.replace(make_config(run_dir, eval=evaluation), mesh=mesh))
    err = capsys.readouterr().err
    assert "parameters on 8 cpu devices (data 2 x fsdp 2 x model 2)" in err
    ours, expected = read_state(run_dir, 10), read_state(trained_run(), 10)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-3, atol=2e-4, err_msg=name)
    scores = tiny.read_metrics(run_dir)[-1]
    assert scores.keys() >= {"validation/loss", "validation/capitals/perplexity"}
    assert not [name for name in scores if "exact_match" in name]  # Nothing was generated.


@pytest.mark.slow
def test_a_schedule_that_depends_on_steps_says_so(tmp_path, capsys):
    cosine = {"schedule": "cosine"}
    train(make_config(tmp_path, optimizer=cosine, train={"steps": 4}, eval=NO_EVAL))
    capsys.readouterr()
    train(make_config(tmp_path, optimizer=cosine, train={"steps": 8}, eval=NO_EVAL))
    err = capsys.readouterr().err
    assert "the cosine schedule falls until step 8 from here on; so far it fell until 4" in err
    rates = [line["train/learning_rate"] for line in tiny.read_metrics(tmp_path)]
    # Steps 2 and 4 of a run of 4, then 6 and 8 of a run of 8: after 1, 3, 5 and 7 updates.
    fallen = (1 / 4, 3 / 4, 5 / 8, 7 / 8)
    expected = [1e-2 * (1 + math.cos(math.pi * x)) / 2 for x in fallen]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_early_stopping_stops_and_stays_stopped(tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 2.0, math.nan, 2.5, 2.6, 2.7])
    monkeypatch.setattr(evaluations, "run_evaluation", lambda *_: {})
    monkeypatch.setattr(evaluations, "mean_loss", lambda _: next(losses))

    def config(patience):
        evaluation = {"every": 1, "patience": patience}
        return make_config(tmp_path, eval=evaluation, checkpoint={"keep": 1, "every": 100})

    train(config(2))
    reason = "2 evaluations without a loss below 2.0000"
    assert f"stopping at step 4: {reason}" in capsys.readouterr().err
    # The last one, and the best.
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
    assert find(str(tmp_path)).path.name == "2"

    train(config(2))
    message = f"stopped early, after {reason}; raise eval.patience to go on"
    assert message in capsys.readouterr().err
    train(config(4))
    assert "stopping at step 6: 4 evaluations without" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "6"]


def test_asked_to_stop_it_saves_the_step_and_goes_on(tmp_path, capsys):
    """SIGTERM, here in the evaluation after step 2."""
    sections = {"train": {"steps": 4}, "eval": {"every": 2}, "checkpoint": {"every": 100}}
    train(make_config(tmp_path / "whole", **sections))
    config = make_config(tmp_path / "stopped", **sections)

    def ask(step, scalars):
        signal.raise_signal(signal.SIGTERM)
        return ""

    with pytest.raises(distributed.Preempted, match="step 3 is saved"):
        train(config, watch=ask)
    assert checkpoint.latest_checkpoint(tmp_path / "stopped").name == "3"
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    assert main(["train", str(path)]) == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped", 4)
    assert tiny.read_metrics(tmp_path / "whole") == tiny.read_metrics(tmp_path / "stopped")


def test_a_run_that_was_asked_to_stop_has_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    path = tmp_path / "config.json"
    path.write_text(to_json(make_config(tmp_path / "run", train={"steps": 4}, eval=NO_EVAL)))
    monkeypatch.setattr(distributed.StopRequest, "reached", lambda self: True)
    assert main(["train", str(path)]) == START_AGAIN
    assert "step 1 is saved; the same command goes on" in capsys.readouterr().err


# --- Starting from other parameters ---------------------------------------------------------------


# A step that changes no bit: what is saved are the parameters that the run began with.
STILL = {
    "optimizer": {"learning_rate": 1e-30},
    "train": {"steps": 1},
    "eval": NO_EVAL,
}


def params_of(run_dir, step):
    state = read_state(run_dir, step)
    return {name: value for name, value in state.items() if name.startswith("['params']")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    options = {"dtype": "float32", "max_shard_bytes": 10**9, "overwrite": False}
    export_model(str(trained_run()), str(folder), **options)
    return folder


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("folder", "float32"),
        ("weights alone", "float32"),
        ("run", "bfloat16"),
        ("checkpoint", "float32"),
    ],
)
def test_fine_tuning_starts_from_the_source(kind, dtype, exported, tmp_path):
    alone = tmp_path / "weights"
    source, step = {
        "folder": (exported, 10),
        "weights alone": (alone, 10),
        "run": (trained_run(), 10),  # Step 10 has the lower validation loss.
        "checkpoint": (trained_run() / "checkpoints" / "5", 5),
    }[kind]
    dtypes = {"dtype": dtype, "param_dtype": dtype}
    config = make_config(tmp_path, init={"model": str(source)}, model=dtypes, **STILL)
    if kind == "weights alone":
        shutil.copytree(exported, alone, ignore=shutil.ignore_patterns("tokenizer*"))
        with pytest.raises(ValueError, match="holds no tokenizer"):
            train(config)
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, vocabulary="bytes")
        )
    train(config)
    expected, ours = params_of(trained_run(), step), params_of(tmp_path, 1)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, expected[name].astype(value.dtype), err_msg=name)


def test_fine_tuned_run_goes_on_without_its_source(exported, tmp_path):
    """And takes architecture and tokenizer from it: nothing of them is in the config."""
    source = shutil.copytree(exported, tmp_path / "source")
    (source / "config.json").write_text(
        (exported / "config.json").read_text().replace('"d_ff": 32', '"d_ff": 32, "note": 1')
    )
    model = type(tiny.TINY.model)(scan_layers=False)
    config = make_config(tmp_path / "run", init={"model": str(source)}, **STILL)
    config = dataclasses.replace(config, model=model)
    with pytest.warns(UserWarning, match="note"):
        train(config)
    shutil.rmtree(source)
    longer = dataclasses.replace(config, train=TrainConfig(steps=2))
    train(longer)
    saved = from_json((tmp_path / "run" / "t5jax_config.json").read_text())
    assert saved.model == tiny.TINY.model
    with pytest.raises(ValueError, match=r"init.model was '.*source' and is ''"):
        train(dataclasses.replace(longer, init=InitConfig(), model=saved.model))


def test_architecture_that_disagrees_with_its_source(exported, tmp_path):
    config = make_config(tmp_path, init={"model": str(exported)}, model={"d_model": 32})
    message = rf"model.d_model is 32, in {exported} it is 16; leave it out, or start from another"
    with pytest.raises(ValueError, match=message):
        train(config)


def test_imported_run_is_no_run_to_go_on_with(exported, tmp_path):
    import_model(str(exported), str(tmp_path / "imported"))
    with pytest.raises(ValueError, match="holds imported parameters.*set init.model to .*imported"):
        train(make_config(tmp_path / "imported"))
    with pytest.raises(ValueError, match="imported holds a run already; choose another folder"):
        import_model(str(exported), str(tmp_path / "imported"))


def test_epochs_in_place_of_steps(tmp_path, capsys):
    """The 40 rows of the task are 5 steps of 8."""
    schedule = {"schedule": "linear", "final_fraction": 0.5}

    def epochs(number):
        return make_config(
            tmp_path, eval=NO_EVAL, optimizer=schedule, train={"epochs": number, "log_every": 1}
        )

    train(epochs(0.4))
    assert "; an epoch is 40 examples, 5 steps\n" in capsys.readouterr().err
    rates = [line["train/learning_rate"] for line in tiny.read_metrics(tmp_path)]
    assert rates == pytest.approx([1e-2, 0.75e-2])  # It falls until the end that was counted.
    train(epochs(0.4))
    err = capsys.readouterr().err
    assert "step 2 is reached, train.steps is 2, which train.epochs 0.4 are; raise it to go" in err
    train(epochs(0.6))
    assert [line["step"] for line in tiny.read_metrics(tmp_path)] == [1, 2, 3]


# --- A task's own code fails ----------------------------------------------------------------------


def failing(monkeypatch, **functions):
    """Replaces the metrics or the postprocessing of every set of examples."""
    made = pipeline.eval_sets

    def eval_sets(*args, **options):
        return [dataclasses.replace(s, **functions) for s in made(*args, **options)]

    monkeypatch.setattr(pipeline, "eval_sets", eval_sets)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("metric", "task capitals: metric precision fails: ZeroDivisionError: division by zero"),
        ("postprocess", "task capitals: postprocess last_word fails on the prediction '"),
        ("evaluation", "out of memory"),
    ],
)
def test_the_step_is_saved_before_what_failed_in_an_evaluation_is_raised(
    kind, message, tmp_path, monkeypatch, capsys
):
    def precision(targets, predictions):
        wrong = sum(t != p for t, p in zip(targets, predictions, strict=True))
        return {"precision": 1 / (not wrong)}

    def last_word(text, example):
        return {t: t for t in "ABCD"}[text[:1]]  # As the targets begin, and not what is made up.

    if kind == "metric":
        failing(monkeypatch, metric_fns=[precision])
    elif kind == "postprocess":
        failing(monkeypatch, postprocess=last_word)
    else:

        def evaluate(*_):
            raise RuntimeError(message)

        monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    sections = {"train": {"steps": 9}, "eval": {"every": 3}, "checkpoint": {"every": 100}}
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)) as caught:
        train(make_config(tmp_path, **sections))
    if kind != "evaluation":
        assert f"({__file__}, line " in str(caught.value)
    assert "the checkpoint of step 3 is saved" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    # The same command makes it again, and records the loss then: train/test_owed_evaluations.py.
    assert read_loop(tmp_path, 3)["owes_evaluation"]
    assert read_loop(tmp_path, 3)["best_loss"] is None


def test_metrics_are_tried_before_the_first_step(tmp_path, monkeypatch):
    failing(monkeypatch, metric_fns=[lambda targets, predictions: targets["word"]])
    message = r"task capitals: metric <lambda> fails: TypeError: list indices .*test_train.py, line"
    with pytest.raises(ValueError, match=message):
        train(make_config(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


def test_the_step_is_saved_before_what_failed_in_the_data_is_raised(tmp_path, monkeypatch, capsys):
    fetch, calls = Prefetch.fetch, itertools.count(1)

    def fail_at_the_fourth(self):
        if next(calls) == 4:
            raise ValueError("row 31 has no field 'word'")
        fetch(self)

    monkeypatch.setattr(Prefetch, "fetch", fail_at_the_fourth)
    config = make_config(tmp_path / "run")
    with pytest.raises(ValueError, match="row 31 has no field"):
        train(config)
    assert "the checkpoint of step 3 is saved" in capsys.readouterr().err
    monkeypatch.setattr(Prefetch, "fetch", fetch)
    train(config)
    assert_same_bits(tmp_path / "run", trained_run(), 10)


def test_an_evaluation_on_the_training_split_has_names_of_its_own(tmp_path):
    sections = {"train": {"steps": 2, "log_every": 1}, "eval": {"every": 1, "split": "train"}}
    train(make_config(tmp_path, **sections))
    lines = log.read_metrics(tmp_path)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2]
    assert [line["step"] for line in lines if "eval/train/loss" in line] == [1, 2]
    assert not any(name.startswith("train/capitals") for line in lines for name in line)


# --- What goes wrong ------------------------------------------------------------------------------


def test_nan_loss_stops_and_the_last_good_checkpoint_goes_on(tmp_path, capsys):
    run_dir = trained_run(copy_to=tmp_path / "run")
    sections = {"train": {"steps": 15}, "checkpoint": {"every": 1}, "eval": NO_EVAL}
    config = make_config(run_dir, optimizer={"learning_rate": 1e30}, **sections)
    with pytest.raises(NonFiniteLoss, match=r"(loss|grad_norm) is nan at step 12; the last good"):
        train(config)
    steps = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir())
    assert steps == [10, 11], "a checkpoint of NaN, or none"
    shutil.rmtree(run_dir / "checkpoints" / "11")  # It has the step that was too long.
    capsys.readouterr()
    train(make_config(run_dir, optimizer={"learning_rate": 1e-3}, **sections))
    otherwise = re.findall("from here on otherwise: (.*)", capsys.readouterr().err)
    assert otherwise == ["optimizer.learning_rate was 0.01 and is 0.001"]
    state = read_state(run_dir, 15)
    assert all(np.isfinite(x).all() for x in state.values())
    assert [line["step"] for line in tiny.read_metrics(run_dir) if "train/loss" in line] == [
        2,
        4,
        6,
        8,
        10,
        12,
        14,
        15,
    ]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"d_model": 32}},
            r"model.d_model was 16 and is 32; set it back, or begin a new",
        ),
        ({"model": {"param_dtype": "bfloat16"}}, r"model.param_dtype was 'float32' and is"),
        ({"optimizer": {"name": "adafactor"}}, r"optimizer.name was 'adamw' and is 'adafactor'"),
        ({"optimizer": {"weight_decay": 0.1}}, r"optimizer.weight_decay was None and is 0.1"),
        ({"train": {"steps": 20, "seed": 1}}, r"train.seed was 0 and is 1"),
        ({"init": {"model": "RUN"}}, r"init.model was '' and is '.*run'"),
        ({"data": {"batch_size": 16}}, r"data.batch_size was 8 and is 16 now; set it back, or"),
        ({"data": {"seed": 1}}, r"data.seed was 0 and is 1"),
        ({"data": {"mixture": "numbers"}}, r"data.mixture was 'capitals' and is 'numbers'"),
        (
            {"data": {"mixture": "capitols"}},
            r"data.mixture is 'capitols'.* did you mean capitals\?",
        ),
        (
            {"mesh": {"model": 3, "data": 1}},
            r"mesh data x fsdp x sequence x model = 1 x 1 x 1 x 3 does",
        ),
        ({"eval": {"batch_size": 3}}, r"eval.batch_size 3 is not divisible by .* = 8 devices"),
        ({"eval": {"split": "tset"}}, r"no split 'tset'; there are train, validation"),
        (
            {"train": {"steps": 20, "microbatches": 2}},
            r"batch_size / train.microbatches = 8 / 2 = 4 is not divisible by .* = 8 devices",
        ),
    ],
)
@pytest.mark.usefixtures("eight_devices")
def test_run_with_another_config_is_refused_and_loses_nothing(sections, message, tmp_path):
    run_dir = trained_run(copy_to=tmp_path / "run")
    before = tiny.contents(run_dir)
    if "init" in sections:
        sections = {"init": {"model": str(run_dir)}}
    with pytest.raises(ValueError, match=message):
        train(make_config(run_dir, **{"train": {"steps": 20}} | sections))
    assert tiny.contents(run_dir) == before


def test_runs_do_not_mix(tmp_path):
    before = tiny.contents(trained_run())
    train(make_config(tmp_path / "other", **STILL | {"train": {"steps": 1, "seed": 1}}))
    assert tiny.contents(trained_run()) == before
    other, ours = params_of(tmp_path / "other", 1), params_of(trained_run(), 10)
    assert any((other[name] != ours[name]).any() for name in ours)


# --- No dead option -------------------------------------------------------------------------------


SECTIONS = {"data": DataConfig, "eval": EvalConfig, "checkpoint": CheckpointConfig}
SECTIONS |= {"train": TrainConfig, "init": InitConfig}
# Field: another value, and whether batches, sets of examples or both change, or the words with
# which it is refused, or where a test of the loop shows what it does.
CHANGES = {
    "data.mixture": ("nothing", "data.mixture is 'nothing'"),
    "data.mixture_changes": (("1:letters",), "both"),  # What comes later is measured too.
    "data.task_files": (("absent.py",), "there is no file absent.py"),
    "data.vocabulary": ("absent.model", "no tokenizer 'absent.model'"),
    "data.cache": ("CACHE", "batches"),
    "data.inputs_length": (8, "batches"),
    "data.targets_length": (2, "batches"),
    "data.batch_size": (16, "batches"),
    "data.pack": (True, "batches"),
    "data.prefix_lm": (True, "data.prefix_lm is True, but t5"),  # True: test_train_families.py.
    "data.seed": (1, "batches"),
    "eval.every": (3, test_how_often_and_how_much_is_measured),
    "eval.split": ("train", "sets"),
    "eval.batch_size": (0, "eval.batch_size is 0"),
    "eval.num_examples": (2, "sets"),
    "eval.max_tokens": (1, test_how_often_and_how_much_is_measured),
    "eval.generate": (False, test_run_goes_on_with_another_mesh),
    "eval.num_samples": (2, test_what_a_person_sees),
    "eval.patience": (0, "eval.patience is 0"),  # 2 and 4: in the test of early stopping.
    "checkpoint.every": (4, test_how_often_and_how_much_is_measured),
    "checkpoint.keep": (0, "checkpoint.keep is 0"),  # 1: in the test of early stopping.
    "train.epochs": (0.0, "train.epochs is 0.0; it must be above 0"),  # Others: in its own test.
    "train.steps": (5, test_how_often_and_how_much_is_measured),
    "train.microbatches": (3, "data.batch_size 8 is not divisible by train.microbatches 3"),
    "train.log_every": (2, test_how_often_and_how_much_is_measured),
    "train.seed": (1, test_runs_do_not_mix),
    "train.profile": (-1, "train.profile is -1"),  # 2: test_compilation.py.
    "train.attention": ("flash", "flash, which runs on tpu only, but the devices are cpu; set"),
    "init.model": ("./absent", "there is no folder ./absent"),
}


def test_every_field_is_in_the_table():
    fields = {f"{s}.{f.name}" for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
    assert fields == set(CHANGES)


def changed(field, tmp_path):
    section, name = field.split(".")
    value = str(tmp_path / "caches") if CHANGES[field][0] == "CACHE" else CHANGES[field][0]
    return make_config(tmp_path, **{section: {name: value}})


def fields_that(*effects):
    return [field for field, (_, effect) in CHANGES.items() if effect in effects]


@pytest.mark.parametrize(
    "field", [f for f, (_, e) in CHANGES.items() if isinstance(e, str) and " " in e]
)
def test_field_that_cannot_work_is_refused(field, tmp_path):
    with pytest.raises(ValueError, match=CHANGES[field][1]):
        train(changed(field, tmp_path))


def read_batches(config):
    """Returns the first two batches of a run, and its sets of examples for evaluation."""
    registry.load_tasks(config.data.task_files)
    tokenizer = pipeline.tokenizer_for(config, None)
    iterator = pipeline.train_iterator(config, tokenizer, list(range(config.data.batch_size)))
    batches = [{k: v.tolist() for k, v in next(iterator).items()} for _ in range(2)]
    sets = pipeline.eval_sets(config, tokenizer=tokenizer)
    return batches, [example.inputs for one in sets for example in one.examples]


@pytest.mark.parametrize("field", fields_that("batches", "sets", "both"))
def test_field_changes_what_is_read(field, tmp_path):
    batches, sets = read_batches(make_config(tmp_path))
    other_batches, other_sets = read_batches(changed(field, tmp_path))
    assert (other_batches != batches) == (CHANGES[field][1] != "sets")
    assert (other_sets != sets) == (CHANGES[field][1] != "batches")
    if field == "data.mixture_changes":  # From step 1 on.
        assert other_batches[0] == batches[0]
