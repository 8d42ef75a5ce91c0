"""Scores of given answers: what the logits of whole rows say, however they are batched."""

import jax
import numpy as np
import pytest

from conformance.cases import LOGITS, random_params
from conformance.families import GPT2, VARIANTS, change
from t5jax import batch as features
from t5jax import sharding
from t5jax.config import MeshConfig
from t5jax.decoding import Generator
from t5jax.models import api
from t5jax.tokenizers import ByteTokenizer

INPUTS = [[7, 9, 4, 1], [8, 1], [], [5] * 20 + [1]]
ANSWERS = [[3, 0, 17, 9], [9, 1], [30, 31, 32], [4]]


def generator(model, mesh=MeshConfig(data=-1), **fields):
    return Generator(model, ByteTokenizer(), sharding.make_mesh(mesh), **fields)


def log_softmax_of(model, params, prompts, answers):
    """Yields float32 [n, V] for each answer, from rows that are padded behind."""
    alone = model.kind == "decoder"
    starts = prompts if alone else [[model.decoder_start_token_id]] * len(prompts)
    read = [[*start, *answer[:-1]] for start, answer in zip(starts, answers, strict=True)]
    batch = features.prompt_batch(read, "decoder", 4, 24)
    if not alone:
        batch |= features.prompt_batch(prompts, "encoder", 4, 24)
    logits = jax.nn.log_softmax(LOGITS(model, params, batch), axis=-1)
    for row, (start, whole) in enumerate(zip(starts, read, strict=True)):
        yield np.asarray(logits[row, len(start) - 1 : len(whole)])


@pytest.mark.parametrize("variant", ["t5_1_0", "llama"])
def test_scores_are_those_of_the_logits(variant):
    model = VARIANTS[variant]
    params = random_params(model)
    generate = generator(model)
    prompts = generate.prompts(INPUTS, 9)
    # Either layout of the parameters.
    given = api.arrange_for_decoding(model, params) if variant == "llama" else params
    scores = generate.score(given, INPUTS, ANSWERS, batch_size=4, num_top=2)
    expected = log_softmax_of(model, params, prompts, ANSWERS)
    for answer, score, logits in zip(ANSWERS, scores, expected, strict=True):
        own = logits[np.arange(len(answer)), answer]
        assert score.tokens == answer
        np.testing.assert_allclose(score.log_probs, own, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(score.total, own.sum(), atol=1e-3)
        np.testing.assert_array_equal(score.is_greedy, logits.argmax(-1) == answer)
        np.testing.assert_allclose(score.top_log_probs, np.sort(logits)[:, :-3:-1], atol=2e-4)


def test_scores_do_not_depend_on_batches_or_devices():
    model = change(VARIANTS["t5_1_0"], vocab_size=384)
    params = random_params(model)
    one = generator(model).score(params, INPUTS, ANSWERS, batch_size=2)
    shared = generator(model, MeshConfig(data=1, fsdp=8))
    many = shared.score(params, INPUTS, ANSWERS, batch_size=32)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)
    assert generator(model).score(params, [[8, 1]], [[]], batch_size=2)[0].total == 0


def test_positions_and_ids_are_checked():
    model = change(GPT2, vocab_size=384)
    generate, params = generator(model), random_params(model)
    assert len(generate.score(params, [[7] * 60], [[7] * 5], batch_size=1)) == 1
    with pytest.raises(ValueError, match="prompt and answer 0 have 66 tokens.*64 positions"):
        generate.score(params, [[7] * 60], [[7] * 6], batch_size=1)
    with pytest.raises(ValueError, match="id 999"):
        generate.score(params, [[7]], [[7, 999]], batch_size=1)
