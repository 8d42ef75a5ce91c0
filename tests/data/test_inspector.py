"""`t5jax tasks` and `t5jax vocab train`: what they find in tasks, and say of broken ones."""

import math
import re

import numpy as np
import pytest
import tokenizers

from t5jax.cli import main
from t5jax.data import registry
from t5jax.data.bridge.tf import seqio
from t5jax.data.inspector import check_tasks, length_bins, list_tasks, plot_lengths, show_task
from t5jax.data.mixtures import mixture
from t5jax.data.objectives.span_corruption import SpanCorruption
from t5jax.data.registry import load_tasks
from t5jax.data.sources.cleaning import drop_duplicates
from t5jax.data.sources.kinds import jsonl
from t5jax.data.sources.source import Source
from t5jax.data.tasks.corpus import text_task
from t5jax.data.tasks.prompted import prompted_task
from t5jax.data.texts import common_tokenizer, read_lines
from t5jax.metrics import bleu, exact_match, pearson
from t5jax.tokenizers import ByteTokenizer, LabelTokenizer, load_tokenizer
from t5jax.tokenizers.training import Measure, measure, sample

LENGTHS = {"inputs": 20, "targets": 4}
ROWS = [{"q": "a" * n, "a": str(n)} for n in (1, 2, 3, 3, 30)]


def add(name, rows=ROWS, templates=(("say {q}", "{a}"),), source=None, **options):
    source = source or Source({"train": lambda: rows, "test": lambda: rows[:2]})
    options = {"metrics": [exact_match], "vocabulary": "bytes"} | options
    return prompted_task(name, source, templates, **options)


