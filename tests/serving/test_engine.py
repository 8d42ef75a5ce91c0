"""Continuous batching: an answer does not depend on those beside it, and no slot is lost."""

import dataclasses
import threading
import time

import jax
import numpy as np
import pytest

from conformance.cases import LOGITS, random_params
from serving import live
from serving.live import GPT, T5, Listener, engine_of, wait_for
from t5jax import sharding
from t5jax.config import MeshConfig
from t5jax.decoding import GenerationOptions
from t5jax.serving.programs import Programs
from t5jax.serving.requests import QueueFull, Request, Stopping

MODELS = {"encoder_decoder": T5, "decoder": GPT}
DRAW = GenerationOptions(temperature=1.0, top_k=30, top_p=0.9, seed=7)
REPEAT = GenerationOptions(repetition_penalty=1.3, no_repeat_ngram_size=2)


@pytest.fixture(scope="module", params=MODELS)
def engine(request):
    # Rows are stepped in several shapes for one of them; each is compiled.
    with engine_of(MODELS[request.param], batch_invariant=request.param != "decoder") as engine:
        yield engine


def requests(max_tokens=12):
    rng = np.random.default_rng(0)
    options = (GenerationOptions(), DRAW, REPEAT)
    return [
        Request(tuple(rng.integers(3, 200, n).tolist()), max_tokens, options[i % 3], stream=(0, i))
        for i, n in enumerate((3, 16, 9, 1, 12, 5, 7))
    ]


def test_alone_in_company_and_joining_give_the_same(engine):
    alone = [Listener(engine, request).result() for request in requests()]
    together = [listener.result() for listener in [Listener(engine, r) for r in requests()]]
    joining = []
    for request in requests():
        joining.append(Listener(engine, request))
        wait_for(lambda: joining[-1].answer.num_tokens)
    joining = [listener.result() for listener in joining]
    assert len({tuple(ids) for ids, *_ in alone}) > 4, "all alike would prove little"
    for one, *others in zip(alone, together, joining, strict=True):
        for other in others:
            assert (one[0], one[2:]) == (other[0], other[2:])
            np.testing.assert_allclose(one[1], other[1], atol=2e-5)
    wait_for(lambda: not engine.num_running + engine.num_waiting)


def test_greedy_tokens_and_log_probabilities_are_those_of_the_whole_sequence(engine):
    model, params = engine.model, random_params(engine.model)
    request = requests()[0]
    ids, logprobs, _, reason = Listener(engine, request).result()
    assert reason == ("stop" if ids[-1] == 1 else "length")
    read = [0, *ids[:-1]] if model is T5 else [*request.prompt, *ids[:-1]]
    batch = {"decoder_input_tokens": np.array([read], np.int32)}
    if model is T5:
        batch["encoder_input_tokens"] = np.array([request.prompt], np.int32)
    logits = LOGITS(model, params, batch)[0, -len(ids) :]
    assert ids == logits.argmax(-1).tolist()
    expected = jax.nn.log_softmax(logits)[np.arange(len(ids)), np.array(ids)]
    np.testing.assert_allclose(logprobs, expected, atol=2e-5)


def test_the_bits_of_an_answer_do_not_depend_on_company():
    with engine_of(GPT, batch_invariant=True) as engine:
        alone = [Listener(engine, request).result() for request in requests()]
        together = [listener.result() for listener in [Listener(engine, r) for r in requests()]]
    assert alone == together


def test_where_bits_count_the_first_request_waits_for_every_program(monkeypatch):
    """Otherwise a prompt would be padded by what is compiled when it comes."""
    compile_prompts = Programs._compile_prompts

    def slowly(self, key):
        if key[0] < self.prompt_lengths[-1]:
            time.sleep(0.5)
        compile_prompts(self, key)

    monkeypatch.setattr(Programs, "_compile_prompts", slowly)
    found = live.pretrained(T5)
    options = dataclasses.replace(live.SIZES, batch_invariant=True, max_source_length=64)
    engine = live.Engine(T5, found.params, found.tokenizer, found.mesh, options=options)
    programs = engine.programs
    assert len(programs.prompt_lengths) > 1
    assert programs.compile()
    assert {length for length, _ in filter(_is_pair, programs._compiled)} == {
        *programs.prompt_lengths
    }


