"""lm-evaluation-harness scores a served decoder as it scores the same folder with transformers."""

import pytest

import folders
import t5jax
from serving.live import running
from t5jax.serving.served import ServedModel
from t5jax.serving.sizes import EngineOptions
from tiny import one_device  # noqa: F401

QUESTIONS = [
    ("What is the capital of France?", [" It is Paris.", " It is the sea.", " 12"]),
    ("She sells sea", [" shells by", " digit", " shore, he said."]),
    ("The quick", [" brown fox", " Numbers", "?"]),
]


@pytest.mark.slow
@pytest.mark.hf
@pytest.mark.parametrize("tokenizer", ["remote", "huggingface"])
def test_choices_are_scored_as_by_transformers(tmp_path, tokenizer):
    pytest.importorskip("torch")
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folders.write_folder(tmp_path / "gpt2", "gpt2")
    asked = [(question, choice) for question, choices in QUESTIONS for choice in choices]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    theirs = HFLM(pretrained=str(tmp_path / "gpt2"), device="cpu", batch_size=1)
    expected = theirs.loglikelihood(requests)
    model = t5jax.load(str(tmp_path / "gpt2"))
    with running(ServedModel("gpt2", model, EngineOptions(slots=1, max_length=64))) as url:
        ours = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            pretrained="gpt2",
            tokenizer=str(tmp_path / "gpt2"),
            tokenizer_backend=tokenizer,
            tokenized_requests=True,
            max_length=64,
        )
        found = ours.loglikelihood(requests)
    assert [logprob for logprob, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-3)
    assert [is_greedy for _, is_greedy in found] == [x for _, x in expected]
    # A server without log-probabilities of the prompt would score all choices alike.
    assert len({round(logprob, 2) for logprob, _ in found}) == len(found)
