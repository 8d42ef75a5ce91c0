"""`t5jax eval`: from names to scores, beside baselines, and a folder that goes on."""

import json
from pathlib import Path

import pytest

import tiny
from t5jax import pretrained
from t5jax.convert import export_model
from t5jax.data.batches.examples import EvalExample, EvalSet
from t5jax.evaluation import Evaluator, baselines, evaluate_model
from t5jax.evaluation.predictions import Folder
from t5jax.evaluation.results import result_of
from t5jax.evaluation.scores import Answers
from t5jax.metrics import bits_per_byte, rank_accuracy
from t5jax.metrics.likelihood import Choice, Details, LogProb
from tiny import one_device, trained_run  # noqa: F401

OPTIONS = {"split": "validation", "batch_size": 8, "resamples": 20}


def test_run_checkpoint_and_export_measure_the_same(tmp_path, capsys):
    run_dir = trained_run()
    capsys.readouterr()  # Of the training, where this test is the first to need it.
    scores = tmp_path / "scores.json"
    of_run = evaluate_model(str(run_dir), **OPTIONS | {"json": scores, "num_samples": 2})
    out, err = capsys.readouterr()
    assert "exact_match" in out
    assert "+ the model is better" in out
    assert "prediction" not in out
    assert err.count("  prediction ") == 2
    assert json.loads(scores.read_text()) == of_run
    assert of_run["capitals"]["num_examples"] == 11

    # What the loop measured at the checkpoint that is best, the last one here.
    logged = [line for line in tiny.read_metrics(run_dir) if "validation/loss" in line][-1]
    for name, value in of_run["capitals"]["model"].items():
        assert value == pytest.approx(logged[f"validation/capitals/{name}"], rel=1e-6)

    # From Python the scores are returned, and nothing is printed.
    capsys.readouterr()
    assert pretrained.load(str(run_dir)).evaluate(**OPTIONS) == of_run
    assert capsys.readouterr().out == ""
    assert evaluate_model(str(run_dir / "checkpoints/10"), **OPTIONS) == of_run
    assert evaluate_model(str(run_dir / "checkpoints/5"), **OPTIONS) != of_run

    options = {"dtype": "float32", "max_shard_bytes": 10**9, "overwrite": False}
    export_model(str(run_dir), str(tmp_path / "hf"), **options)
    given = {"tasks": "capitals", "inputs_length": 16, "max_tokens": 8}
    assert evaluate_model(str(tmp_path / "hf"), **OPTIONS | given) == of_run


def test_options_of_eval_count():
    run_dir, few = str(trained_run()), OPTIONS | {"num_examples": 3, "show": False}
    (full,) = evaluate_model(run_dir, **few).values()
    assert full["num_examples"] == 3
    for option, value in {
        "dtype": "bfloat16",
        "inputs_length": 4,
        "max_tokens": 2,
        "split": "train",
        "shots": 1,
    }.items():
        longer = {"inputs_length": 40} if option == "shots" else {}
        (other,) = evaluate_model(run_dir, **few | {option: value} | longer).values()
        assert other["model"]["loss"] != full["model"]["loss"], option
        if option == "dtype":
            assert other["model"]["loss"] == pytest.approx(full["model"]["loss"], rel=0.02)
    (other,) = evaluate_model(run_dir, **few | {"resamples": 0}).values()
    assert (other["intervals"], other["comparisons"]) == ({}, {})
    assert other["model"] == full["model"]


def test_metrics_and_choices_that_are_asked_for():
    options = OPTIONS | {"num_examples": 4, "show": False, "baseline": ()}
    asked = {"metrics": ["token_f1", "exact_match", "bits_per_byte", "loss"], "choices": ["A", "B"]}
    (found,) = evaluate_model(str(trained_run()), **options | asked).values()
    assert list(found["model"]) == [
        *("loss", "perplexity", "token_accuracy", "bits_per_byte"),
        *("rank_accuracy", "rank_accuracy_norm", "exact_match", "token_f1"),
    ]
    assert found["baselines"] == {}