def _is_pair(key):
    return type(key) is tuple


def test_nothing_is_compiled_after_the_start(engine):
    compiled = []

    def listen(name, *_, **__):
        is_its = threading.current_thread() is engine._thread
        if is_its and name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    rng = np.random.default_rng(1)
    for _ in range(3):
        listeners = [
            Listener(
                engine,
                Request(
                    tuple(rng.integers(3, 200, rng.integers(1, 17)).tolist()),
                    int(rng.integers(1, 16)),
                    dataclasses.replace(
                        (DRAW, REPEAT, GenerationOptions(suppressed_tokens=(9,)))[rng.integers(3)],
                        logprobs=int(rng.integers(3)) or None,
                    ),
                    streaming=bool(rng.integers(2)),
                ),
            )
            for _ in range(int(rng.integers(1, 9)))
        ]
        for listener in listeners:
            listener.result()
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_several_answers_to_a_prompt_differ_and_a_seed_repeats_them(engine):
    prompt = (9, 10, 11)
    first, second = (
        [Listener(engine, Request(prompt, 8, DRAW, stream=(0, i))).result()[0] for i in (0, 1)]
        for _ in range(2)
    )
    assert first == second
    assert first[0] != first[1]


def test_the_most_probable_tokens_are_reported(engine):
    listener = Listener(engine, Request((5, 6, 7), 3, GenerationOptions(logprobs=4)))
    listener.result()
    for token in (token for piece in listener.pieces for token in piece.tokens):
        ids, logprobs = zip(*token.top, strict=True)
        assert len(ids) == 4
        assert token.id == ids[0]
        assert list(logprobs) == sorted(logprobs, reverse=True)
        assert logprobs[0] == pytest.approx(token.logprob, abs=1e-5)


def test_a_stop_text_ends_an_answer_before_it(engine):
    # Letters alone, so that every token has a text.
    letters = tuple(range(100, 126))
    options = GenerationOptions(temperature=5.0, seed=1)
    for seed in range(50):
        options = GenerationOptions(temperature=5.0, seed=seed)
        _, _, whole, _ = Listener(engine, Request(letters[:5], 16, options)).result()
        if len(whole) >= 4:
            break
    stop = whole[2:4]
    options = GenerationOptions(temperature=5.0, seed=seed, stop=("nowhere", stop))
    listener = Listener(engine, Request(letters[:5], 16, options))
    _, _, text, reason = listener.result()
    assert (text, reason) == (whole[: whole.index(stop)], "stop")
    # Nothing of it was sent too early.
    assert all(stop[0] not in piece.text or text.count(stop[0]) for piece in listener.pieces)


def test_who_gives_up_frees_the_slot_and_disturbs_nobody(engine):
    long = Request((8, 9), 15, GenerationOptions(min_tokens=15), streaming=True)
    expected = Listener(engine, long).result()
    listeners = [Listener(engine, long) for _ in range(9)]
    for listener in listeners[::2]:
        listener.answer.cancel()
    results = [listener.result() for listener in listeners]
    assert all(result[0] == expected[0] for result in results[1::2])
    assert {result[3] for result in results[::2]} <= {"cancelled", "length"}
    wait_for(lambda: not engine.num_running)


def test_a_deadline_ends_an_answer(engine):
    request = Request((8, 9), 15, deadline=time.monotonic() - 1)
    assert Listener(engine, request).result()[2:] == ("", "timeout")


