"""Exports in CTranslate2: the same tokens, and the same scores, which alone show a wrong scale."""

import dataclasses

import jax
import numpy as np
import pytest

from conformance.cases import random_examples, random_params
from conformance.families import GPT2, LLAMA, QWEN3, VARIANTS, change
from conformance.families import T5 as SMALL
from t5jax import batch as features
from t5jax import decoding
from t5jax.hf import ctranslate2 as ct2
from t5jax.hf import io
from t5jax.models import api
from t5jax.quantize.matrices import Scheme, dequantize_params, quantize_params

ctranslate2 = pytest.importorskip("ctranslate2", reason="what reads the exports")
transformers = pytest.importorskip("transformers", reason="what it converts with")
pytest.importorskip("torch", reason="what it converts with")
pytestmark = pytest.mark.hf
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

STEPS = 8
T5 = {
    "1.1": SMALL,
    "1.0": dataclasses.replace(
        SMALL, mlp_activation="relu", tie_word_embeddings=True, scale_decoder_outputs=True
    ),
    "1.1, tied": dataclasses.replace(SMALL, tie_word_embeddings=True),
}
GPT = {
    "gpt2": GPT2,
    "gpt2_untied": VARIANTS["gpt2_untied"],
    # Its Llama has heads of d_model / num_heads, and does not stretch what llama3 stretches.
    "llama": change(LLAMA, head_dim=4),
    "llama_biased": change(VARIANTS["llama_biased"], d_model=20, head_dim=4, rope_theta=300.0),
    "qwen3": QWEN3,
}
LOGITS = jax.jit(api.logits, static_argnums=0)


def token(i: int) -> str:
    return f"t{i}"


def convert(folder, config, params, quantization=None):
    """Exports a model with a tokenizer whose tokens are t0, t1, ..., and converts it."""
    io.save_params(folder / "hf", config, params)
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {token(i): i for i in range(config.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=token(3)))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token=token(3),
        pad_token=token(config.pad_token_id),
        eos_token=token(config.eos_token_id),
        bos_token=token(config.decoder_start_token_id),
    ).save_pretrained(folder / "hf")
    ct2.convert(folder / "hf", folder / "ct2", quantization)
    return str(folder / "ct2")


def expect(config, logits, tokens, results):
    """Compares greedy tokens, and the mean of their log-probabilities.

    Args:
      logits: [B, T, V], those from which the tokens were taken.
      tokens: [B, T], with what ends a text, and padding behind.
      results: for each row, the tokens without what ends it, and the score.
    """
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    assert len(np.unique(tokens)) > 1  # Not one token over and over.
    for row, (got, score) in enumerate(results):
        ends = np.flatnonzero(tokens[row] == config.eos_token_id)
        length = ends[0] if len(ends) else tokens.shape[1]
        assert got == [token(i) for i in tokens[row, :length]]
        places = np.arange(min(length + 1, tokens.shape[1]))
        expected = log_probs[row, places, tokens[row, places]].mean()
        np.testing.assert_allclose(score, expected, atol=1e-3)


@pytest.mark.parametrize("variant", T5)
def test_t5(variant, tmp_path):
    config = T5[variant]
    params = random_params(config, seed=1)
    translator = ctranslate2.Translator(convert(tmp_path, config, params), device="cpu")

    rng = np.random.default_rng(0)
    sources = [rng.integers(2, config.vocab_size, n).tolist() for n in (9, 5, 7)]
    inputs = features.pad_ids(sources, 3, 9)
    batch = {features.ENCODER_INPUT_TOKENS: inputs}
    tokens = np.asarray(decoding.greedy(config, params, batch, STEPS))
    batch[features.DECODER_INPUT_TOKENS] = features.shift_right(tokens, 0)
    results = translator.translate_batch(
        [[token(i) for i in source] for source in sources],
        beam_size=1,
        min_decoding_length=0,  # By default the first token is not to end the text.
        max_decoding_length=STEPS,
        return_scores=True,
    )
    found = [(result.hypotheses[0], result.scores[0]) for result in results]
    expect(config, LOGITS(config, params, batch), tokens, found)


def test_int8_that_is_exported_and_rounded_again_is_as_near_as_it_was(tmp_path):
    """What `t5jax compress` with int8 activations makes, and CTranslate2 of its export."""
    params = random_params(SMALL, seed=1)
    rounded = quantize_params(SMALL, params, Scheme("int8", activations="int8"))
    folder = convert(tmp_path, SMALL, dequantize_params(rounded), "int8")
    rng = np.random.default_rng(0)
    sources = [rng.integers(2, SMALL.vocab_size, n).tolist() for n in (9, 5, 7)]
    batch = {features.ENCODER_INPUT_TOKENS: features.pad_ids(sources, 3, 9)}
    targets_BT = np.asarray(decoding.greedy(SMALL, params, batch, STEPS))
    batch[features.DECODER_INPUT_TOKENS] = features.shift_right(targets_BT, 0)
    floats_BT, ours_BT = (
        np.take_along_axis(
            np.asarray(jax.nn.log_softmax(LOGITS(SMALL, each, batch))), targets_BT[..., None], -1
        )[..., 0]
        for each in (params, rounded)
    )
    texts = [[[token(i) for i in row] for row in rows] for rows in (sources, targets_BT)]
    results = ctranslate2.Translator(folder, device="cpu").score_batch(*texts)
    theirs_BT = np.array([result.log_probs[:STEPS] for result in results])
    apart = [np.abs(x - y).mean() for x, y in ((ours_BT, floats_BT), (theirs_BT, ours_BT))]
    assert apart[0] < 0.06, "nats a token, of a random network with 12 inputs a product"
    assert apart[1] < apart[0]


@pytest.mark.parametrize("variant", GPT)
def test_gpt(variant, tmp_path):
    config = GPT[variant]
    params = random_params(config, seed=1)
    generator = ctranslate2.Generator(convert(tmp_path, config, params), device="cpu")

    # Of one length: behind padding CTranslate2 counts positions from the padding on.
    examples = random_examples(config, ((0, 6),) * 3)
    prompts = [example[features.DECODER_INPUT_TOKENS].tolist() for example in examples]
    batch = features.prompt_batch(prompts, "decoder", 3, 6)
    tokens = np.asarray(decoding.greedy(config, params, batch, STEPS))
    whole = {features.DECODER_INPUT_TOKENS: np.concatenate([prompts, tokens], axis=1)[:, :-1]}
    results = generator.generate_batch(
        [[token(i) for i in prompt] for prompt in prompts],
        beam_size=1,
        sampling_topk=1,
        max_length=STEPS,
        include_prompt_in_result=False,
        return_scores=True,
    )
    found = [(result.sequences[0], result.scores[0]) for result in results]
    expect(config, LOGITS(config, params, whole)[:, 5:], tokens, found)
