"""Runs, models, caches, data and results at gs://, through the command line: as local ones.

One short training is shared: stopped, gone on with, and compared with one on this machine's disk.
"""

import json
import re

import pytest

import gcs
import tiny
from command_line import fails, main, run
from t5jax.config import to_json
from t5jax.monitor import log
from t5jax.train import train
from t5jax.train.prefetch import Prefetch
from tiny import assert_same_bits, make_config, one_device, read_metrics  # noqa: F401

SECTIONS = {
    "train": {"steps": 4, "log_every": 1, "profile": 1},
    "eval": {"every": 2, "batch_size": 8, "num_examples": 8, "generate": False},
    "checkpoint": {"every": 2},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The service, with a run at gs://bucket/run that was stopped after step 3, and went on."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.use_one_device(patch)
        for server in gcs.served(patch, tmp_path_factory.mktemp("cache")):
            folder = tmp_path_factory.mktemp("run")
            config = folder / "config.json"
            config.write_text(to_json(make_config("gs://bucket/run", **SECTIONS)))
            with pytest.MonkeyPatch.context() as stop:
                stop.setattr(Prefetch, "fetch", stopping_at(3, Prefetch.fetch))
                assert main(["train", str(config)]) == 130
            server.stopped = {**server.buckets["bucket"]}
            assert main(["train", str(config)]) == 0
            server.folder = folder
            yield server


def stopping_at(step, fetch):
    """Returns a `Prefetch.fetch` that stops the loop when it fetches the batch after `step`."""
    calls = iter(range(10**6))

    def stop(self):
        if next(calls) == step:
            raise KeyboardInterrupt
        fetch(self)

    return stop


@pytest.fixture
def objects(server):
    """The objects of gs://bucket; what a test leaves is removed."""
    before = {**server.buckets["bucket"]}
    yield server.buckets["bucket"]
    server.buckets["bucket"] = before


def test_a_run_that_was_stopped_ends_with_the_bits_of_one_on_disk(server, tmp_path):
    # What was there when it was stopped: the checkpoint of step 2, and the metrics until there.
    kept = {name.split("/")[2] for name in server.stopped if name.startswith("run/checkpoints/")}
    assert "2" in kept
    stopped = server.stopped["run/metrics.jsonl"].decode().splitlines()
    assert {1, 2} <= {json.loads(line)["step"] for line in stopped}
    # A copy of the folder is a run too.
    copy = server.copy("run", tmp_path / "copy")
    train(make_config(tmp_path / "here", **SECTIONS))
    assert_same_bits(copy, tmp_path / "here", 4)
    assert read_metrics(copy) == read_metrics(tmp_path / "here")
    here = {p.relative_to(tmp_path / "here").parts[0] for p in (tmp_path / "here").iterdir()}
    assert {path.name for path in copy.iterdir()} == here
    assert (copy / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((copy / "profile").rglob("*.xplane.pb"))
    assert len(list((copy / "tensorboard").iterdir())) == 2  # One a start.


def test_a_checkpoint_that_was_not_finished_does_not_count(server, objects, capsys, tmp_path):
    for name in ("commit_success.txt", "checksums.json"):
        del objects[f"run/checkpoints/4/{name}"]
    config = tmp_path / "config.json"
    config.write_text(to_json(make_config("gs://bucket/run", **SECTIONS)))
    status, _, err = run(capsys, "train", config)
    assert status == 0, err
    assert "going on from step 2 of gs://bucket/run" in err
    assert "run/checkpoints/4/commit_success.txt" in objects
    assert [line["step"] for line in log.read_metrics(server.copy("run", tmp_path / "copy"))] == [
        *(1, 2, 2, 2, 3, 4, 4, 4)
    ]
    # Once more: there is nothing to do.
    status, _, err = run(capsys, "train", config)
    assert (status, "nothing to do in gs://bucket/run" in err) == (0, True)


def test_a_run_copied_from_a_disk_is_gone_on_with(server, objects, capsys, tmp_path):
    """Orbax writes no commit_success.txt there."""
    for step in (2, 4):
        del objects[f"run/checkpoints/{step}/commit_success.txt"]
    assert run(capsys, "export", "gs://bucket/run", tmp_path / "out")[0] == 0
    config = tmp_path / "config.json"
    config.write_text(to_json(make_config("gs://bucket/run", **SECTIONS)))
    status, _, err = run(capsys, "train", config)
    assert (status, "nothing to do in gs://bucket/run" in err) == (0, True)
    assert {f"run/checkpoints/{step}/commit_success.txt" for step in (2, 4)} <= {*objects}


def test_a_damaged_checkpoint_is_named_and_set_aside(server, objects, capsys, tmp_path):
    """Nothing is read for that; and what else is there stays, which Orbax alone would delete."""
    objects["run/checkpoints/notes/mine.txt"] = b"mine"
    config = tmp_path / "config.json"
    sections = {**SECTIONS, "train": {"steps": 5, "log_every": 1}}
    config.write_text(to_json(make_config("gs://bucket/run", **sections)))
    half = next(n for n in objects if n.startswith("run/checkpoints/4/state/d/"))
    objects[half] = objects[half][:-1]
    message = fails(capsys, "export", "gs://bucket/run/checkpoints/4", tmp_path / "out")
    below = half.removeprefix("run/checkpoints/4/")
    assert f"gs://bucket/run/checkpoints/4 is damaged: {below} has " in message
    status, _, err = run(capsys, "train", config)
    assert status == 0, err
    assert "warning: checkpoint gs://bucket/run/checkpoints/4 is damaged" in err
    assert "going on from step 2 of gs://bucket/run" in err
    assert half.replace("/4/", "/4.damaged/") in objects
    assert objects["run/checkpoints/notes/mine.txt"] == b"mine"
    assert "run/checkpoints/5/checksums.json" in objects
    assert "run/run.lock" not in objects


def test_export_and_infer(server, objects, capsys, tmp_path):
    assert run(capsys, "export", "gs://bucket/run", "gs://bucket/out")[0] == 0
    assert run(capsys, "export", "gs://bucket/run/checkpoints/4", tmp_path / "out")[0] == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {n.removeprefix("out/"): objects[n] for n in server.names("out/")} == files
    message = fails(capsys, "export", "gs://bucket/run", "gs://bucket/out")
    assert "gs://bucket/out is not empty (5 entries)" in message
    ask = ["--prompt", "capitals: ab", "--max-tokens", "4"]
    _, expected, _ = run(capsys, "infer", tmp_path / "out", *ask)
    assert expected
    for model in ("gs://bucket/run", "gs://bucket/run/checkpoints/4", "gs://bucket/out"):
        assert run(capsys, "infer", model, *ask) == (0, expected, "")


def test_answers_go_on_in_a_bucket(server, objects, capsys, monkeypatch):
    words = [f"capitals: {word}" for word in ("a", "ab", "abc", "d", "dc")]
    objects["in.txt"] = "".join(f"{word}\n" for word in words).encode()
    command = ["infer", "gs://bucket/run", "--input", "gs://bucket/in.txt", "--max-tokens", "3"]
    command += ["--batch-size", "1"]
    status, _, err = run(capsys, *command, "--output", "gs://bucket/whole.jsonl")
    assert (status, err) == (0, "wrote gs://bucket/whole.jsonl: 5 prompts\n")
    whole = objects["whole.jsonl"].decode().splitlines(keepends=True)
    assert [json.loads(line)["prompt"] for line in whole] == words
    # Killed within a line.
    objects["part.jsonl"] = ("".join(whole[:2]) + whole[2][:9]).encode()
    objects["part.jsonl.run.json"] = objects["whole.jsonl.run.json"]
    status, _, err = run(capsys, *command, "--output", "gs://bucket/part.jsonl")
    assert (status, err) == (0, "wrote gs://bucket/part.jsonl: 5 prompts, 2 of them before\n")
    assert objects["part.jsonl"] == objects["whole.jsonl"]
    message = fails(capsys, *command, "--seed", "3", "--output", "gs://bucket/part.jsonl")
    assert "was begun otherwise: seed was 0 and is 3" in message


def test_evaluate_with_a_baseline_and_go_on(server, objects, capsys):
    command = ["eval", "gs://bucket/run", "--split", "validation", "--num-examples", "6"]
    command += ["--max-tokens", "4", "--resamples", "0"]
    first = ["--output", "gs://bucket/first", "--json", "gs://bucket/scores.json"]
    status, out, err = run(capsys, *command, *first)
    assert status == 0, err
    assert server.names("first/") == [
        "first/evaluation.json",
        "first/predictions/capitals.jsonl",
        "first/report.html",
        "first/scores.json",
    ]
    assert objects["scores.json"] == objects["first/scores.json"]
    # The predictions are there, and the model is not asked again.
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t5jax.evaluation.Evaluator.answers", lambda *a, **k: asked.append(k) or [])
        assert run(capsys, *command, "--output", "gs://bucket/first")[:2] == (0, out)
    assert [k["start"] for k in asked] == [6]
    baselines = ["gs://bucket/first", "gs://bucket/scores.json"]
    more = ["--baseline", *baselines, "--json", "gs://bucket/both.json"]
    assert run(capsys, *command, *more)[0] == 0
    assert list(json.loads(objects["both.json"])["capitals"]["baselines"]) == baselines


def test_train_on_data_a_vocabulary_and_a_cache_in_a_bucket(server, objects, capsys, tmp_path):
    rows = [{"word": word, "capitals": word.upper()} for word in "abcdefgh"]
    objects["rows.jsonl"] = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    objects["tasks/mine.py"] = (
        b"from neighbour import TEMPLATE\n"
        b"from t5jax.data import jsonl, prompted_task\n"
        b"rows = jsonl({'train': 'gs://bucket/rows.jsonl', 'validation': 'gs://bucket/ro*.jsonl'})\n"
        b"prompted_task('in_a_bucket', rows, [TEMPLATE], metrics=[])\n"
    )
    objects["tasks/neighbour.py"] = b"TEMPLATE = ('{word}', '{capitals}')\n"
    tasks = ["--task-files", "gs://bucket/tasks/mine.py"]
    vocabulary = "gs://bucket/run/tokenizer"
    lengths = ["--inputs-length", "16", "--targets-length", "8", "--vocabulary", vocabulary]
    cache = ["cache", "in_a_bucket", "gs://bucket/cache", *tasks, *lengths, "--processes", "1"]
    status, _, err = run(capsys, *cache)
    assert status == 0, err
    assert "cache/in_a_bucket/train/cache.json" in objects
    written = {n: objects[n] for n in server.names("cache/")}
    assert run(capsys, *cache)[0] == 0
    assert {n: objects[n] for n in server.names("cache/")} == written  # It matches.

    objects["configs/mine.json"] = to_json(
        make_config(
            "gs://bucket/second",
            data={
                "mixture": "in_a_bucket",
                "task_files": ("gs://bucket/tasks/mine.py",),
                "vocabulary": vocabulary,
                "cache": "gs://bucket/cache",
            },
            train={"steps": 1, "log_every": 1},
            eval={"every": 0},
            init={"model": "gs://bucket/run"},
        )
    ).encode()
    status, _, err = run(capsys, "train", "gs://bucket/configs/mine.json")
    assert status == 0, err
    assert "parameters from gs://bucket/run/checkpoints/4" in err
    assert "second/checkpoints/1/commit_success.txt" in objects
    # A shard that has been cut short is written anew.
    shard = next(n for n in server.names("cache/") if n.endswith("array_record") and objects[n])
    objects[shard] = objects[shard][:-1]
    status, _, err = run(capsys, *cache)
    assert status == 0, err
    assert objects[shard] == written[shard]


def test_import_embed_and_the_other_files(server, objects, capsys, tmp_path):
    assert run(capsys, "import", "gs://bucket/run", "gs://bucket/imported")[0] == 0
    assert "imported/checkpoints/0/commit_success.txt" in objects
    assert {"imported/t5jax_config.json", "imported/tokenizer/tokenizer.json"} <= {*objects}
    assert "holds a run already" in fails(capsys, "import", "gs://bucket/run", "gs://bucket/run")
    # Pages and lists of runs.
    status, out, _ = run(capsys, "report", "gs://bucket/run")
    assert (status, out) == (0, "gs://bucket/run/report.html\n")
    assert b"gs://bucket/run" in objects["run/report.html"]
    status, out, err = run(capsys, "runs", "gs://bucket/run")
    assert status == 0, err
    assert "finished" in out
    embed = ["embed", "gs://bucket/imported", "--text", "ab", "--output", "gs://bucket/e.npy"]
    assert run(capsys, *embed)[0] == 0
    assert objects["e.npy"].startswith(b"\x93NUMPY")
    objects["texts.txt"] = b"the cat and the tree saw water\n" * 20
    vocab = ["vocab", "train", "gs://bucket/texts.txt", "--size", "17"]
    status, _, err = run(capsys, *vocab, "--output", "gs://bucket/v.model")
    assert status == 0, err
    assert "--data.vocabulary gs://bucket/v.model" in err
    assert "v.model" in objects


def test_what_cannot_work_is_one_message(server, objects, capsys, tmp_path):
    config = tmp_path / "config.json"

    def train_at(run_dir):
        config.write_text(to_json(make_config(run_dir, **SECTIONS)))
        return fails(capsys, "train", config)

    assert "there is no bucket elsewhere; check the name" in train_at("gs://elsewhere/run")
    assert "the run's folder is s3://bucket/run; expected a path of this machine or" in train_at(
        "s3://bucket/run"
    )
    with server.fault(status=403, method="POST"):
        assert "no rights to gs://bucket/new/.writable" in train_at("gs://bucket/new")
    with server.fault(status=403, method="GET", name="/b/bucket?"):
        message = train_at("gs://bucket/new")
    assert re.search("properties of its bucket cannot be read .*Storage Legacy Bucket Re", message)
    more = {"infer": ["--prompt=a"], "embed": ["--text=a"], "export": ["gs://bucket/x"]}
    for command in ("infer", "eval", "embed", "export"):
        message = fails(capsys, command, "gs://bucket/none", *more.get(command, []))
        assert "there is no model gs://bucket/none; check the name" in message
    assert not server.names("new")
