import collections
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t5jax.batch import BatchSpec
from t5jax.data.batches.converters import make_converter
from t5jax.data.batches.iterator import Batches
from t5jax.data.cache import examples as cache_examples
from t5jax.data.cache import reader
from t5jax.data.cache.examples import CachedExamples, Part, mix
from t5jax.data.cache.reader import CachedTask
from t5jax.data.cache.store import _combine
from t5jax.data.cache.writer import Shard, ShardWriter, shard_name
from t5jax.data.objectives.span_corruption import SpanCorruption
from t5jax.tokenizers import ByteTokenizer

LENGTHS = {"inputs": 12, "targets": 8}
EOS = 1


def write(folder: Path, examples, *, features=("inputs", "targets"), chunk=3, num_shards=4) -> Path:
    """Writes a cache as `t5jax.data.cache.store` does, without a task."""
    folder.mkdir(parents=True)
    writers = {}
    for number, start in enumerate(range(0, len(examples), chunk)):
        rows = [[np.array(e[f], "<u2") for f in features] for e in examples[start : start + chunk]]
        shard = number % num_shards
        if shard not in writers:
            writers[shard] = ShardWriter(folder, shard, num_shards)
        writers[shard].add(
            np.array([[len(x) for x in row] for row in rows], np.int32),
            [np.concatenate(row).tobytes() for row in rows],
        )
    shards: list[Shard] = [writer.close() for writer in writers.values()]
    np.save(folder / reader.LENGTHS_FILE, np.concatenate([shard.lengths for shard in shards]))
    names = [shard_name(shard.number, num_shards) for shard in shards]
    info = {
        "features": features,
        "eos_ids": dict.fromkeys(features, EOS),
        "dtype": "<u2",
        "content": _combine([shard.content for shard in shards]),
        "shards": {n: len(shard.lengths) for n, shard in zip(names, shards, strict=True)},
        "files": {n: (folder / n).stat().st_size for n in (*names, reader.LENGTHS_FILE)},
    }
    (folder / reader.INFO_FILE).write_text(json.dumps(info))
    return folder


def numbered(n: int, first: int = 10) -> list[dict]:
    """Returns examples that say which one they are, of lengths from 2 to 8."""
    rng = np.random.default_rng(n)
    return [
        {
            "inputs": [first + i] * rng.integers(1, 8) + [EOS],
            "targets": [first + i] * rng.integers(1, 5) + [EOS],
        }
        for i in range(n)
    ]


def part(folder, n, first=10, rate=1.0, name="a") -> Part:
    return Part(name, CachedTask(write(folder / name, numbered(n, first))), rate)


def name_of(example) -> int:
    return int(example["targets"][0])


# --- A task -------------------------------------------------------------------------------------


def test_every_record_comes_back_in_any_order_with_its_trailing_zeros(tmp_path):
    examples = [*numbered(20), {"inputs": [7, 0, 0], "targets": [0, 256, 0]}]
    task = CachedTask(write(tmp_path / "a", examples))
    rows = np.random.default_rng(0).permutation(21)
    found = {tuple(map(tuple, example)) for example in task.read(rows)}
    assert found == {(tuple(e["inputs"]), tuple(e["targets"])) for e in examples}
    whole = task.read(np.arange(21))
    for row, example in zip(rows, task.read(rows), strict=True):
        assert [x.tolist() for x in example] == [x.tolist() for x in whole[row]]
        assert [len(x) for x in example] == task.lengths[row].tolist()
        assert example[0].dtype == np.int32


def test_a_cache_cut_short_or_damaged_is_refused(tmp_path):
    path = write(tmp_path / "a", numbered(30))
    shard = path / shard_name(1, 4)
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{shard.name} has \d+ bytes; expected {len(content)}"):
        CachedTask(path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        CachedTask(path)
    shard.write_bytes(b"\x55" * len(content))
    with pytest.raises(ValueError, match=r"is damaged .*written anew"):
        CachedTask(path).read(np.arange(30))
    (path / reader.INFO_FILE).write_text('{"files": ')
    with pytest.raises(ValueError, match=r"cache\.json cannot be read"):
        CachedTask(path)
    with pytest.raises(ValueError, match=r"there is no cache in .*t5jax cache"):
        CachedTask(tmp_path / "elsewhere")


# --- Order and mixing ---------------------------------------------------------------------------


def test_an_epoch_has_every_example_once_and_each_its_own_order(tmp_path):
    examples = CachedExamples([part(tmp_path, 50)], LENGTHS, seed=3)
    read = [name_of(e) for e in examples.get(range(150))]
    epochs = [read[i : i + 50] for i in (0, 50, 100)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10, 60))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # A global shuffle: the first tenth comes from everywhere.
    assert max(epochs[0][:5]) - min(epochs[0][:5]) > 15
    other = CachedExamples([part(tmp_path, 50, name="b")], LENGTHS, seed=4)
    assert [name_of(e) for e in other.get(range(50))] != epochs[0]


