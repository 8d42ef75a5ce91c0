"""Sweeps, with training replaced by a formula; once with training itself."""

import dataclasses
import json
import math
import threading
from pathlib import Path

import pytest

import quick
from t5jax import distributed
from t5jax.checkpoint import best_loss
from t5jax.cli import main
from t5jax.config import Config, EvalConfig, OptimizerConfig, TrainConfig, from_json
from t5jax.metrics import BY_NAME, OF_SCORES
from t5jax.metrics.likelihood import HIGHER_IS_BETTER, LOWER_IS_BETTER
from t5jax.monitor import log
from t5jax.sweep import SweepOptions, parse_space, sweep
from t5jax.sweep.objectives import parse_objective, values_in
from t5jax.sweep.results import best_trials, plots, trials_table
from t5jax.train import NonFiniteLoss
from tiny import one_device, read_state  # noqa: F401

RATES = ["optimizer.learning_rate=log(1e-5, 1e-1)"]


def config_in(folder: Path, **changes) -> Config:
    return Config(
        run_dir=str(folder), train=TrainConfig(steps=3), eval=EvalConfig(every=1), **changes
    )


class Training:
    """Stands for `train`: a loss of |log10(rate) + 3| that falls with the steps.

    It goes on where its metrics.jsonl ends, and can die at a step, as a killed process does.
    """

    def __init__(self, die_at: tuple[int, int] | None = None, fails: str = ""):
        self.die_at, self.fails, self.began, self.steps = die_at, fails, [], 0

    def __call__(self, config: Config, *, watch) -> Path:
        path = Path(config.run_dir)
        path.mkdir(parents=True, exist_ok=True)
        self.began.append((path.name, config.optimizer.learning_rate))
        if self.fails == "nan":
            raise NonFiniteLoss("loss is nan at step 1")
        if self.fails:
            raise ValueError(self.fails)
        done = len(log.read_metrics(path))
        for step in range(done + 1, config.train.steps + 1):
            if self.die_at == (len(self.began), step):
                raise SystemExit  # Nothing is told to the study, and the lock is let go.
            loss = abs(math.log10(config.optimizer.learning_rate) + 3) + 1 / step
            scalars = {"validation/loss": loss, "validation/task/bleu": -loss}
            self.steps += 1
            with open(path / log.METRICS_FILE, "a") as file:
                file.write(json.dumps({"step": step, "time": 0.0, **scalars}) + "\n")
            if watch(step, scalars):
                break
        return path


def test_the_best_config_is_written_and_gives_the_score_again(tmp_path: Path):
    config = config_in(tmp_path / "s")
    study = sweep(config, parse_space(RATES, config), SweepOptions(4), train=Training())
    assert len(study.trials) == 4
    best = from_json((tmp_path / "s/best.json").read_text())
    assert best.run_dir == str(tmp_path / "s/best")
    Training()(best, watch=lambda step, scalars: "")
    assert values_in(Path(best.run_dir), SweepOptions().sought) == [study.best_value]
    assert study.best_value == min(t.value for t in study.trials)


def test_the_same_seed_draws_the_same_values(tmp_path: Path):
    found = []
    for name in "ab":
        config = config_in(tmp_path / name)
        options = SweepOptions(3, sampler="random", seed=4)
        study = sweep(config, parse_space(RATES, config), options, train=Training())
        found.append([trial.params for trial in study.trials])
    assert found[0] == found[1]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_killed_sweep_draws_what_a_whole_one_does(tmp_path: Path, sampler: str):
    """Nothing twice, though its sampler begins anew."""
    found = []
    for name, parts in (("whole", [4]), ("parts", [1, 2, 4])):
        config = config_in(tmp_path / name)
        for trials in parts:
            options = SweepOptions(trials, sampler=sampler)
            study = sweep(config, parse_space(RATES, config), options, train=Training())
        found.append([trial.params["optimizer.learning_rate"] for trial in study.trials])
    assert found[0] == found[1]
    assert len(set(found[0])) == 4


