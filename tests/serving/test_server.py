"""OpenAI's interface over live models: its own client, streams, clients that leave, bad bodies."""

import base64
import concurrent.futures
import dataclasses
import functools
import json
import logging
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest

from conformance.cases import LOGITS, random_params
from serving import bodies, browser
from serving.live import GPT, T5, running, served, wait_for
from t5jax.serving.app import make_app
from t5jax.serving.errors import ApiError
from t5jax.serving.schemas import CompletionBody, Message
from t5jax.serving.writing import plan

KEY = "a-key-of-many-letters"
MESSAGES = [{"role": "user", "content": "abc"}]
# httpx itself waits for 5 s, which may be too few on a machine that has much else to do.
get, post = (functools.partial(method, timeout=60) for method in (httpx.get, httpx.post))


@pytest.fixture(scope="module")
def models():
    return served("t5", T5, batch_invariant=True), served(
        "gpt", GPT, batch_invariant=True, max_length=16
    )


@pytest.fixture(scope="module")
def url(models):
    with running(*models, max_body_bytes=20_000) as url:
        yield url
        engines = [model.engine for model in models]
        wait_for(lambda: not any(e.num_running + e.num_waiting for e in engines))


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(url, path="/v1/completions", **body):
    return post(url + path, json=body)


# --- OpenAI's client ----------------------------------------------------------------------------


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["t5", "gpt"]
    assert client.models.retrieve("gpt").id == "gpt"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt9")


def test_a_completion_is_greedy_and_its_stream_has_the_same_text(client):
    asked = {"model": "t5", "prompt": "abc", "max_tokens": 8}
    whole = client.completions.create(**asked)
    assert client.completions.create(**asked, temperature=0).choices == whole.choices
    pieces = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *pieces, last = pieces
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage
    assert whole.usage.prompt_tokens == 4  # With eos.


def test_a_chat_and_its_stream(client):
    asked = {"model": "t5", "messages": MESSAGES, "max_tokens": 8}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    message = whole.choices[0].message
    prompt = client.completions.create(model="t5", prompt="abc", max_tokens=8)
    assert (message.role, message.content) == ("assistant", prompt.choices[0].text)
    for token in whole.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == message.content


def test_several_answers_are_drawn_and_the_best_are_kept(client):
    asked = {"model": "gpt", "prompt": ["abc", "d"], "max_tokens": 6, "seed": 3}
    three = client.completions.create(**asked, n=3, logprobs=1)
    assert [choice.index for choice in three.choices] == list(range(6))
    texts = [tuple(choice.logprobs.tokens) for choice in three.choices]
    assert len(set(texts)) == 6
    again = client.completions.create(**asked, n=3, logprobs=1)
    assert [tuple(choice.logprobs.tokens) for choice in again.choices] == texts
    best = client.completions.create(**asked, n=1, best_of=3, logprobs=1)

    def mean(choice):
        return np.mean(choice.logprobs.token_logprobs)

    expected = [max(three.choices[i : i + 3], key=mean) for i in (0, 3)]
    found = [choice.logprobs.tokens for choice in best.choices]
    assert found == [choice.logprobs.tokens for choice in expected]
    assert best.usage == three.usage  # All that was written counts.


def test_the_same_prompt_twice_is_drawn_twice_as_generate_draws_it(client, models):
    asked = {"model": "gpt", "prompt": ["abc", "abc"], "max_tokens": 6, "seed": 3}
    found = client.completions.create(**asked, n=2)
    texts = [choice.text for choice in found.choices]
    options = models[1].pretrained.options(
        max_tokens=6, temperature=1.0, top_k=50, seed=3, num_answers=2
    )
    answers = models[1].pretrained.answers(["abc", "abc"], options)
    assert texts == [one.text for each in answers for one in each]
    assert len(set(texts)) == 4


