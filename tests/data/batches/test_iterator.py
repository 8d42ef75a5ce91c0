"""Batches over examples that can be told apart: streamed and with random access."""

import collections
import json

import numpy as np
import pytest

from t5jax.batch import BatchSpec, validate_batch
from t5jax.data.batches.converters import make_converter
from t5jax.data.batches.iterator import WINDOW, Batches, ChangingBatches

EPOCH = 1500  # No multiple of the window, of a batch, or of what a row holds.
SPEC = BatchSpec(16, 48, 32, True)
UNPACKED = BatchSpec(16, 48, 32)


class Streamed:
    """Example k of an epoch is its number, in figures that no other one has, and an eos."""

    def __init__(self, name="numbers", longest=40):
        self.fingerprint = {"data.mixture": name, "data.cache": None}
        self._longest = longest
        self.num_read = 0

    def windows(self, start, most):
        while True:
            self.num_read += most
            yield [self.example(k) for k in range(start, start + most)]
            start += most

    def example(self, k):
        number = k % EPOCH
        rng = np.random.default_rng(number)
        lengths = rng.integers(2, [self._longest, 20])
        inputs, targets = (np.full(n, 2 + number, np.int32) for n in lengths)
        inputs[-1] = targets[-1] = 1
        return {"inputs": inputs, "targets": targets}


class RandomAccess(Streamed):
    def lengths(self, start, stop):
        examples = [self.example(k) for k in range(start, stop)]
        return {f: np.array([len(e[f]) for e in examples]) for f in ("inputs", "targets")}

    def get(self, indices):
        self.num_read += len(indices)
        return [self.example(k) for k in indices]

    def window(self, start, most):
        return start + most


