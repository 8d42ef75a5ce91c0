"""Classes: from the labels of a task to the rows of a classifier, streamed and cached."""

import pickle
import random
from collections import Counter

import numpy as np
import pytest

from t5jax.architectures import BertConfig
from t5jax.batch import BatchSpec, ExampleFormat, validate_batch
from t5jax.data.batches.converters import example_lengths, make_converter
from t5jax.data.bridge.tf import elements, seqio
from t5jax.data.bridge.vocabulary import RunVocabulary, building_for
from t5jax.data.cache.examples import open_cached
from t5jax.data.cache.store import write_caches
from t5jax.data.run import Run
from t5jax.data.sources.source import Source
from t5jax.data.streamed import StreamedExamples
from t5jax.data.tasks.prompted import prompted_task
from t5jax.metrics import accuracy
from t5jax.tokenizers import ByteTokenizer, LabelTokenizer, load_tokenizer

MOODS, ENTITIES = ("bad", "so so", "good"), ("O", "PER", "LOC")
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "un", "##kind", "##ly"]
PIECES += [".", "-", "the", "great", "film", "##s"]


@pytest.fixture(scope="module")
def word_piece(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(PIECES))
    return load_tokenizer(path)


def ids_of(*pieces):
    return [PIECES.index(piece) for piece in pieces]


# --- The tokenizer ------------------------------------------------------------------------------


def test_a_text_has_one_label():
    labels = LabelTokenizer(MOODS)
    assert [labels.encode(text) for text in ("bad", " so so", "good ")] == [[0], [1], [2]]
    assert labels.decode([1, labels.eos_id, 2]) == "so so"
    assert labels.decode([]) == ""
    assert labels.eos_id == labels.unk_id == 3
    assert labels.vocab_size == 5
    assert labels.arrange("whatever it is", "so so", ByteTokenizer()) == "so so"


def test_a_word_has_one_label():
    labels = LabelTokenizer(ENTITIES, per_word=True)
    assert labels.encode("O PER  LOC O") == [0, 1, 2, 0]
    assert labels.decode([0, 4, 1, 4, 4, 2, 3, 0]) == "O PER LOC"


def test_tokenizers_of_classes_differ_where_their_classes_do():
    different = {
        repr(LabelTokenizer(*arguments))
        for arguments in [(MOODS,), (MOODS[::-1],), (MOODS, True), (ENTITIES,)]
    }
    assert len(different) == 4
    assert repr(LabelTokenizer(list(MOODS))) == repr(LabelTokenizer(MOODS))
    again = pickle.loads(pickle.dumps(LabelTokenizer(MOODS)))
    assert again.encode("good") == [2]


def test_that_of_a_model():
    by_text = BertConfig(head="sequence_classification", labels=MOODS)
    by_word = BertConfig(head="token_classification", labels=ENTITIES)
    assert repr(LabelTokenizer.of(by_text)) == repr(LabelTokenizer(MOODS))
    assert repr(LabelTokenizer.of(by_word)) == repr(LabelTokenizer(ENTITIES, True))
    assert LabelTokenizer.of(BertConfig()) is None


@pytest.mark.parametrize(
    ("per_word", "text", "message"),
    [
        (False, "god", r"'god' is not a class of the model; did you mean good\? model.labels has "),
        (
            False,
            "",
            r"'' is not a class of the model; model.labels has 'bad', 'so so', 'good'; ",
        ),
        (False, "bad good", "'bad good' is not a class of the model; .* or add it to model.labels"),
        (
            True,
            "O GEO",
            r"'GEO' is not a class of the model; .*model.labels has 'O', 'PER', 'LOC';",
        ),
    ],
)
def test_what_is_no_label(per_word, text, message):
    labels = LabelTokenizer(ENTITIES if per_word else MOODS, per_word)
    with pytest.raises(ValueError, match=message):
        labels.encode(text)
    with pytest.raises(ValueError, match=message):
        labels.arrange("a b", text, ByteTokenizer())


def test_of_many_classes_a_message_names_the_first():
    labels = LabelTokenizer([f"class{i}" for i in range(1000)])
    with pytest.raises(ValueError, match=r"'class0', .*'class19', \.\.\.; correct") as caught:
        labels.encode("x")
    assert len(str(caught.value)) < 500


# --- Words and their pieces ---------------------------------------------------------------------