def test_a_trial_that_failed_otherwise_is_tried_once_more(tmp_path: Path):
    """Such as one that had no room on the disk; the same error twice is the trial's own."""
    for name, errors in (("s", ["disk full"]), ("t", ["too large", "too large"])):
        config = config_in(tmp_path / name)
        space = parse_space(["train.steps=choice(1)"], config)
        options = SweepOptions(1, sampler="grid")
        for error in errors:
            message = rf"trial \d .*steps 1\) failed: {error}.* once more"
            with pytest.raises(ValueError, match=message):
                sweep(config, space, options, train=Training(fails=error))
        last = Training()
        study = sweep(config, space, options, train=last)
        assert [began for began, _ in last.began] == (["trial-0000"] if name == "s" else [])
        assert table_cells(study, "state") == ["complete" if name == "s" else "fail"]


def test_a_killed_sweep_goes_on_in_the_trial_s_own_run(tmp_path: Path):
    config = config_in(tmp_path / "s")
    space, first = parse_space(RATES, config), Training(die_at=(2, 3))
    with pytest.raises(SystemExit):
        sweep(config, space, SweepOptions(4), train=first)
    second = Training()
    study = sweep(config, space, SweepOptions(4), train=second)
    assert second.began[0] == first.began[1]  # The same folder and the same value,
    assert first.steps + second.steps == 4 * 3  # of which no step is done twice.
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert len(complete) == 4
    taken_up = next(t for t in complete if t.system_attrs.get("failed_trial") == 1)
    assert list(taken_up.intermediate_values) == [1, 2, 3]
    assert sorted(table_cells(study, "trial")) == ["0", "1", "3", "4"]
    assert set(table_cells(study, "state")) == {"complete"}


def test_a_preempted_trial_goes_on(tmp_path: Path):
    config = config_in(tmp_path / "s")
    space, options = parse_space(RATES, config), SweepOptions(1)
    asked = []

    def preempted(config: Config, *, watch) -> Path:
        asked.append(config)
        raise distributed.Preempted("asked to stop (SIGTERM): step 1 is saved")

    with pytest.raises(distributed.Preempted):
        sweep(config, space, options, train=preempted)
    training = Training()
    sweep(config, space, options, train=training)
    assert training.began == [(Path(c.run_dir).name, c.optimizer.learning_rate) for c in asked]


def table_cells(study, title: str) -> list[str]:
    table = trials_table(study, SweepOptions().sought)
    return list(next(c for c in table.columns if c.header == title).cells)


def test_every_cell_of_a_grid_once_also_after_a_kill(tmp_path: Path):
    config = config_in(tmp_path / "s")
    space = parse_space(
        ["optimizer.learning_rate=choice(1e-4, 1e-3)", "train.steps=int(2, 6, 2)"], config
    )
    options = SweepOptions(1, sampler="grid")
    with pytest.raises(SystemExit):
        sweep(config, space, options, train=Training(die_at=(3, 2)))
    study = sweep(config, space, options, train=Training())
    found = [
        (t.params["optimizer.learning_rate"], t.params["train.steps"])
        for t in study.trials
        if t.state.name == "COMPLETE"
    ]
    assert sorted(found) == [(r, s) for r in (1e-4, 1e-3) for s in (2, 4, 6)]
    assert study.best_params == {"optimizer.learning_rate": 1e-3, "train.steps": 6}


def test_cells_that_a_killed_process_left_out_are_added(tmp_path: Path, monkeypatch):
    import optuna

    config = config_in(tmp_path / "s")
    space = parse_space(["train.steps=int(1, 4)"], config)
    enqueue, options = optuna.Study.enqueue_trial, SweepOptions(1, sampler="grid")

    def dies(study, cell):
        if cell["train.steps"] == 3:
            raise SystemExit
        enqueue(study, cell)

    monkeypatch.setattr(optuna.Study, "enqueue_trial", dies)
    with pytest.raises(SystemExit):
        sweep(config, space, options, train=Training())
    monkeypatch.setattr(optuna.Study, "enqueue_trial", enqueue)
    study = sweep(config, space, options, train=Training())
    assert [trial.params["train.steps"] for trial in study.trials] == [1, 2, 3, 4]