CHOOSING = """
from t5jax.data import JinjaTemplate, jsonl, prompted_task, rank_accuracy

prompted_task(
    "choosing",
    jsonl({"train": "rows.jsonl", "validation": "rows.jsonl"}),
    [JinjaTemplate("{{q}} ||| {{answer_choices[a]}}", choices="{{x}} ||| {{y}}")],
    metrics=[rank_accuracy],
)
"""


def test_choices_of_a_tasks_templates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"question {i}", "x": "A" * i, "y": "B", "a": i % 2} for i in range(1, 5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choosing.py").write_text(CHOOSING)
    for split in ("validation", "train"):
        options = OPTIONS | {"show": False, "resamples": 0, "split": split}
        options |= {"task_files": ["choosing.py"], "output": tmp_path / split}
        (found,) = evaluate_model(str(trained_run()), "choosing", **options).values()
        lines = (tmp_path / split / "predictions/choosing.jsonl").read_text().splitlines()
        given = [json.loads(line) for line in lines]
        for row, line in zip(rows, given, strict=True):
            assert [choice["text"] for choice in line["choices"]] == [row["x"], row["y"]]
            first, second = (choice["log_prob"] for choice in line["choices"])
            right = (second > first) == bool(row["a"])
            assert line["scores"]["rank_accuracy"] == 100.0 * right
        scores = [line["scores"]["rank_accuracy"] for line in given]
        assert found["model"]["rank_accuracy"] == sum(scores) / 4


def test_tasks_by_name_and_by_pattern():
    options = OPTIONS | {"num_examples": 2, "show": False, "resamples": 0}
    found = evaluate_model(str(trained_run()), ["cap*", "first_letter", "capitals"], **options)
    assert list(found) == ["capitals", "first_letter"]
    found = evaluate_model(str(trained_run()), ["first_letter", "capitals:0"], shots=2, **options)
    assert list(found) == ["first_letter:2shot", "capitals:0:2shot"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "capitols"}, r"--tasks is 'capitols', which no task .*; did you mean capitals"),
        ({"tasks": "capitol*"}, r"no task matches 'capitol\*'; did you mean capitals"),
        ({"tasks": "cap*", "split": "x"}, r"no task with the split 'x' matches 'cap\*'"),
        ({"split": "test"}, r"capitals has no split 'test'; there are train, validation"),
        ({"max_tokens": 0}, r"targets_length is 0; it must be at least 1"),
        ({"inputs_length": 0}, r"inputs_length is 0; it must be at least 1"),
        ({"num_examples": 0}, r"num_examples is 0; it must be at least 1"),
        ({"resamples": -1}, r"--resamples is -1; it must be at least 0"),
        ({"shots": -1}, r"--shots is -1; it must be at least 0"),
        (
            {"metrics": ["f1_makro"]},
            r"no metric 'f1_makro'; did you mean f1_macro\? known",
        ),
        ({"metrics": ["rank_accuracy"]}, r"example 0 has no answer choices; .*--choices yes no"),
        ({"json": Path("/proc/none/s.json")}, r"--json .*: there is no folder /proc/none; make it"),
        ({"html": Path("/proc/none/s.html")}, r"--html .*: there is no folder /proc/none; make it"),
        ({"task_files": ("absent.py",)}, r"there is no file absent.py"),
        ({"baseline": ["copy", "copy"]}, r"--baseline copy is there twice"),
        ({"baseline": ["absent.json"]}, r"--baseline absent.json: No such file"),
        ({"baseline": [__file__ + "/none"]}, r"none"),
    ],
)
def test_options_of_eval_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_model(str(trained_run()), **OPTIONS | {"show": False} | changes)


def test_a_model_that_was_trained_on_nothing_needs_a_task(tmp_path):
    options = {"dtype": "float32", "max_shard_bytes": 10**9, "overwrite": False}
    export_model(str(trained_run()), str(tmp_path / "hf"), **options)
    with pytest.raises(ValueError, match=r"does not say what it was trained on; give --tasks"):
        evaluate_model(str(tmp_path / "hf"), **OPTIONS)