@pytest.fixture(scope="module", autouse=True)
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    rows = Source({"train": lambda: ROWS, "test": lambda: ROWS[:2]})
    cleaned = rows.clean(drop_duplicates("q")).filter(lambda row: len(row["q"]) > 1, "short")
    templates = {"say": ("say {q}", "{a}"), "ask": ("{q}?", "{a}")}
    add("inspect_prompted", source=cleaned, templates=templates, metrics=[exact_match, bleu])
    documents = [{"text": "It was the best of times, it was the worst of times. " * 4}] * 2
    source = Source({"train": lambda: documents})
    text_task("inspect_text", source, SpanCorruption(), vocabulary="bytes")
    (folder / "lines.txt").write_text("one\ntwenty-two\n")
    seqio.TaskRegistry.add(
        "inspect_seqio",
        source=seqio.TextLineDataSource({"validation": str(folder / "lines.txt")}),
        preprocessors=[
            lambda ds: ds.map(lambda line: {"inputs": line, "targets": line}),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=dict.fromkeys(
            ["inputs", "targets"], seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
        ),
        metric_fns=[],
    )
    add("inspect_open", vocabulary=None)
    add("inspect_file", source=jsonl({"train": folder / "absent.jsonl"}))
    mixture("inspect_mixture", {"inspect_prompted": 2, "inspect_seqio": 1})


# --- list ---------------------------------------------------------------------------------------


def test_list_says_where_rows_come_from_without_reading_one():
    found = {row.name: row for row in list_tasks("inspect_")}
    prompted = found["inspect_prompted"]
    assert prompted.source == "test_inspector.py"
    assert prompted.splits == "train, test"
    assert prompted.templates == "say, ask"
    assert prompted.metrics == "exact_match, bleu"
    assert found["inspect_file"].source == "absent.jsonl"
    assert found["inspect_text"].templates == "SpanCorruption"
    assert found["inspect_seqio"].source == "TextLineDataSource"
    assert found["inspect_mixture"].source == ("mixture of inspect_prompted 2, inspect_seqio 1")
    assert [row.name for row in list_tasks("inspect_*x*")] == ["inspect_mixture", "inspect_text"]
    with pytest.raises(ValueError, match="no task like 'inspect_promted'; did you mean inspect_pr"):
        list_tasks("inspect_promted")


# --- show ---------------------------------------------------------------------------------------


def test_show_counts_lengths_cuts_and_drops():
    report = show_task("inspect_prompted", lengths=LENGTHS, num_shown=3)
    texts = [dict(example.texts) for example in report.shown]
    assert texts[:2] == [{"inputs": "say aa", "targets": "2"}, {"inputs": "aa?", "targets": "2"}]
    assert report.shown[0].ids["targets"] == [ord("2") + 3, 1]
    assert (report.split, report.num_examples, report.is_whole) == ("train", 6, True)
    inputs, targets = report.features["inputs"], report.features["targets"]
    assert inputs.lengths.tolist() == [7, 4, 8, 5, 35, 32]
    assert targets.lengths.tolist() == [2, 2, 2, 2, 3, 3]
    assert (inputs.truncated, targets.truncated) == (2 / 6, 0)
    assert list(report.dropped.values()) == [1, 1]
    duplicates, short = report.dropped
    assert duplicates.startswith("drop_duplicates")
    assert short == "short"


def test_show_reads_no_more_than_asked():
    report = show_task("inspect_prompted", lengths=LENGTHS, num_shown=0, num_examples=4)
    assert (report.num_examples, report.is_whole, report.shown) == (4, False, [])
    assert show_task("inspect_prompted", lengths=LENGTHS, num_examples=6).is_whole


def test_show_counts_unknown_pieces(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("say aaa aa a\n" * 9)
    assert (
        main(["vocab", "train", str(lines), "--size", "9", "--output", f"{tmp_path}/x.model"]) == 0
    )
    tokenizer = load_tokenizer(tmp_path / "x.model")
    report = show_task("inspect_open", "test", tokenizer=tokenizer, lengths=LENGTHS)
    # Each target is a space and a digit, which the vocabulary lacks, and eos.
    assert report.features["targets"].unknown == pytest.approx(1 / 3)
    assert report.features["inputs"].unknown == 0


def test_show_of_a_text_task_is_what_its_objective_makes():
    lengths = {"inputs": 64, "targets": 32}
    report = show_task("inspect_text", lengths=lengths)
    inputs, targets = (report.shown[0].texts[name] for name in ("inputs", "targets"))
    assert inputs.startswith("It")
    assert "<extra_id_0>" in inputs
    assert targets.startswith("<extra_id_0>")
    assert report.features["inputs"].lengths[0] == 64
    assert report.features["inputs"].truncated == report.features["targets"].truncated == 0


def test_show_of_a_task_of_seqio():
    report = show_task("inspect_seqio", lengths={"inputs": 5, "targets": 20})
    assert report.split == "validation"
    assert report.shown[1].texts == {"inputs": "twenty-two", "targets": "twenty-two"}
    assert report.features["inputs"].lengths.tolist() == [4, 11]
    assert report.features["inputs"].truncated == 0.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect_promted"], "no task file registers.*; did you mean inspect_prompted"),
        (["inspect_mixture"], "is a mixture; show one of its tasks: inspect_prompted, inspect_seq"),
        (["inspect_text", "dev"], "inspect_text has no split 'dev'; there are train"),
        (["inspect_open"], "task inspect_open leaves its vocabulary to the run; name one here"),
        (["inspect_file"], "'inspect_file': there is no file .*absent.jsonl"),
        (["inspect_prompted:tell"], "has no variant 'inspect_prompted:tell'"),
    ],
)
def test_show_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        show_task(*args, lengths=LENGTHS)


# --- Histograms ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "counts", "edges"),
    [
        ([3], [1], [3, 4]),
        ([1, 1, 2, 4], [2, 1, 0, 1], [1, 2, 3, 4, 5]),
        ([0, 9, 10, 11, 119], [2, 2, *[0] * 9, 1], [*range(0, 121, 10)]),
        ([95, 215], [1, 0, 0, 0, 0, 0, 1], [80, 100, 120, 140, 160, 180, 200, 220]),
    ],
)
def test_bins_are_round_and_hold_all(lengths, counts, edges):
    got_counts, got_edges = length_bins(np.array(lengths))
    assert got_edges.tolist() == edges
    assert got_counts.tolist() == counts