def test_a_database_keeps_sweeps_apart(tmp_path: Path):
    options = SweepOptions(1, storage=f"sqlite:///{tmp_path / 'all.db'}")
    for folder, steps in (("a/s", 3), ("b/s", 4)):
        config = dataclasses.replace(config_in(tmp_path / folder), train=TrainConfig(steps=steps))
        space = parse_space(RATES, config)
        if steps == 3:
            sweep(config, space, options, train=Training())
            continue
        with pytest.raises(ValueError, match=r"all\.db holds another sweep: config is another"):
            sweep(config, space, options, train=Training())


def test_where_an_objective_shall_go():
    def directions(*texts):
        return [parse_objective(text).direction for text in texts]

    assert set(directions("test/loss", "validation/t/perplexity", "t/wer:min")) == {"minimize"}
    assert set(directions("v/t/exact_match", "v/t/rouge1", "v/t/loss:max")) == {"maximize"}
    assert parse_objective("v/t/wer:min").name == "v/t/wer"
    with pytest.raises(ValueError, match="write validation/t/wer:min or validation/t/wer:max"):
        parse_objective("validation/t/wer")
    with pytest.raises(ValueError, match="bleu"):
        parse_objective("validation/t/blue")


def test_every_score_of_ours_has_a_direction():
    known = LOWER_IS_BETTER | HIGHER_IS_BETTER
    texts, numbers, tags = ["a b"] * 2, [0, 1], [["B-X"], ["O"]]
    for name, fn in BY_NAME.items():
        values = tags if name == "entity_f1" else numbers if "f1_" in name else texts
        if name in ("accuracy", "matthews", "pearson", "spearman"):
            values = numbers
        assert fn(values, values).keys() <= known, name
    assert {*OF_SCORES, "rank_accuracy_norm", "token_accuracy"} <= known


def test_several_workers_share_a_sweep(tmp_path: Path):
    config = config_in(tmp_path / "s")
    space = parse_space(["train.steps=int(1, 8)"], config)
    options, trainings, errors = SweepOptions(1, sampler="grid"), [Training() for _ in range(4)], []

    def work(training):
        try:
            sweep(config, space, options, train=training)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(training,)) for training in trainings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    began = [name for training in trainings for name, _ in training.began]
    assert sorted(began) == [f"trial-{number:04d}" for number in range(8)]


def test_hopeless_trials_are_pruned(tmp_path: Path):
    config = config_in(tmp_path / "s")
    space = parse_space(
        ["optimizer.learning_rate=choice(1e-3, 1e-1)", "train.seed=int(0, 4)"], config
    )
    options = SweepOptions(1, sampler="grid", prune=True)
    study = sweep(config, space, options, train=Training())
    pruned = [t for t in study.trials if t.state.name == "PRUNED"]
    assert len(pruned) == 5
    assert all(t.params["optimizer.learning_rate"] == 1e-1 for t in pruned)
    assert all(len(t.intermediate_values) < 3 for t in pruned)


def test_several_objectives(tmp_path: Path):
    config = config_in(tmp_path / "s")
    options = SweepOptions(3, objectives=("validation/loss", "validation/task/bleu"))
    study = sweep(config, parse_space(RATES, config), options, train=Training())
    assert [one.direction for one in options.sought] == ["minimize", "maximize"]
    assert len(best_trials(study)) == 1  # One is the other's negative here.
    assert {path.name for path in plots(study, tmp_path, options.sought)} >= {
        "history.png",
        "history-2.png",
    }