def test_beams_are_those_of_generate_and_come_as_a_whole(client, models):
    asked = {"model": "t5", "prompt": ["abc", "d"], "max_tokens": 6}
    beams = {"num_beams": 3, "length_penalty": 0.5}
    found = client.completions.create(**asked, n=2, extra_body=beams)
    options = models[0].pretrained.options(max_tokens=6, num_answers=2, **beams)
    answers = models[0].pretrained.answers(["abc", "d"], options)
    expected = [one for each in answers for one in each]
    assert [choice.text for choice in found.choices] == [one.text for one in expected]
    assert found.usage.completion_tokens == sum(len(one.tokens) for one in expected)
    pieces = list(client.completions.create(**asked, n=2, stream=True, extra_body=beams))
    assert [(p.choices[0].index, p.choices[0].text) for p in pieces] == [
        (choice.index, choice.text) for choice in found.choices
    ]


def test_generation_config_is_obeyed(models, monkeypatch):
    served, body = models[0], CompletionBody(model="t5", prompt="abc")
    config = {"do_sample": True, "temperature": 0.6, "forced_bos_token_id": 7}
    with_config = dataclasses.replace(served.pretrained, source=_Config(config))
    monkeypatch.setattr(served, "pretrained", with_config)
    served.__dict__.pop("_generation", None)
    served._options_of.cache_clear()
    try:
        assert served.options(body, 3).temperature == 0.6
        config |= {"do_sample": False, "num_beams": 3}
        served.__dict__.pop("_generation")
        served._options_of.cache_clear()
        beams, drawn = served.options(body, 1), served.options(body, 3)
        assert (beams.num_beams, beams.forced_tokens) == (3, (7,))
        assert (drawn.num_beams, drawn.temperature) == (1, 1.0)
    finally:
        served.__dict__.pop("_generation", None)
        served._options_of.cache_clear()


class _Config:
    def __init__(self, generation):
        self._generation = generation

    def generation(self):
        return self._generation


def test_a_default_that_nobody_asked_for_is_no_error(client):
    answer = client.completions.create(model="gpt", prompt=[60] * 14)
    assert answer.usage.completion_tokens <= 3


def test_a_completion_goes_on_a_decoders_prompt(models):
    """Its first word may have a space in front; what an encoder-decoder writes is a text alone."""
    for model, goes_on in zip(models, (False, True), strict=True):
        body = CompletionBody(model=model.name, prompt="ab")
        (request,) = plan(model, body, [model.prompt("ab")], None).requests
        assert request.continues is goes_on
        stream = model.engine._text_of(request)
        assert stream._shown._ids_before == (model.prompt("ab") if goes_on else [])


def test_an_echo_is_the_prompt_as_it_was_given(client):
    answer = client.completions.create(model="t5", prompt="ab c", max_tokens=1, echo=True)
    assert answer.choices[0].text.startswith("ab c")
    assert "</s>" not in answer.choices[0].text[:8]


def test_an_echo_alone_has_the_probabilities_of_the_prompt(client):
    asked = {"model": "gpt", "prompt": ["abc", "de"], "logprobs": 2, "echo": True}
    one = client.completions.create(**asked, max_tokens=1)
    none = client.completions.create(**asked, max_tokens=0)
    assert [choice.text for choice in none.choices] == ["abc", "de"]
    assert none.usage.completion_tokens == 0
    for with_one, alone in zip(one.choices, none.choices, strict=True):
        expected = with_one.logprobs.model_dump()
        found = alone.logprobs.model_dump()
        assert found == {name: values[:-1] for name, values in expected.items()}
    parts = list(client.completions.create(**asked, max_tokens=0, stream=True))
    texts = [c.text for index in (0, 1) for part in parts for c in part.choices if c.index == index]
    assert "".join(texts) == "abcde"