def test_too_many_are_refused_all_or_none(engine):
    request = Request((8, 9), 15)
    room = engine.size.rows + engine.options.max_waiting
    before = engine.counters.requests
    with pytest.raises(ValueError, match="fewer at a time"):
        engine.submit([request] * (room + 1), [print] * (room + 1))
    assert engine.counters.requests == before
    listeners = []

    def ask_often():
        for _ in range(10_000):  # Meanwhile it answers some.
            listeners.append(Listener(engine, request))

    with pytest.raises(QueueFull):
        ask_often()
    assert engine.counters.requests == before + len(listeners)
    for listener in listeners:
        listener.result()
    for wrong in (Request((8,) * 40, 1), Request((8,), 99), Request((8,), 0), Request((999,), 1)):
        with pytest.raises(ValueError, match="prompt|max_tokens"):
            Listener(engine, wrong)


def test_stopping_finishes_what_has_begun():
    with engine_of(GPT) as engine:
        listeners = [Listener(engine, Request((8, 9), 15)) for _ in range(8)]
        assert engine.stop(60)
        assert all(listener.result()[3] in ("length", "stop") for listener in listeners)
        with pytest.raises(Stopping):
            Listener(engine, Request((8, 9), 15))


def test_a_listener_that_fails_stops_only_its_own_answer(engine):
    def fail(piece):
        raise RuntimeError("mine")

    (answer,) = engine.submit([Request((8, 9), 15)], [fail])
    Listener(engine, Request((8, 9), 15)).result()
    wait_for(lambda: answer.finished)
    assert engine.is_alive


def test_an_encoder_writes_nothing():
    with pytest.raises(ValueError, match="encoder"), engine_of(T5.encoder_alone()):
        pass


def test_memory_decides_how_many_slots_there_are(monkeypatch):
    found = live.pretrained(GPT)

    def slots_with(free, slots=None):
        monkeypatch.setattr("t5jax.serving.sizes.free_memory", lambda mesh: (free, 32))
        options = live.EngineOptions(slots=slots, max_length=32)
        return live.Engine(GPT, found.params, found.tokenizer, found.mesh, options=options)

    one = slots_with(10**9).bytes_per_slot
    # Keys and values of 32 tokens are most of it.
    assert one > 2 * 32 * GPT.num_kv_heads * GPT.head_dim * 4
    assert slots_with(10**9).size.rows == 32
    assert slots_with(10 * one).size.rows == 6
    with pytest.raises(ValueError, match="max_length"):
        slots_with(one / 2)
    assert slots_with(10 * one, slots=20).size.rows == 20
    with pytest.raises(ValueError, match=r"no memory for 21 slots, .* set fewer slots"):
        slots_with(10 * one, slots=21)


def test_what_prompts_share_is_read_once_and_changes_nothing():
    rng = np.random.default_rng(5)
    begin = tuple(rng.integers(3, 200, 20).tolist())
    turns = [begin, (*begin, 7), (*begin[:18], 9, 8)]
    with engine_of(GPT) as engine:
        found, shared = [], []
        for turn in turns:
            found.append(Listener(engine, Request(turn, 6)).result())
            shared.append(engine.counters.shared_tokens)
        # The next turn of a conversation, while another answer is being written.
        answer = found[0][0]
        other = Listener(engine, Request((5, 6), 15, GenerationOptions(min_tokens=15)))
        following = Request((*begin, *answer, 4), 4)
        found.append(Listener(engine, following).result())
        other.result()
        assert shared == [0, 20, 38]
        assert engine.counters.shared_tokens > 38 + 20
    with engine_of(GPT, batch_invariant=True) as engine:
        alone = [Listener(engine, Request(turn, 6)).result() for turn in turns]
        alone.append(Listener(engine, following).result())
        assert engine.counters.shared_tokens == 0
    for one, other in zip(alone, found, strict=True):
        assert (one[0], one[2:]) == (other[0], other[2:])
        np.testing.assert_allclose(one[1], other[1], atol=2e-5)