def test_the_plot_is_a_png(tmp_path):
    report = show_task("inspect_prompted", lengths=LENGTHS)
    plot_lengths(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# --- check --------------------------------------------------------------------------------------


def checks(name, **options):
    return {(c.split, c.template): c for c in check_tasks(name, lengths=LENGTHS, **options)}


def test_check_reads_every_split_under_every_template():
    found = checks("inspect_prompted")
    assert {key: (c.num_examples, c.num_dropped, c.error) for key, c in found.items()} == {
        ("train", "say"): (3, 2, ""),
        ("train", "ask"): (3, 2, ""),
        ("test", "say"): (1, 1, ""),
        ("test", "ask"): (1, 1, ""),
    }
    names = [c.task for c in check_tasks("inspect_mixture", lengths=LENGTHS)]
    assert names == ["inspect_prompted"] * 4 + ["inspect_seqio"]


def answers(*texts, **options):
    """Returns the check of a task with these answers."""
    if "inspect_answers" in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove("inspect_answers")
    rows = [{"q": f"{i}", "a": text} for i, text in enumerate(texts)]
    settings = {k: options.pop(k) for k in ("metrics", "postprocess") if k in options}
    add("inspect_answers", source=Source({"train": lambda: rows}), **settings)
    (found,) = checks("inspect_answers", **options).values()
    return found


def test_check_doubts_targets_that_are_none():
    assert answers("0", "-1", "2").doubts == (
        "1 targets are -1, which often says that there is no label",
    )
    assert answers("0", "-1", "x").doubts == ()  # No numbers of labels.
    assert answers("-2", "-1", "0").doubts == ()
    assert answers("nan", "a", "None", "nan").doubts == (
        "2 targets are 'nan'",
        "1 targets are 'None'",
    )
    assert answers("eins", "null").doubts == ()  # Zero, in German.
    assert answers("null", "a", "null").doubts == ("2 targets are 'null'",)
    assert "nan, so it is missing" in answers(math.nan).error


def test_check_doubts_targets_that_say_nothing():
    assert answers("1", "0.30000000000000004", "0.1").doubts == (
        "1 targets are numbers with 10 decimals or more; round them, as {score:.1f} does",
    )
    assert answers(*100 * ["a"]).doubts == ("all 100 targets are 'a'",)
    assert answers(*99 * ["a"]).doubts == answers(*100 * ["a"], "b").doubts == ()


def test_check_doubts_targets_that_the_vocabulary_cannot_give_back(tmp_path):
    vocabulary = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"</s>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>")
    )
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    found = answers("a", "é", "a", tokenizer=load_tokenizer(tmp_path))
    assert found.doubts == ("1 targets come back from the vocabulary changed: 'é' as '<unk>'",)
    assert answers("a", "é", "a b ").doubts == ()


def test_check_tries_metrics_on_the_targets():
    def fails(targets, predictions):
        raise KeyError("x")

    found = answers("a", metrics=[exact_match, fails])
    assert found.error == "its metric fails fails on its own targets: KeyError: 'x'"
    assert answers("a", metrics=[pearson]).error.startswith("its metric pearson fails on its own t")
    assert answers("1", "2", metrics=[pearson]).error == ""
    found = answers("a", postprocess=int)
    assert found.error.startswith("its postprocess fails on its targets: ValueError")
    odd = iter(range(100))
    found = answers("a", "b", postprocess=lambda text: text + str(next(odd)))
    assert found.doubts == ("the targets themselves score exact_match 0.00",)


def test_check_knows_labels_and_cuts():
    labels = LabelTokenizer(["yes", "no"])
    found = answers("yes", "no", labels=labels)
    assert (found.error, found.num_examples, found.num_cut) == ("", 2, {})
    assert (
        "row 1, template 'say {q}': 'nay' is not a class"
        in answers("yes", "nay", labels=labels).error
    )
    words = LabelTokenizer(["yes", "no"], per_word=True)
    assert answers("yes", "no", labels=words).doubts == ()
    assert answers("yes", "no").num_cut == {}  # LENGTHS has 4 with eos.
    assert answers("yes!", "no").num_cut == {"targets": 1}


