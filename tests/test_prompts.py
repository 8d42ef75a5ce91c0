import json

import pytest

from t5jax import metrics
from t5jax.data.prompts import Template, prompted_task, read
from t5jax.data.sources import Source, jsonl
from t5jax.data.tf import seqio
from t5jax.data.vocabularies import run_vocabulary
from t5jax.tokenizers import ByteTokenizer

ROWS = [{"q": f"q{i}", "a": f"a{i}", "n": i} for i in range(5)]
TEMPLATES = [("Ask: {q}", "{a}"), ("{n}. {q}?", "= {a}")]


@pytest.fixture(autouse=True)
def clean_registry():
    before = set(seqio.TaskRegistry.names())
    yield
    for name in set(seqio.TaskRegistry.names()) - before:
        seqio.TaskRegistry.remove(name)


def make_task(rows, templates=TEMPLATES, **settings):
    source = Source({"train": lambda: rows, "validation": lambda: rows})
    settings = {"metrics": [metrics.exact_match]} | settings
    return prompted_task("prompted", source, templates, **settings)


def examples(task, split):
    with run_vocabulary(ByteTokenizer()):
        dataset = task.get_dataset(None, split, shuffle=False)
    return read(lambda: list(dataset.as_numpy_iterator()))


# --- Templates ----------------------------------------------------------------------------------


def test_a_template_renders_a_row():
    template = Template("{{{x}}} {y:.1f} {z[k][0]}", "{x}")
    row = {"x": "a{b}", "y": 2, "z": {"k": ["c"]}, "unused": None}
    assert template.render(row) == ("{a{b}} 2.0 c", "a{b}", "a{b} 2 c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{q", r"inputs of template .*expected '}' before end of string in '{q'"),
        ("q}", "Single '}' encountered in format string in 'q}'; write {{ for a brace"),
        ("{}", "{} in '{}' must be the name of a field"),
        ("{0}", "{0} in '{0}' must be the name of a field"),
        ("question", "'question' names no field; expected something like {question}"),
        ("{{q}}", "names no field"),
        ("", "'' names no field"),
    ],
)
def test_a_mistyped_template_is_found_at_registration(text, message):
    import re

    pattern = message if message.startswith("inputs of") else re.escape(message)
    with pytest.raises(ValueError, match=pattern):
        make_task(ROWS, [(text, "{a}")])
    with pytest.raises(ValueError, match=r"task 'prompted': targets of template '{q}'"):
        make_task(ROWS, [("{q}", text)])
    assert "prompted" not in seqio.TaskRegistry.names()


def test_what_is_not_a_list_of_templates_is_refused():
    with pytest.raises(ValueError, match=r"'Ask: {q}' is not a template; expected a list of pairs"):
        make_task(ROWS, ("Ask: {q}", "{a}"))
    with pytest.raises(ValueError, match="task 'prompted' has no templates"):
        make_task(ROWS, [])
    make_task(ROWS)
    with pytest.raises(ValueError, match="'prompted' already; choose another name"):
        make_task(ROWS)


# --- Tasks --------------------------------------------------------------------------------------


def test_training_has_every_template_and_other_splits_take_turns():
    task = make_task(ROWS)
    train = [(e["inputs_pretokenized"], e["targets_pretokenized"]) for e in examples(task, "train")]
    expected = [(f"Ask: q{i}", f"a{i}") for i in range(5)]
    expected += [(f"{i}. q{i}?", f"= a{i}") for i in range(5)]
    assert sorted(train) == sorted((a.encode(), b.encode()) for a, b in expected)
    prompts = [e["inputs_pretokenized"].decode() for e in examples(task, "validation")]
    assert prompts == ["Ask: q0", "1. q1?", "Ask: q2", "3. q3?", "Ask: q4"]


def test_tokens_are_those_of_the_tokenizer_with_eos():
    example = examples(make_task([{"q": "é <extra_id_0>", "a": ""}], TEMPLATES[:1]), "validation")[
        0
    ]
    assert example["inputs"].tolist() == [*ByteTokenizer().encode("Ask: é <extra_id_0>"), 1]
    assert example["targets"].tolist() == [1]