# --- Baselines ------------------------------------------------------------------------------------


def test_beside_a_model_a_folder_and_a_file(tmp_path, capsys):
    """Three forms of one earlier checkpoint: the same scores; paired where answers are there."""
    run_dir, folder, file = trained_run(), tmp_path / "five", tmp_path / "five.json"
    earlier = str(run_dir / "checkpoints/5")
    options = OPTIONS | {"resamples": 200}
    of_five = evaluate_model(earlier, **options | {"output": folder, "json": file})["capitals"]
    given = [earlier, str(folder), str(file), "majority"]
    page = tmp_path / "page.html"
    found = evaluate_model(str(run_dir), **options | {"baseline": given, "html": page})["capitals"]
    assert list(found["baselines"]) == [earlier, str(folder), "majority", str(file)]
    for name in given[:3]:
        assert found["baselines"][name] == pytest.approx(of_five["model"])
    paired, unpaired = (found["comparisons"][name]["loss"] for name in (str(folder), str(file)))
    assert found["comparisons"][earlier] == found["comparisons"][str(folder)]
    # Trained on: better on the very same examples.
    assert paired["verdict"] == "better"
    assert paired["difference"] == pytest.approx(unpaired["difference"])
    widths = [high - low for low, high in (paired["interval"], unpaired["interval"])]
    assert widths[0] < widths[1]
    assert "loss" not in found["baselines"]["majority"]
    assert "better" in page.read_text()


def test_losses_of_other_tokens_are_not_compared(caplog):
    """As those of a baseline with another vocabulary: only what is per byte of the same text."""
    examples = [EvalExample("", "", "text", [], []) for _ in range(8)]
    asked = EvalSet("task", examples, [], str, [bits_per_byte, rank_accuracy])

    def says(num_tokens, num_bytes):
        choices = [Choice("text", "text", -1.0)]
        details = Details(num_tokens, 0, num_bytes, 1, choices)
        return Answers(None, [LogProb(-4.0, details)] * 8, None)

    for other, expected in (
        (says(2, 4), ["loss", "perplexity", "token_accuracy", "bits_per_byte"]),
        (says(3, 4), ["bits_per_byte"]),
        (says(3, 3), []),
    ):
        result = result_of(asked, says(2, 4), {"other": other}, [], 10, 0)
        names = [*expected, "rank_accuracy", "rank_accuracy_norm"]
        assert list(result["baselines"]["other"]) == names
        assert list(result["comparisons"]["other"]) == names
    warnings = [record.getMessage() for record in caplog.records]
    assert "--metrics bits_per_byte can be compared" in warnings[0]
    assert "bits_per_byte of other are left out" in warnings[1]


def test_a_baseline_of_something_else_is_refused_by_name(tmp_path, capsys):
    run_dir, folder, file = str(trained_run()), tmp_path / "of", tmp_path / "scores.json"
    few = OPTIONS | {"num_examples": 4, "show": False, "resamples": 0}
    evaluate_model(run_dir, **few | {"output": folder, "json": file})

    def refused(message, baseline, **changes):
        with pytest.raises(ValueError, match=message):
            evaluate_model(run_dir, **few | {"baseline": [str(baseline)]} | changes)

    refused("of has no predictions of the task first_letter; it has capitals", folder,
            tasks="first_letter")  # fmt: skip
    refused("has no scores of the task first_letter; it has capitals", file, tasks="first_letter")
    refused("4 predictions of the task capitals, which has 11 examples", folder, num_examples=None)
    refused("scores of 4 examples of the task capitals; here it has 11", file, num_examples=None)
    refused("the inputs of example 0 of the task capitals are .*here", folder, split="train")
    for wrong in ("[1, 2]", '{"capitals": {"num_examples": "4", "loss": 1}}'):
        file.write_text(wrong)
        refused('holds no scores; expected {"TASK": {"METRIC": NUMBER}}', file)


