"""Scores and samples as they are printed, on a terminal and in Markdown."""

import io

import pytest

from t5jax.monitor import tables

RESULTS = {
    "rte": {
        "num_examples": 1277,
        "model": {"loss": 0.41234, "accuracy": 71.25},
        "baselines": {"copy": {"accuracy": 0.0}, "majority": {"accuracy": 52.7}},
        "comparisons": {
            "copy": {"accuracy": {"verdict": "better"}},
            "majority": {"accuracy": {"verdict": "not distinguishable"}},
        },
    },
    "numbers": {
        "num_examples": 20,
        "model": {"exact_match": 12.0},
        "baselines": {"copy": {"exact_match": 40.0}, "majority": {"exact_match": 0.5}},
        "comparisons": {"copy": {"exact_match": {"verdict": "worse"}}},
    },
}


def rendered(table):
    file = io.StringIO()
    tables.print_table(table, file)
    return [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]


def test_results_table_at_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = rendered(tables.results_table(RESULTS))
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines[-3:]]
    assert rows == [
        ["rte", "(1,277)", "loss", "0.4123", "–", "–"],
        ["accuracy", "71.25", "0.00", "+", "52.70", "="],
        ["numbers", "(20)", "exact_match", "12.00", "40.00", "-", "0.50"],
    ]


def test_results_table_in_a_file_is_wider_than_a_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    names = [f"baseline_{i}" for i in range(8)]
    row = {
        "model": {"token_accuracy": 1.0},
        "baselines": {n: {"token_accuracy": 1.0} for n in names},
    }
    lines = rendered(tables.results_table({"numbers": {"num_examples": 20, **row}}))
    assert lines[0].split()[2:] == ["metric", "model", *names]
    assert lines[-1].split()[:3] == ["numbers", "(20)", "token_accuracy"]


def test_results_table_marks_a_model_that_a_baseline_beats():
    table = tables.results_table(RESULTS)
    assert [str(cell.style) for cell in table.columns[2].cells] == ["bold", "yellow", "yellow"]
    # Without resamples the scores alone count.
    for model, style in ((5.0, "yellow"), (6.0, "bold")):
        row = {"num_examples": 1, "model": {"em": model}, "baselines": {"copy": {"em": 5.0}}}
        (cell,) = tables.results_table({"t": row}).columns[2].cells
        assert cell.style == style
        row |= {"lower_is_better": ["em"]}
        (cell,) = tables.results_table({"t": row}).columns[2].cells
        assert cell.style == "yellow"  # Neither is lower.
    row |= {"model": {"em": 4.0}}
    (cell,) = tables.results_table({"t": row}).columns[2].cells
    assert cell.style == "bold"


def test_results_table_of_tasks_with_other_baselines_and_long_names(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "a_task_whose_name_is_rather_longer_than_its_column"
    results = {**RESULTS, name: {"num_examples": 3, "model": {"bleu": 1.0}}}
    lines = rendered(tables.results_table(results))
    assert max(map(len, lines)) <= 80
    # Nothing of the name is lost.
    row = next(i for i, line in enumerate(lines) if "a_task" in line)
    width = lines[row].index("bleu")
    assert "".join(line[:width].strip() for line in lines[row:]) == f"{name} (3)"


def test_results_markdown():
    assert tables.results_markdown({**RESULTS, "a|b": {"num_examples": 3, "model": {"x": 1}}}) == (
        "| task | metric | model | copy | majority | examples |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |\n"
        "| rte | loss | 0.4123 | – | – | 1,277 |\n"
        "| rte | accuracy | 71.25 | 0.00 + | 52.70 = | 1,277 |\n"
        "| numbers | exact_match | 12.00 | 40.00 - | 0.50 | 20 |\n"
        "| a\\|b | x | 1.00 | – | – | 3 |\n"
    )


def test_samples_table_shows_text_as_it_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    inputs = ["is [red]this[/red] so?", "start " + "x" * 1000 + " end"]
    targets, predictions = ["yes", ["a", "b"]], ["yes", "\x1b[31mc"]
    lines = rendered(tables.samples_table(inputs, targets, predictions, max_chars=60))
    words = [" ".join(line.split()) for line in lines]
    assert words[:3] == ["input is [red]this[/red] so?", "target yes", "prediction yes"]
    assert words[3] == f"input start {'x' * 22} … {'x' * 24} end"
    assert words[4:] == ["target a | b", "prediction �[31mc"]
    with pytest.raises(ValueError, match="2 inputs, 2 targets and 1 predictions"):
        tables.samples_table(inputs, targets, ["a"])


def test_samples_table_marks_a_prediction_that_is_right():
    table = tables.samples_table(["a"] * 3, ["yes", ["no", "nay"], "yes"], ["yes", "nay", "ye"])
    styles = [str(cell.style) for cell in table.columns[1].cells][2::3]
    assert styles == ["green", "green", ""]


def test_cut_keeps_both_ends_within_the_limit():
    assert tables._cut("abcdef", 6) == "abcdef"
    assert tables._cut("abcdefghij", 7) == "ab … ij"


def test_samples_markdown():
    assert tables.samples_markdown(["a\nb"], [["x", "y"]], ["`z`"]) == (
        "- input: `a b`\n- target: `x` or `y`\n- prediction: `'z'`\n"
    )
    with pytest.raises(ValueError, match="expected the same number of each"):
        tables.samples_markdown(["a"], [], ["b"])
