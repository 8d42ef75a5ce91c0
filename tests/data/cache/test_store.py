import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from processes import Process
from t5jax import metrics
from t5jax.architectures import T5Config
from t5jax.config import Config, DataConfig
from t5jax.data import pipeline, registry
from t5jax.data.bridge.tf import seqio, tf
from t5jax.data.bridge.vocabulary import RunVocabulary, building_for
from t5jax.data.cache.examples import open_cached
from t5jax.data.cache.reader import CachedTask, split_folder
from t5jax.data.cache.store import write_caches
from t5jax.data.objectives.span_corruption import SpanCorruption
from t5jax.data.run import Run
from t5jax.data.sources.cleaning import drop_duplicates
from t5jax.data.sources.kinds import jsonl
from t5jax.data.sources.source import Source
from t5jax.data.tasks.corpus import text_task
from t5jax.data.tasks.prompted import prompted_task
from t5jax.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
LENGTHS = {"inputs": 24, "targets": 12}
ROWS = [{"q": f"question {i}", "a": f"answer {i % 50}"} for i in range(600)]


@pytest.fixture(autouse=True)
def shipped_tasks(clean_registries):
    registry.load_tasks()


def add_task(name="asked", rows=ROWS, templates=(("{q}?", "{a}"),), source=None, **settings):
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    source = source or Source({"train": lambda: rows, "validation": lambda: rows[:7]})
    settings = {"metrics": [metrics.exact_match], "vocabulary": "bytes"} | settings
    return prompted_task(name, source, list(templates), **settings)


def cache(folder, mixture="asked", lengths=LENGTHS, processes=1, tokenizer=BYTES, **options):
    run = Run(tokenizer, lengths=lengths)
    return write_caches(mixture, folder, run, processes=processes, **options)


def reasons(folder, **options) -> list[str]:
    return [report.reason for report in cache(folder, **options)]


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def leftovers(folder) -> list[str]:
    """Returns what lies beside whole caches, but for locks."""
    return [p.name for p in Path(folder).glob("*/.*") if not p.name.endswith(".lock")]


def streamed(task, split="train", lengths=LENGTHS) -> list[tuple]:
    with building_for(Run(BYTES)):
        dataset = task.get_dataset(lengths, split, shuffle=False)
    return [
        tuple(tuple(e[f].tolist()) for f in task.output_features)
        for e in dataset.as_numpy_iterator()
    ]


def read(folder, mixture="asked", num=None, lengths=LENGTHS, split="train") -> list[tuple]:
    examples = open_cached(mixture, folder, Run(BYTES, lengths=lengths), 0, split)
    num = num or len(CachedTask(split_folder(folder, mixture, split)))
    return [tuple(tuple(x.tolist()) for x in e.values()) for e in examples.get(range(num))]


# --- What is written ----------------------------------------------------------------------------


def test_a_prompted_task_has_the_examples_that_are_streamed(tmp_path):
    task = add_task(templates=[("{q}?", "{a}"), ("Answer this long question: {q}", "It is {a}")])
    reports = cache(tmp_path, splits=("train", "validation"))
    for report in reports:
        expected = streamed(task, report.split)
        assert sorted(read(tmp_path, split=report.split)) == sorted(expected)
        assert (
            report.num_examples == len(expected) == {"train": 1200, "validation": 7}[report.split]
        )
        assert report.path == tmp_path / "asked" / report.split
    # Longer ones were cut: the cache itself has all of them.
    lengths = CachedTask(reports[0].path).lengths
    assert reports[0].num_tokens == lengths.sum()
    assert lengths[:, 0].max() == len("Answer this long question: question 599") + 1


def test_the_content_does_not_depend_on_the_number_of_processes(tmp_path):
    add_task()
    for processes in (1, 2):
        cache(tmp_path / str(processes), processes=processes)
    one, two = (contents(tmp_path / name / "asked/train") for name in "12")
    assert one == two
    assert sum(name.startswith("shard") for name in one) == 3  # 600 examples, 256 at a time.