def test_so_has_every_epoch_of_a_large_task(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_examples, "_SMALL", 10)
    large = CachedExamples([part(tmp_path / "large", 50)], LENGTHS, 0)
    read = [name_of(e) for e in large.get(range(150))]
    epochs = [read[i : i + 50] for i in (0, 50, 100)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10, 60))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = CachedExamples([part(tmp_path / "other", 50)], LENGTHS, 1)
    assert [name_of(e) for e in other.get(range(50))] != epochs[0]


def test_two_tasks_of_one_size_have_different_orders(tmp_path):
    parts = [part(tmp_path, 30, first, name=name) for name, first in (("a", 10), ("b", 110))]
    read = [name_of(e) for e in CachedExamples(parts, LENGTHS, seed=3).get(range(60))]
    assert [n for n in read if n < 100] != [n - 100 for n in read if n >= 100]


def test_any_way_to_read_gives_the_same_examples(tmp_path):
    examples = CachedExamples([part(tmp_path, 50)], LENGTHS, seed=3)
    numbers = [1030, 4, 4, 99, 0, 2047]  # From several blocks, one of them twice.
    lengths = examples.lengths(0, 2048)
    for number, example in zip(numbers, examples.get(numbers), strict=True):
        (single,) = examples.get([number])
        for feature in LENGTHS:
            assert single[feature].tolist() == example[feature].tolist()
            assert lengths[feature][number] == len(example[feature])
    assert lengths["inputs"].dtype == np.int32
    assert examples.get([]) == []


def test_what_is_too_long_is_cut_and_keeps_its_eos(tmp_path):
    task = CachedTask(write(tmp_path / "a", [{"inputs": [5, 6, 7, 8, EOS], "targets": [9, EOS]}]))
    examples = CachedExamples([Part("a", task)], {"inputs": 3, "targets": 2}, seed=0)
    (example,) = examples.get([0])
    assert example["inputs"].tolist() == [5, 6, EOS]
    assert example["targets"].tolist() == [9, EOS]
    assert examples.lengths(0, 1)["inputs"].tolist() == [3]


def test_shares_are_exact_at_every_length(tmp_path):
    rates = {"a": 0.5, "b": 1.0, "c": 2.5}
    firsts = {"a": 10, "b": 1000, "c": 2000}
    parts = [part(tmp_path, 30, firsts[n], rate, n) for n, rate in rates.items()]
    examples = CachedExamples(parts, LENGTHS, seed=0)
    names = np.array([name_of(e) for e in examples.get(range(4000))])
    for (name, first), rate in zip(firsts.items(), rates.values(), strict=True):
        mine = (names >= first) & (names < first + 30)
        counts = np.cumsum(mine)
        expected = np.arange(1, 4001) * rate / 4
        assert np.abs(counts - expected).max() < 3, name
        # Its own epochs, whatever the others do.
        own = names[mine]
        for start in range(0, len(own) - 30, 30):
            assert sorted(own[start : start + 30]) == list(range(first, first + 30))


def test_a_tiny_share_is_not_rounded_to_none(tmp_path):
    parts = [part(tmp_path, 5), part(tmp_path, 5, rate=1e-12, name="b")]
    tasks = CachedExamples(parts, LENGTHS, 0).fingerprint["cached tasks"]
    assert {name: weight for name, (*_, weight) in tasks.items()} == {"a": 1 << 24, "b": 1}


def test_mixing_by_hand():
    # One in four for the first: the last of each four, as floor(3k / 4) stands still there.
    parts, positions = mix(np.arange(8), [1, 3])
    assert parts.tolist() == [0, 1, 1, 1, 0, 1, 1, 1]
    assert positions.tolist() == [0, 0, 1, 2, 1, 3, 4, 5]
    weights = [3, 5, 7, 1]
    parts, positions = mix(np.arange(1600) + 10**9 * 16, weights)
    for i, weight in enumerate(weights):
        assert (parts == i).sum() == weight * 100
        assert positions[parts == i].tolist() == list(
            range(weight * 10**9, weight * 10**9 + weight * 100)
        )