def test_tokens_that_are_suppressed_are_not_written_and_others_are_not_disturbed(engine):
    request = Request((5, 6, 7), 6)
    plain = Listener(engine, request).result()
    options = GenerationOptions(suppressed_tokens=tuple(set(plain[0])))
    limited = Request((5, 6, 7), 6, options)
    listeners = [Listener(engine, r) for r in (request, limited, request)]
    results = [listener.result() for listener in listeners]
    assert results[0][0] == results[2][0] == plain[0]
    assert not set(results[1][0]) & set(plain[0])


def test_presence_biases_and_forced_tokens_change_their_own_answer_alone(engine):
    plain = Listener(engine, Request((5, 6, 7), 8)).result()
    first = plain[0][0]
    asked = {
        "bias": GenerationOptions(logit_bias=((first, -100.0),)),
        "frequency": GenerationOptions(frequency_penalty=50.0),
        "presence": GenerationOptions(presence_penalty=50.0),
        "forced": GenerationOptions(forced_tokens=(40, 41)),
        "none": GenerationOptions(),
    }
    listeners = {n: Listener(engine, Request((5, 6, 7), 8, o)) for n, o in asked.items()}
    ids = {name: listener.result()[0] for name, listener in listeners.items()}
    assert ids["none"] == plain[0]
    assert first not in ids["bias"]
    assert ids["forced"][:2] == [40, 41]
    for name in ("frequency", "presence"):  # What was read does not count.
        assert ids[name][0] == first
        assert len(set(ids[name])) == len(ids[name])


@pytest.mark.parametrize("kind", MODELS)
def test_several_devices_write_what_one_writes(kind):
    """And a decoder shares there what prompts begin with."""
    model, is_decoder = MODELS[kind], kind == "decoder"
    begin = tuple(range(30, 50))
    turns = [Request((*begin, *more), 5) for more in ((), (7,), (8, 9))] if is_decoder else []
    with engine_of(model, batch_invariant=True) as engine:
        alone = [Listener(engine, request).result() for request in (*requests()[:4], *turns)]
    mesh = sharding.make_mesh(MeshConfig(data=4, model=2))
    with engine_of(model, mesh=mesh, batch_invariant=not is_decoder) as engine:
        kinds = {len(x.sharding.device_set) for x in jax.tree.leaves(engine.programs._slots.cache)}
        assert kinds == {8}
        listeners = [Listener(engine, request) for request in requests()[:4]]
        together = [listener.result() for listener in listeners]
        together += [Listener(engine, request).result() for request in turns]
        assert engine.counters.shared_tokens == (40 if is_decoder else 0)
    for one, other in zip(alone, together, strict=True):
        assert (one[0], one[2:]) == (other[0], other[2:])
        np.testing.assert_allclose(one[1], other[1], atol=2e-5)


def test_when_the_engine_fails_nobody_waits_for_ever(monkeypatch):
    found = live.pretrained(T5)
    engine = live.Engine(T5, found.params, found.tokenizer, found.mesh, options=live.SIZES)

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.programs, "compile", lambda: True)
    monkeypatch.setattr(engine.programs, "reading", lambda n: (16, 4))
    monkeypatch.setattr(engine.programs, "insert", fail)
    listeners = [Listener(engine, Request((8, 9), 15)) for _ in range(6)]
    engine.start()
    assert {listener.result()[3] for listener in listeners} == {"error"}
    with pytest.raises(Stopping):
        Listener(engine, Request((8, 9), 15))


def test_what_idle_rows_write_over_is_not_shared():
    found = live.pretrained(GPT)
    engine = live.Engine(GPT, found.params, found.tokenizer, found.mesh, options=live.SIZES)
    prompt, written = tuple(range(30, 50)), list(range(60, 67))
    (answer,) = engine.submit([Request(prompt, 7)], [print])
    engine._in_slots[0], answer.slot, answer.finished = answer, 0, "length"
    engine._held.put(0, prompt, 0)
    engine._held.extend(0, written)
    engine._free(answer)
    # All of its 26 places were in use; other rows went on, so that the last one was written over.
    assert engine._held.longest_shared((*prompt, *written, 9, 9), 0) == (0, 24)