def test_references_and_postprocess_reach_the_metric():
    rows = [{"q": "2+2", "a": "so # 4", "refs": ["4", "# four"]}, {"q": "1", "a": "1", "refs": "1"}]

    def last(text):
        return text.split("#")[-1].strip()

    task = make_task(rows, TEMPLATES[:1], references="refs", postprocess=last)
    both = [
        task.postprocess_fn("ignored", example=e, is_target=True)
        for e in examples(task, "validation")
    ]
    assert both == [["4", "four"], "1"]
    assert task.postprocess_fn("therefore # four", example=None, is_target=False) == "four"
    seqio.TaskRegistry.remove("prompted")
    task = make_task(rows, TEMPLATES[:1], postprocess=last)
    first = examples(task, "validation")[0]
    assert task.postprocess_fn("so # 4", example=first, is_target=True) == "4"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "x"}, "there is no field 'a'; the row has q"),
        ({"q": "x", "a": None}, "field 'a' is None, a NoneType; a template needs texts or numbers"),
        ({"q": ["x"], "a": "y"}, r"field 'q' is \['x'\], a list"),
        ({"q": "x", "a": "y", "refs": []}, r"references field 'refs' is \[\]; expected a text"),
        ({"q": "x", "a": "y"}, "references field 'refs' is None; .* the row has q, a"),
    ],
)
def test_a_row_that_does_not_fit_is_named(row, message):
    good = {"q": "x", "a": "y", "refs": "z"}
    task = make_task([good, good, row], TEMPLATES[:1], references="refs")
    where = "task 'prompted': split 'train', row 2, template 'Ask: {q}': "
    with pytest.raises(ValueError, match=where + message):
        examples(task, "train")


def test_a_format_that_does_not_fit_a_value_is_named():
    task = make_task(ROWS, [Template("{q:.1f}", "{a}", name="precise")])
    with pytest.raises(ValueError, match="row 0, template 'precise': Unknown format code 'f'"):
        examples(task, "train")


def test_an_error_of_the_users_own_function_passes_as_it_is():
    def rows():
        yield ROWS[0]
        raise KeyError("my own")

    task = prompted_task("own", Source({"train": rows}), TEMPLATES, metrics=[])
    with pytest.raises(KeyError, match="my own"):
        examples(task, "train")


# --- Sources ------------------------------------------------------------------------------------


def test_jsonl_reads_globs_in_order_and_skips_blank_lines(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"q": "2"}\n\n{"q": "é"}\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"q": "1"}', encoding="utf-8-sig")
    source = jsonl({"train": tmp_path / "*.jsonl", "test": tmp_path / "b.jsonl"})
    assert source.splits == ("train", "test")
    assert [row["q"] for row in source.rows("train")] == ["1", "2", "é"]
    assert list(source.map(lambda row: {"n": len(row)}).rows("test")) == [{"n": 1}, {"n": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"q": 1}\n{"q": \n', r"bad\.jsonl, line 2 is not JSON"),
        (b'{"q": 1}\n\n{"q": "\xff"}\n', r"bad\.jsonl, line 3 is not JSON: 'utf-8'"),
        (b"[1]\n", r"bad\.jsonl, line 1 is a JSON list; expected an object"),
        (b"\n\n", r"bad\.jsonl is empty"),
    ],
)
def test_a_bad_jsonl_file_is_named_with_its_line(content, message, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(jsonl({"train": tmp_path / "bad.jsonl"}).rows("train"))


def test_a_missing_jsonl_file_is_an_error_when_it_is_read():
    source = jsonl({"train": "absent-*.jsonl"})
    with pytest.raises(ValueError, match=r"there is no file absent-\*\.jsonl \(looked from /"):
        list(source.rows("train"))


def test_sources_refuse_what_is_no_function_or_row():
    with pytest.raises(ValueError, match="split 'train' of a source is a list; expected a func"):
        Source({"train": ROWS})
    with pytest.raises(ValueError, match="a source has no splits"):
        Source({})
    source = Source({"train": lambda: ["text"], "none": lambda: []})
    with pytest.raises(ValueError, match="row 0 of split 'train' is a str; expected a dict"):
        list(source.rows("train"))
    with pytest.raises(ValueError, match="split 'none' has no rows"):
        list(source.rows("none"))
    with pytest.raises(ValueError, match="there is no split 'test'; there are train, none"):
        list(source.rows("test"))


def test_real_rows_read_through_templates(request):
    path = request.config.rootpath.parent / "shared/data/tasks/gsm8k.test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    source = jsonl({"test": path})
    task = prompted_task("gsm8k", source, [("{question}", "{answer}")], metrics=[])
    lines = path.read_text(encoding="utf-8").splitlines()
    read = examples(task, "test")
    assert len(read) == len(lines) == 1319
    assert read[7]["targets_pretokenized"].decode() == json.loads(lines[7])["answer"]
