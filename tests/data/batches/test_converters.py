import numpy as np
import pytest

from t5jax.batch import BatchSpec, ExampleFormat, prompt_batch, shift_right, validate_batch
from t5jax.data.batches.converters import example_lengths, make_converter, pack
from t5jax.data.bridge.tf import seqio, tf


def example(inputs, targets):
    return {"inputs": np.array(inputs, np.int32), "targets": np.array(targets, np.int32)}


# Two rows: the first of two examples, the second of three, which fill it.
ROWS = [
    [example([7, 8, 5, 1], [3, 9, 1]), example([8, 4, 9, 3, 1], [4, 1])],
    [example([5, 1], [6, 6, 6, 1]), example([9, 9, 9, 1], [1]), example([2, 4, 6, 1], [3, 3, 1])],
]
ALIGNED = [
    [example([8, 9, 9, 3, 4, 1], [8, 7, 4, 3, 4, 1]), example([8, 3, 9, 1], [8, 3, 6, 1])],
    [example([8, 9, 1], [8, 5, 1])],
]
CONVERTERS = {
    "encoder_decoder": seqio.EncDecFeatureConverter,
    "decoder": seqio.LMFeatureConverter,
    "prefix_lm": seqio.PrefixLMFeatureConverter,
    "encoder": lambda **settings: seqio.EncoderFeatureConverter(mask_id=9, **settings),
}


# SeqIO has the start of a text in front of inputs, and leaves an eos behind them.
FORMS = {"prefix_lm": ExampleFormat(eos_id=1, prompt_start=(0,), prompt_end=(1,))}


def spec_of(kind, packed, rows=2):
    targets_length = 10 if kind == "encoder" else 8
    return BatchSpec(rows, 0 if kind == "decoder" else 10, targets_length, packed, kind)


def seqio_rows(kind, packed, rows):
    """What SeqIO's converter makes of each row's examples, which it packs into one."""
    names = ["targets"] if kind == "decoder" else ["inputs", "targets"]
    lengths = {"inputs": 10, "targets": 10 if kind == "encoder" else 8}
    converter = CONVERTERS[kind](pack=packed)
    made = []
    for row in rows:
        dataset = tf.data.Dataset.from_generator(
            lambda row=row: ({name: e[name] for name in names} for e in row),
            output_signature=dict.fromkeys(names, tf.TensorSpec([None], tf.int32)),
        )
        converted = converter(dataset, {name: lengths[name] for name in names})
        made += list(converted.as_numpy_iterator())
    return {name: np.stack([m[name] for m in made]) for name in made[0]}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", CONVERTERS)
def test_features_are_seqios_token_for_token(kind, packed):
    rows = ALIGNED if kind == "encoder" else ROWS
    if not packed:
        rows = [[e] for row in rows for e in row]
    theirs = seqio_rows(kind, packed, rows)
    spec = spec_of(kind, packed, len(rows))
    ours = make_converter(spec, FORMS.get(kind, ExampleFormat()))(rows)
    validate_batch(ours, spec)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name != "encoder_loss_weights":  # SeqIO's are where the inputs have the mask.
            np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_packed_rows_by_hand():
    batch = make_converter(BatchSpec(1, 10, 6, True))([ROWS[0][::-1]])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "encoder_input_tokens": [[8, 4, 9, 3, 1, 7, 8, 5, 1, 0]],
        "encoder_segment_ids": [[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]],
        "encoder_positions": [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]],
        "decoder_input_tokens": [[0, 4, 0, 3, 9, 0]],
        "decoder_target_tokens": [[4, 1, 3, 9, 1, 0]],
        "decoder_loss_weights": [[1, 1, 1, 1, 1, 0]],
        "decoder_segment_ids": [[1, 1, 2, 2, 2, 0]],
        "decoder_positions": [[0, 1, 0, 1, 2, 0]],
    }