def test_a_corpus_is_cut_into_pieces_that_fill_a_row(tmp_path):
    documents = [{"text": f"Document {i} says {i * i}. " * (i % 7)} for i in range(100)]
    source = Source({"train": lambda: documents})
    text_task("asked", source, SpanCorruption(), vocabulary="bytes")
    (report,) = cache(tmp_path)
    cached_task = CachedTask(report.path)
    tokens = np.concatenate([x[0] for x in cached_task.read(np.arange(len(cached_task)))])
    whole = [[*ids, 1] for d in documents if (ids := BYTES.encode(d["text"]))]
    assert tokens.tolist() == [i for ids in whole for i in ids]
    assert set(cached_task.lengths[:-1, 0]) == {report.num_tokens // (report.num_examples - 1)}
    examples = open_cached("asked", tmp_path, Run(BYTES, lengths=LENGTHS), 0)
    lengths = examples.lengths(0, 50)
    assert lengths["inputs"].max() == 24
    for k, example in enumerate(examples.get(range(50))):
        assert {f: len(x) for f, x in example.items()} == {f: lengths[f][k] for f in lengths}
    # Pieces depend on lengths, and so does their cache.
    assert cache(tmp_path, lengths={"inputs": 30, "targets": 12})[0].reason == (
        "the tokens of a piece has changed"
    )


def test_tasks_of_seqios_own(tmp_path):
    feature = seqio.Feature(RunVocabulary("bytes"), add_eos=True)

    def dataset(split, shuffle_files, seed=None):
        texts = [row["q"] for row in ROWS[:40]]
        return tf.data.Dataset.from_tensor_slices({"inputs": texts, "targets": texts[::-1]})

    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim]
    task = None
    for name, preprocessors in {
        "asked": steps,
        "asked_placeholder": [steps[0], seqio.CacheDatasetPlaceholder(), steps[1]],
        # What is too long loses its eos, or its end if there is none.
        "asked_before_the_cut": [steps[0], seqio.preprocessors.append_eos],
        "asked_without": steps[:1],
    }.items():
        task = seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(dataset, splits=["train"]),
            preprocessors=preprocessors,
            output_features={"inputs": feature, "targets": feature},
        )
        lengths = {"inputs": 10, "targets": 12}
        assert cache(tmp_path, name, lengths)[0].reason == "it is not there"
        assert sorted(read(tmp_path, name, lengths=lengths)) == sorted(
            streamed(task, lengths=lengths)
        )
        assert cache(tmp_path, name, lengths)[0].reason == ""


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [seqio.preprocessors.tokenize, "placeholder", "shuffled"],
            "shuffled after what is cached",
        ),
        ([seqio.preprocessors.tokenize, "shuffled"], "asked draws at random before"),
        (
            [],
            "task asked: feature 'inputs' of an example .*lack seqio.preprocessors.tokenize",
        ),
    ],
)
def test_tasks_that_cannot_be_cached_say_why(tmp_path, steps, message):
    @seqio.map_over_dataset(num_seeds=1)
    def shuffled(example, seed):
        shuffle = tf.random.experimental.stateless_shuffle
        return example | {"inputs": shuffle(example["inputs"], seed=seed)}

    known = {"shuffled": shuffled, "placeholder": seqio.CacheDatasetPlaceholder()}
    shuffled.__name__ = "shuffled"
    feature = seqio.Feature(RunVocabulary("bytes"))
    seqio.TaskRegistry.add(
        "asked",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
                {"inputs": ["a text", "another"], "targets": ["b", "c"]}
            ),
            splits=["train"],
        ),
        preprocessors=[known[s] if isinstance(s, str) else s for s in steps],
        output_features={"inputs": feature, "targets": feature},
    )
    with pytest.raises(ValueError, match=message):
        cache(tmp_path)
    assert leftovers(tmp_path) == []


def test_batches_of_a_run_come_from_the_cache_and_mixtures_change(tmp_path):
    add_task("asked_a", [{"q": f"a{i}", "a": str(i)} for i in range(30)])
    add_task("asked_b", [{"q": f"b{i}", "a": str(i)} for i in range(10)])
    seqio.MixtureRegistry.add("asked_mix", [("asked_a", 3), ("asked_b", 1)])
    data = DataConfig(
        mixture="asked_mix",
        mixture_changes=("10:asked_b",),
        inputs_length=8,
        targets_length=8,
        batch_size=4,
        cache=str(tmp_path),
    )
    batches = pipeline.train_iterator(Config(model=T5Config(vocab_size=384), data=data))
    prompts = [
        [BYTES.decode(row) for row in next(batches)["encoder_input_tokens"]] for _ in range(15)
    ]
    early = [p for batch in prompts[:10] for p in batch]
    assert sorted(early) == sorted([f"a{i}?" for i in range(30)] + [f"b{i}?" for i in range(10)])
    assert all(p.startswith("b") for batch in prompts[10:] for p in batch)


# --- What makes a cache stale -------------------------------------------------------------------


