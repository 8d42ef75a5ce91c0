"""What the routes of a server share."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

from t5jax.checks import did_you_mean
from t5jax.serving.errors import ApiError
from t5jax.serving.metrics import Metrics
from t5jax.serving.served import ServedModel


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """The bounds of a server."""

    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    """Keys, one of which every request must have. Empty: none is needed."""
    max_body_bytes: int = 4 * 2**20
    """Maximum size of a body."""
    max_concurrent: int = 512
    """Maximum number of requests that are being answered."""
    max_seconds: float = 600.0
    """Maximum time for a request."""
    drain_seconds: float = 60.0
    """How long requests may take to finish after SIGTERM."""


class Server:
    """What the routes share."""

    def __init__(self, models: Sequence[ServedModel], options: ServerOptions) -> None:
        self.models: Mapping[str, ServedModel] = {served.name: served for served in models}
        self.options = options
        self.created = int(time.time())
        self.stopping = False
        self.metrics = Metrics(models)

    @property
    def is_ready(self) -> bool:
        return not self.stopping and all(served.is_ready for served in self.models.values())

    def model(self, name: str | None) -> ServedModel:
        """Returns a model by its name, by default the first one.

        Raises:
          ApiError: if there is none, or it cannot answer.
        """
        served = next(iter(self.models.values())) if name is None else self.models.get(name)
        if served is None:
            given = str(name)[:80]
            hint = did_you_mean(given, self.models)
            raise ApiError(
                404,
                f"there is no model {given!r}; {hint}known are {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        if served.failure is not None:
            raise ApiError(503, f"{served.name} has failed; the server's log says why")
        if not served.is_ready:
            raise ApiError(503, f"{served.name} is being compiled; try again", retry_after=5)
        return served

    def writer(self, name: str) -> ServedModel:
        """Returns a model that writes text."""
        served = self.model(name)
        if served.engine is None:
            raise ApiError(
                400,
                f"{served.name} is an encoder and writes no text; /v1/embeddings gives its vectors",
                param="model",
            )
        return served
