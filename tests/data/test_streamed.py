"""Streamed examples: each once an epoch, shuffled as a whole, from any place on."""

import itertools
import json
import logging
import os

import pytest

from t5jax.architectures import T5Config
from t5jax.config import Config, DataConfig
from t5jax.data import pipeline
from t5jax.data.bridge.tf import elements, seqio, tf
from t5jax.data.bridge.vocabulary import RunVocabulary
from t5jax.data.mixtures import mixture
from t5jax.data.objectives.span_corruption import SpanCorruption
from t5jax.data.run import Run
from t5jax.data.sources import spool
from t5jax.data.sources.kinds import jsonl
from t5jax.data.sources.source import Source
from t5jax.data.streamed import StreamedExamples
from t5jax.data.tasks import base
from t5jax.data.tasks.corpus import text_task
from t5jax.data.tasks.prompted import prompted_task
from t5jax.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
RUN = Run(BYTES, lengths={"inputs": 24, "targets": 24})
ROWS = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(40)]
TEXTS = [{"text": f"document {i} " + "abcdefgh"[i % 8] * (7 * i % 90)} for i in range(40)]

pytestmark = pytest.mark.usefixtures("clean_registries")


def add_tasks() -> list[int]:
    """Registers three kinds of task and a mixture; returns what grows with each reading of ROWS."""
    passes = []

    def rows():
        passes.append(1)
        return ROWS

    prompted_task("asked", Source({"train": rows}), [("{q}", "{a}"), ("{q}?", "{a}")], metrics=[])
    text_task("texts", Source({"train": lambda: TEXTS}), SpanCorruption())
    foreign = {"inputs": [f"foreign {i}" for i in range(7)], "targets": ["yes"] * 7}
    seqio.TaskRegistry.add(
        "foreign",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(foreign),
            splits=["train"],
        ),
        output_features=dict.fromkeys(("inputs", "targets"), seqio.Feature(RunVocabulary())),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    )
    mixture("mixed", {"asked": 3, "texts": 1, "foreign": 0.5})
    mixture("ours", {"asked": 3, "texts": 1})
    return passes


def stream(name, start=0, seed=7):
    windows = StreamedExamples(name, RUN, seed).windows(start, 16)
    for example in itertools.chain.from_iterable(windows):
        yield tuple(tuple(example[f].tolist()) for f in ("inputs", "targets"))


def take(num, *args, **options) -> list[tuple]:
    return list(itertools.islice(stream(*args, **options), num))


@pytest.fixture(params=["kept", "read each time"])
def buffer(request, monkeypatch):
    """Tasks of no more examples than the buffer holds are kept; here either all are, or none."""
    size = 10_000 if request.param == "kept" else 16
    monkeypatch.setattr(base, "SHUFFLE_BUFFER", size)
    return size


