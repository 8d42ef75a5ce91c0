"""Small models behind engines and live servers."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

import jax
import uvicorn

from conformance.cases import random_params
from conformance.families import GPT2, change
from conformance.families import T5 as SMALL
from t5jax import sharding
from t5jax.config import AxisRules
from t5jax.models import api
from t5jax.pretrained import Pretrained
from t5jax.serving.app import make_app
from t5jax.serving.engine import Engine
from t5jax.serving.requests import Piece, Request
from t5jax.serving.served import ServedModel
from t5jax.serving.sizes import EngineOptions
from t5jax.serving.state import ServerOptions
from t5jax.tokenizers import ByteTokenizer

# One layer each, and one length of prompts: what is compiled is most of a test's time.
T5 = change(SMALL, vocab_size=384, num_encoder_layers=1, num_decoder_layers=1, scan_layers=False)
GPT = change(GPT2, vocab_size=384, num_layers=1, eos_token_id=1, scan_layers=False)
_COMPILING = 600  # Seconds, on a machine that has much else to do.
SIZES = EngineOptions(slots=4, max_length=32, max_source_length=16, max_waiting=8)


def pretrained(model, mesh=None) -> Pretrained:
    """Returns a model with random parameters, by default on one device."""
    params = random_params(model)
    rules = AxisRules()
    if mesh is not None:
        axes = api.param_axes(model), api.param_shapes(model)
        rules = sharding.divisible_rules(*axes, mesh, rules)
        params = jax.device_put(params, sharding.param_shardings(*axes, mesh, rules))
    if model.kind != "encoder":
        params = api.arrange_for_decoding(model, params)
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    return Pretrained(model, params, ByteTokenizer(), mesh, rules)


def wait_for(condition, seconds=60.0) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


# --- Engines ------------------------------------------------------------------------------------


@contextlib.contextmanager
def engine_of(model, mesh=None, **sizes) -> Iterator[Engine]:
    """Yields an engine that has compiled its programs, by default on one device."""
    found = pretrained(model, mesh)
    options = dataclasses.replace(SIZES, **sizes)
    engine = Engine(
        *(model, found.params, found.tokenizer, found.mesh, found.rules), options=options
    )
    engine.start()
    wait_for(lambda: engine.programs.is_complete.is_set() or engine.failure, _COMPILING)
    yield engine
    assert engine.stop(60), "it did not stop"
    engine.programs._pool.shutdown()
    assert engine.failure is None
    assert engine.num_running == engine.num_waiting == 0


class Listener:
    """Collects the pieces of an answer."""

    def __init__(self, engine: Engine, request: Request):
        self.pieces: list[Piece] = []
        self.done = threading.Event()
        (self.answer,) = engine.submit([request], [self._listen])

    def _listen(self, piece: Piece) -> None:
        assert not self.done.is_set(), "a piece after the last one"
        self.pieces.append(piece)
        if piece.finish_reason:
            self.done.set()

    def result(self):
        """Returns the ids, the log-probabilities, the text and why the answer ended."""
        assert self.done.wait(60)
        tokens = [token for piece in self.pieces for token in piece.tokens]
        text = "".join(piece.text for piece in self.pieces)
        ids = [token.id for token in tokens]
        return ids, [t.logprob for t in tokens], text, self.pieces[-1].finish_reason


# --- Servers ------------------------------------------------------------------------------------


def served(name, model, **sizes) -> ServedModel:
    """Returns a model that is served when an app with it starts."""
    return ServedModel(name, pretrained(model), dataclasses.replace(SIZES, **sizes))


@contextlib.contextmanager
def running(*models: ServedModel, **options) -> Iterator[str]:
    """Runs a server in a thread; yields its URL once it is ready."""
    app = make_app(models, ServerOptions(**options))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        wait_for(lambda: all(model.is_ready for model in models), _COMPILING)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        for model in models:
            # What was being compiled would count as what the next test compiles.
            model._worker.shutdown()
            if model.engine is not None:
                model.engine.programs._pool.shutdown()