@pytest.mark.parametrize(
    ("rate", "size", "message"),
    [(0.0, 3, "task a has the rate 0.0"), (-1.0, 3, "must be above 0"), (float("nan"), 3, "nan")],
)
def test_bad_rates_are_refused(tmp_path, rate, size, message):
    with pytest.raises(ValueError, match=message):
        CachedExamples([part(tmp_path, size, rate=rate)], LENGTHS, seed=0)
    with pytest.raises(ValueError, match="no tasks"):
        CachedExamples([], LENGTHS, seed=0)


# --- Objectives ---------------------------------------------------------------------------------


def test_objectives_are_applied_anew_each_epoch_with_lengths_known_beforehand(tmp_path):
    rng = np.random.default_rng(0)
    pieces = [{"targets": rng.integers(3, 200, n).tolist()} for n in (40, 40, 40, 36)]
    task = CachedTask(write(tmp_path / "a", pieces, features=("targets",)))
    objective = SpanCorruption().bind(ByteTokenizer(), 40, 40)
    examples = CachedExamples(
        [Part("a", task, objective=objective)], {"inputs": 40, "targets": 40}, seed=1
    )
    read, again = examples.get(range(8)), examples.get(range(8))
    lengths = examples.lengths(0, 8)
    seen = collections.defaultdict(set)
    for k, (example, same) in enumerate(zip(read, again, strict=True)):
        assert example["inputs"].tolist() == same["inputs"].tolist()
        assert lengths["inputs"][k] == len(example["inputs"])
        assert lengths["targets"][k] == len(example["targets"])
        tokens = [*example["inputs"].tolist(), *example["targets"].tolist()]
        kept = tuple(sorted(x for x in tokens if 3 <= x < 200))
        seen[kept].add(tuple(example["inputs"].tolist()))
    # All of each text is there, and two epochs hide different spans of it.
    assert set(seen) == {tuple(sorted(piece["targets"])) for piece in pieces}
    assert sum(len(masks) for masks in seen.values()) == 8


# --- Hosts, restarts ----------------------------------------------------------------------------


def batches(examples, pack, rows=None) -> Batches:
    spec = BatchSpec(8, 12, 8, pack)
    return Batches(examples, make_converter(spec), spec, 7, rows)