def test_a_cache_that_matches_is_kept(tmp_path):
    add_task()
    assert reasons(tmp_path) == ["it is not there"]
    before = contents(tmp_path)
    assert reasons(tmp_path) == [""]
    # Lengths cut when it is read.
    assert reasons(tmp_path, lengths={"inputs": 9, "targets": 9}) == [""]
    add_task()  # The same task, registered anew.
    assert reasons(tmp_path) == [""]
    assert contents(tmp_path) == before
    assert reasons(tmp_path, rebuild=True) == ["asked for"]
    assert contents(tmp_path) == before


def test_what_changes_a_task_is_found_out(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:20]))
    source = jsonl({"train": str(data)})
    folder = tmp_path / "cache"

    def steps(suffix):
        def helper(text):
            return text + suffix

        return source.map(lambda row: row | {"q": helper(row["q"])})

    changes = [
        ({"source": source}, "it is not there"),
        ({"source": source}, ""),
        ({"source": source, "templates": [("{q}!", "{a}")]}, "its templates .* has changed"),
        ({"source": steps("!")}, "its templates .* has changed"),
        ({"source": steps("?")}, "the code of its rows has changed"),
        ({"source": steps("?")}, ""),
        ({"source": source.clean(drop_duplicates("q"))}, "the code of its rows has changed"),
        ({"source": source.clean(drop_duplicates("a"))}, "the code of its rows has changed"),
        ({"source": source.clean(drop_duplicates("a"))}, ""),
    ]
    for settings, reason in changes:
        add_task(**settings)
        (found,) = reasons(folder)
        assert re.fullmatch(reason, found), settings
    # The file: another content, and the same at another time.
    data.write_text(data.read_text().replace("question 3", "question x"))
    assert reasons(folder) == [f"{data} has changed"]
    content = data.read_bytes()
    data.unlink()
    data.write_bytes(content)
    os.utime(data, (1, 1))
    assert reasons(folder) == [""]
    # Same size, same time to the second, other bytes.
    data.write_bytes(content.replace(b"question x", b"question y"))
    os.utime(data, (2, 2))
    assert reasons(folder) == [f"{data} has changed"]
    assert "question y?" in [BYTES.decode(inputs) for inputs, _ in read(folder)]


def test_hosts_that_keep_the_files_in_different_folders_share_a_cache(tmp_path):
    def write(host, rows):
        for number, part in enumerate((rows[:20], rows[20:])):
            path = tmp_path / host / f"part-{number}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
            os.utime(path, (5, 5))

    def reasons_on(host):
        add_task(source=jsonl({"train": f"{tmp_path / host}/part-*.jsonl"}))
        return reasons(tmp_path / "cache")

    write("a", ROWS[:40])
    write("b", ROWS[:40])
    write("c", [*ROWS[:39], {"q": "question xx", "a": "answer 39"}])
    assert [reasons_on(host) for host in "aba"] == [["it is not there"], [""], [""]]
    # Size and time are the same, and so is all but one row.
    assert reasons_on("c") == [f"{tmp_path}/c/part-1.jsonl has changed"]
    assert "question xx?" in [BYTES.decode(inputs) for inputs, _ in read(tmp_path / "cache")]
    write("a", ROWS[20:40] + ROWS[:20])
    assert reasons_on("b") == [f"{tmp_path}/b/part-1.jsonl has changed"]
    assert reasons_on("a") == [f"{tmp_path}/a/part-0.jsonl has changed"]
    assert reasons_on("nowhere") == [""]


def test_another_vocabulary_is_found_out(tmp_path):
    class Doubling(ByteTokenizer):
        def __repr__(self):
            return "Doubling()"

        def encode(self, text):
            return [i for i in super().encode(text) for _ in "ab"]

    add_task()
    cache(tmp_path)
    assert reasons(tmp_path, tokenizer=Doubling()) == ["the vocabulary has changed"]


def test_lengths_count_where_a_task_depends_on_them(tmp_path):
    add_task(too_long="drop")
    reports = cache(tmp_path, lengths={"inputs": 24, "targets": 9})
    assert reports[0].num_examples < 600
    assert sum(reports[0].dropped.values()) == 600 - reports[0].num_examples
    kept = cache(tmp_path, lengths={"inputs": 9, "targets": 9})[0]
    assert kept.reason == ""
    assert kept.dropped == reports[0].dropped  # Still known.
    assert reasons(tmp_path, lengths={"inputs": 9, "targets": 12}) == [
        "data.targets_length has changed"
    ]


def test_a_cache_does_without_its_sources(tmp_path, caplog):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:20]))
    add_task(source=jsonl({"train": str(data)}))
    cache(tmp_path / "cache")
    data.unlink()
    assert reasons(tmp_path / "cache") == [""]
    assert f"{data} cannot be read" in caplog.text
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="rows.jsonl"):
        cache(tmp_path / "cache")


