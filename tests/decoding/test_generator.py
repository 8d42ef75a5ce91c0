"""Prompts in padded batches, and the same answers however they are batched."""

import dataclasses

import jax
import numpy as np
import pytest

from conformance.cases import random_params
from conformance.families import GPT2, LLAMA, change
from conformance.families import T5 as SMALL
from t5jax import sharding
from t5jax.config import MeshConfig
from t5jax.decoding import GenerationOptions, Generator, padded_batches
from t5jax.tokenizers import ByteTokenizer

MODEL = dataclasses.replace(SMALL, vocab_size=384)
PARAMS = random_params(MODEL)


def rows_of(*lengths):
    return [[7] * n for n in lengths]


@pytest.mark.parametrize(
    ("lengths", "batch_size", "parts", "expected"),
    [
        ((3, 20, 40), 2, 1, [(2, 2, 32), (1, 2, 64)]),  # (sequences, rows, length)
        ((3, 20, 40), 2, 8, [(2, 8, 32), (1, 8, 64)]),
        ((1, 1, 1, 1, 1), 100, 1, [(5, 8, 16)]),
        ((16, 17), 1, 1, [(1, 1, 16), (1, 1, 32)]),
        ((1, 1, 1, 1, 1), 3, 1, [(3, 3, 16), (2, 3, 16)]),  # No more rows than asked for.
        ((), 4, 1, []),
    ],
)
def test_few_shapes(lengths, batch_size, parts, expected):
    batches = list(padded_batches(rows_of(*lengths), batch_size, parts))
    assert [(len(chunk), rows, length) for chunk, rows, length in batches] == expected
    assert [ids for chunk, _, _ in batches for ids in chunk] == rows_of(*lengths)


@pytest.mark.parametrize("mesh", [MeshConfig(data=1, fsdp=8), MeshConfig(data=8)])
def test_answers_do_not_depend_on_batches_or_devices(mesh):
    rng = np.random.default_rng(0)
    inputs = [[*rng.integers(3, 200, n).tolist(), 1] for n in (2, 30, 9, 17, 1)]
    generate = Generator(MODEL, ByteTokenizer(), sharding.make_mesh(mesh))
    together = generate(PARAMS, inputs, max_tokens=6, batch_size=32)
    alone = [generate(PARAMS, [ids], max_tokens=6, batch_size=1)[0] for ids in inputs]
    assert together == alone == generate(PARAMS, inputs, max_tokens=6, batch_size=2)
    assert len(set(together)) > 1
    assert generate(PARAMS, [], max_tokens=6, batch_size=2) == []


def test_beams_over_a_mesh_are_those_of_one_device():
    rng = np.random.default_rng(1)
    inputs = [[*rng.integers(3, 200, n).tolist(), 1] for n in (2, 30, 9)]
    options = GenerationOptions(num_beams=4, num_answers=2, max_tokens=6, length_penalty=0.5)
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    for config in (MeshConfig(data=2, fsdp=2, model=2), MeshConfig(data=8)):
        found = [
            Generator(MODEL, ByteTokenizer(), mesh).answers(PARAMS, inputs, options, batch_size=4)
            for mesh in (one, sharding.make_mesh(config))
        ]
        for mine, theirs in zip(*found, strict=True):
            assert [a.tokens for a in mine] == [a.tokens for a in theirs]
            scores = [[a.score for a in answers] for answers in (mine, theirs)]
            np.testing.assert_allclose(*scores, rtol=1e-4)
    assert len({tuple(a.tokens) for answers in found[0] for a in answers}) == 6


def test_learned_positions_end():
    model = change(GPT2, vocab_size=384)
    assert model.max_positions == 64
    params = random_params(model)
    generate = Generator(model, ByteTokenizer(), sharding.make_mesh(MeshConfig(data=-1)))
    ids = [7] * 60  # The last of 5 tokens is not read.
    assert len(generate(params, [ids, [8]], max_tokens=5, batch_size=2)) == 2
    with pytest.raises(
        ValueError, match=r"prompt 1 has 60 tokens, and 6 .*64 positions.*at most 5"
    ):
        generate(params, [[8], ids], max_tokens=6, batch_size=2)
    # Rotations go on.
    llama = change(LLAMA, vocab_size=384)
    generate = dataclasses.replace(generate, model=llama)
    assert generate(random_params(llama), [ids], max_tokens=9, batch_size=1)