@pytest.mark.parametrize("pack", [False, True])
def test_one_two_and_four_hosts_have_the_same_batches(tmp_path, pack):
    parts = [part(tmp_path, 60, 10, 1, "a"), part(tmp_path, 45, 1000, 2, "b")]
    whole = batches(CachedExamples(parts, LENGTHS, 3), pack)
    hosts = {
        count: [
            batches(
                CachedExamples(parts, LENGTHS, 3), pack, range(i * 8 // count, (i + 1) * 8 // count)
            )
            for i in range(count)
        ]
        for count in (1, 2, 4)
    }
    for _ in range(40):  # Several epochs, none of them a multiple of the batch.
        batch = next(whole)
        for together in hosts.values():
            found = [next(host) for host in together]
            for name, value in batch.items():
                np.testing.assert_array_equal(np.concatenate([b[name] for b in found]), value)
    states = [host.state() for together in hosts.values() for host in together]
    assert all(state == whole.state() for state in states)
    assert len(json.dumps(whole.state())) < 1000  # A few numbers, however long the run.


def targets_of(batch) -> list[int]:
    """Returns the name of every example in a batch, row by row."""
    first = batch["decoder_target_tokens"]
    if "decoder_positions" in batch:
        return first[(batch["decoder_positions"] == 0) & (first != 0)].tolist()
    return first[:, 0].tolist()


def assert_epochs(names: list[int], every: range) -> None:
    """Every example once in each epoch, and none twice in the one that has begun."""
    for start in range(0, len(names), len(every)):
        epoch = names[start : start + len(every)]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(every)


@pytest.mark.parametrize("pack", [False, True])
def test_killed_at_random_and_restarted_on_other_hosts_every_example_is_seen_once(tmp_path, pack):
    task = part(tmp_path, 1000, 300)
    rng = np.random.default_rng(0)
    names, state = [], None
    reference = batches(CachedExamples([task], LENGTHS, 3), pack)
    while len(names) < 4000:
        num_hosts = int(rng.choice([1, 2, 4, 8]))
        hosts = []
        for i in range(num_hosts):
            rows = range(i * 8 // num_hosts, (i + 1) * 8 // num_hosts)
            hosts.append(batches(CachedExamples([task], LENGTHS, 3), pack, rows))
            if state is not None:
                hosts[-1].restore(json.loads(json.dumps(state)))
        for _ in range(int(rng.integers(1, 60))):
            found = [next(host) for host in hosts]
            whole = next(reference)
            for name, value in whole.items():
                np.testing.assert_array_equal(np.concatenate([b[name] for b in found]), value)
            state = hosts[0].state()
            names += targets_of(whole)
        # What follows the last state is lost with the kill, and read again.
        for host in hosts:
            next(host)
    assert_epochs(names, range(300, 1300))


@pytest.mark.parametrize("window", [7, 64, 1024])
@pytest.mark.parametrize("size", [1, 5, 64, 65, 200])
def test_packed_epochs_are_exact_for_every_size_window_and_number_of_hosts(
    tmp_path, monkeypatch, size, window
):
    monkeypatch.setattr("t5jax.data.batches.iterator.WINDOW", window)
    examples = CachedExamples([part(tmp_path, size)], LENGTHS, 3)
    every, sequences = range(10, 10 + size), []
    for count in (1, 2, 4):
        hosts = [batches(examples, True, range(i, 8, count)) for i in range(count)]
        names = []
        while len(names) < 3 * size + 40:
            found = [next(host) for host in hosts]
            rows = {name: np.empty((8, *x.shape[1:]), x.dtype) for name, x in found[0].items()}
            for i, batch in enumerate(found):
                for name, x in batch.items():
                    rows[name][i::count] = x
            names += targets_of(rows)
        assert_epochs(names, every)
        sequences.append(names)
    assert sequences[0] == sequences[1] == sequences[2]


def test_packed_epochs_of_a_mixtures_tasks_are_exact_where_windows_stay_large(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("t5jax.data.batches.iterator.WINDOW", 32)
    ranges = {"a": range(10, 110), "b": range(200, 500), "tiny": range(600, 603)}
    parts = [part(tmp_path, len(r), r[0], i + 1, n) for i, (n, r) in enumerate(ranges.items())]
    examples = CachedExamples(parts, LENGTHS, 3)
    iterator, names = batches(examples, True), []
    while len(names) < 3000:
        names += targets_of(next(iterator))
    for name in ("a", "b"):
        assert_epochs([n for n in names if n in ranges[name]], ranges[name])
    # The tiny one has an epoch every six examples, for which no window ends.
    starts = [0]
    while starts[-1] < 3000:
        starts.append(examples.window(starts[-1], 32))
    sizes = np.diff(starts)
    assert sizes.max() == 32
    assert np.mean(sizes) > 24
    tiny = collections.Counter(n for n in names if n in ranges["tiny"])
    assert max(tiny.values()) - min(tiny.values()) <= 32 // 6


def test_only_the_rows_of_a_host_are_read(tmp_path, monkeypatch):
    task = part(tmp_path, 60)
    read = []
    original = CachedTask.read
    monkeypatch.setattr(
        CachedTask, "read", lambda s, rows: read.append(len(rows)) or original(s, rows)
    )
    host = batches(CachedExamples([task], LENGTHS, 3), False, range(2, 4))
    for _ in range(5):
        next(host)
    assert sum(read) == 10


def test_a_state_of_other_content_is_refused(tmp_path):
    state = batches(CachedExamples([part(tmp_path, 20)], LENGTHS, 3), True).state()
    changed = part(tmp_path / "other", 21)
    with pytest.raises(ValueError, match=r"cached tasks was .*\[20, .* is .*\[21, "):
        batches(CachedExamples([changed], LENGTHS, 3), True).restore(state)


def test_reading_needs_no_tensorflow(tmp_path):
    path = write(tmp_path / "a", numbered(10))
    code = (
        "import sys; sys.modules.update({'tensorflow': None, 'seqio': None})\n"
        "from t5jax.data.cache.examples import *\n"
        f"task = CachedTask({str(path)!r})\n"
        "examples = CachedExamples([Part('a', task)], {'inputs': 12, 'targets': 8}, 0)\n"
        "print(sorted(int(e['targets'][0]) for e in examples.get(range(10))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(list(range(10, 20))), done.stderr