# --- Kills, full disks, damage ------------------------------------------------------------------

WRITER = """
import resource
import signal
import sys
import time

from t5jax.data import pipeline, registry
from t5jax.data.cache.store import write_caches
from t5jax.data.tasks.prompted import prompted_task
from t5jax.data.run import Run
from t5jax.data.sources.source import Source
from t5jax.tokenizers import ByteTokenizer


def rows():
    for i in range(5000):
        if i == 4000:
            print("writing", flush=True)
            time.sleep(SLEEP)
        yield {"q": f"question {i}", "a": str(i)}


prompted_task("asked", Source({"train": rows}), [("{q}", "{a}")], metrics=[], vocabulary="bytes")
LIMIT
try:
    run = Run(ByteTokenizer(), lengths={"inputs": 24, "targets": 12})
    write_caches("asked", sys.argv[1], run, processes=1)
except ValueError as error:
    print("ValueError:", error)
"""


def start_writer(folder, sleep=0, limit="") -> Process:
    return Process("-c", WRITER.replace("SLEEP", str(sleep)).replace("LIMIT", limit), folder)


@pytest.mark.slow
def test_what_a_killed_writer_leaves_is_never_read(tmp_path):
    writer = start_writer(tmp_path, sleep=100)
    writer.wait_for("writing")
    writer.kill()
    writer.wait()
    assert len(leftovers(tmp_path)) == 1
    add_task()
    with pytest.raises(ValueError, match="there is no cache"):
        open_cached("asked", tmp_path, Run(BYTES, lengths=LENGTHS), 0)
    assert reasons(tmp_path) == ["it is not there"]
    assert leftovers(tmp_path) == []
    assert len(read(tmp_path)) == 600


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path):
    limit = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
    )
    out = start_writer(tmp_path, limit=limit).wait().out
    assert f"ValueError: the cache {tmp_path / 'asked'} cannot be written" in out
    assert "GB are free there" in out
    assert [p.name for p in (tmp_path / "asked").iterdir()] == [".train.lock"]


@pytest.mark.parametrize("file", ["shard", "lengths", "cache.json"])
def test_a_damaged_cache_is_written_anew(tmp_path, file):
    add_task()
    cache(tmp_path)
    whole = contents(tmp_path)
    (path,) = [p for p in (tmp_path / "asked/train").glob(f"{file}*")][:1]
    path.write_bytes(path.read_bytes()[:-20])
    (reason,) = reasons(tmp_path)
    assert path.name in reason
    assert contents(tmp_path) == whole


def test_two_writers_take_turns(tmp_path):
    calls = tmp_path / "calls"  # What a function keeps in its closure is part of the fingerprint.

    def rows():
        with calls.open("a") as file:
            file.write("read\n")
        time.sleep(0.5)
        return ROWS

    add_task(source=Source({"train": rows}))
    found = []
    threads = [threading.Thread(target=lambda: found.extend(reasons(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["", "", "it is not there"]
    assert calls.read_text() == "read\n"


def test_who_reads_a_cache_reads_on_while_it_is_written_anew(tmp_path):
    add_task()
    cache(tmp_path)
    examples = open_cached("asked", tmp_path, Run(BYTES, lengths=LENGTHS), 0)
    before = [e["inputs"].tolist() for e in examples.get(range(600))]
    add_task(templates=[("Other: {q}", "{a}")])
    assert reasons(tmp_path) != [""]
    assert [e["inputs"].tolist() for e in examples.get(range(600))] == before


# --- Bad input ----------------------------------------------------------------------------------


def test_errors_name_what_is_wrong(tmp_path):
    add_task(rows=[{"q": "x", "a": "y"}, {"q": "z"}])
    with pytest.raises(ValueError, match=r"task 'asked'.*row 1.*'a'"):
        cache(tmp_path)
    assert leftovers(tmp_path) == []
    add_task(rows=[])
    with pytest.raises(ValueError, match="asked.*no rows"):
        cache(tmp_path)
    with pytest.raises(ValueError, match="no split 'test'; there are train, validation"):
        cache(tmp_path, splits=("test",))
    with pytest.raises(ValueError, match=r"the cache's folder is s3://bucket/folder; expected a"):
        cache("s3://bucket/folder")
    with pytest.raises(ValueError, match="processes is -1; it must be at least 1"):
        cache(tmp_path, processes=-1)
    with pytest.raises(ValueError, match="num_shards is 0"):
        cache(tmp_path, num_shards=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        cache(tmp_path / "file")