def test_offsets_of_an_echo_are_places_in_its_text(client):
    prompt = "aä b\U0001f642c"  # With characters of two and of four bytes.
    (choice,) = client.completions.create(
        model="gpt", prompt=prompt, max_tokens=1, logprobs=0, echo=True
    ).choices
    tokens = list(zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True))
    assert choice.text.startswith(prompt)
    assert [(t, n) for t, n in tokens[:-1] if len(t) == 1] == [
        ("a", 0), (" ", 2), ("b", 3), ("c", 5)
    ]  # fmt: skip
    assert tokens[-1][1] == len(prompt)


def test_penalties_and_biases_over_http(client):
    asked = {"model": "t5", "prompt": "abc", "max_tokens": 6, "logprobs": 0}
    plain = client.completions.create(**asked).choices[0].logprobs.tokens
    ids = [i for i in range(384) if i != 1]
    bias = {str(ids[70]): 100}
    biased = client.completions.create(**asked, logit_bias=bias).choices[0].logprobs.tokens
    assert set(biased) == {chr(70 - 3 + 1)}
    once = client.completions.create(**asked, logit_bias=bias, frequency_penalty=2.0)
    assert once.choices[0].logprobs.tokens == biased  # 100 outweighs it.
    assert plain != biased
    forced = client.completions.create(**asked, extra_body={"forced_tokens": [70, 71]})
    assert forced.choices[0].logprobs.tokens[:2] == ["C", "D"]


