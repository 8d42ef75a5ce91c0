"""How each kind of model reads an example."""

import pytest

from t5jax.architectures import published
from t5jax.batch import ExampleFormat
from t5jax.special_tokens import example_format
from t5jax.tokenizers import ByteTokenizer


class Silent(ByteTokenizer):
    """One whose files do not say what a text begins and ends with."""

    prompt_affixes = None


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("t5_small", ExampleFormat(1, 0, 0, 32128, (), (1,), 1, "seq2seq_lm")),
        ("t5gemma_s_s", ExampleFormat(1, 2, 0, 256000, (2,), (), 1, "seq2seq_lm")),
        ("llama3_8b", ExampleFormat(1, 128000, 128001, 128256, (), (), 128000, "causal_lm")),
        ("bert_tiny", ExampleFormat(1, 101, 0, 30522, (101,), (102,), 102)),
    ],
)
def test_format_of_a_model(size, expected):
    assert example_format(published(size), Silent()) == expected


def test_format_of_a_classifier():
    model = published("bert_tiny", head="token_classification", labels=("a", "b", "c"))
    form = example_format(model, Silent())
    assert (form.start_id, form.head, form.num_labels) == (101, "token_classification", 3)


@pytest.mark.parametrize(
    ("form", "inputs", "prompt"),
    [
        (ExampleFormat(9, prompt_end=(9,)), [7, 9], [7, 9]),
        (ExampleFormat(9, prompt_end=(9,)), [7], [7]),  # As a task of SeqIO wants it.
        (ExampleFormat(9, prompt_end=()), [7, 9, 9], [7, 9]),
        (ExampleFormat(9, prompt_start=(5,), prompt_end=()), [7, 9], [5, 7]),
        (ExampleFormat(9, prompt_start=(5,), prompt_end=()), [5, 7, 9], [5, 7]),  # Not twice.
        (ExampleFormat(9, prompt_start=(5, 6), prompt_end=(8,)), [5, 7, 9], [5, 6, 5, 7, 8]),
        (ExampleFormat(9, prompt_start=(5,), prompt_end=()), [9], [5]),
        (ExampleFormat(9, prompt_end=(), nothing=3), [9], [3]),
        (ExampleFormat(9, prompt_end=(), nothing=3), [], [3]),
    ],
)
def test_what_is_read_of_inputs(form, inputs, prompt):
    assert form.prompt(inputs).tolist() == prompt
    assert len(prompt) <= max(len(inputs) + form.num_added, 1)
