"""Figures of a server for Prometheus."""

import time
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from t5jax.serving.protection import App, Message, Receive, Send
from t5jax.serving.requests import Answer
from t5jax.serving.served import ServedModel

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts requests, and reads the engines' counters when asked."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = models
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.requests = Counter(
            "t5jax_http_requests",
            "HTTP requests",
            ["path", "status"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "t5jax_http_request_seconds",
            "Time until a response was sent",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "t5jax_time_to_first_token_seconds",
            "Time from a request to the first token",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def observe(self, served: ServedModel, answers: Sequence[Answer]) -> None:
        """Adds the times of answers."""
        for answer in answers:
            if answer.first_token is not None:
                seconds = answer.first_token - answer.submitted
                self._first_token.labels(served.name).observe(seconds)

    def render(self) -> tuple[bytes, str]:
        """Returns the figures as text, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterable[Any]:
        """Yields the figures of the engines."""
        gauges = {
            "slots": ("Answers that can be written at a time", lambda e: e.size.rows),
            "running": ("Answers being written", lambda e: e.num_running),
            "waiting": ("Answers that wait for a slot", lambda e: e.num_waiting),
            "cache_bytes": (
                "Memory for keys and values",
                lambda e: e.size.rows * e.bytes_per_slot,
            ),
        }
        counters = {
            "answers": ("Answers asked for", lambda e: e.counters.requests),
            "prompt_tokens": ("Tokens read", lambda e: e.counters.prompt_tokens),
            "shared_prompt_tokens": (
                "Tokens of prompts that were in a slot already",
                lambda e: e.counters.shared_tokens,
            ),
            "written_tokens": ("Tokens written", lambda e: e.counters.tokens),
            "steps": ("Steps of the decoder", lambda e: e.counters.steps),
        }
        engines = [(m.name, m.engine) for m in self._models if m.engine is not None and m.base is m]
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"t5jax_{name}", text, labels=["model"])
            for model, engine in engines:
                gauge.add_metric([model], value(engine))  # type: ignore[no-untyped-call]
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"t5jax_{name}", text, labels=["model"])
            for model, engine in engines:
                counter.add_metric([model], value(engine))  # type: ignore[no-untyped-call]
            yield counter
        finished = CounterMetricFamily(
            "t5jax_finished", "Answers by why they ended", labels=["model", "reason"]
        )
        for model, engine in engines:
            for reason, count in dict(engine.counters.finished).items():
                finished.add_metric([model, reason], count)
        yield finished


class CountRequests:
    """Counts requests by path and status, and how long they take."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            # Only paths that there are: anybody can make others up.
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - start)