def test_a_baseline_that_was_asked_with_other_lengths_is_said(tmp_path, caplog):
    asked = {"inputs_length": 512, "max_tokens": 4}
    (tmp_path / "evaluation.json").write_text(json.dumps({"options": asked}))
    earlier = baselines.find(str(tmp_path))
    baselines.warn_of_lengths(earlier, asked)
    assert not caplog.text
    baselines.warn_of_lengths(earlier, asked | {"max_tokens": 128})
    assert "was asked with max_tokens 4, not 128: where texts are longer" in caplog.text


# --- The folder -----------------------------------------------------------------------------------


def test_an_evaluation_that_was_stopped_goes_on_without_asking_twice(tmp_path, monkeypatch):
    run_dir, folder = str(trained_run()), tmp_path / "out"
    options = OPTIONS | {"show": False, "tasks": ["capitals", "first_letter"]}
    whole = evaluate_model(run_dir, **options | {"output": tmp_path / "whole"})
    asked = []
    answers = Evaluator.answers

    def stopping(self, params, eval_set, *, start=0, most=None):
        for number, some in enumerate(answers(self, params, eval_set, start=start, most=4)):
            if eval_set.task == "first_letter" and number == 1:
                raise KeyboardInterrupt
            asked.append((eval_set.task, start + 4 * number, len(some)))
            yield some

    monkeypatch.setattr(Evaluator, "answers", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(run_dir, **options | {"output": folder})
    file = folder / "predictions/first_letter.jsonl"
    assert len(file.read_text().splitlines()) == 4
    with file.open("a") as torn:
        torn.write('{"index": 4, "inp')
    asked.clear()

    def counting(self, params, eval_set, *, start=0, most=None):
        for some in answers(self, params, eval_set, start=start, most=most):
            asked.append((eval_set.task, start, len(some)))
            yield some

    monkeypatch.setattr(Evaluator, "answers", counting)
    assert evaluate_model(run_dir, **options | {"output": folder}) == whole
    assert asked == [("first_letter", 4, 7)]
    for name in ("predictions/capitals.jsonl", "predictions/first_letter.jsonl", "scores.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(11))
    assert {"inputs", "targets", "prediction", "scores", "log_prob"} <= rows[0].keys()
    # Other metrics of the same answers ask nothing; neither do other devices and batches.
    asked.clear()
    evaluate_model(run_dir, **options | {"output": folder, "metrics": ["bleu"], "batch_size": 4})
    assert asked == []


def test_a_folder_of_another_evaluation_is_refused(tmp_path):
    run_dir, folder = trained_run(tmp_path / "run"), tmp_path / "out"
    options = OPTIONS | {"show": False, "output": folder, "num_examples": 2, "resamples": 0}
    evaluate_model(str(run_dir), **options)
    for changes, message in (
        ({"split": "train"}, "whose split is 'validation'; now it is 'train'; give another"),
        ({"max_tokens": 3}, "whose max_tokens is 8; now it is 3"),
        ({"tasks": "first_letter"}, "whose what is asked is .*capitals"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_model(str(run_dir), **options | changes)
    with pytest.raises(ValueError, match=r"whose model is '.*/10'; now it is '.*/5'"):
        evaluate_model(str(run_dir / "checkpoints/5"), **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    with pytest.raises(ValueError, match="mine holds something else; give a folder that is new"):
        evaluate_model(str(run_dir), **options | {"output": tmp_path / "mine"})
    with (
        Folder(tmp_path / "new", {"model": {}, "options": {}, "tasks": {}}),
        pytest.raises(ValueError, match=r"another command is writing --output .*new now; wait"),
    ):
        Folder(tmp_path / "new", {"model": {}, "options": {}, "tasks": {}})
    file = folder / "predictions/capitals.jsonl"
    first, second = file.read_text().splitlines(keepends=True)
    file.write_text(second + first)
    with pytest.raises(ValueError, match=r"jsonl, line 1, is of example 1; expected 0: two"):
        evaluate_model(str(run_dir), **options)
    line = '{"index": 0}\n'
    (folder / "predictions/capitals.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"capitals.jsonl has a line that is no prediction: "):
        evaluate_model(str(run_dir), **options)
