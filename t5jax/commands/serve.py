"""`t5jax serve`: OpenAI's interface to models."""

import collections
import dataclasses
import itertools
import math
import socket
import sys
import time
from pathlib import Path
from typing import Literal

from t5jax import storage
from t5jax.commands.parse import check_options, parse, take_models
from t5jax.config import MeshConfig


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serves models over HTTP, with OpenAI's interface and a page to try them.

    Without a key it only listens on this machine. SIGTERM finishes what has been begun.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all, which needs --api-key-file."""
    port: int = 8000
    """Port to listen on; 0 for any that is free."""
    api_key_file: Path | None = None
    """File of API keys, one a line, one of which every request must have."""
    slots: int | None = None
    """Answers that are written at a time. None: as many as fit into free memory, at most 128, on a
    CPU 32."""
    max_length: int = 1024
    """Maximum length of prompt and answer of a decoder in tokens; of a model with an encoder, of
    the answer."""
    max_source_length: int = 1024
    """Maximum length of an encoder's input in tokens."""
    max_waiting: int = 256
    """Answers that may wait for a slot; more get status 429."""
    max_body_bytes: int = 4 * 2**20
    """Maximum size of a request."""
    max_concurrent: int = 512
    """Maximum number of requests at a time; more get status 429."""
    max_seconds: float = 600.0
    """Maximum time for a request."""
    drain_seconds: float = 60.0
    """How long requests may take to finish after SIGTERM."""
    batch_invariant: bool = False
    """The bits of an answer do not depend on what else is being written; slower."""
    base: str = ""
    """Of an adapter: where its base is now. Empty: where the adapter says."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of computation and parameters. None: as in training."""
    kv_cache: Literal["int8"] | None = None
    """int8: keep keys and values in a quarter of the memory. None: as the model says."""
    mesh: MeshConfig = MeshConfig()
    """Devices to use."""


_USAGE = """\
usage: t5jax serve MODEL [MODEL ...] [--adapter NAME=PATH ...] [OPTIONS]

MODEL is a hub name, a Hugging Face folder, a run, or a checkpoint, optionally with a name for
requests: NAME=MODEL, or --model NAME=MODEL. Without one it is the hub name, or the folder's.
--adapter serves adapters over one MODEL, each under its name: runs, or PEFT's folders.
"""


def serve(args: list[str]) -> None:
    adapters, args = _adapters(args)
    models, rest = _models(args)
    if any(word in ("-h", "--help") for word in rest):
        print(_USAGE)
    options = parse(Serve, rest, prog="t5jax serve")
    _check(options)
    if not models:
        raise ValueError("there is no model; give one or more: t5jax serve MODEL")
    if adapters and len(models) > 1:
        raise ValueError(
            f"--adapter is over one model, and there are {len(models)}: {', '.join(models)}; give "
            "one, or start a server for each"
        )
    if options.base and len(models) > 1:
        raise ValueError(
            f"--base {options.base} is of one adapter, and there are {len(models)} models: "
            f"{', '.join(models)}; start a server for each"
        )
    for name in adapters:
        if name in models:
            raise ValueError(f"a model and an adapter have the name {name!r}; give another one")
    try:
        from t5jax.serving.protection import is_loopback
        from t5jax.serving.server import serve as run
        from t5jax.serving.state import ServerOptions
    except ModuleNotFoundError as error:
        if str(error.name).startswith("t5jax"):
            raise
        raise ValueError(
            f"{error.name} is missing; install what serving needs: pip install 't5jax[serve]'"
        ) from None
    keys = read_keys(options.api_key_file) if options.api_key_file else ()
    if not keys and not is_loopback(options.host):
        raise ValueError(
            f"--host {options.host} lets other machines in; give --api-key-file FILE with a key a "
            "line, or leave --host out"
        )
    _check_address(options.host, options.port)
    from t5jax.compilation import keep_programs
    from t5jax.pretrained import load
    from t5jax.serving.served import ServedModel
    from t5jax.serving.sizes import EngineOptions

    keep_programs()
    sizes = EngineOptions(
        slots=options.slots,
        max_length=options.max_length,
        max_source_length=options.max_source_length,
        max_waiting=options.max_waiting,
        batch_invariant=options.batch_invariant,
    )
    served = []
    for name, model in models.items():
        _say(f"loading {model}")
        found = load(
            model,
            dtype=options.dtype,
            mesh=options.mesh,
            base=options.base,
            adapters=adapters,
            kv_cache=options.kv_cache,
        )
        served.append(ServedModel(name, found, sizes))
        _say(_describe(served[-1]))
    served += [served[0].adapted(name, number) for number, name in enumerate(adapters, 1)]
    if adapters:
        _say(f"adapters: {', '.join(adapters)}")
    bounds = ServerOptions(
        api_keys=keys,
        max_body_bytes=options.max_body_bytes,
        max_concurrent=options.max_concurrent,
        max_seconds=options.max_seconds,
        drain_seconds=options.drain_seconds,
    )

    async def on_start(url: str) -> None:
        import asyncio

        keyed = "; requests need an API key" if keys else ""
        _say(f"listening on {url} (OpenAI's interface at {url}/v1, a page at {url}/){keyed}")
        start = time.monotonic()
        _say("compiling")
        while not all(m.is_ready for m in served):
            if failed := [m for m in served if m.failure is not None]:
                _say(f"{failed[0].name} failed: {failed[0].failure}")
                return
            await asyncio.sleep(0.1)
        _say(f"ready after {time.monotonic() - start:.1f} s")

    run(served, host=options.host, port=options.port, options=bounds, on_start=on_start)
    _say("stopped")