def test_an_epoch_has_every_example_once_in_its_own_order(buffer):
    passes = add_tasks()
    prompts = [p for row in ROWS for p in (row["q"], row["q"] + "?")]
    found = take(240, "asked")
    assert all(targets[-1] == 1 for _, targets in found)
    epochs = [[BYTES.decode(inputs) for inputs, _ in found[i : i + 80]] for i in (0, 80, 160)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(prompts)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    if buffer > 80:  # The order of TensorFlow's shuffle.
        order = tf.data.Dataset.range(80).shuffle(80, seed=7).repeat(3)
        assert list(itertools.chain(*epochs)) == [prompts[i] for i in elements(order)]
    assert len(passes) <= 2  # The rows, and once more into the spool.


def test_rows_sorted_by_class_are_shuffled_as_a_whole(monkeypatch):
    monkeypatch.setattr(base, "SHUFFLE_BUFFER", 20)
    rows = [{"q": f"{i}", "a": "no" if i < 1000 else "yes"} for i in range(2000)]
    prompted_task("sorted", Source({"train": lambda: rows}), [("{q}", "{a}")], metrics=[])
    found = take(4000, "sorted")
    for start in range(0, 4000, 100):  # 5 standard deviations.
        answers = [BYTES.decode(targets) for _, targets in found[start : start + 100]]
        assert 25 <= answers.count("yes") <= 75
    assert found[:2000] != found[2000:]
    assert sorted(found[:2000]) == sorted(found[2000:])
    assert take(2000, "sorted") == found[:2000]
    assert take(2000, "sorted", seed=8) != found[:2000]
    assert take(10, "sorted", 3210) == found[3210:3220]


def test_a_table_that_is_too_large_to_be_held_is_shuffled_as_a_whole(monkeypatch, tmp_path, caplog):
    """By the offsets of its lines, in the same order as one that is held."""
    monkeypatch.setattr(base, "SHUFFLE_BUFFER", 20)
    lines = [f'{{"q": "{i}", "a": "{"no" if i < 500 else "yes"}"}}\n' for i in range(1000)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    source = jsonl({"train": tmp_path / "a.jsonl"}).hold_out("test", every=10)
    source = source.filter(lambda row: row["q"][-1] != "7")
    prompted_task("indexed", source, [("{q}", "{a}")], metrics=[])
    held = take(1700, "indexed")
    monkeypatch.setattr(spool, "MOST", 1000)
    assert take(1700, "indexed") == held
    assert caplog.text == ""


def test_what_cannot_be_shuffled_as_a_whole_is_said(monkeypatch, caplog):
    monkeypatch.setattr(base, "SHUFFLE_BUFFER", 20)
    monkeypatch.setattr(spool, "MOST", 1000)
    prompted_task("large", Source({"train": lambda: ROWS}), [("{q}", "{a}")], metrics=[])
    with caplog.at_level(logging.WARNING):
        found = take(40, "large")
    assert sorted(inputs for inputs, _ in found) == sorted(
        tuple([*BYTES.encode(row["q"]), 1]) for row in ROWS
    )
    assert "task large: the rows of its split 'train' cannot be reached" in caplog.text
    assert "more than 1,000 bytes, and they come from a function" in caplog.text
    assert "shuffled among 20 examples at a time" in caplog.text


def test_a_task_of_which_nothing_is_left_is_an_error():
    rows = Source({"train": lambda: ROWS})
    options = {"metrics": [], "too_long": "drop"}
    prompted_task("long", rows, [("{q}", "{a} " + 24 * "x")], **options)
    with pytest.raises(ValueError, match="long has no examples in its split 'train'"):
        take(1, "long")


def test_that_seqio_shuffles_a_part_at_a_time_is_said(caplog):
    add_tasks()
    with caplog.at_level(logging.WARNING):
        assert len(take(9, "foreign")) == 9
    assert "task foreign: SeqIO shuffles its examples among 1,000 at a time" in caplog.text


def windows(name, num, start=0, most=16) -> list[list]:
    found = StreamedExamples(name, RUN, 7).windows(start, most)
    return [[BYTES.decode(e["inputs"]) for e in window] for window in itertools.islice(found, num)]


def test_the_examples_of_an_epoch_are_counted():
    add_tasks()
    counts = {name: StreamedExamples(name, RUN, 7).epoch() for name in ("asked", "texts")}
    assert counts["asked"] == 80  # Two templates.
    # Bytes and an eos after each document, cut into pieces that fill a row.
    piece = seqio.get_mixture_or_task("texts").source.bind(RUN).tokens_length
    assert counts["texts"] == -(-sum(len(row["text"]) + 1 for row in TEXTS) // piece)
    with pytest.raises(ValueError, match=r"the mixture has 2 tasks \(asked, texts\), of which"):
        StreamedExamples("ours", RUN, 7).epoch()
    with pytest.raises(ValueError, match="foreign is a task of SeqIO's own, whose examples are"):
        StreamedExamples("foreign", RUN, 7).epoch()


def test_a_window_ends_with_the_epoch():
    add_tasks()
    found = windows("asked", 6, most=30)
    assert list(map(len, found)) == [30, 30, 20] * 2
    assert len(set(itertools.chain(*found[:3]))) == 80
    assert windows("asked", 3, start=60, most=30) == found[2:5]
    assert list(map(len, windows("asked", 3, most=1000))) == [80] * 3


def test_in_a_mixture_windows_end_with_the_epochs_of_large_tasks():
    small = [{"q": f"small {i}", "a": "x"} for i in range(5)]
    for name, rows in {"large": ROWS, "small": small}.items():
        source = Source({"train": lambda rows=rows: rows})
        prompted_task(name, source, [("{q}", "{a}")], metrics=[])
    mixture("both", {"large": 2, "small": 1})
    found = windows("both", 20, most=16)
    # A task's epoch ends in a window only if it is too short: 5 * 3 < 16 * 2 <= 40 * 3 / 2.
    for window in found:
        asked = [prompt for prompt in window if prompt.startswith("question")]
        assert len(asked) == len(set(asked))
    ends = list(itertools.accumulate(map(len, found)))
    assert min(map(len, found)) < 16 == max(map(len, found))
    assert sum(len(window) < 16 for window in found) <= ends[-1] / 60 + 1
    for number, end in enumerate(ends[:3]):
        assert windows("both", 3, start=end) == found[number + 1 : number + 4]


def test_a_window_does_not_depend_on_those_before():
    """As where a task's epoch ends with one window, and its next one begins within the next."""
    sizes = {"a": 40, "b": 33, "c": 37}
    for name, size in sizes.items():
        rows = [{"q": f"{name} {i}", "a": "x"} for i in range(size)]
        source = Source({"train": lambda rows=rows: rows})
        prompted_task(name, source, [("{q}", "{a}")], metrics=[])
    mixture("three", dict.fromkeys(sizes, 1))
    found = windows("three", 12, most=11)
    ends = list(itertools.accumulate(map(len, found)))
    for number in (6, 7, 8):
        resumed = windows("three", 2, start=ends[number], most=11)
        assert resumed == found[number + 1 : number + 3]


def test_files_that_were_replaced_are_named_on_resume(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"q": "1", "a": "2"}\n')
    rows = jsonl({"train": [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]})
    prompted_task("of_files", rows, [("{q}", "{a}")], metrics=[], vocabulary="bytes")
    data = DataConfig("of_files", inputs_length=24, targets_length=24, batch_size=2)
    config = Config(model=T5Config(vocab_size=384), data=data)
    state = json.loads(json.dumps(pipeline.train_iterator(config).state()))
    os.utime(tmp_path / "a.jsonl", (1, 1))  # A copy is no change.
    pipeline.train_iterator(config).restore(state)
    (tmp_path / "b.jsonl").write_text('{"q": "1", "a": "3"}\n')
    with pytest.raises(ValueError, match=r"the content of b\.jsonl was '\w+' and is '\w+' now"):
        pipeline.train_iterator(config).restore(state)


@pytest.mark.parametrize("name", ["asked", "ours"])
def test_a_stream_goes_on_from_any_place(name, buffer):
    add_tasks()
    straight = take(700, name)
    for start in (1, 80, 333, 660):
        assert take(40, name, start) == straight[start : start + 40]


def test_epochs_that_are_skipped_are_not_read(buffer):
    passes = add_tasks()
    assert take(1, "asked", 80 * 50 + 3) == take(80 * 50 + 4, "asked")[-1:]
    passes.clear()
    take(1, "asked", 80 * 50 + 3)
    assert len(passes) <= 2


def test_batches_go_on_where_they_were_on_more_hosts():
    add_tasks()
    data = DataConfig("ours", vocabulary="bytes", inputs_length=24, targets_length=24, batch_size=4)
    config = Config(model=T5Config(vocab_size=384), data=data)
    whole = pipeline.train_iterator(config)
    batches = [next(whole) for _ in range(5)]
    state = None
    for step, num_hosts in enumerate((1, 2, 4, 2, 1)):  # Killed after every step.
        for host in range(num_hosts):
            rows = range(host, 4, num_hosts)
            part = pipeline.train_iterator(config, rows=rows)
            if state:
                part.restore(json.loads(state))
            batch = next(part)
            for name, array in batches[step].items():
                assert (batch[name] == array[list(rows)]).all()
        state = json.dumps(part.state())