def test_the_first_piece_of_a_word_has_its_label(word_piece):
    labels = LabelTokenizer(ENTITIES, per_word=True)
    # WordPiece takes punctuation for words of their own, which no piece shows afterwards.
    inputs, targets = "unkindly a.b.-c the films", "PER LOC O PER"
    arranged = labels.encode(labels.arrange(inputs, targets, word_piece))
    pieces = ids_of("un", "##kind", "##ly", "a", ".", "b", ".", "-", "c", "the", "film", "##s")
    assert word_piece.encode(inputs) == pieces
    none = 4
    assert arranged == [1, none, none, 2, none, none, none, none, none, 0, 1, none]


def test_spaces_belong_to_the_bytes_behind_them():
    labels = LabelTokenizer(ENTITIES, per_word=True)
    arranged = labels.encode(labels.arrange("ab c", "PER O", ByteTokenizer()))
    assert arranged == [1, 4, 0, 4]  # a, b, the space, c.


def test_a_word_without_pieces_has_no_place(word_piece):
    labels = LabelTokenizer(ENTITIES, per_word=True)
    assert word_piece.encode("a \x7f b") == ids_of("a", "b")
    assert labels.encode(labels.arrange("a \x7f b", "PER O LOC", word_piece)) == [1, 2]


def test_a_no_break_space_does_not_end_a_word(word_piece):
    labels = LabelTokenizer(ENTITIES, per_word=True)
    assert labels.encode(labels.arrange("a\u00a0b c\u2028the", "PER LOC", word_piece)) == [
        1,
        4,
        2,
        4,
    ]


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ("a b c", "O O", r"its inputs have 3 words and its targets 2 labels \('a b c', 'O O'\); e"),
        (
            "a  b",
            "O O",
            r"its inputs 'a  b' are not split word by word by ByteTokenizer",
        ),
    ],
)
def test_words_that_do_not_fit(inputs, targets, message):
    labels = LabelTokenizer(ENTITIES, per_word=True)
    with pytest.raises(ValueError, match=message):
        labels.arrange(inputs, targets, ByteTokenizer())


# --- Rows ---------------------------------------------------------------------------------------


def example(inputs, targets):
    return {"inputs": np.array(inputs, np.int32), "targets": np.array(targets, np.int32)}


def test_a_text_has_its_class_where_it_begins():
    rows = [[example([7, 8, 3], [2, 3]), example([9, 3], [0, 3])], [example([6, 6, 6, 3], [1, 3])]]
    spec = BatchSpec(2, 8, 4, True, "encoder")
    converter = make_converter(
        spec, ExampleFormat(start_id=5, head="sequence_classification", num_labels=3)
    )
    batch = converter(rows)
    validate_batch(batch, spec)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "encoder_input_tokens": [[5, 7, 8, 3, 5, 9, 3, 0], [5, 6, 6, 6, 3, 0, 0, 0]],
        "encoder_target_tokens": [[2, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]],
        "encoder_loss_weights": [[1, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]],
        "encoder_segment_ids": [[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0, 0]],
        "encoder_positions": [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 0, 0, 0]],
    }
    assert converter.capacity == {"data.inputs_length": 8}
    lengths = {"inputs": np.array([3, 7]), "targets": np.array([2, 2])}
    assert converter.sizes(lengths).tolist() == [[4], [8]]
    assert example_lengths(spec, ExampleFormat(head="sequence_classification")) == {
        "inputs": 7,
        "targets": 2,
    }


@pytest.mark.parametrize("pack", [True, False])
def test_first_pieces_have_the_classes_of_their_words(pack):
    # 3 ends targets and 4 stands where a piece has no label of its own.
    examples = [example([7, 8, 9, 3], [0, 4, 2, 3]), example([6, 3], [1, 3])]
    rows = [examples] if pack else [[e] for e in examples]
    spec = BatchSpec(len(rows), 8, 4, pack, "encoder")
    batch = make_converter(
        spec, ExampleFormat(start_id=5, head="token_classification", num_labels=3)
    )(rows)
    validate_batch(batch, spec)
    expected = {
        "encoder_input_tokens": [[5, 7, 8, 9, 3], [5, 6, 3]],
        "encoder_target_tokens": [[0, 0, 0, 2, 0], [0, 1, 0]],
        "encoder_loss_weights": [[0, 1, 0, 1, 0], [0, 1, 0]],
    }
    for name, parts in expected.items():
        joined = [[*parts[0], *parts[1]]] if pack else parts
        padded = [part + [0] * (8 - len(part)) for part in joined]
        assert batch[name].tolist() == padded, name
    assert example_lengths(spec, ExampleFormat(head="token_classification")) == {
        "inputs": 7,
        "targets": 7,
    }


