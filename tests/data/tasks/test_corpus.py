import dataclasses
from pathlib import Path

import numpy as np
import pytest

from t5jax.architectures import T5Config
from t5jax.config import Config, DataConfig, EvalConfig
from t5jax.data import pipeline, registry
from t5jax.data.bridge.tf import seqio
from t5jax.data.bridge.vocabulary import building_for
from t5jax.data.objectives.language_modelling import CausalLM, MaskedLM
from t5jax.data.objectives.mixture import ul2
from t5jax.data.objectives.span_corruption import SpanCorruption
from t5jax.data.run import Run
from t5jax.data.sources.source import Source
from t5jax.data.tasks.corpus import CorpusSource, text_task
from t5jax.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
DOCUMENTS = [f"document {i} " + "abcdefgh"[i % 8] * (7 * i % 90) for i in range(40)]
BOOKS = Path(__file__).parents[4] / "shared" / "data"
pytestmark = pytest.mark.usefixtures("clean_registries")


def add_task(objective, name="texts", rows=None, **settings):
    rows = [{"text": text} for text in DOCUMENTS] if rows is None else rows
    source = Source({split: lambda: rows for split in ("train", "validation")})
    return text_task(name, source, objective, **{"vocabulary": "bytes"} | settings)


def make_config(mixture="texts", **data) -> Config:
    sizes = {"inputs_length": 48, "targets_length": 48, "batch_size": 8}
    return Config(
        model=T5Config(vocab_size=384),
        data=DataConfig(mixture=mixture, **(sizes | data)),
        eval=EvalConfig(),
    )


def stream() -> list[int]:
    return [i for text in DOCUMENTS for i in (*BYTES.encode(text), BYTES.eos_id)]


def read_examples(name, num_epochs=1, shuffle=False, seed=0, lengths=(48, 48)):
    lengths = dict(zip(("inputs", "targets"), lengths, strict=True))
    dataset = seqio.TaskRegistry.get(name).get_dataset(
        lengths, "train", shuffle=shuffle, num_epochs=num_epochs, seed=seed
    )
    return [{k: v.tolist() for k, v in e.items()} for e in dataset.as_numpy_iterator()]


def rebuild(example) -> list[int]:
    """Returns the text of a span-corrupted example; byte sentinels are the ids from 159 on."""
    spans, tokens = {}, []
    for i in example["targets"][:-1]:
        if i >= 159:
            span = spans.setdefault(i, [])
        else:
            span.append(i)
    for i in example["inputs"][:-1]:
        tokens += spans[i] if i >= 159 else [i]
    return tokens


def test_all_text_comes_once_an_epoch_and_corrupted_anew_in_each():
    add_task(SpanCorruption())
    examples = read_examples("texts", num_epochs=2)
    n = len(examples) // 2
    first, second = examples[:n], examples[n:]
    assert [i for e in first for i in rebuild(e)] == stream()
    assert [i for e in second for i in rebuild(e)] == stream()
    assert all(a != b for a, b in zip(first[:-1], second[:-1], strict=True))
    assert {len(e["inputs"]) for e in first[:-1]} == {48}
    assert read_examples("texts", num_epochs=2) == examples
    assert read_examples("texts", num_epochs=2, seed=1) != examples


def test_training_shuffles_pieces_within_an_epoch():
    add_task(CausalLM())
    in_order = [e["targets"] for e in read_examples("texts")]
    assert [i for piece in in_order for i in piece] == stream()
    shuffled = [e["targets"] for e in read_examples("texts", 2, shuffle=True)]
    for epoch in (shuffled[: len(in_order)], shuffled[len(in_order) :]):
        assert epoch != in_order
        assert sorted(epoch) == sorted(in_order)


def test_batches_of_an_objective_resume_exactly():
    add_task(ul2())
    config = make_config(inputs_length=64)
    straight, stopped = pipeline.train_iterator(config), pipeline.train_iterator(config)
    for _ in range(5):
        next(straight)
        next(stopped)
    resumed = pipeline.train_iterator(config)
    resumed.restore(stopped.state())
    for _ in range(4):
        a, b = next(straight), next(resumed)
        assert all((a[name] == b[name]).all() for name in a)


def test_a_language_model_without_inputs_trains_an_encoder_decoder():
    add_task(CausalLM())
    config = make_config(inputs_length=1)
    batch = next(pipeline.train_iterator(config))
    assert batch["encoder_input_tokens"].tolist() == [[1]] * 8
    pieces = {tuple(e["targets"]) for e in read_examples("texts")}
    for row in batch["decoder_target_tokens"]:
        assert tuple(row[row != 0].tolist()) in pieces
    [eval_set] = pipeline.eval_sets(config)
    # There are none; the model reads an eos, as in training.
    assert {tuple(e.input_ids) for e in eval_set.examples} == {()}
    assert [i for e in eval_set.examples for i in e.target_ids] == stream()
    assert eval_set.metric_fns == []


def test_every_evaluation_asks_the_same():
    add_task(SpanCorruption())
    first, second = (pipeline.eval_sets(make_config(seed=s))[0].examples for s in (0, 1))
    assert first == second
    assert len({tuple(e.input_ids) for e in first}) == len(first)