def test_echo_gives_the_log_probabilities_of_a_prompt_as_lm_eval_reads_them(client):
    prompt = [60, 61, 62, 70]
    answer = client.completions.create(
        model="gpt", prompt=[prompt], max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    lengths = {len(getattr(logprobs, name)) for name in type(logprobs).model_fields}
    assert lengths == {len(prompt) + 1}
    assert logprobs.token_logprobs[0] is None
    logits = LOGITS(GPT, random_params(GPT), {"decoder_input_tokens": np.array([prompt])})[0]
    expected = np.asarray(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    own = [expected[i, token] for i, token in enumerate(prompt[1:])]
    np.testing.assert_allclose(logprobs.token_logprobs[1:4], own, atol=2e-5)
    for i, top in enumerate(logprobs.top_logprobs[1:]):
        assert max(top.values()) == pytest.approx(expected[i].max(), abs=2e-5)
    assert answer.choices[0].text.startswith("9:;C")


def test_embeddings_as_numbers_and_as_the_client_asks_for_them(client, url, models):
    texts = ["a", "bcd", "e"]
    found = client.embeddings.create(model="t5", input=texts)  # In base64.
    vectors = np.array([item.embedding for item in found.data])
    np.testing.assert_allclose(vectors, models[0].pretrained.embed(texts), atol=1e-5)
    assert found.usage.prompt_tokens == 8
    ids = [[100, 1], [101, 102, 103, 1], [104, 1]]  # As they are, with eos.
    of_ids = client.embeddings.create(model="t5", input=ids)
    assert [item.embedding for item in of_ids.data] == [item.embedding for item in found.data]
    plain = ask(url, "/v1/embeddings", model="t5", input="a", encoding_format="float").json()
    np.testing.assert_allclose(plain["data"][0]["embedding"], vectors[0], atol=1e-5)
    coded = ask(url, "/v1/embeddings", model="t5", input="a", encoding_format="base64").json()
    data = base64.b64decode(coded["data"][0]["embedding"])
    np.testing.assert_allclose(np.frombuffer(data, "<f4"), vectors[0], atol=1e-5)


def test_the_tokenizer_over_http(url):
    assert ask(url, "/tokenize", prompt="ab").json()["tokens"] == [100, 101, 1]
    bare = ask(url, "/tokenize", prompt="ab", add_special_tokens=False).json()
    assert (bare["tokens"], bare["count"]) == ([100, 101], 2)
    assert ask(url, "/detokenize", tokens=[100, 101, 1]).json() == {"prompt": "ab</s>"}
    info = get(f"{url}/tokenizer_info").json()
    assert (info["eos_token"], info["chat_template"]) == ("</s>", None)


# --- What is refused ----------------------------------------------------------------------------

WRONG = {
    "no prompt": {"prompt": ...},
    "a number for a prompt": {"prompt": 3},
    "an empty list": {"prompt": []},
    "a mixed list": {"prompt": ["a", 3]},
    "half a character": {"prompt": "\ud800"},
    "an id without an embedding": {"prompt": [999]},
    "a negative id": {"prompt": [-1]},
    "a prompt that is too long": {"prompt": "a" * 100},
    "an answer that is too long": {"max_tokens": 99},
    "no tokens": {"max_tokens": 0},
    "a text for a number": {"max_tokens": "3"},
    "true for a number": {"temperature": True},
    "a negative temperature": {"temperature": -1},
    "infinity": {"temperature": float("inf")},
    "not a number": {"top_p": float("nan")},
    "no probability": {"top_p": 0},
    "an unknown option": {"max_token": 3},
    "a penalty out of range": {"presence_penalty": 2.5},
    "a bias of no id": {"logit_bias": {"the": 1}},
    "a bias of an id that there is not": {"logit_bias": {"999": 1}},
    "a forced id that there is not": {"forced_tokens": [999]},
    "beams that are drawn": {"num_beams": 2, "temperature": 1},
    "beams with log-probabilities": {"num_beams": 2, "logprobs": 1},
    "more answers than beams": {"num_beams": 2, "n": 3},
    "the best of beams": {"num_beams": 3, "best_of": 3, "n": 2},
    "an answer that is too short": {"min_tokens": 5, "max_tokens": 4},
    "equal answers": {"n": 2, "temperature": 0},
    "more than the best": {"n": 3, "best_of": 2},
    "a stream of the best": {"best_of": 2, "stream": True},
    "options of no stream": {"stream_options": {"include_usage": True}},
    "an empty stop text": {"stop": ""},
    "too many alternatives": {"logprobs": 21},
    "a prompt of an encoder echoed": {"echo": True, "logprobs": 1},
    "too many at once": {"prompt": ["a"] * 100},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_body_is_answered_with_what_is_wrong(url, change):
    body = {"model": "t5", "prompt": "abc", "max_tokens": 4} | change
    body = {name: value for name, value in body.items() if value is not ...}
    answer = post(f"{url}/v1/completions", content=json.dumps(body), headers=JSON)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 10
    assert "Traceback" not in error["message"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt: List should have at least 1 item after validation, not 0"),
        ({"prompt": [[]]}, "prompt.0: List should have at least 1 item after validation, not 0"),
        ({"stop": 5}, "stop: Input should be a valid string, or Input should be a valid list"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x: String should match pattern '^[0-9]{1,9}$'"),
        ({"temperature": "1"}, "temperature: Input should be a valid number"),
    ],
)
def test_what_is_wrong_is_said_in_the_words_of_the_interface(url, change, message):
    body = {"model": "t5", "prompt": "abc", "max_tokens": 4} | change
    assert ask(url, "/v1/completions", **body).json()["error"]["message"] == message


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("path", "content", "headers", "status"),
    [
        ("/v1/completions", b"{", JSON, 400),
        ("/v1/completions", b"[1]", JSON, 400),
        ("/v1/completions", b"\xff\xfe", JSON, 400),
        ("/v1/completions", b"null", JSON, 400),
        ("/v1/completions", b'{"model": "t5", "prompt": "a"}', {}, 400),
        ("/v1/completions", b" " * 30_000, JSON, 413),
        ("/v1/completions", b'{"model": "nope", "prompt": "a"}', JSON, 404),
        ("/v1/nothing", b"{}", JSON, 404),
        ("/v1/models", b"{}", JSON, 405),
        ("/v1/embeddings", b'{"model": "gpt", "input": "a"}', JSON, 400),
        ("/v1/embeddings", b'{"model": "t5", "input": []}', JSON, 400),
        ("/v1/embeddings", b'{"model": "t5", "input": "a", "pooling": "pooler"}', JSON, 400),
        ("/v1/chat/completions", b'{"model": "t5", "messages": []}', JSON, 400),
        (
            "/v1/chat/completions",
            b'{"model": "gpt", "messages": [{"role": "user", "content": "a"}]}',
            JSON,
            400,
        ),
        (
            "/v1/chat/completions",
            b'{"model": "t5", "messages": [{"role": "tool", "content": "a"}]}',
            JSON,
            400,
        ),
    ],
)
def test_errors_have_openais_form(url, path, content, headers, status):
    answer = post(url + path, content=content, headers=headers)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_mutated_bodies_are_answered_or_refused(url):
    """At the end of all tests here, no slot is taken."""
    found = bodies.attack(url, 120, seed=1)
    assert found[200] > 5
    assert found[400] > 50


def test_a_fault_of_ours_has_openais_form(url, models, monkeypatch):
    def fail(*args):
        raise KeyError("a fault")

    monkeypatch.setattr(type(models[0]), "prompt", fail)
    answer = ask(url, model="t5", prompt="abc")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "a fault" not in answer.text


def test_a_chat_template_sees_names(models, monkeypatch):
    served = models[0]
    template = "{% for m in messages %}{{ m.name or 'nobody' }}: {{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(served.tokenizer, "chat_template", template)
    monkeypatch.delitem(served.__dict__, "_template", raising=False)
    try:
        names = [Message(role="user", content="hi", name=name) for name in ("Ada", None)]
        text = served.tokenizer.decode(served.chat_prompt(names))
        assert text == "Ada: hi\nnobody: hi\n"  # And no eos: the template writes none.
        assert served.chat_prompt(names)[-1] != served.tokenizer.eos_id
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            served.chat_prompt([Message(role="user", content="hi", name="\ud800")])
    finally:
        served.__dict__.pop("_template", None)


def test_parts_of_a_body_that_never_ends_are_not_kept(url):
    def parts():
        while True:
            yield b" " * 1000

    with httpx.stream(
        "POST", f"{url}/v1/completions", content=parts(), headers=JSON, timeout=60
    ) as answer:
        assert answer.status_code == 413


# --- Clients that leave, and full queues ----------------------------------------------------------


def slow_request(url, path="/v1/completions", **changes):
    """Begins a request of many answers on a socket of its own."""
    body = {"model": "t5", "prompt": ["abc"] * 8, "max_tokens": 30, "min_tokens": 30} | changes
    body = {name: value for name, value in body.items() if value is not ...}
    content = json.dumps(body).encode()
    connection = socket.create_connection((httpx.URL(url).host, httpx.URL(url).port))
    connection.sendall(
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" % path.encode()
        + b"Content-Length: %d\r\n\r\n" % len(content)
        + content
    )
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(url, models, stream, monkeypatch):
    engine, gone = models[0].engine, threading.Event()
    before = engine.counters.finished["cancelled"]
    decode = type(engine.programs).decode

    def decode_when_given_up(*args, **options):
        running = [answer for answer in engine._in_slots if answer]
        wait_for(lambda: gone.is_set() and all(answer.gave_up for answer in running))
        return decode(*args, **options)

    monkeypatch.setattr(type(engine.programs), "decode", decode_when_given_up)
    connection = slow_request(url, stream=stream)
    wait_for(lambda: engine.num_running == 4)
    connection.close()
    gone.set()
    wait_for(lambda: not engine.num_running + engine.num_waiting)
    wait_for(lambda: engine.counters.finished["cancelled"] > before)


def test_what_a_client_that_went_away_asked_for_leaves_the_queue(url, models):
    served, go_on = models[0], threading.Event()
    served.submit(go_on.wait, [()])
    try:
        for path, body in {
            "/v1/completions": {"num_beams": 2, "prompt": ["abc"] * 3},
            "/v1/embeddings": {"prompt": ..., "max_tokens": ..., "min_tokens": ..., "input": "a"},
        }.items():
            connection = slow_request(url, path, **body)
            wait_for(lambda: served._queued > 1)
            connection.close()
            wait_for(lambda: served._queued == 1)
        with pytest.raises(ApiError, match="1 requests wait") as error:
            served.submit(print, [()] * 8)  # All of them or none.
        assert error.value.status == 429
        with pytest.raises(ValueError, match="9 prompts are to be read at once"):
            served.submit(print, [()] * 9)
    finally:
        go_on.set()
    wait_for(lambda: served._queued == 0)


def test_a_full_queue_says_when_to_come_again_and_others_are_not_disturbed(url, models):
    alone = ask(url, model="t5", prompt="abc", max_tokens=8).json()["choices"]
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        asked = [pool.submit(ask, url, model="t5", prompt="abc", max_tokens=8) for _ in range(60)]
        answers = [future.result() for future in asked]
    assert {answer.status_code for answer in answers} <= {200, 429}
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["choices"] == alone
        else:
            assert int(answer.headers["Retry-After"]) >= 1


def test_what_takes_too_long_is_given_up(models, url, monkeypatch):
    monkeypatch.setattr("t5jax.serving.generation._deadline", lambda server: time.monotonic())
    assert ask(url, model="t5", prompt="abc").status_code == 504


# --- Operation ------------------------------------------------------------------------------------


def test_health_readiness_and_figures(url, models):
    assert get(f"{url}/health").status_code == get(f"{url}/ready").status_code == 200
    ask(url, model="t5", prompt="abc", max_tokens=2)
    wait_for(lambda: not models[0].engine.num_running)
    text = get(f"{url}/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
    assert float(figures['t5jax_slots{model="t5"}']) == 4
    assert float(figures['t5jax_running{model="t5"}']) == 0
    assert float(figures['t5jax_written_tokens_total{model="t5"}']) > 0
    path = 't5jax_http_requests_total{path="/v1/completions",status="200"}'
    assert float(figures[path]) > 0


def test_the_interface_describes_itself(url):
    description = get(f"{url}/openapi.json").json()
    paths = {"/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models"}
    assert paths <= set(description["paths"])
    body = description["components"]["schemas"]["CompletionBody"]
    assert body["properties"]["model"]["enum"] == ["t5", "gpt"]


@pytest.mark.parametrize("name", ["", "page/page.js", "page/page.css"])
def test_the_page_loads_nothing_from_elsewhere(url, name):
    answer = get(f"{url}/{name}")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "http://" not in answer.text.replace("http://www.w3.org", "")
    assert "https://" not in answer.text
    assert get(f"{url}/page/../server.py").status_code == 404


@pytest.mark.skipif(browser.find_browser() is None, reason="there is no Chromium")
def test_the_page_writes_an_answer_in_a_browser(url, client, tmp_path):
    asked = {"model": "t5", "prompt": "abc", "max_tokens": 9, "logprobs": 5}
    expected = client.completions.create(**asked, temperature=0).choices[0]
    with browser.page(browser.find_browser(), tmp_path) as page:
        page.call("Page.navigate", url=url)
        page.wait_for("document.getElementById('about')?.textContent.startsWith('2 models')")
        page.value("document.getElementById('max_tokens').value = 9")
        page.value("document.getElementById('prompt').focus()")
        page.call("Input.insertText", text="abc")
        page.press("Enter", modifiers=2)
        speed = page.wait_for(
            "/tokens in/.test(document.getElementById('speed').textContent)"
            " && document.getElementById('speed').textContent"
        )
        assert speed.startswith(f"{len(expected.logprobs.tokens)} tokens in")
        assert page.value("document.getElementById('answer').textContent") == expected.text
        page.value("document.getElementById('tokens').focus()")
        page.press("ArrowRight")
        caption = page.value("document.querySelector('#alternatives caption').textContent")
        assert caption.startswith("Token 2 of")
        # The five most probable ones.
        assert page.value("document.querySelectorAll('#alternatives tbody tr').length") == 5
        assert not page.complaints
        assert all(asked.startswith((url, "data:")) for asked in page.requests)
        assert f"{url}/v1/completions" in page.requests


def transport(models, **options):
    from t5jax.serving.state import ServerOptions

    app = make_app(models, ServerOptions(**options))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost"), app


def test_a_key_is_needed_where_there_are_keys(models, url, caplog):
    caplog.set_level(logging.DEBUG)

    async def run():
        client, _ = transport(models, api_keys=("another-key-of-letters", KEY))
        statuses = {}
        for name, headers in {
            "none": {},
            "wrong": {"Authorization": f"Bearer {KEY}x"},
            "another scheme": {"Authorization": f"Basic {KEY}"},
            "right": {"Authorization": f"Bearer {KEY}"},
        }.items():
            answer = await client.get("/v1/models", headers=headers)
            statuses[name] = answer.status_code
        for path in ("/metrics", "/openapi.json"):
            assert (await client.get(path)).status_code == 401
        for path in ("/", "/health", "/ready", "/page/page.js"):
            assert (await client.get(path)).status_code == 200
        return statuses

    import asyncio

    statuses = asyncio.run(run())
    assert statuses == {"none": 401, "wrong": 401, "another scheme": 401, "right": 200}
    assert KEY not in caplog.text


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "[::1]"])
def test_this_machine_needs_no_key(url, host):
    assert get(f"{url}/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "10.0.0.1"])
def test_a_site_whose_name_leads_here_is_refused(url, host):
    assert get(f"{url}/v1/models", headers={"Host": host}).status_code == 403


def test_while_it_stops_new_requests_are_refused(models, url):
    async def run():
        client, app = transport(models)
        app.state.server.stopping = True
        ready, asked = await client.get("/ready"), await client.get("/v1/models")
        health = await client.get("/health")
        return ready, asked, health

    import asyncio

    ready, asked, health = asyncio.run(run())
    assert (ready.status_code, asked.status_code, health.status_code) == (503, 503, 200)
    assert asked.headers["Retry-After"]


def test_more_requests_than_are_answered_at_a_time(models, url):
    async def run():
        client, _ = transport(models, max_concurrent=0)
        return await client.get("/v1/models")

    import asyncio

    assert asyncio.run(run()).status_code == 429


def test_prompts_and_answers_are_not_logged(url, caplog):
    caplog.set_level(logging.DEBUG)
    answer = ask(url, model="t5", prompt="xyzzy", max_tokens=8)
    assert answer.status_code == 200
    assert ask(url, model="t5", prompt="xyzzy" * 50).status_code == 400
    assert "xyzzy" not in caplog.text


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", ["t5", "gpt"])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_is_json_of_a_schema_beside_others_that_are_free(client, name, temperature):
    asked = {"model": name, "prompt": "abc", "max_tokens": 14, "temperature": temperature}
    free = client.completions.create(model=name, prompt="abc", max_tokens=14)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        forms = pool.submit(
            client.completions.create, **asked, extra_body={"response_format": form}
        )
        beside = pool.submit(client.completions.create, model=name, prompt="abc", max_tokens=14)
        choice = forms.result().choices[0]
        assert beside.result().choices == free.choices
    if choice.finish_reason == "stop":
        assert 0 <= json.loads(choice.text)["n"] <= 99
    else:  # A model of random weights may write spaces without end.
        assert choice.text.startswith("{")


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}},
        {"type": "json_schema", "json_schema": {"schema": {"required": "é" * 50}}},
        {"type": "json_object", "json_schema": {"schema": {}}},
        {"type": "xml"},
    ],
)
def test_a_wrong_response_format(url, form):
    answer = ask(url, model="t5", prompt="abc", response_format=form)
    assert answer.status_code == 400
    assert len(answer.json()["error"]["message"]) > 10
