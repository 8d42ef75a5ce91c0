"""Several adapters over one base: each answer is as if its adapter were alone."""

import dataclasses

import jax
import numpy as np

from conformance.cases import LOGITS, random_params
from serving.live import SIZES, T5, Listener, pretrained, wait_for
from t5jax.adapters import lora
from t5jax.config import LoraConfig
from t5jax.models import api
from t5jax.serving.engine import Engine
from t5jax.serving.requests import Request

CONFIGS = (
    LoraConfig(rank=2, targets=("query", "wo"), dora=True),
    LoraConfig(rank=3, alpha=6, targets=("query", "value")),
)


def adapters(model, params):
    """Returns the leaves of an adapter of each config, none at its start."""
    found = []
    for number, config in enumerate(CONFIGS):
        start = lora.flatten(lora.init(config, model, params, jax.random.key(number)))
        rng = np.random.default_rng(number)
        found.append(
            {
                path: np.asarray(start[path])
                + (path.rpartition("/")[2] in lora.TRAINED)
                * rng.normal(0, 0.5, start[path].shape).astype(np.float32)
                for path in lora.leaves(config, model)
            }
        )
    return found


def test_each_answer_is_as_if_its_adapter_were_alone():
    base = random_params(T5)
    leaves = adapters(T5, base)
    flat = lora.flatten(base)
    alone = [base, *(lora.merge(T5, lora.unflatten(flat | one)) for one in leaves)]
    whole = lora.unflatten(flat | lora.stack(T5, leaves))
    model = dataclasses.replace(
        pretrained(T5), params=api.arrange_for_decoding(T5, whole), adapters=("one", "other")
    )
    engine = Engine(T5, model.params, model.tokenizer, model.mesh, options=SIZES)
    engine.start()
    wait_for(lambda: engine.ready.is_set() or engine.failure, 600)
    prompts = [(5, 6, 7, 8), (90, 91, 92)]
    requests = [Request(p, 6, adapter=number) for p in prompts for number in range(3)]
    listeners = [Listener(engine, request) for request in requests]
    answers = [listener.result() for listener in listeners]
    assert engine.stop(30)
    assert len({tuple(ids) for ids, *_ in answers}) > 3, "all alike would prove little"
    for request, (ids, logprobs, *_) in zip(requests, answers, strict=True):
        batch = {
            "encoder_input_tokens": np.array([request.prompt], np.int32),
            "decoder_input_tokens": np.array([[0, *ids[:-1]]], np.int32),
        }
        logits = LOGITS(T5, alone[request.adapter], batch)[0]
        assert ids == logits.argmax(-1).tolist()
        expected = jax.nn.log_softmax(logits)[np.arange(len(ids)), np.array(ids)]
        np.testing.assert_allclose(logprobs, expected, atol=5e-5)
        one = model.with_adapter(request.adapter).params
        np.testing.assert_allclose(LOGITS(T5, one, batch)[0], logits, atol=5e-5)