def test_the_source_gives_documents_and_pieces_without_tensorflow():
    source = add_task(CausalLM(), field="book.text", rows=[{"book": {"text": "abc"}}] * 3).source
    assert isinstance(source, CorpusSource)
    assert list(source.texts("train")) == ["abc"] * 3
    run = Run(BYTES, lengths={"targets": 5})
    pieces = [e["targets"].tolist() for e in source.once("train", run)]
    a, b, c = BYTES.encode("abc")
    assert pieces == [[a, b, c, 1, a], [b, c, 1, a, b], [c, 1]]


# --- What cannot work ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"txt": "a"},
            "task 'texts': split 'train', row 1: there is no field 'text'; the row has txt",
        ),
        ({"text": 3}, "task 'texts': split 'train', row 1: field 'text' is 3; expected a text"),
    ],
)
def test_a_row_without_text_is_a_plain_error(row, message):
    add_task(SpanCorruption(), rows=[{"text": "a"}, row])
    with pytest.raises(ValueError, match=message) as error:
        next(pipeline.train_iterator(make_config()))
    assert error.value.__suppress_context__  # Nothing of TensorFlow's is shown.


def test_an_empty_split_is_an_error():
    add_task(SpanCorruption(), rows=[])
    with pytest.raises(ValueError, match="task 'texts': split 'train' has no rows"):
        next(pipeline.train_iterator(make_config()))


def test_lengths_that_do_not_suit_the_objective_are_refused_before_training():
    add_task(SpanCorruption())
    with pytest.raises(
        ValueError, match=r"task texts: SpanCorruption.*targets_length is 5; set it"
    ):
        pipeline.train_iterator(make_config(targets_length=5))
    with pytest.raises(ValueError, match="texts' is read without a length of inputs, targets"):
        seqio.TaskRegistry.get("texts").get_dataset(None, "train", shuffle=False)


def test_an_objective_for_another_kind_of_model_is_refused():
    add_task(MaskedLM())
    with pytest.raises(
        ValueError,
        match=r"task texts \(MaskedLM\(share=0.15\)\) is for an encoder with a masked_lm",
    ):
        pipeline.train_iterator(make_config())


def test_a_name_that_is_taken_is_refused():
    add_task(CausalLM())
    with pytest.raises(ValueError, match="there is a task or mixture 'texts' already"):
        add_task(CausalLM())


def test_the_vocabulary_is_the_runs():
    add_task(CausalLM(), vocabulary=None)
    with building_for(Run(BYTES)):
        assert [i for e in read_examples("texts") for i in e["targets"]] == stream()
    with pytest.raises(ValueError, match="the run has no vocabulary"):
        read_examples("texts")


# --- The novels ---------------------------------------------------------------------------------


@pytest.fixture
def novels(monkeypatch, tmp_path):
    if not (BOOKS / "text").is_dir():
        pytest.skip(f"there are no books in {BOOKS / 'text'}")
    monkeypatch.setenv("T5JAX_DATA", str(BOOKS))
    path = Path(__file__).parents[3] / "tasks" / "novels.py"
    names = [n for n in seqio.TaskRegistry.names() if n.startswith("novels")]
    for name in names:
        seqio.TaskRegistry.remove(name)
    registry._load(path)
    return seqio.TaskRegistry.get("novels_spans").source


def test_a_tenth_of_each_novel_is_held_out(novels):
    chapters = {split: [r["text"] for r in novels.source.rows(split)] for split in novels.splits}
    assert not set(chapters["train"]) & set(chapters["validation"])
    everything = "".join(sorted(t for texts in chapters.values() for t in texts))
    books = "".join(p.read_text() for p in (BOOKS / "text").glob("*.md"))
    assert sorted(everything.replace("\n", "")) == sorted(books.replace("\n", ""))
    for word in ("Queequeg", "Elizabeth"):
        for texts in chapters.values():
            assert sum(word in text for text in texts) > 2
    sizes = {split: sum(map(len, texts)) for split, texts in chapters.items()}
    assert sizes["validation"] / sizes["train"] == pytest.approx(1 / 9, abs=0.03)
    assert {Path(p).name for p in novels.source.files("train")} == {
        "moby_dick.md",
        "pride_and_prejudice.md",
    }


@pytest.mark.parametrize(
    ("task", "lengths"),
    [("novels_spans", (128, 32)), ("novels_ul2", (128, 96)), ("novels_lm", (1, 128))],
)
def test_batches_of_the_novels_are_full(novels, task, lengths):
    data = {"inputs_length": lengths[0], "targets_length": lengths[1], "vocabulary": "bytes"}
    batch = next(pipeline.train_iterator(make_config(task, **data)))
    inputs = batch["encoder_input_tokens"]
    assert (inputs != 0).mean() > (0.6 if task == "novels_ul2" else 0.99)
    assert len({tuple(row) for row in batch["decoder_target_tokens"].tolist()}) == 8
    config = dataclasses.replace(make_config(task, **data), eval=EvalConfig(num_examples=4))
    [eval_set] = pipeline.eval_sets(config)
    assert all(len(e.target_ids) <= lengths[1] for e in eval_set.examples)
    assert np.ptp([len(e.input_ids) for e in eval_set.examples]) <= (128 if "ul2" in task else 0)
