"""What task files import: the names of t5jax.data itself."""

import pytest

from processes import run_python
from t5jax import data


def test_every_name_is_there():
    for name in data.__all__:
        assert getattr(data, name).__name__ == name if name != "INSTRUCTION" else data.INSTRUCTION
    with pytest.raises(AttributeError, match=r"'t5jax.data' has no attribute 'jsnl'"):
        data.jsnl  # noqa: B018
    assert set(dir(data)) == set(data.__all__)


def test_rows_templates_objectives_and_metrics_come_without_tensorflow():
    run_python(  # Where TensorFlow and SeqIO cannot be imported.
        """
        from t5jax.data import (
            MaskedLM, Source, Template, accuracy, drop_missing, hf_dataset, jsonl, tfds
        )

        source = Source({"train": lambda: [{"q": "2 + 2", "a": "4"}, {"q": " ", "a": "4"}]})
        [row] = source.clean(drop_missing("q")).rows("train")
        assert Template("{q}?", "{a}").render(row).inputs == "2 + 2?"
        """
    )
