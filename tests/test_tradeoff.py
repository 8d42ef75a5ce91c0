"""What a smaller model gains and costs, in words."""

import math
import os

import numpy as np

from conformance.cases import random_params
from conformance.families import GPT2, T5, VARIANTS
from t5jax.hf import io, peft
from t5jax.tokenizers import ByteTokenizer
from t5jax.tradeoff import Tradeoff, _room, measure


def test_it_says_what_is_lost_and_that_there_is_no_gain():
    comparison = {"difference": -1.5, "interval": [-2.0, -0.5], "verdict": "worse"}
    quality = {"t": {"model": {"em": 90.0}, "comparisons": {"runs/x": {"em": comparison}}}}
    found = Tradeoff((4_000_000, 1_000_000), (4_000_000, 1_040_000), quality, (10.0, 9.0))
    assert list(found.lines()) == [
        "in memory, float32: 4.00 MB before, 1.00 MB after, 25.0%",
        "on disk: 4.00 MB before, 1.04 MB after, 26.0%",
        "t em: 90, against the model before -1.5 [-2, -0.5], worse",
        "speed here: 10.0 examples/s before, 9.0 after: no gain (0.90 times)",
    ]
    comparison |= {"interval": [math.nan, math.nan], "verdict": "not distinguishable"}
    (*_, quality, _) = found.lines()
    assert quality.endswith("-1.5 (too few examples for an interval), not distinguishable")
    *_, speed = Tradeoff((4, 1), (4, 1), {}, (10.0, 15.0)).lines()
    assert speed.endswith("1.50 times as fast")


def test_prompts_and_answers_fit_the_positions():
    assert _room(T5) == (None, 32)
    assert _room(GPT2) == (GPT2.max_positions // 2, min(32, GPT2.max_positions // 2))
    assert _room(VARIANTS["bert_masked_lm"])[0] == VARIANTS["bert_masked_lm"].max_positions


def test_bytes_are_those_of_the_weights_that_are_read(tmp_path):
    io.save_params(tmp_path / "model", T5, random_params(T5), tokenizer=ByteTokenizer())
    size = os.path.getsize(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(bytes(99))  # As on the Hub.
    leaf = {"soft_prompt/embedding": np.zeros((2, T5.d_model), np.float32)}
    peft.save(tmp_path / "adapter", T5, leaf, str(tmp_path / "model"))
    found = measure(str(tmp_path / "adapter"), str(tmp_path / "model"))
    assert found.disk_bytes == (found.memory_bytes[0], size)
    assert 0 < size - found.memory_bytes[1] < 20_000