def test_lengths_of_the_other_kinds():
    assert example_lengths(BatchSpec(2, 9, 4)) == {"inputs": 9, "targets": 4}
    assert example_lengths(BatchSpec(2, 9, 4, kind="encoder"), ExampleFormat(head="masked_lm")) == {
        "inputs": 9,
        "targets": 9,
    }
    assert example_lengths(BatchSpec(2, 0, 4, kind="decoder")) == {"inputs": 1, "targets": 4}


@pytest.mark.parametrize(
    ("head", "targets", "message"),
    [
        ("sequence_classification", [7, 1], r"are \[7, 1\] \(2 ids\); expected a class below 3"),
        (
            "sequence_classification",
            [0, 1, 3],
            r"are \[0, 1, 3\] \(3 ids\); expected a class bel",
        ),
        ("token_classification", [0, 3], r"are \[0, 3\] \(2 ids\); expected 3, one a piece, with"),
    ],
)
def test_targets_that_are_no_classes(head, targets, message):
    spec = BatchSpec(1, 8, 4, False, "encoder")
    converter = make_converter(spec, ExampleFormat(start_id=5, head=head, num_labels=3))
    with pytest.raises(ValueError, match=message):
        converter([[example([7, 8, 3], targets)]])


# --- Tasks, streamed and cached -----------------------------------------------------------------

WORDS = ("unkindly", "a.b", "the", "films", "great")


def rows(split):
    rng = random.Random(split)
    for _ in range(12):
        words = rng.choices(WORDS, k=rng.randint(1, 5))
        yield {
            "text": " ".join(words),
            "mood": "good" if "great" in words else "so so",
            "entities": " ".join("LOC" if "." in word else "O" for word in words),
        }


SOURCE = Source({s: lambda s=s: rows(s) for s in ("train", "validation")})
prompted_task("moods", SOURCE, [("{text}", "{mood}")], metrics=[accuracy])
prompted_task("entities", SOURCE, [("{text}", "{entities}")], metrics=[accuracy])
prompted_task(
    "short_entities", SOURCE, [("{text}", "{entities}")], metrics=[accuracy], too_long="drop"
)
CASES = {
    "moods": ("sequence_classification", LabelTokenizer(MOODS)),
    "entities": ("token_classification", LabelTokenizer(ENTITIES, per_word=True)),
}


def expected_examples(task, word_piece, lengths):
    """The examples of the training split, by hand."""
    _, labels = CASES[task]
    found = set()
    for row in rows("train"):
        inputs = word_piece.encode(row["text"])
        if task == "moods":
            targets = [MOODS.index(row["mood"])]
        else:
            targets = []
            for word, entity in zip(row["text"].split(), row["entities"].split(), strict=True):
                pieces = word_piece.encode(word)
                targets += [ENTITIES.index(entity), *[4] * (len(pieces) - 1)]
        inputs, targets = inputs[: lengths["inputs"] - 1], targets[: lengths["targets"] - 1]
        found.add(((*inputs, word_piece.eos_id), (*targets, labels.eos_id)))
    return found


def as_set(examples):
    return {(tuple(e["inputs"].tolist()), tuple(e["targets"].tolist())) for e in examples}