def test_objectives_are_those_of_the_exported_step(tmp_path: Path):
    lines = [
        {"step": 1, "time": 0, "validation/loss": 2.0, "validation/a/bleu": 9.0},
        {"step": 2, "time": 0, "validation/loss": 1.0, "validation/a/bleu": 5.0},
        {"step": 3, "time": 0, "validation/loss": None, "validation/a/bleu": 99.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert values_in(tmp_path, [parse_objective("validation/a/bleu")]) == [5.0]
    with pytest.raises(ValueError, match=r"no metric validation/a/blue; .* validation/a/bleu"):
        values_in(tmp_path, [parse_objective("validation/a/blue:max")])


def test_a_loss_that_is_not_finite_ends_a_trial_and_not_the_sweep(tmp_path: Path):
    config = config_in(tmp_path / "s")
    study = sweep(config, parse_space(RATES, config), SweepOptions(2), train=Training(fails="nan"))
    assert [t.state.name for t in study.trials] == ["FAIL", "FAIL"]
    assert "loss is nan" in study.trials[0].user_attrs["error"]
    assert best_trials(study) == []


def test_another_error_names_the_trial(tmp_path: Path):
    config = config_in(tmp_path / "s")
    with pytest.raises(ValueError, match=r"trial 0 \(optimizer.learning_rate .*\) failed: no rows"):
        sweep(config, parse_space(RATES, config), SweepOptions(2), train=Training(fails="no rows"))


def test_another_sweep_in_the_folder_is_refused(tmp_path: Path):
    config = config_in(tmp_path / "s")
    sweep(config, parse_space(RATES, config), SweepOptions(1), train=Training())
    other = parse_space(["optimizer.learning_rate=log(1e-4, 1e-1)"], config)
    with pytest.raises(ValueError, match=r"holds another sweep: space was .*1e-05.* is .*0.0001"):
        sweep(config, other, SweepOptions(1), train=Training())
    # More trials, and another seed, are the same sweep.
    more = sweep(config, parse_space(RATES, config), SweepOptions(3, seed=9), train=Training())
    assert len(more.trials) == 3


def test_a_function_as_the_space(tmp_path: Path):
    (tmp_path / "space.py").write_text(
        "def space(trial):\n"
        '    rate = trial.suggest_float("rate", 1e-4, 1e-2, log=True)\n'
        '    return {"optimizer.learning_rate": rate, "train.steps": 2}\n'
    )
    config = config_in(tmp_path / "s")
    space = parse_space([f"{tmp_path / 'space.py'}:space"], config)
    study = sweep(config, space, SweepOptions(3), train=Training())
    best = from_json((tmp_path / "s/best.json").read_text())
    assert best.optimizer.learning_rate == study.best_params["rate"]
    assert best.train.steps == 2


def test_an_error_of_the_function_names_its_line(tmp_path: Path):
    (tmp_path / "space.py").write_text("def space(trial):\n    return {}['rate']\n")
    config = config_in(tmp_path / "s")
    space = parse_space([f"{tmp_path / 'space.py'}:space"], config)
    with pytest.raises(ValueError, match=r"space\.py:space fails: KeyError: 'rate' .*, line 2\)"):
        sweep(config, space, SweepOptions(1), train=Training())


def test_configs_of_trials_that_are_no_longer_the_best_are_removed(tmp_path: Path):
    config = config_in(tmp_path / "s")
    space = parse_space(RATES, config)
    study = sweep(config, space, SweepOptions(1), train=Training())
    for name in ("best-2.json", "best-mine.json", "best.json"):
        (tmp_path / "s" / name).write_text("old")
    sweep(config, space, SweepOptions(1), train=Training())  # Nothing is left to train.
    assert not (tmp_path / "s/best-2.json").exists()
    assert (tmp_path / "s/best-mine.json").read_text() == "old"
    best = from_json((tmp_path / "s/best.json").read_text())
    assert best.optimizer.learning_rate == study.best_params["optimizer.learning_rate"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.learning_rate", "expected FIELD=VALUES"),
        ("optimizer.learning_rate=1e-3", "expected FIELD=VALUES"),
        ("optimizer.learning_rat=log(1e-5, 1e-3)", "learning_rate"),
        ("optimizer.learning_rate=lod(1e-5, 1e-3)", "there is no lod"),
        ("optimizer.learning_rate=log(0, 1)", "above 0"),
        ("optimizer.learning_rate=log(1, 1)", "below HIGH"),
        ("optimizer.learning_rate=log(1)", "expected one of"),
        ("optimizer.learning_rate=log(a, b)", "expected one of"),
        ("train.steps=uniform(1, 2.5)", "train.steps"),
        ("train.steps=int(1.5, 4)", "expected one of"),
        ("train.steps=int(1, 4, 0)", "STEP"),
        ("optimizer.name=choice(adamw, adamx)", "adamx"),
        ("optimizer.name=choice()", "no values"),
        ("nowhere.py:space", "there is no file nowhere.py"),
    ],
)
def test_a_space_that_cannot_be_is_named(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_space([text], Config())


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optimizer.name=choice(adamw, adafactor)", ("adamw", "adafactor")),
        ("optimizer.clip_norm=choice(None, 1.0)", (None, 1.0)),
        ("data.mixture=choice('a, b', c)", ("a, b", "c")),
        ("optimizer.learning_rate=log(1e-5,1e-2)", (1e-5, 1e-2)),
    ],
)
def test_values_are_read(text: str, values: tuple):
    ((_, found),) = parse_space([text], Config()).fields
    assert found.arguments == values


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"sampler": "grid"}, "no end of values"),
        ({}, {"trials": 0}, "--trials"),
        ({}, {"prune": True, "objectives": ("validation/loss", "b:min")}, "leave --prune out"),
        ({"eval": EvalConfig(every=0)}, {}, "eval.every"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, changes, options, message: str):
    config = dataclasses.replace(config_in(tmp_path / "s"), **changes)
    with pytest.raises(ValueError, match=message):
        sweep(config, parse_space(RATES, config), SweepOptions(**options), train=Training())
    assert not list(tmp_path.rglob("trial-*"))