def test_check_counts_what_stands_in_train_too():
    train = [{"q": "Where is it?", "a": "Here"}, {"q": "Who", "a": "I"}, {"q": "x", "a": "y"}]
    test = [
        {"q": "WHERE  is it？", "a": "here\n"},  # A full-width question mark.
        {"q": "Who", "a": "She"},
        {"q": "Whose", "a": "I"},
        {"q": "x", "a": "y"},
    ]
    splits = {"test": lambda: test, "dev": lambda: test[2:3], "train": lambda: train}
    add("inspect_doubles", source=Source(splits), templates={"say": ("say {q}", "{a}")})
    found = checks("inspect_doubles")
    assert list(found) == [("train", "say"), ("test", "say"), ("dev", "say")]
    counts = {s: (c.num_prompts_in_train, c.num_in_train) for (s, _), c in found.items()}
    assert counts == {"train": (0, 0), "test": (3, 2), "dev": (0, 0)}
    # Exemplars hide what is asked.
    assert checks("inspect_doubles:2shot")["test", "say"].num_prompts_in_train == 0

    books = {"train": ["One. " * 30, "Two. " * 30], "test": ["two. " * 30, "Three. " * 30]}
    source = Source({s: lambda b=b: [{"text": text} for text in b] for s, b in books.items()})
    text_task("inspect_books", source, SpanCorruption(), vocabulary="bytes")
    lengths = {"inputs": 64, "targets": 32}
    found = {c.split: c for c in check_tasks("inspect_books", lengths=lengths)}
    assert (found["test"].num_prompts_in_train, found["test"].num_in_train) == (1, 1)
    assert found["test"].num_examples > 2


def test_check_finds_what_is_wrong():
    missing = [{"q": "a", "a": "1"}, {"q": "b"}]
    add("inspect_bad", missing, {"good": ("{q}", "{q}"), "bad": ("{q}", "{a}")})
    found = checks("inspect_bad")
    assert not found["train", "good"].error
    message = "split 'train', row 1, template 'bad': there is no field 'a'; the row has q"
    assert message in found["train", "bad"].error
    assert "row 1" in found["test", "bad"].error

    add("inspect_empty", [{"q": "a", "a": ""}])
    assert "its targets are empty" in checks("inspect_empty")["train", "0"].error
    add("inspect_dropped", [{"q": "a", "a": ""}], empty="drop")
    assert checks("inspect_dropped")["train", "0"].error == "there are no examples"
    add("inspect_none", [])
    assert "split 'train' has no rows" in checks("inspect_none")["train", "0"].error
    assert "there is no file" in checks("inspect_file")["train", "0"].error
    add("inspect_fails", source=Source({"train": lambda: [{}][1]}))
    assert "IndexError: list index out of range" in checks("inspect_fails")["train", "0"].error


def test_check_of_a_task_of_seqio_with_empty_targets(tmp_path):
    (tmp_path / "lines.txt").write_text("one\n\nthree\n")
    task = seqio.TaskRegistry.get("inspect_seqio")
    source = seqio.TextLineDataSource({"train": str(tmp_path / "lines.txt")})
    seqio.TaskRegistry.add_provider(
        "inspect_seqio_empty", task.replace(name="inspect_seqio_empty", source=source)
    )
    assert checks("inspect_seqio_empty")["train", ""].error == "example 1 has empty targets"


# --- The commands -------------------------------------------------------------------------------


def run(capsys, *args) -> tuple[int, str, str]:
    status = main([str(arg) for arg in args])
    return status, *capsys.readouterr()


def test_commands_print_what_was_found(capsys, tmp_path):
    status, out, err = run(capsys, "tasks", "list", "inspect_pr")
    assert (status, err) == (0, "")
    assert "inspect_prompted" in out
    assert "say, ask" in out

    options = ["--inputs-length", 20, "--targets-length", 4, "--png", tmp_path / "x.png"]
    status, out, err = run(capsys, "tasks", "show", "inspect_prompted", "--num", 1, *options)
    assert (status, err) == (0, f"wrote {tmp_path / 'x.png'}\n")
    assert (
        "inputs:\n  say aa\n  7 tokens: 118[s] 100[a] 124[y] 35[ ] 100[a] 100[a] 1[<eos>]\n" in out
    )
    assert "lengths in tokens with eos, of 6 examples" in out
    assert "33.33%" in out
    assert "  5 to  9  3  █████" in "\n".join(f"  {line.strip()}" for line in out.splitlines())
    assert "longer than the limit" in out
    assert "short" in out

    status, out, err = run(capsys, "tasks", "check", "inspect_prompted")
    assert (status, err) == (0, "")
    assert "ok     inspect_prompted train say: 3 examples, 2 dropped\n" in out
    assert "ok     inspect_prompted test say: 1 examples, 1 dropped, 1 also in train\n" in out
    assert out.endswith("4 of 4 are sound\n")
    status, out, err = run(
        capsys, "tasks", "check", "inspect_prompted:ask", "--labels", "2", "--inputs-length", "4"
    )
    assert status == 1
    assert "FAILED inspect_prompted:ask train ask: " in out
    assert "'3' is not a class of the model" in out
    assert "ok     inspect_prompted:ask test ask: 1 examples, 1 dropped\n" in out
    status, out, _ = run(capsys, "tasks", "check", "inspect_file")
    assert status == 1
    assert out.startswith("FAILED inspect_file train 0: task 'inspect_file': there is no file")