@pytest.mark.parametrize("task", CASES)
def test_streamed_and_cached_examples_are_classes(task, word_piece, tmp_path):
    head, labels = CASES[task]
    spec = BatchSpec(4, 9, 4, True, "encoder")
    lengths = example_lengths(spec, ExampleFormat(head=head))
    expected = expected_examples(task, word_piece, lengths)
    assert len(expected) > 5
    assert max(len(inputs) for inputs, _ in expected) == 8  # Some are cut.
    run = Run(word_piece, labels, lengths)
    streamed = StreamedExamples(task, run, 0)
    assert as_set(next(streamed.windows(0, 12))) == expected
    assert streamed.fingerprint["model.labels"] == repr(labels)

    (report,) = write_caches(task, tmp_path, run, processes=1)
    assert report.num_examples == 12
    cached = open_cached(task, tmp_path, run, 0)
    examples = cached.get(range(12))
    assert as_set(examples) == expected
    assert cached.fingerprint["model.labels"] == repr(labels)
    batch = make_converter(spec, ExampleFormat(start_id=2, head=head, num_labels=3))(
        [[e] for e in examples[:4]]
    )
    validate_batch(batch, spec)
    assert (batch["encoder_input_tokens"][:, 0] == 2).all()

    # Other classes, or none, are other caches.
    for other in (LabelTokenizer((*labels.labels, "other"), labels.per_word), None):
        (report,) = write_caches(task, tmp_path, run._replace(labels=other), processes=1)
        assert report.reason == "model.labels has changed"


def test_metrics_compare_with_the_labels_of_words(word_piece):
    _, labels = CASES["entities"]
    task = seqio.TaskRegistry.get("entities")
    with building_for(Run(word_piece, labels)):
        dataset = task.get_dataset(None, "validation", shuffle=False)
    found = [task.postprocess_fn("", example=row, is_target=True) for row in elements(dataset)]
    assert found == [row["entities"] for row in rows("validation")]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (9, "PER LOC O PER"),  # The second word has no pieces.
        (6, "PER LOC O"),  # Four pieces and eos: the third word's second piece is cut.
        (3, "PER LOC"),
    ],
)
def test_metrics_compare_with_the_labels_that_a_model_is_asked_for(word_piece, length, expected):
    """So that one which answers each rightly scores 100."""
    labels = LabelTokenizer(ENTITIES, per_word=True)
    row = {"text": "a \u200d b unkindly the", "entities": "PER O LOC O PER"}
    task = prompted_task(
        f"asked_{length}",
        Source({"validation": lambda: iter([row])}),
        [("{text}", "{entities}")],
        metrics=[accuracy],
    )
    lengths = {"inputs": length, "targets": length}
    with building_for(Run(word_piece, labels, lengths)):
        dataset = task.get_dataset(lengths, "validation", shuffle=False)
    (example,) = elements(dataset)
    assert task.postprocess_fn("", example=example, is_target=True) == expected
    spec = BatchSpec(1, 10, 10, False, "encoder")
    form = ExampleFormat(start_id=2, head="token_classification", num_labels=3)
    ids = {name: example[name] for name in ("inputs", "targets")}
    batch = make_converter(spec, form)([[ids]])
    asked = batch["encoder_loss_weights"][0] > 0
    assert labels.decode(batch["encoder_target_tokens"][0][asked].tolist()) == expected


def test_targets_that_are_too_long_are_counted_in_pieces(word_piece):
    _, labels = CASES["entities"]
    source = seqio.TaskRegistry.get("short_entities").source
    lengths, dropped = {"inputs": 6, "targets": 6}, Counter()
    kept = source.examples("train", dropped, Run(word_piece, labels, lengths))
    texts = [row["text"] for row in rows("train")]
    short = [text for text in texts if len(word_piece.encode(text)) < 6]
    assert [e["inputs"] for e in kept] == short
    assert 0 < dropped.total() == len(texts) - len(short)
    assert all(reason.startswith("targets too long") for reason in dropped)


def test_a_row_with_another_label_is_named(word_piece):
    labels = LabelTokenizer(("bad", "good"))
    examples = StreamedExamples("moods", Run(word_piece, labels, {"inputs": 8, "targets": 2}), 0)
    message = (
        r"task 'moods': split 'train', row \d+, template .*: 'so so' is not a class of the model; "
        "model.labels has 'bad', 'good'"
    )
    with pytest.raises(ValueError, match=message):
        next(examples.windows(0, 1))


def test_a_task_that_is_no_prompted_one_has_no_classes_to_cache(tmp_path):
    seqio.TaskRegistry.add(
        "foreign_moods",
        source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=("train",)),
        output_features={"targets": seqio.Feature(RunVocabulary("bytes"))},
        preprocessors=[],
    )
    with pytest.raises(ValueError, match="task foreign_moods is no prompted task, which a classif"):
        write_caches("foreign_moods", tmp_path, Run(ByteTokenizer(), CASES["moods"][1]))