@pytest.mark.parametrize("kind", ["encoder_decoder", "encoder"])
def test_where_padding_has_the_id_of_eos_lengths_tell_them_apart(kind):
    spec = BatchSpec(2, 5, 5, kind=kind, pads_with_eos=True)
    rows = [[example([8, 9, 1], [0, 7, 1])], [example([1], [1])]]
    batch = make_converter(spec, ExampleFormat(pad_id=1))(rows)
    validate_batch(batch, spec)
    assert batch["encoder_input_tokens"].tolist() == [[8, 9, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert batch["encoder_segment_ids"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]


def test_an_encoder_is_asked_where_targets_are():
    masked = [[example([8, 9, 2, 1], [0, 5, 7, 0])], [example([8, 9, 1], [0, 9, 0])]]
    batch = make_converter(BatchSpec(2, 5, 5, False, "encoder"))(masked)
    assert batch["encoder_loss_weights"].tolist() == [[0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]


def test_an_encoder_decoder_reads_eos_where_there_are_only_targets():
    spec = BatchSpec(1, 3, 6, True)
    converter = make_converter(spec, ExampleFormat(eos_id=9, prompt_end=(9,), nothing=9))
    row = [{"targets": np.array(ids, np.int32)} for ids in ([5, 6], [7, 8, 9])]
    batch = converter([row])
    assert batch["encoder_input_tokens"].tolist() == [[9, 9, 0]]
    assert batch["encoder_segment_ids"].tolist() == [[1, 2, 0]]
    assert converter.sizes({"targets": np.array([2, 3])}).tolist() == [[1, 2], [1, 3]]
    assert batch["decoder_target_tokens"].tolist() == [[5, 6, 7, 8, 9, 0]]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder", "prefix_lm"])
def test_id_0_may_be_a_word_and_another_id_the_start(kind, packed):
    rows = [[example([4, 0, 1], [0, 7, 0])]]
    form = ExampleFormat(start_id=50)
    if kind == "prefix_lm":
        form = ExampleFormat(prompt_start=(50,), prompt_end=())
    batch = make_converter(spec_of(kind, packed, 1), form)(rows)
    assert batch["decoder_loss_weights"].sum() == 3
    first = 2 if kind == "prefix_lm" else 0
    assert batch["decoder_target_tokens"][0, first : first + 3].tolist() == [0, 7, 0]
    assert batch["decoder_input_tokens"][0, 0] == 50
    if not packed:
        targets = batch["decoder_target_tokens"]
        assert (batch["decoder_input_tokens"] == shift_right(targets, 50)).all()


def test_a_decoder_reads_inputs_and_targets_in_one_row():
    rows = [[example([7, 8, 9], [3, 9]), example([5], [6, 9])], [example([9], [4, 9])]]
    spec = BatchSpec(2, 6, 3, True, "decoder")
    converter = make_converter(spec, ExampleFormat(9, prompt_start=(50,), prompt_end=()))
    batch = converter(rows)
    validate_batch(batch, spec)
    # The eos behind inputs is gone, that behind targets stays; nothing is asked of the inputs.
    assert {name: value.tolist() for name, value in batch.items()} == {
        "decoder_input_tokens": [[50, 7, 8, 3, 50, 5, 6, 0, 0], [50, 4, 0, 0, 0, 0, 0, 0, 0]],
        "decoder_target_tokens": [[7, 8, 3, 9, 5, 6, 9, 0, 0], [4, 9, 0, 0, 0, 0, 0, 0, 0]],
        "decoder_loss_weights": [[0, 0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0]],
        "decoder_segment_ids": [[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0]],
        "decoder_positions": [[0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]],
    }
    assert converter.capacity == {"data.inputs_length + data.targets_length": 9}
    assert converter.sizes({n: np.array([3]) for n in ("inputs", "targets")}).tolist() == [[6]]
    # The first token is read and not predicted, so that it takes no room; others do.
    for start, inputs_length in (((50,), 6), ((50, 51), 5), ((), 6)):
        form = ExampleFormat(9, prompt_start=start, prompt_end=())
        assert example_lengths(spec, form) == {"inputs": inputs_length, "targets": 3}


def test_an_encoder_may_begin_with_a_token_instead_of_ending_with_one():
    spec = BatchSpec(1, 9, 6, True)
    converter = make_converter(spec, ExampleFormat(9, 50, prompt_start=(50,), prompt_end=()))
    batch = converter([[example([7, 8, 9], [3, 9]), example([5], [6, 9])]])
    assert batch["encoder_input_tokens"].tolist() == [[50, 7, 8, 50, 5, 0, 0, 0, 0]]
    assert batch["encoder_segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0, 0]]
    lengths = {"inputs": np.array([3, 1]), "targets": np.array([2, 2])}
    assert converter.sizes(lengths).tolist() == [[4, 2], [2, 2]]
    assert example_lengths(spec, ExampleFormat(prompt_start=(50,), prompt_end=())) == {
        "inputs": 8,
        "targets": 6,
    }


def test_prompts_of_a_decoder_are_padded_behind():
    batch = prompt_batch([[50, 7, 8], [50]], "prefix_lm", 3, 4)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "decoder_input_tokens": [[50, 7, 8, 0], [50, 0, 0, 0], [0, 0, 0, 0]],
        "decoder_segment_ids": [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
        "decoder_positions": [[0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        "decoder_causal_attention": [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
    }


# --- Packing ------------------------------------------------------------------------------------


def test_packing_by_hand():
    # The largest first, each where it fits: 6+3, 5+4, 2.
    sizes = np.array([[2], [3], [6], [4], [5]])
    assert pack(sizes, [9]) == [[1, 2], [3, 4], [0]]
    # The second side stands in the way of 6+3, which leaves room for 2.
    sizes = np.array([[2, 1], [3, 5], [6, 5], [4, 1], [5, 1]])
    assert pack(sizes, [9, 9]) == [[0, 2], [1, 4], [3]]


def normal(rng, mean, spread, most):
    return np.clip(rng.normal(mean, spread, 1024), 3, most).astype(int)


@pytest.mark.parametrize(
    ("capacity", "sizes"),
    [
        ((512, 512), [(100, 40), (130, 60)]),  # Questions and worked answers.
        ((512, 128), [(250, 80), (30, 12)]),  # Abstracts and summaries.
        ((24, 16), [(12, 4), (7, 3)]),
        ((512,), [(90, 70)]),
    ],
)
def test_packed_rows_are_full_and_hold_every_example_once(capacity, sizes):
    rng = np.random.default_rng(0)
    sides = [normal(rng, *size, most) for size, most in zip(sizes, capacity, strict=True)]
    sizes = np.stack(sides, axis=1)
    rows = pack(sizes, capacity)
    assert sorted(k for row in rows for k in row) == list(range(1024))
    assert all(row == sorted(row) for row in rows)
    taken = np.array([sizes[row].sum(axis=0) for row in rows])
    assert (taken <= capacity).all()
    assert (taken.sum(axis=0) / (len(rows) * np.array(capacity))).max() > 0.95


# --- What no network can read ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (99, r"has id 99, but model.vocab_size is 60: .* \(row 1 of a batch, token 2, where the"),
        (-4, r"has id -4 \(row 1 of a batch, token 2, where the ids are … 7 8 -4 1 …\); ids begin"),
    ],
)
@pytest.mark.parametrize("side", ["inputs", "targets"])
def test_an_id_without_an_embedding_is_named_with_its_row(bad, message, side):
    """A device would read another row of the embedding without a word."""
    rows = [[example([5, 6], [7])], [example([7, 8], [7, 8])]]
    rows[1][0][side] = np.array([7, 8, bad, 1])
    converter = make_converter(BatchSpec(2, 4, 4), ExampleFormat(num_embeddings=60))
    with pytest.raises(ValueError, match=message):
        converter(rows)


def test_a_class_that_is_none_is_named_with_its_example():
    form = ExampleFormat(head="token_classification", num_labels=3, num_embeddings=60)
    converter = make_converter(BatchSpec(2, 6, 6, kind="encoder"), form)
    rows = [
        [{"inputs": np.array([5, 6, 1]), "targets": np.array([0, 2, 3])}],
        [{"inputs": np.array([5, 6, 1]), "targets": np.array([0, -1, 3])}],
    ]
    with pytest.raises(ValueError, match=r"example 1 of a batch has the class -1: .* \[0, -1, 3\]"):
        converter(rows)
    form = ExampleFormat(head="sequence_classification", num_labels=3, num_embeddings=60)
    converter = make_converter(BatchSpec(2, 6, 2, kind="encoder"), form)
    for bad in (3, -1):
        row = {"inputs": np.array([5, 6, 1]), "targets": np.array([bad, 3])}
        with pytest.raises(ValueError, match="has the class -1|expected a class below 3"):
            converter([[row], [row]])
