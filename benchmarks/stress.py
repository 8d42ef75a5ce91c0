"""Many clients at once against a server of t5jax, some of which hang up or read slowly.

Starts a server with two small models of random weights, asks each prompt alone first, and then from
many clients: a tenth hangs up in the middle of an answer, a tenth reads slowly. At the end every
answer must have been the same as alone, and no slot may be taken. Memory, threads and open files of
the server are printed on the way; once it is warm they must not grow.

    python benchmarks/stress.py [--clients 200] [--seconds 60] [--pause 0]

A soak of an hour at low load:

    python benchmarks/stress.py --clients 10 --seconds 3600 --pause 5
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

MODELS = ("t5", "gpt")
NUM_PROMPTS, MAX_TOKENS = 40, 24


def write_models(folder: Path) -> None:
    """Writes an encoder-decoder and a decoder that read bytes."""
    import jax

    from t5jax.architectures import published
    from t5jax.hf import io
    from t5jax.models import api
    from t5jax.tokenizers import ByteTokenizer

    ids = {"vocab_size": 384, "eos_token_id": 1, "scan_layers": False}
    t5 = {"num_encoder_layers": 2, "num_decoder_layers": 2, "d_model": 64, "d_ff": 128}
    gpt = {"num_layers": 2, "d_model": 64, "d_ff": 128, "num_heads": 4, "num_kv_heads": 4}
    models = {
        "t5": published("t5_1_1_small", **ids, **t5),
        "gpt": published(
            "gpt2", **ids, **gpt, head_dim=16, decoder_start_token_id=1, pad_token_id=0
        ),
    }
    for name, model in models.items():
        params = api.init_params(model, jax.random.key(0))
        # Wide enough that every prompt has an answer of its own.
        params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
        io.save_params(folder / name, model, params, tokenizer=ByteTokenizer())


@contextlib.contextmanager
def server(folder: Path):
    """Runs a server; yields its process and URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "t5jax.cli", "serve"]
    command += [f"{name}={folder / name}" for name in MODELS]
    command += ["--port", str(port), "--slots", "16", "--max-length", "96"]
    command += ["--max-source-length", "64", "--max-waiting", "64", "--batch-invariant"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError("the server did not start")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.2)
        yield process, url
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise RuntimeError(f"the server ended with status {process.returncode}")
    finally:
        if process.poll() is None:
            process.kill()


def body_of(number: int, stream: bool) -> dict:
    model, prompt = MODELS[number % 2], f"prompt {number * 37 % 1000} " * (1 + number % 3)
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "logprobs": 0}
    if number % 4 > 1:
        body |= {"temperature": 1.0, "seed": number, "top_k": 20}
    return body | {"stream": stream}


def read(data: dict) -> list:
    logprobs = data["choices"][0]["logprobs"]
    return list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))


class Load:
    """What clients do, and what came of it."""

    def __init__(self, url: str, expected: list, pause: float) -> None:
        self.url, self.expected, self.pause = url, expected, pause
        self.counts: collections.Counter = collections.Counter()

    async def client(self, number: int, end: float) -> None:
        rng = random.Random(number)
        kind = {0: "hangs up", 1: "reads slowly"}.get(number % 10, "reads")
        while time.monotonic() < end:
            which = rng.randrange(NUM_PROMPTS)
            stream = kind != "reads" or rng.random() < 0.5
            async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
                try:
                    await self._ask(client, kind, which, stream, rng)
                except httpx.TransportError as error:
                    self.counts[f"transport error {type(error).__name__}"] += 1
            await asyncio.sleep(self.pause * 2 * rng.random())

    async def _ask(self, client, kind, which, stream, rng) -> None:
        body = body_of(which, stream)
        if not stream:
            answer = await client.post("/v1/completions", json=body)
            found = read(answer.json()) if answer.status_code == 200 else None
            await self._judge(answer, found, which)
            return
        found: list = []
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                await self._judge(answer, None, which)
                return
            leaves_after = rng.randrange(MAX_TOKENS)
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                found += read(json.loads(line.removeprefix("data: ")))
                if kind == "hangs up" and len(found) >= leaves_after:
                    self.counts["hung up"] += 1
                    return
                if kind == "reads slowly":
                    await asyncio.sleep(0.05)
        await self._judge(answer, found, which)

    async def _judge(self, answer: httpx.Response, found: list | None, which: int) -> None:
        if answer.status_code == 429:
            self.counts["refused (429)"] += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]))
        elif found is None:
            self.counts[f"status {answer.status_code}"] += 1
        elif found != self.expected[which]:
            self.counts["WRONG"] += 1
        else:
            self.counts["right"] += 1


@dataclasses.dataclass(frozen=True)
class Held:
    """What a process holds."""

    resident_mib: int
    threads: int
    open_files: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        return cls(
            int(status["VmRSS"].split()[0]) // 1024,
            int(status["Threads"]),
            len(os.listdir(f"/proc/{pid}/fd")),
        )

    def __str__(self) -> str:
        return f"{self.resident_mib} MiB, {self.threads} threads, {self.open_files} open files"


def figures(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics").text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


def busy_slots(url: str, seconds: float = 30) -> dict[str, float]:
    """Returns what still runs or waits after a while."""
    end = time.monotonic() + seconds
    while True:
        busy = {k: v for k, v in figures(url).items() if "_running{" in k or "_waiting{" in k}
        busy = {k: v for k, v in busy.items() if v}
        if not busy or time.monotonic() > end:
            return busy
        time.sleep(0.2)


async def run(url: str, pid: int, clients: int, seconds: float, pause: float) -> Load:
    expected = []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        for number in range(NUM_PROMPTS):
            answer = await client.post("/v1/completions", json=body_of(number, False))
            answer.raise_for_status()
            expected.append(read(answer.json()))
    if len({json.dumps(one) for one in expected}) < NUM_PROMPTS // 2:
        raise RuntimeError("most answers are alike: the test would see little")
    load = Load(url, expected, pause)
    end = time.monotonic() + seconds
    asking = [asyncio.create_task(load.client(i, end)) for i in range(clients)]
    start = time.monotonic()
    print(f"at first: {Held.by(pid)}", flush=True)
    while time.monotonic() < end:
        await asyncio.sleep(min(seconds / 6, 300, end - time.monotonic() + 0.1))
        now = f"{time.monotonic() - start:.0f} s"
        print(f"{now}: {Held.by(pid)}, {dict(load.counts)}", flush=True)
    await asyncio.gather(*asking)
    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pause", type=float, default=0, help="a client's mean seconds of rest")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        with server(Path(folder)) as (process, url):
            load = asyncio.run(run(url, process.pid, args.clients, args.seconds, args.pause))
            busy = busy_slots(url)
            print(f"at last: {Held.by(process.pid)}")
            print({k: v for k, v in figures(url).items() if "finished" in k or "running" in k})
            bad = {k: v for k, v in load.counts.items() if k not in GOOD}
            if busy or bad or not load.counts["right"]:
                raise SystemExit(f"failed: {busy}, {bad}")
    print("every answer was right, no slot is lost, the server stopped when it was told to")


GOOD = ("right", "hung up", "refused (429)")

if __name__ == "__main__":
    main()
