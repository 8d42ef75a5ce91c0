"""lm-evaluation-harness: the log-probabilities and answers of its own `hf` backend."""

import json
import shutil

import numpy as np
import pytest

from folders import write_folder
from t5jax import pretrained

harness = pytest.importorskip("lm_eval", reason="lm-eval is in the extra of that name")
torch = pytest.importorskip("torch", reason="the judge is transformers, on torch")

import transformers
from lm_eval.api.instance import Instance

from t5jax.lm_eval import LM

pytestmark = pytest.mark.hf

QUESTIONS = [
    ("What is the capital of France? It is", ["Paris.", "the lazy dog, he said."], 0),
    ("The quick brown fox", ["jumps over", "sea shells by the sea shore"], 1),
    ("Numbers such as ", ["12", "seven and more"], 0),
    ("She sells  ", ["the fox", "shore"], 1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a function that returns a folder of random weights, as transformers writes it."""
    root = tmp_path_factory.mktemp("folders")

    def find(name):
        if not (root / name).exists():
            write_folder(root / name, name)
        return str(root / name)

    return find


def requests(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


class Plain:
    """What transformers gives: one text after the other, without the harness or batches."""

    def __init__(self, folder):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        config = transformers.AutoConfig.from_pretrained(folder)
        self.pairs = config.is_encoder_decoder
        kind = "Seq2SeqLM" if self.pairs else "CausalLM"
        self.model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()

    def log_prob(self, context, continuation):
        context, spaces = context.rstrip(), context[len(context.rstrip()) :]
        ids = self.tokenizer.encode(context)
        if self.pairs:
            answer = self.tokenizer.encode(spaces + continuation, add_special_tokens=False)
            given = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([answer])}
        else:
            whole = self.tokenizer.encode(context + spaces + continuation)
            answer = whole[len(ids) :]
            given = {"input_ids": torch.tensor([whole[:-1]])}
        with torch.no_grad():
            logits_TV = self.model(**given).logits[0, -len(answer) :]
        log_p_TV = torch.log_softmax(logits_TV.double(), -1)
        greedy = logits_TV.argmax(-1).tolist() == answer
        return log_p_TV[range(len(answer)), answer].sum().item(), greedy


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_log_probabilities_are_those_of_transformers(folder, name):
    pairs = [(context, c) for context, choices, _ in QUESTIONS for c in choices]
    plain, model = Plain(folder(name)), LM(folder(name), batch_size=16)
    found = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    expected = [plain.log_prob(*pair) for pair in pairs]
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], atol=1e-3)
    assert [f[1] for f in found] == [e[1] for e in expected]


def test_a_task_whose_answers_are_known_is_not_at_chance(folder, tmp_path, monkeypatch):
    """Of four answers the one that transformers finds most probable: 100 %; chance is 25 %."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    plain, rng = Plain(folder("t5")), np.random.default_rng(0)
    words = ["fox", "sea", "dog", "is", "The", "by", "it", "day"]
    rows = []
    for _ in range(10):
        context, choices = " ".join(rng.choice(words, 3)), rng.choice(words, 4, replace=False)
        # The harness puts a space before each choice.
        totals = [plain.log_prob(context, f" {choice}")[0] for choice in choices]
        rows.append({"q": context, "choices": choices.tolist(), "a": int(np.argmax(totals))})
    assert len({row["a"] for row in rows}) == 4, "one place for all would prove little"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "known",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    model = LM(pretrained.load(folder("t5")), batch_size=64)
    found = harness.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)
    assert found["results"]["known"]["acc,none"] == 1.0


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_requests_of_every_kind_have_the_answers_of_the_hf_backend(folder, name):
    """With a model of few positions: contexts lose their start, long texts are read in windows."""
    backend = pytest.importorskip(
        "lm_eval.models.huggingface", reason="needs accelerate and peft", exc_type=ImportError
    )
    theirs = backend.HFLM(pretrained=folder(name), device="cpu", batch_size=2, max_length=28)
    ours = LM(folder(name), batch_size=16, max_length=28)
    texts = [(f"{context} {choices[0]}",) for context, choices, _ in QUESTIONS]
    asked = {
        "loglikelihood": [
            ("", "The fox"),
            *((q, c) for q, choices, _ in QUESTIONS for c in choices),
        ],
        "loglikelihood_rolling": texts,
    }
    for kind, arguments in asked.items():
        answers = [
            getattr(model, kind)(requests(kind, *arguments), disable_tqdm=True)
            for model in (theirs, ours)
        ]
        np.testing.assert_allclose(*map(np.array, answers), atol=1e-3, err_msg=kind)
    settings = {"until": ["."], "max_gen_toks": 4, "do_sample": False}
    asked = requests("generate_until", *((text, settings) for (text,) in texts))
    expected, found = (m.generate_until(asked, disable_tqdm=True) for m in (theirs, ours))
    assert len(set(found)) > 1
    hot = settings | {"do_sample": True, "temperature": 5.0}
    drawn = ours.generate_until(requests("generate_until", *((text, hot) for (text,) in texts)))
    assert drawn != found
    for one, other in zip(expected, found, strict=True):
        # Theirs lets an encoder-decoder write as many tokens more as the batch's inputs have.
        assert one.startswith(other) if name == "t5" else one == other


def test_settings_that_cannot_work(folder):
    with pytest.raises(
        ValueError, match="model_args has revision; expected pretrained, batch_size"
    ):
        LM(folder("gpt2"), revision="main")
    with pytest.raises(ValueError, match="bert is an encoder and writes no text"):
        LM(folder("bert"))
    model = LM(folder("gpt2"), batch_size="auto", max_length=8)
    assert model.batch_size == 32

    def generate(**settings):
        model.generate_until(requests("generate_until", ("a", settings)))

    with pytest.raises(ValueError, match=r"generation_kwargs has typical_p; expected until, max"):
        generate(typical_p=0.7, max_gen_toks=2)
    with pytest.raises(ValueError, match=r"max_gen_toks is 9, and the model has 8 positions"):
        generate(max_gen_toks=9)
    with pytest.raises(ValueError, match="a continuation has 12 tokens, and the model 8 positions"):
        model._loglikelihood_tokens([(None, [1], list(range(12)))])


def test_the_command_line_of_the_harness_knows_the_model():
    from lm_eval.api.registry import get_model

    assert get_model("t5jax") is LM


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}[{{ m['role'] }}] {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_a_conversation_is_what_transformers_makes_of_it(folder, tmp_path):
    shutil.copytree(folder("llama"), tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    model = LM(str(tmp_path / "chat"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "chat")
    asked = [{"role": "user", "content": "the fox"}]
    begun = [*asked, {"role": "assistant", "content": "the dog "}]
    for messages, prompted in ((asked, True), (begun, False)):
        text = theirs.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=prompted,
            continue_final_message=not prompted,
        )
        assert model.apply_chat_template(messages, add_generation_prompt=prompted) == text
        expected = theirs.encode(text, add_special_tokens=False)
        assert model.tok_encode(text) == expected
    system = {"role": "system", "content": "be brief"}
    assert model.apply_chat_template([system, *asked]) == model.apply_chat_template(asked)
    assert model.chat_template(True) == TEMPLATE
    model.loaded.tokenizer.chat_template = None
    del model._template
    with pytest.raises(ValueError, match="leave --apply_chat_template out"):
        model.apply_chat_template(asked)
