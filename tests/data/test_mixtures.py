"""Rates of mixtures, held against numbers worked out by hand, and what is refused."""

import itertools
import json

import pytest

from t5jax.data import mixtures
from t5jax.data.bridge.tf import seqio
from t5jax.data.mixtures import mixture, num_rows
from t5jax.data.registry import check_mixture
from t5jax.data.sources.kinds import jsonl
from t5jax.data.sources.source import Source
from t5jax.data.tasks.prompted import prompted_task
from t5jax.metrics import exact_match

SIZES = {"small": 10, "middle": 40, "large": 250}
_numbers = itertools.count()


def add_task(name, source=None, size=3):
    rows = [{"a": f"{name} {i}"} for i in range(size)]
    source = source or Source({"train": lambda: rows})
    templates = {"plain": ("{a}", "{a}")}
    return prompted_task(name, source, templates, metrics=[exact_match], vocabulary="bytes")


@pytest.fixture(scope="module")
def tasks():
    """Three tasks with 10, 40 and 250 rows; returns their names."""
    names = [f"mixtures_{name}" for name in SIZES]
    for name, size in zip(names, SIZES.values(), strict=True):
        add_task(name, size=size)
    return names


def shares(tasks, **options) -> list[float]:
    """Registers a mixture and returns the share of each task, in per cent."""
    made = mixture(f"mixtures_{next(_numbers)}", tasks, **options)
    rates = [made.get_rate(seqio.TaskRegistry.get(task)) for task in tasks]
    return [100 * rate / sum(rates) for rate in rates]


def test_rates_of_ones_own(tasks):
    assert shares(dict(zip(tasks, [3, 1, 0.5], strict=True))) == pytest.approx(
        [66.667, 22.222, 11.111], abs=1e-3
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [100 / 3, 100 / 3, 100 / 3]),
        ({"rates": "equal"}, [100 / 3, 100 / 3, 100 / 3]),
        # 10, 40, 250 of 300.
        ({"rates": "proportional"}, [10 / 3, 40 / 3, 250 / 3]),
        # 10, 40, 50 of 100.
        ({"rates": "proportional", "cap": 50}, [10, 40, 50]),
        # Square roots of 10, 40, 250: 3.1623 + 6.3246 + 15.8114 = 25.2982.
        ({"rates": "proportional", "temperature": 2}, [12.5, 25, 62.5]),
        # Square roots of 10, 40, 90: 3.1623 (1 + 2 + 3).
        ({"rates": "proportional", "cap": 90, "temperature": 2}, [100 / 6, 100 / 3, 50]),
        # Far above 1, equal.
        ({"rates": "proportional", "temperature": 1e9}, [100 / 3, 100 / 3, 100 / 3]),
    ],
)
def test_rates_of_a_list(options, expected, tasks):
    assert shares(tasks, **options) == pytest.approx(expected, abs=1e-4)


def test_examples_come_at_the_rates(tasks):
    made = mixture("mixtures_read", {tasks[0]: 1, tasks[2]: 3})
    dataset = made.get_dataset({"inputs": 40, "targets": 40}, num_epochs=None, seed=1)
    counts = {task: 0 for task in tasks}
    vocabulary = made.output_features["inputs"].vocabulary
    for example in dataset.take(2000).as_numpy_iterator():
        counts[vocabulary.decode(example["inputs"]).rpartition(" ")[0]] += 1
    assert counts[tasks[1]] == 0
    assert 440 < counts[tasks[0]] < 560  # 500 +- 3 standard deviations.


def test_tasks_may_come_later_and_may_be_variants_or_mixtures():
    whole = mixture("mixtures_early", {"mixtures_late:plain:2shot": 1, "mixtures_pair": 2})
    mixture("mixtures_pair", {"mixtures_late": 1, "mixtures_other": 3})
    assert whole.name == "mixtures_early"
    with pytest.raises(ValueError, match="'mixtures_early': there is no task 'mixtures_late:plain"):
        _ = whole.tasks
    add_task("mixtures_late")
    add_task("mixtures_other")
    assert check_mixture("mixtures_early") is whole
    rates = {task.name: whole.get_rate(task) for task in whole.tasks}
    expected = {"mixtures_late:plain:2shot": 1, "mixtures_late": 0.5, "mixtures_other": 1.5}
    assert rates == expected
    unsized = mixture("mixtures_unsized", ["mixtures_pair"], rates="proportional")
    with pytest.raises(ValueError, match="'mixtures_pair' is a mixture, which has no size of its"):
        _ = unsized.tasks


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        ({"a": 1, "b": -0.5}, {}, "rate of 'b' is -0.5; expected a number above 0 .leave a task"),
        ({"a": 0}, {}, "mixture 'mixtures_bad': the rate of 'a' is 0; expected a number above 0"),
        ({"a": float("nan")}, {}, "the rate of 'a' is nan; expected"),
        ({"a": float("inf")}, {}, "the rate of 'a' is inf; expected"),
        ({"a": "much"}, {}, "the rate of 'a' is 'much'; expected a number above 0"),
        ({}, {}, "is of {}; expected tasks, such as"),
        ("a", {}, "is of 'a'; expected tasks, such as"),
        (["a", "a"], {}, "a task is there twice in a, a"),
        (["a"], {"rates": "by_size"}, "rates is 'by_size'; expected one of equal, proportional"),
        ({"a": 1}, {"rates": "equal"}, "the tasks come with rates; leave one out"),
        (["a"], {"cap": 5}, "cap is 5, which only rates=.proportional. of a list of tasks uses"),
        ({"a": 1}, {"temperature": 2}, "temperature is 2, which only rates=.proportional."),
        (["a"], {"rates": "proportional", "cap": 0}, "cap is 0; expected a number above 0"),
        (["a"], {"rates": "proportional", "temperature": -1}, "temperature is -1; expected a num"),
    ],
)
def test_refused(tasks, options, message):
    with pytest.raises(ValueError, match=message):
        mixture("mixtures_bad", tasks, **options)
    assert "mixtures_bad" not in seqio.MixtureRegistry.names()


def test_a_name_that_is_taken(tasks):
    mixture("mixtures_taken", tasks)
    for name in ("mixtures_taken", tasks[0]):
        with pytest.raises(ValueError, match=f"there is a task or mixture '{name}' already"):
            mixture(name, tasks)


# --- Sizes --------------------------------------------------------------------------------------


def test_rows_are_counted_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("T5JAX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"a": str(i)}) + "\n" for i in range(7)))
    source = jsonl({"train": file}).filter(lambda row: row["a"] != "3", "three")
    task = add_task("mixtures_counted", source)
    assert num_rows(task) == 6
    (kept,) = (tmp_path / "cache" / "counts").iterdir()
    assert kept.read_text() == "6"
    kept.write_text("60")  # To tell a count that is read from one that is made.
    assert num_rows(task) == 6
    mixtures._counts.clear()  # As another process has it.
    assert num_rows(task) == 60
    mixtures._counts.clear()
    file.write_text('{"a": "0"}\n')
    assert num_rows(task) == 1
    with pytest.raises(ValueError, match="'mixtures_counted' has no split 'dev' to count; there a"):
        num_rows(task, "dev")


def test_rows_of_a_task_of_seqio(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    task = seqio.TaskRegistry.add(
        "mixtures_seqio",
        source=seqio.TextLineDataSource({"train": str(tmp_path / "a.txt")}),
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
        preprocessors=[],
    )
    assert num_rows(task) == 3
