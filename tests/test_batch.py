"""How each kind of model reads an example."""

import pytest

from t5jax.architectures import published
from t5jax.batch import ExampleFormat


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("t5_small", ExampleFormat(1, 0, None, "seq2seq_lm", 0)),
        ("t5gemma_s_s", ExampleFormat(1, 2, 2, "seq2seq_lm", 0)),
        ("llama3_8b", ExampleFormat(128001, 128000, None, "causal_lm", 0)),
        ("bert_tiny", ExampleFormat(102, 101, None, "masked_lm", 0)),
    ],
)
def test_format_of_a_model(size, expected):
    assert ExampleFormat.of(published(size)) == expected


def test_format_of_a_classifier():
    model = published("bert_tiny", head="token_classification", labels=("a", "b", "c"))
    expected = ExampleFormat(102, 101, None, "token_classification", 3)
    assert ExampleFormat.of(model) == expected
