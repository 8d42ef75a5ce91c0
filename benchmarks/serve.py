"""A served T5 1.1 small, compared with transformers and CTranslate2 behind HTTP in one run.

Each server is a process of its own, and clients ask again as soon as they are answered: 64 input
and 64 output tokens, random weights, greedy. transformers answers one request after the other, as
its `generate` does; CTranslate2 takes requests asynchronously. The table shows requests and output
tokens a second, and the median and 99th percentile of the time to an answer. Needs the extras
`torch` and `dev`.

    python benchmarks/serve.py [--clients 1 8 32] [--seconds 20] [--only t5jax]
"""

import argparse
import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

SOURCE = NEW_TOKENS = 64
MODEL = "t5_1_1_small"
SERVERS = ("t5jax", "transformers", "CTranslate2, float32", "CTranslate2, int8")


# --- Servers, each in its own process -------------------------------------------------------------


def write_model(folder: Path, model_name: str) -> None:
    """Writes a model with random weights, for all of them."""
    import jax
    import tokenizers
    import transformers

    from t5jax.architectures import published
    from t5jax.hf import io
    from t5jax.models import api

    model = published(model_name, scan_layers=False)
    params = jax.jit(lambda key: api.init_params(model, key))(jax.random.key(0))
    io.save_params(folder, model, params)
    words = {f"t{i}": i for i in range(model.vocab_size)}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "t2")),
        pad_token=f"t{model.pad_token_id}",
        eos_token=f"t{model.eos_token_id}",
        unk_token="t2",
    ).save_pretrained(folder)


def serve_t5jax(folder: str, port: int) -> None:
    from t5jax.cli import main

    sizes = ["--max-length", str(NEW_TOKENS), "--max-source-length", str(SOURCE), "--slots", "32"]
    main(["serve", f"model={folder}", "--port", str(port), *sizes])


def serve_peer(answer, port: int) -> None:
    """Serves an asynchronous function from prompts to answers behind the same HTTP layer."""
    import fastapi
    import uvicorn
    from pydantic import BaseModel

    class Body(BaseModel):
        prompt: list[int]

    app = fastapi.FastAPI()

    @app.get("/ready")
    async def ready() -> dict:
        return {}

    @app.post("/v1/completions")
    async def completions(body: Body) -> dict:
        ids = await answer(body.prompt)
        return {"ids": ids, "usage": {"completion_tokens": len(ids)}}

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def serve_transformers(folder: str, port: int) -> None:
    import torch
    from transformers import T5ForConditionalGeneration

    network = T5ForConditionalGeneration.from_pretrained(folder).eval()
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    lock = asyncio.Lock()

    def generate(prompt):
        with torch.inference_mode():
            return network.generate(input_ids=torch.tensor([prompt]), **options)[0, 1:].tolist()

    async def answer(prompt):
        async with lock:
            return await asyncio.to_thread(generate, prompt)

    serve_peer(answer, port)


def serve_ctranslate2(folder: str, port: int, compute_type: str) -> None:
    import ctranslate2

    converter = ctranslate2.converters.TransformersConverter(folder)
    converted = converter.convert(os.path.join(folder, "ctranslate2"), force=True)
    translator = ctranslate2.Translator(
        converted, compute_type=compute_type, intra_threads=os.cpu_count()
    )

    async def answer(prompt):
        (result,) = translator.translate_batch(
            [[f"t{i}" for i in prompt]],
            beam_size=1,
            min_decoding_length=NEW_TOKENS,
            max_decoding_length=NEW_TOKENS,
            asynchronous=True,
        )
        found = await asyncio.to_thread(result.result)
        return [int(token[1:]) for token in found.hypotheses[0]]

    serve_peer(answer, port)


def serve(name: str, folder: str, port: int) -> None:
    if name == "t5jax":
        serve_t5jax(folder, port)
    elif name == "transformers":
        serve_transformers(folder, port)
    else:
        serve_ctranslate2(folder, port, name.removeprefix("CTranslate2, "))


def cpu_seconds(pid: int) -> float:
    """Returns the time that a process has had on a processor (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def server(name: str, folder: Path):
    """Runs a server; yields its URL once it answers, and has compiled all that it will."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--serve", name, "--folder", folder, "--port", str(port)]
    process = subprocess.Popen([str(word) for word in command])
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{name} did not start")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.2)
        before = -float("inf")
        while (now := cpu_seconds(process.pid)) - before > 1:
            before = now
            time.sleep(5)
        yield url
    finally:
        process.terminate()
        process.wait(60)


# --- Clients --------------------------------------------------------------------------------------


async def load(url: str, name: str, clients: int, seconds: float, vocab_size: int):
    """Returns the answers a second, and the seconds that each of them took."""
    import httpx

    rng = np.random.default_rng(0)
    prompts = rng.integers(3, vocab_size, (256, SOURCE)).tolist()
    extra = {}
    if name == "t5jax":
        extra = {"model": "model", "max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS}
    took: list[float] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as client:

        async def ask(number: int) -> None:
            body = {"prompt": prompts[number % len(prompts)], **extra}
            start = time.perf_counter()
            answer = await client.post("/v1/completions", json=body)
            answer.raise_for_status()
            written = answer.json()["usage"]["completion_tokens"]
            if written != NEW_TOKENS:
                raise RuntimeError(f"{name} wrote {written} tokens, not {NEW_TOKENS}")
            took.append(time.perf_counter() - start)

        await asyncio.gather(*(ask(i) for i in range(clients)))  # Warms up.
        took.clear()
        start = time.perf_counter()
        end = start + seconds

        async def keep_asking(number: int) -> None:
            while time.perf_counter() < end:
                await ask(number)
                number += clients

        await asyncio.gather(*(keep_asking(i) for i in range(clients)))
        return len(took) / (time.perf_counter() - start), np.array(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=20, help="of load for each number")
    parser.add_argument("--only", nargs="+", default=SERVERS, choices=SERVERS)
    parser.add_argument("--model", default=MODEL, help="name of a published size")
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.folder, args.port)
        return

    from t5jax.architectures import published

    table = Table(title=f"{args.model}, {SOURCE} -> {NEW_TOKENS} tokens, float32, over HTTP")
    for column in ("server", "clients", "requests/s", "tokens/s", "p50 s", "p99 s"):
        table.add_column(column, justify="left" if column == "server" else "right")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_model(folder, args.model)
        vocab_size = published(args.model).vocab_size
        for name in args.only:
            with server(name, folder) as url:
                for clients in args.clients:
                    rate, took = asyncio.run(load(url, name, clients, args.seconds, vocab_size))
                    p50, p99 = np.percentile(took, [50, 99])
                    cells = (f"{rate:.2f}", f"{rate * NEW_TOKENS:,.0f}", f"{p50:.3f}", f"{p99:.3f}")
                    table.add_row(name, str(clients), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
