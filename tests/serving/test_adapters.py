"""Several adapters over one base, and a soft prompt: each answer is as if its model were alone."""

import concurrent.futures
import dataclasses
import itertools

import jax
import numpy as np
import openai
import pytest

import t5jax
from conformance.cases import random_params
from serving.live import SIZES, T5, pretrained, running
from t5jax import trees
from t5jax.adapters import lora
from t5jax.config import LoraConfig, MeshConfig
from t5jax.hf import io, peft
from t5jax.models import api
from t5jax.serving.served import ServedModel
from t5jax.tokenizers import ByteTokenizer

CONFIGS = (
    LoraConfig(rank=2, targets=("query", "wo"), dora=True),
    LoraConfig(rank=3, alpha=6, targets=("query", "value")),
)
PROMPTS = ["twelve", "a b c", "Où est-ce ?"]


def adapters(model, params):
    """Returns the leaves of an adapter of each config, none at its start."""
    found = []
    for number, config in enumerate(CONFIGS):
        start = trees.flatten(lora.init(config, model, params, jax.random.key(number)))
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


def ask(url, names):
    """Returns the texts and the log-probabilities of answers by name, all asked for at once."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def one(asked):
        name, prompt = asked
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=6, logprobs=0)
        return answer.choices[0].text, answer.choices[0].logprobs.token_logprobs

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [(name, prompt) for name in names for prompt in PROMPTS]
        found = list(pool.map(one, asked))
    size = len(PROMPTS)
    return {name: found[i * size : (i + 1) * size] for i, name in enumerate(names)}


def alone(params):
    """Returns the same of a model on one device that has nothing else to do."""
    model = dataclasses.replace(pretrained(T5), params=api.arrange_for_decoding(T5, params))
    options = model.options(max_tokens=6, logprobs=0)
    answers = [one for one, *_ in model.answers(PROMPTS, options)]
    return [(one.text, one.log_probs) for one in answers]


def assert_same(found, expected):
    for (text, log_probs), (alone, alone_log_probs) in zip(found, expected, strict=True):
        assert text == alone
        np.testing.assert_allclose(log_probs, alone_log_probs, atol=1e-4)


@pytest.mark.filterwarnings("ignore:the mesh does not divide heads")
def test_each_answer_is_as_if_its_adapter_were_alone_on_eight_devices(tmp_path):
    base = random_params(T5)
    leaves = adapters(T5, base)
    flat = trees.flatten(base)
    io.save_params(tmp_path / "base", T5, base, tokenizer=ByteTokenizer())
    for name, one in zip(("one", "other"), leaves, strict=True):
        peft.save(tmp_path / name, T5, one, str(tmp_path / "base"))
    model = t5jax.load(
        str(tmp_path / "base"),
        mesh=MeshConfig(data=4, model=2),
        adapters={name: str(tmp_path / name) for name in ("one", "other")},
    )
    assert model.mesh.size == 8
    served = ServedModel("base", model, SIZES)
    with running(served, served.adapted("one", 1), served.adapted("other", 2)) as url:
        found = ask(url, ["base", "one", "other"])
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        vectors = [
            client.embeddings.create(model=name, input="abc", encoding_format="float").data[0]
            for name in found
        ]
        beams = client.completions.create(
            model="base", prompt=PROMPTS[0], max_tokens=4, extra_body={"num_beams": 2}
        )
    assert beams.choices
    # Adapters of queries, values and the encoder's MLP change what it embeds.
    for vector, other in itertools.combinations(vectors, 2):
        assert np.abs(np.subtract(vector.embedding, other.embedding)).max() > 1e-3
    expected = model.embed(["abc"])[0]  # Without an adapter.
    np.testing.assert_allclose(vectors[0].embedding, expected, atol=1e-4)
    merged = [base, *(lora.merge(T5, trees.unflatten(flat | one)) for one in leaves)]
    for answers, params in zip(found.values(), merged, strict=True):
        assert_same(answers, alone(params))
    assert len({text for answers in found.values() for text, _ in answers}) > 3, "all alike"


def test_a_soft_prompt_is_read_before_each_prompt():
    params = random_params(T5)
    table_VD = params["token_embedder"]["embedding"]
    whole = params | {"soft_prompt": {"embedding": 3 * table_VD[40:45]}}
    model = dataclasses.replace(pretrained(T5), params=api.arrange_for_decoding(T5, whole))
    with running(ServedModel("soft", model, SIZES)) as url:
        (found,) = ask(url, ["soft"]).values()
    assert_same(found, alone(whole))
    assert [text for text, _ in found] != [text for text, _ in alone(params)]
