"""Beam search and penalties against transformers' `generate`: tokens and scores.

Prompts of different lengths stand in one batch here, and alone there.
"""

import json

import numpy as np
import pytest

from conformance.cases import random_examples, random_params
from conformance.families import VARIANTS, change
from t5jax import batch as features
from t5jax.decoding import GenerationOptions, Parts, row_options
from t5jax.decoding.beams import beam_search
from t5jax.decoding.loop import Request, write
from t5jax.hf import io

torch = pytest.importorskip("torch", reason="transformers' models run on torch")
transformers = pytest.importorskip("transformers", reason="what is compared with")
pytestmark = pytest.mark.hf
LENGTHS, STEPS, END = (9, 1, 4, 2), 9, 17

PENALTIES = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3}


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("t5_1_0", {"early_stopping": "true", "length_penalty": 0.6, "min_tokens": 3}),
        ("gemma3", {"early_stopping": "never", **PENALTIES}),
    ],
)
def test_strategies_are_those_of_transformers(variant, changes, tmp_path):
    model, params = VARIANTS[variant], random_params(VARIANTS[variant], seed=1)
    prompts = prompts_of(model)
    batch = features.prompt_batch(prompts, model.kind, 4, 26)
    io.save_params(tmp_path / "hf", model, params)
    kind = getattr(transformers, architecture(tmp_path))
    theirs = kind.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    ours = change(model, eos_token_id=END)

    def request(options):
        parts = Parts.of([options])
        return Request(rows=row_options([options] * 4) if any(parts) else None, parts=parts)

    options = GenerationOptions(num_beams=3, num_answers=2, **changes)
    tokens, scores = beam_search(
        *(ours, params, batch, STEPS, request(options), np.float32(options.length_penalty)),
        num_beams=3,
        num_answers=2,
        early_stopping=options.early_stopping,
    )
    greedy = GenerationOptions(**PENALTIES)
    greedy_tokens = write(ours, params, batch, STEPS, request(greedy)).tokens.T
    stopping = {"true": True, "false": False}
    for row, prompt in enumerate(prompts):
        common = {
            "input_ids": torch.tensor([prompt]),
            "attention_mask": torch.ones(1, len(prompt)).long(),
            "max_new_tokens": STEPS,
            "do_sample": False,
            "eos_token_id": list(ours.end_token_ids),
            "return_dict_in_generate": True,
            "output_scores": True,
        }
        found = theirs.generate(
            **common,
            num_beams=3,
            num_return_sequences=2,
            length_penalty=options.length_penalty,
            early_stopping=stopping.get(options.early_stopping, "never"),
            min_new_tokens=options.min_tokens,
            **{name: getattr(options, name) for name in PENALTIES},
        )
        np.testing.assert_allclose(scores[row], found.sequences_scores, atol=1e-3)
        begin = len(prompt) if model.kind == "decoder" else 1
        for got, expected in zip(tokens[row], found.sequences, strict=True):
            assert written(ours, got) == written(ours, expected[begin:])
        plain = theirs.generate(**common, num_beams=1, **PENALTIES).sequences[0, begin:]
        assert written(ours, greedy_tokens[row]) == written(ours, plain)


def prompts_of(model) -> list[list[int]]:
    examples = random_examples(model)[:4]
    if model.kind == "decoder":
        name = features.DECODER_INPUT_TOKENS
        return [x[name][:n].tolist() for x, n in zip(examples, LENGTHS, strict=True)]
    return [x[features.ENCODER_INPUT_TOKENS].tolist() for x in examples]


def written(model, tokens) -> list[int]:
    """Returns the tokens up to the one that ends them; transformers may pad with it."""
    tokens = np.asarray(tokens).tolist()
    return tokens[: len(model.answer(tokens)) + 1]


def architecture(folder) -> str:
    name: str = json.loads((folder / "hf" / "config.json").read_text())["architectures"][0]
    return name