class InEpochs(RandomAccess):
    def window(self, start, most):
        return min(start + most, (start // EPOCH + 1) * EPOCH)


def make(examples=None, spec=SPEC, seed=0, rows=None):
    return Batches(examples or Streamed(), make_converter(spec), spec, seed, rows)


def examples_in(batch) -> list[tuple[tuple, tuple]]:
    """Returns the examples of a batch, row by row, as pairs of tuples."""
    found = []
    for row in range(len(batch["encoder_input_tokens"])):
        inputs, targets = batch["encoder_input_tokens"][row], batch["decoder_target_tokens"][row]
        source, target = inputs != 0, targets != 0
        source = batch.get("encoder_segment_ids", [source] * (row + 1))[row]
        target = batch.get("decoder_segment_ids", [target] * (row + 1))[row]
        for i in range(1, source.max() + 1):
            found.append(
                (tuple(inputs[source == i].tolist()), tuple(targets[target == i].tolist()))
            )
    return found


def expected(numbers) -> list[tuple[tuple, tuple]]:
    examples = (Streamed().example(k) for k in numbers)
    return [(tuple(e["inputs"].tolist()), tuple(e["targets"].tolist())) for e in examples]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("kind", [Streamed, RandomAccess])
def test_packed_content_is_the_content_of_each_window_and_no_token_is_lost(kind):
    batches = make(kind())
    seen, tokens = [], 0
    while batches.state()["example"] < 3 * WINDOW:  # Beyond two epochs.
        batch = next(batches)
        validate_batch(batch, SPEC)
        tokens += batch["decoder_loss_weights"].sum()
        assert (batch["decoder_loss_weights"] == (batch["decoder_segment_ids"] > 0)).all()
        assert (batch["decoder_loss_weights"] == (batch["decoder_target_tokens"] != 0)).all()
        seen += examples_in(batch)
    assert tokens == sum(len(targets) for _, targets in seen)
    for window in range(3):
        part = seen[window * WINDOW : (window + 1) * WINDOW]
        numbers = range(window * WINDOW, (window + 1) * WINDOW)
        assert sorted(part) == sorted(expected(numbers))
        assert part != expected(numbers)


@pytest.mark.parametrize("kind", [Streamed, RandomAccess])
def test_every_window_has_an_order_of_its_own(kind):
    class Filling(kind):
        def example(self, k):  # A row each: the order of examples is that of rows.
            row = np.full(SPEC.targets_length, 2 + k % EPOCH, np.int32)
            return {"inputs": row, "targets": row}

    batches = make(Filling())
    orders = []
    for window in range(3):
        rows = [next(batches)["decoder_target_tokens"][:, 0] for _ in range(WINDOW // 16)]
        orders.append(((np.concatenate(rows) - 2 - window * WINDOW) % EPOCH).tolist())
        assert sorted(orders[-1]) == list(range(WINDOW))
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_window_ends_where_the_examples_say():
    batches, seen = make(InEpochs()), []
    while batches.state()["example"] < 4 * EPOCH:
        seen += examples_in(next(batches))
    for epoch in range(4):  # Of a whole window each, and what is left.
        part = seen[epoch * EPOCH : (epoch + 1) * EPOCH]
        assert sorted(part) == sorted(expected(range(EPOCH)))
        assert sorted(part[:WINDOW]) == sorted(expected(range(WINDOW)))


class Counted(InEpochs):
    is_one_task = True

    def epoch(self):
        return EPOCH


def test_the_steps_of_epochs_read_every_example_that_often_and_no_fewer_do():
    size = make(Counted()).epoch(2)
    assert size.num_examples == EPOCH
    read = [
        examples_in(batch)
        for batch, _ in zip(make(Counted()), range(size.total_steps), strict=False)
    ]

    def least(batches):
        counts = collections.Counter(example for batch in batches for example in batch)
        assert len(counts) == EPOCH
        return min(counts.values())

    assert (least(read), least(read[:-1])) == (2, 1)
    assert size.num_steps == -(-size.num_rows // 16)
    assert str(size) == f"1,500 examples in {size.num_rows:,} rows, {size.num_steps:,} steps"
    # Without packing a row is an example. What is known anyway is said without being asked for.
    unpacked = make(Counted(), UNPACKED).epoch(1.5)
    assert (unpacked.num_steps, unpacked.total_steps) == (94, 141)
    assert str(make(Counted(), UNPACKED).epoch()) == "1,500 examples, 94 steps"
    assert str(make(Counted()).epoch()) == "1,500 examples"


class CountedStream(Streamed):
    is_one_task = True

    def epoch(self):
        return EPOCH

    def windows(self, start, most):
        while True:
            end = Counted().window(start, most)
            yield [self.example(k) for k in range(start, end)]
            start = end


def test_the_epochs_of_a_stream_are_counted_if_that_is_asked_for():
    assert make(CountedStream()).epoch() is None
    assert make(CountedStream()).epoch(2) == make(Counted()).epoch(2)
    assert make(CountedStream(), UNPACKED).epoch(1).total_steps == 94


def test_unpacked_rows_are_the_examples_in_order_over_the_ends_of_epochs():
    batches = make(spec=UNPACKED)
    seen = [example for _ in range(200) for example in examples_in(next(batches))]
    assert seen == expected(range(3200))


def test_both_ways_to_read_give_the_same_batches():
    streamed, random_access = make(), make(RandomAccess())
    for _ in range(60):
        assert_equal(next(streamed), next(random_access))


def test_rows_come_in_an_order_that_the_seed_draws():
    first, second, other = next(make()), next(make()), next(make(seed=1))
    assert_equal(first, second)
    assert sorted(map(str, examples_in(first))) != sorted(map(str, examples_in(other)))
    sizes = [(row != 0).sum() for row in first["decoder_target_tokens"]]
    assert sizes != sorted(sizes)
    assert sizes != sorted(sizes, reverse=True)


@pytest.mark.parametrize("kind", [Streamed, RandomAccess])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_rows_of_all_hosts_are_the_global_batch(kind, hosts):
    whole = make(kind())
    # Hosts need not have neighbouring rows: a mesh may lie otherwise.
    parts = [make(kind(), rows=range(host, 16, hosts)) for host in range(hosts)]
    for _ in range(30):
        batch = next(whole)
        for host, part in enumerate(parts):
            assert_equal(next(part), {name: x[host::hosts] for name, x in batch.items()})
    assert len({json.dumps(part.state()) for part in [whole, *parts]}) == 1


def test_with_random_access_a_host_reads_its_own_examples_alone():
    hosts = [RandomAccess() for _ in range(4)]
    iterators = [make(e, rows=range(4 * i, 4 * i + 4)) for i, e in enumerate(hosts)]
    count = sum(len(examples_in(next(iterator))) for _ in range(9) for iterator in iterators)
    assert sum(host.num_read for host in hosts) == count
    streamed = Streamed()
    next(make(streamed, rows=range(4)))
    assert streamed.num_read == WINDOW


@pytest.mark.parametrize("spec", [SPEC, UNPACKED])
@pytest.mark.parametrize("kind", [Streamed, InEpochs])
def test_a_run_killed_at_random_goes_on_exactly_on_any_number_of_hosts(kind, spec):
    straight = make(kind(), spec)
    batches = [next(straight) for _ in range(90)]
    rng, position, state = np.random.default_rng(0), 0, None
    while position < 90:
        hosts = int(rng.choice([1, 2, 4]))
        parts = [
            make(kind(), spec, rows=range(h * 16 // hosts, (h + 1) * 16 // hosts))
            for h in range(hosts)
        ]
        if state:
            for part in parts:
                part.restore(json.loads(state))
        for batch in batches[position : position + int(rng.integers(1, 40))]:
            got = [next(part) for part in parts]
            assert_equal({name: np.concatenate([g[name] for g in got]) for name in batch}, batch)
            position += 1
        state = json.dumps(parts[0].state())
        assert parts[0].state()["batches"] == position
    assert json.loads(state) == straight.state()


def test_the_state_is_a_few_numbers():
    batches = make()
    for _ in range(40):
        next(batches)
    state = batches.state()
    fingerprint = state.pop("fingerprint")
    assert state.keys() == {"example", "row", "batches"}
    assert all(type(value) is int for value in state.values())
    assert fingerprint == {
        "data.mixture": "numbers",
        "data.cache": None,
        "data.inputs_length": 48,
        "data.targets_length": 32,
        "data.batch_size": 16,
        "data.pack": True,
        "data.seed": 0,
    }


def test_a_state_of_other_examples_is_refused():
    state = make().state()
    with pytest.raises(
        ValueError, match=r"data\.mixture was 'numbers' and is 'others' now; set it"
    ):
        make(Streamed("others")).restore(state)
    with pytest.raises(ValueError, match=r"data\.pack was True and is False now"):
        make(spec=UNPACKED).restore(state)


def test_batches_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        next(make())["encoder_input_tokens"][0, 0] = 5


@pytest.mark.parametrize("kind", [Streamed, RandomAccess])
def test_an_example_that_does_not_fit_a_row_is_an_error(kind):
    with pytest.raises(
        ValueError, match=r"takes \d+ tokens of a row that holds 48; raise data.inp"
    ):
        next(make(kind(longest=60)))


def test_after_an_error_reading_begins_again_where_it_was():
    class Failing(Streamed):
        fails = True

        def windows(self, start, most):
            for number, window in enumerate(super().windows(start, most), start // most):
                if number == 1 and self.fails:
                    raise ValueError("the disk is gone")
                yield window

    examples = Failing()
    batches, straight = make(examples), make()
    while batches.state()["row"] + 16 < len(batches._window.rows if batches._window else range(99)):
        assert_equal(next(batches), next(straight))
    with pytest.raises(ValueError, match="the disk is gone"):  # Amid a batch of two windows.
        next(batches)
    examples.fails = False
    for _ in range(9):
        assert_equal(next(batches), next(straight))
    assert batches.state() == straight.state()


# --- Changes of the mixture ---------------------------------------------------------------------


def changing(*changes):
    stages = [(0, "easy"), *changes]
    return ChangingBatches(
        [
            (first, lambda name=name, seed=seed: make(Streamed(name), seed=seed))
            for seed, (first, name) in enumerate(stages)
        ]
    )


def test_the_mixture_changes_after_its_step_and_resumes_on_either_side():
    batches, easy, hard = changing((5, "hard")), make(), make(seed=1)
    states = [batches.state()]
    for step in range(12):
        assert_equal(next(batches), next(easy if step < 5 else hard))
        states.append(json.loads(json.dumps(batches.state())))
    assert [s["batches"] for s in states] == list(range(13))
    assert [s["fingerprint"]["data.mixture"] for s in states] == ["easy"] * 6 + ["hard"] * 7
    for start in (0, 3, 5, 6, 9):
        resumed, straight = changing((5, "hard")), changing((5, "hard"))
        resumed.restore(states[start])
        for _ in range(start):
            next(straight)
        for _ in range(4):
            assert_equal(next(resumed), next(straight))
        assert resumed.state() == straight.state()


def test_changes_may_be_added_ahead_but_not_behind():
    batches = changing()
    for _ in range(6):
        next(batches)
    state = batches.state()
    changing((6, "hard"), (9, "other")).restore(state)
    with pytest.raises(ValueError, match=r"data\.mixture_changes was \[\] and is \[5\] now"):
        changing((5, "hard")).restore(state)
    later = changing((2, "hard"))
    for _ in range(4):
        next(later)
    with pytest.raises(ValueError, match=r"data\.mixture was 'hard' and is 'other' now"):
        changing((2, "other")).restore(later.state())
    with pytest.raises(ValueError, match=r"data\.mixture_changes was \[2\] and is \[3\] now"):
        changing((3, "hard")).restore(later.state())


def test_a_batch_without_a_target_is_named_and_can_be_read_again():
    class Empty(Streamed):
        def example(self, k):
            return super().example(k) | {"targets": np.zeros(0, np.int32)}

    batches = make(Empty(), UNPACKED)
    for _ in range(2):  # It stays where it is.
        with pytest.raises(ValueError, match="no token of a batch of 16 rows is a target"):
            next(batches)