def test_check_says_by_its_exit_status_what_it_found(capsys):
    assert answers("a", "nan").doubts  # Registers the task.
    assert run(capsys, "tasks", "check", "inspect_answers")[0] == 3
    assert run(capsys, "tasks", "check", "inspect_answers", "--accept-doubts")[0] == 0
    assert answers("a", metrics=[pearson]).error
    assert run(capsys, "tasks", "check", "inspect_answers", "--accept-doubts")[0] == 1


def test_all_tasks_are_those_of_the_user(monkeypatch, tmp_path):
    """Without the data of those that come with t5jax, these could only fail."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_broken", {})
    load_tasks()
    assert {"gsm8k", "numbers"} <= set(registry.task_names())
    assert not {"gsm8k", "numbers"} & set(registry.own_task_names())
    assert "inspect_file" in registry.own_task_names()
    monkeypatch.setattr(registry, "task_names", lambda: ["gsm8k"])
    assert registry.own_task_names() == ["gsm8k"]
    monkeypatch.setitem(registry._broken, tmp_path / "mine.py", "it fails")
    assert registry.own_task_names() == []
    monkeypatch.undo()
    (path,) = [path for path in registry._names if path.stem == "gsm8k"]
    monkeypatch.chdir(path.parent.parent)  # Where they are the user's own.
    assert "gsm8k" in registry.own_task_names()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tasks", "shwo"], "there is no command tasks 'shwo'; did you mean show? known are list,"),
        (["vocab", "trian"], "there is no command vocab 'trian'; did you mean train?"),
        (
            ["tasks", "show", "inspect_prompted", "--num", "-1"],
            "--num is -1; it must be at least 0",
        ),
        (["tasks", "check", "x", "--inputs-length", "0"], "--inputs-length is 0; it must be at l"),
        (["vocab", "train", "x", "--output", "x.txt"], "--output is x.txt; expected a file ending"),
        (["vocab", "train", "x", "--size", "0"], "--size is 0; it must be at least 1"),
        (["vocab", "train", "inspect_"], "no task file registers"),
        (["vocab", "train", "./absent.txt"], "there is no file"),
        (["vocab", "train", "inspect_prompted", "--split", "dev"], "has no split 'dev'; there are"),
        (["vocab", "train", "inspect_text", "--size", "9999"], "cannot train a SentencePiece voc"),
        (["cache", "inspect_open", "FOLDER"], "task inspect_open leaves its vocabulary to the run"),
        (["cache", "inspect_text", "FOLDER", "--beam", "--processes", "2"], "leave one out"),
    ],
)
def test_commands_refuse(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *[str(tmp_path) if arg == "FOLDER" else arg for arg in args])
    assert (status, out) == (1, "")
    assert message in err


def test_tokens_show_where_words_begin(capsys, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("say aaa aa a b\n" * 9)
    run(capsys, "vocab", "train", lines, "--size", 9, "--output", tmp_path / "x.model")
    options = ["--vocabulary", tmp_path / "x.model", "--num", 1]
    _, out, _ = run(capsys, "tasks", "show", "inspect_open", *options)
    inputs, targets = (line for line in out.splitlines() if " tokens: " in line)
    assert "".join(re.findall(r"\[(.*?)\]", inputs)) == " say a<eos>"
    assert "".join(re.findall(r"\[(.*?)\]", targets)) == " <unk><eos>"
    assert out.count("vocabulary: SentencePieceTokenizer(109 ids") == 1


def test_lengths_that_no_example_has_are_one_line(capsys):
    rows = [{"q": "a" * n, "a": "1"} for n in (1, 1, 1, 50, 100)]
    add("inspect_gaps", rows)
    limits = ["--inputs-length", 60, "--targets-length", 4]
    _, out, _ = run(capsys, "tasks", "show", "inspect_gaps", *limits)
    found = out.partition("inputs, 60 at most\n")[2].partition("\n\ntargets, 4 at most\n")
    assert found[0].splitlines() == [
        "    0 to   9  3  " + "█" * 50,
        "   10 to  49  0",
        "   50 to  59  1  " + "█" * 17,
        "   60 to  99  0",
        "  100 to 109  1  " + "█" * 17 + "  longer than the limit",
    ]
    assert found[2].splitlines()[:3] == ["  2  5  " + "█" * 50, "", "rows and examples dropped"]


def test_groups_and_their_commands_have_help(capsys):
    for args, expected in [
        (["tasks"], "check NAME|all"),
        (["tasks", "--help"], "list [PATTERN]"),
        (["vocab", "-h"], "train TASK|FILES..."),
    ]:
        status, out, err = run(capsys, *args)
        assert (status, err) == (0, "")
        assert expected in out
    for args, expected in [
        (["tasks", "list"], "--task-files"),
        (["tasks", "show"], "(default: 10000)"),
        (["tasks", "check"], "NAME"),
        (["vocab", "train"], "{unigram,bpe}"),
        (["cache"], "MIXTURE FOLDER"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main([*args, "--help"])
        assert stopped.value.code == 0
        assert expected in capsys.readouterr().out


# --- Vocabularies -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_vocabulary_from_a_task_knows_its_texts(kind, capsys, tmp_path):
    words = [a + b + c for a in "bcd" for b in "aeiou" for c in "lmnrst"]
    rows = [{"q": f"{x} {y}", "a": y.upper()} for x in words[:30] for y in words[60:]]
    add(f"inspect_{kind}", rows)
    path = tmp_path / f"{kind}.model"
    options = ["--size", 60, "--type", kind, "--output", path]
    status, out, err = run(capsys, "vocab", "train", f"inspect_{kind}", *options)
    assert (status, err) == (0, f"wrote {path}; use it with --data.vocabulary {path}\n")
    assert "SentencePieceTokenizer(160 ids" in out
    assert "0.000% of tokens are unknown" in out
    assert "100.00% of lines are restored exactly" in out
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("say bal DAL")) == "say bal DAL"
    first = path.read_bytes()
    run(capsys, "vocab", "train", f"inspect_{kind}", *options)
    assert path.read_bytes() == first


def test_lines_of_tasks_and_files(tmp_path):
    assert list(read_lines(["inspect_seqio"], "validation")) == 2 * ["one"] + 2 * ["twenty-two"]
    assert list(read_lines(["inspect_prompted:ask"], "test")) == ["aa?", "2"]
    (tmp_path / "a.txt").write_text("x y\n\nz\n")
    assert list(read_lines([str(tmp_path / "*.txt")])) == ["x y", "z"]


def test_a_sample_is_drawn_from_all_lines():
    lines = [str(i) for i in range(1000)]
    chosen = sample(iter(lines), 100)
    assert chosen == sample(iter(lines), 100)
    assert len(set(chosen)) == 100
    assert 400 < np.mean([int(line) for line in chosen]) < 600
    assert sample(lines, 1000) == lines


def test_measure_by_hand():
    score = measure(ByteTokenizer(), ["ab", "é"])
    # Three characters, four bytes.
    assert score == Measure(characters_per_token=0.75, unknown=0.0, unchanged=1.0)


def test_one_vocabulary_for_a_mixture():
    assert repr(common_tokenizer("inspect_mixture")) == "ByteTokenizer(384 ids)"
    with pytest.raises(ValueError, match="inspect_open leaves its vocabulary to the run"):
        common_tokenizer("inspect_open")
