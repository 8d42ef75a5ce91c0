"""Streamed examples: each once an epoch, in the order of SeqIO's own parts, from any place on."""

import itertools
import json

import pytest

from t5jax.architectures import T5Config
from t5jax.config import Config, DataConfig
from t5jax.data import pipeline
from t5jax.data.bridge.tf import elements, seqio, tf
from t5jax.data.bridge.vocabulary import RunVocabulary, building_for
from t5jax.data.mixtures import mixture
from t5jax.data.objectives.span_corruption import SpanCorruption
from t5jax.data.run import Run
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


def test_an_epoch_has_every_example_once_in_the_order_of_tensorflows_shuffle(buffer):
    passes = add_tasks()
    prompts = [p for row in ROWS for p in (row["q"], row["q"] + "?")]
    order = tf.data.Dataset.range(80).shuffle(buffer, seed=7).repeat(3)
    found = take(240, "asked")
    assert [BYTES.decode(inputs) for inputs, _ in found] == [prompts[i] for i in elements(order)]
    assert all(targets[-1] == 1 for _, targets in found)
    for epoch in (found[:80], found[80:160], found[160:]):
        assert len(set(epoch)) == 80
    assert found[:80] != found[80:160]
    assert len(passes) == 1 if buffer > 80 else len(passes) >= 3


@pytest.mark.parametrize("name", ["asked", "texts", "mixed"])
def test_seqio_gives_the_same_examples_in_the_same_order(name, buffer):
    add_tasks()
    with building_for(Run(BYTES)):
        dataset = seqio.get_mixture_or_task(name).get_dataset(
            RUN.lengths, "train", shuffle=True, num_epochs=None, seed=7
        )
    through_seqio = [
        tuple(tuple(e[f].tolist()) for f in ("inputs", "targets"))
        for e in elements(dataset.take(300))
    ]
    assert take(300, name) == through_seqio
    assert take(300, name, seed=8) != through_seqio


@pytest.mark.parametrize("name", ["asked", "ours"])
def test_a_stream_goes_on_from_any_place(name, buffer):
    add_tasks()
    straight = take(700, name)
    for start in (1, 80, 333, 660):
        assert take(40, name, start) == straight[start : start + 40]


def test_epochs_that_are_skipped_are_not_read(buffer):
    passes = add_tasks()
    assert take(1, "asked", 80 * 50 + 3) == take(80 * 50 + 4, "asked")[-1:]
    assert len(passes) < 60  # The second reads every epoch, where they are not kept: 51.
    passes.clear()
    take(1, "asked", 80 * 50 + 3)
    assert len(passes) <= 3  # One is read ahead.


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
