"""Where the processes of a run meet, and learn from when one of them stops.

Process 0 listens, and the others keep a connection to it, which the operating system closes when a
process ends, however it ends. jax.distributed has neither the names of the absent at its start nor
a quick answer when a process is killed: its heartbeats take a minute, in which the others wait for
a collective. Standard library alone, so that it can begin before jax.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import Any

_PATIENCE = 2.0
"""Seconds between the news that a process has failed and the end of this one, in which it may find
out the same by itself."""


class Rendezvous:
    """The connections of one process. Ends the process when another one stops."""

    def __init__(self, address: str, count: int, index: int, timeout: float):
        """Waits for all processes.

        Args:
          address: "host:port", on which process 0 listens.
          count: the number of processes.
          index: of this one.
          timeout: seconds to wait.
        Raises:
          ValueError: if a process is absent when the time is over, by name where it is known.
        """
        self._index, self._leaving, self._ending = index, False, False
        self._peers: dict[int, socket.socket] = {}
        host, port = address.rsplit(":", 1)
        self._deadline, self._timeout = time.monotonic() + timeout, timeout
        if index == 0:
            self.names = self._gather(int(port), count)
        else:
            self.names = self._join(host.strip("[]"), int(port), count)
        threading.Thread(target=self._watch, name="rendezvous", daemon=True).start()

    def _gather(self, port: int, count: int) -> list[str]:
        """Accepts the others; returns the host of every process."""
        names = {0: socket.gethostname()}
        try:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            listener = socket.create_server(("", port), family=family, dualstack_ipv6=both)
        except OSError as error:
            raise ValueError(
                f"process 0 cannot listen on port {port} ({error.strerror}); end what listens "
                "there, or choose another port for the coordinator"
            ) from None
        with listener:
            while len(names) < count and (left := self._deadline - time.monotonic()) > 0:
                listener.settimeout(left)
                try:
                    connection, _ = listener.accept()
                    connection.settimeout(5)
                    hello = _receive(connection)
                    index, name = hello["process"], hello["host"]
                except (OSError, ValueError, KeyError, TypeError):
                    continue  # Time is over, or it was no process of ours.
                refusal = None
                if hello["processes"] != count:
                    refusal = f"counts {hello['processes']} processes, and process 0 {count}"
                elif index in names:
                    refusal = f"has the number of a process on {names[index]}"
                if refusal:
                    message = f"process {index} on {name} {refusal}; give each its own number"
                    _send(connection, {"absent": message})
                    self._tell({"absent": message})
                    raise ValueError(message)
                names[index], self._peers[index] = name, connection
        if absent := sorted(set(range(count)) - set(names)):
            present = ", ".join(f"{i} ({names[i]})" for i in sorted(names))
            message = (
                f"{_numbers(absent)} of {count} did not come within {self._timeout:g} s; there are "
                f"{present}. Start the same command on every host, see what the absent ones say, "
                "or give them more time (T5JAX_HOST_TIMEOUT, in seconds)"
            )
            self._tell({"absent": message})
            raise ValueError(message)
        in_order = [names[i] for i in range(count)]
        self._tell({"names": in_order})
        return in_order

    def _join(self, host: str, port: int, count: int) -> list[str]:
        hello = {"process": self._index, "processes": count, "host": socket.gethostname()}
        reason = ""
        while (left := self._deadline - time.monotonic()) > 0:
            try:
                connection = socket.create_connection((host, port), timeout=left)
            except OSError as error:  # It has not started yet.
                reason = f": {error.strerror}" if error.strerror else ""
                time.sleep(min(0.2, max(left, 0)))
                continue
            try:
                _send(connection, hello)
                connection.settimeout(self._timeout + 5)
                answer = _receive(connection)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"process 0 on {host}, port {port}, has stopped while process {self._index} "
                    "waited for the others; see what it says"
                ) from error
            if "absent" in answer:
                raise ValueError(answer["absent"])
            self._peers[0] = connection
            return answer["names"]
        raise ValueError(
            f"process 0 of {count} did not come within {self._timeout:g} s ({host}, port "
            f"{port}{reason}). Start the same command there, open the port, or give it more time "
            "(T5JAX_HOST_TIMEOUT, in seconds)"
        )

    # --- While the run lasts ---------------------------------------------------------------------

    def leave(self) -> None:
        """Says that this process ends as it should."""
        self._leaving = True
        self._tell({"bye": self._index})

    def fail(self, message: str) -> None:
        """Tells the others that this process ends, and why; unless another one has stopped, which
        is why this one fails."""
        time.sleep(0.5)
        if self._ending:
            time.sleep(60)  # `_end` ends the process.
        self._leaving = True
        self._tell({"lost": self._index, "because": message})

    def _tell(self, news: dict[str, Any]) -> None:
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                _send(connection, news)

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for index, connection in self._peers.items():
            connection.setblocking(True)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            selector.register(connection, selectors.EVENT_READ, index)
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    news = _receive(key.fileobj)
                except (OSError, ValueError):
                    news = {"lost": key.data, "because": ""}
                if "bye" in news:
                    selector.unregister(key.fileobj)
                elif not self._leaving:
                    self._end(news["lost"], news["because"])
                else:
                    return

    def _end(self, index: int, because: str) -> None:
        """Ends this process, since another one has."""
        self._ending = not because
        message = f"process {index} on {self.names[index]} has stopped"
        message += f": {because}" if because else ""
        if self._index == 0:
            self._tell({"lost": index, "because": because})
        if because:
            time.sleep(_PATIENCE)  # A mistake in the config stops all, and each says so.
        hint = "; the same command on every host goes on from the last checkpoint"
        print(f"t5jax: error: {message}{'' if because else hint}", file=sys.stderr, flush=True)
        if not because:
            time.sleep(_PATIENCE / 2)  # What is being written may end.
        os._exit(1)


def _numbers(indices: list[int]) -> str:
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: Any) -> dict[str, Any]:
    """Returns the next message.

    Raises:
      ValueError: if the connection is closed, or it is no message.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 2**20:
            raise ValueError("the connection is closed")
        line += byte
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError(f"{message!r} is no message")
    return message
