"""The shipped tasks that recipes train on, on files of the published forms."""

import json

import pytest

from t5jax.data import Source, registry
from t5jax.data.bridge.tf import seqio
from t5jax.data.sources import libraries
from t5jax.data.tasks.prompted import register_variant

pytestmark = pytest.mark.usefixtures("clean_registries")

TEMPLATES = """dataset: ag_news
templates:
  1: !Template
    answer_choices: World ||| Sports
    jinja: '{{ text }} Which section? ||| {{ answer_choices[label] }}'
    name: which section
  2: !Template
    answer_choices: null
    jinja: '{% if label == 1 %}{{ text }} Is this sport? ||| yes{% endif %}'
    name: only sport
"""


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder of data, and one row in place of each data set of the Hub."""
    rows = [{"text": "A goal.", "label": 1}, {"text": "An election.", "label": 0}]

    def hf_dataset(path, splits, name=None, **options):
        return Source(dict.fromkeys(splits, lambda: iter(rows)))

    monkeypatch.setattr(libraries, "hf_dataset", hf_dataset)
    monkeypatch.setenv("T5JAX_DATA", str(tmp_path))
    return tmp_path


def examples(name: str, split: str = "train") -> list[tuple[str, str]]:
    registry.load_tasks()
    register_variant(name)
    return [
        (example["inputs"], example["targets"])
        for example in seqio.TaskRegistry.get(name).source.examples(split)
    ]


def instructions(data, name: str, rows: int, solved: int = 2) -> None:
    """Writes a file of Natural Instructions, with the fields that published ones have."""
    task = {
        "Contributors": ["Anna"],
        "Definition": [f"Do {name}."],
        "Positive Examples": [
            {"input": f"e{i}", "output": f"E{i}", "explanation": "so"} for i in range(solved + 1)
        ],
        "Negative Examples": [],
        "Instances": [
            {"id": f"{name}-{i}", "input": f"in {i}", "output": [f"out {i}", "or"]}
            for i in range(rows)
        ],
        "Instance License": ["Apache 2.0"],
    }
    folder = data / "natural-instructions" / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(task))


def test_natural_instructions_have_definitions_examples_and_a_limit(data):
    lists = data / "natural-instructions" / "splits" / "default"
    lists.mkdir(parents=True)
    names = [f"task{i:03}_a" for i in range(60)]
    (lists / "train_tasks.txt").write_text("\n".join(names) + "\n")
    (lists / "test_tasks.txt").write_text("task900_b\n")
    for name in names:
        instructions(data, name, rows=2)
    instructions(data, "task900_b", rows=130)
    found = examples("natural_instructions")
    validation = examples("natural_instructions", "validation")
    held_out = {inputs.split(".")[0] for inputs, _ in validation}
    assert 0 < len(held_out) < 6  # Whole tasks, about one of fifty.
    assert len(found) == 2 * 2 * (60 - len(held_out))
    assert not held_out & {inputs.split(".")[0] for inputs, _ in found}
    tested = examples("natural_instructions", "test")
    assert len(tested) == 100
    assert tested[0] == ("Do task900_b.\n\nInput: in 0\nOutput:", "out 0")
    solved = "Input: e0\nOutput: E0\n\nInput: e1\nOutput: E1"
    assert tested[1] == (f"Do task900_b.\n\n{solved}\n\nInput: in 1\nOutput:", "out 1")


def test_p3_has_the_prompts_of_promptsource(data):
    folder = data / "promptsource/promptsource/templates/ag_news"
    folder.mkdir(parents=True)
    (folder / "templates.yaml").write_text(TEMPLATES)
    assert sorted(examples("p3_ag_news")) == [
        ("A goal. Is this sport?", "yes"),
        ("A goal. Which section?", "Sports"),
        ("An election. Which section?", "World"),
    ]
    assert examples("p3_ag_news:only_sport") == [("A goal. Is this sport?", "yes")]
    assert len(seqio.MixtureRegistry.get("p3")._rates) == 12


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("natural_instructions", "train_tasks.txt: No such file .* clone github.com/allenai/"),
        ("p3_imdb", "imdb/templates.yaml: No such file .* clone promptsource to "),
    ],
)
def test_files_that_are_not_there_are_named_when_they_are_read(name, message, data):
    with pytest.raises(ValueError, match=message):
        examples(name)


def test_c4_is_a_stream_that_no_one_counts():
    registry.load_tasks()
    for name in ("c4", "c4_ul2", "c4_lm"):
        source = seqio.TaskRegistry.get(name).source.source
        assert source.is_endless("train")
        assert source._function("train").path == "allenai/c4"