def _say(text: str) -> None:
    print(f"t5jax: {text}", file=sys.stderr, flush=True)


def _adapters(args: list[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the adapters by name, and the other arguments."""
    adapters: dict[str, str] = {}
    rest: list[str] = []
    words = collections.deque(args)
    while words:
        word = words.popleft()
        if word == "--adapter":
            given = []
            while words and not words[0].startswith("-"):
                given.append(words.popleft())
        elif word.startswith("--adapter="):
            given = [word.removeprefix("--adapter=")]
        else:
            rest.append(word)
            continue
        for text in given or [""]:
            name, _, path = text.partition("=")
            if not name or not path:
                raise ValueError(f"--adapter {text}: expected NAME=PATH")
            if name in adapters:
                raise ValueError(f"two adapters have the name {name!r}; give them different ones")
            adapters[name] = path
    return adapters, rest


def _models(args: list[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the models by name, and the other arguments."""
    models: dict[str, str] = {}
    named, rest = take_models(args)
    given = [*itertools.takewhile(lambda word: not word.startswith("-"), rest), *named]
    rest = rest[len(given) - len(named) :]
    for word in given:
        name, equals, model = word.partition("=")
        if not equals:
            path = storage.path(word, "--model")
            name, model = (path.resolve().name if path.exists() else word), word
        if not name or not model:
            raise ValueError(f"--model {word}: expected MODEL or NAME=MODEL")
        if name in models:
            raise ValueError(
                f"two models have the name {name!r}; give them different ones: --model NAME={model}"
            )
        models[name] = model
    return models, rest


def _check(options: Serve) -> None:
    names = ("slots", "max_length", "max_source_length", "max_waiting", "max_body_bytes")
    check_options(options, 1, *names, "max_concurrent")
    check_options(options, 0, "port", "drain_seconds")
    if options.port > 65535:
        raise ValueError(f"--port is {options.port}; it must be at most 65535")
    if not options.max_seconds > 0:
        raise ValueError(f"--max-seconds is {options.max_seconds}; it must be above 0")
    for name in ("max_seconds", "drain_seconds"):
        if not math.isfinite(getattr(options, name)):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {getattr(options, name)}; it must be a finite number")


def _check_address(host: str, port: int) -> None:
    """Raises ValueError if the server cannot listen there, before models are loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ValueError(
            f"cannot listen on --host {host} --port {port}: {error.strerror}; give others, such as "
            "--port 0 for any that is free"
        ) from None


def read_keys(file: Path) -> tuple[str, ...]:
    """Returns the API keys of a file, one a line; empty lines and those with # do not count.

    Raises:
      ValueError: if there is none, or one is too short to be safe.
    """
    try:
        text = storage.local(storage.path(file, "--api-key-file")).read_text()
        lines = [line.strip() for line in text.splitlines()]
    except OSError as error:
        raise ValueError(f"--api-key-file {file}: {error.strerror}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"--api-key-file {file} has no key; write one a line")
    for number, key in enumerate(keys, start=1):
        if len(key) < 16 or not key.isascii() or " " in key:
            raise ValueError(
                f"--api-key-file {file}: key {number} must be 16 or more ASCII characters without "
                "spaces; make one with `openssl rand -hex 24`"
            )
    return tuple(keys)


def _describe(served) -> str:
    engine = served.engine
    if engine is None:
        return f"{served.name}: {served.model.family}, embeddings only"
    size = engine.size
    source = f"{size.source_length} tokens of input, " if size.source_length else ""
    total = size.rows * engine.bytes_per_slot / 2**20
    return (
        f"{served.name}: {served.model.family}, {size.rows} slots of {source}{size.length} tokens, "
        f"{total:,.0f} MiB of keys and values"
    )