def test_the_command_trains(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for replacement in quick.replacements():
        monkeypatch.setattr(*replacement)
    small = {"num-encoder-layers": 1, "num-decoder-layers": 1, "d-model": 16, "d-ff": 16}
    words = [word for name, size in small.items() for word in (f"--model.{name}", str(size))]
    words += ["--train.steps", "2", "--eval.every", "2", "--eval.num-examples", "4"]
    words += ["--data.batch-size", "8", "--optimizer.warmup-steps", "1", "--eval.no-generate"]
    space = "optimizer.learning_rate=choice(0.001)"
    command = ["sweep", "quickstart", "--space", space, "--sampler", "grid", *words]
    assert main([*command, "--run-dir", "found"]) == 0
    shown = capsys.readouterr()
    assert "best: t5jax train found/best.json" in shown.out
    best = from_json(Path("found/best.json").read_text())
    assert best.optimizer == dataclasses.replace(
        OptimizerConfig(),
        name="adamw",
        schedule="cosine",
        warmup_steps=1,
        learning_rate=best.optimizer.learning_rate,
    )
    assert Path("found/history.png").exists()
    # Trained again, it gives the same score, and the same parameters.
    assert main(["train", "found/best.json"]) == 0
    assert best_loss("found/best") == best_loss("found/trial-0000")
    ours, theirs = (read_state(f"found/{name}", 2) for name in ("best", "trial-0000"))
    assert ours.keys() == theirs.keys()
    assert all((value == theirs[name]).all() for name, value in ours.items())
    capsys.readouterr()
    assert main(["sweep", "quickstart"]) == 1
    assert "--space" in capsys.readouterr().err


def test_without_optuna_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    space = "optimizer.learning_rate=choice(0.001)"
    assert main(["sweep", "quickstart", "--space", space]) == 1
    error = capsys.readouterr().err
    assert "pip install 't5jax[sweep]'" in error
    assert "Traceback" not in error
