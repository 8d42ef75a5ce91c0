"""A headless Chromium, spoken to by its DevTools protocol over a pipe."""

import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Returns the path of a browser, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page, with all that it has asked for and complained about."""

    def __init__(self, send: int, receive: int):
        self._send, self._receive, self._rest = send, receive, b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """Calls a method of the protocol, and returns its result."""
        message = {"id": next(self._numbers), "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == message["id"]:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _read(self):
        while b"\0" not in self._rest:
            assert select.select([self._receive], [], [], 60)[0], "the browser says nothing"
            part = os.read(self._receive, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def value(self, expression: str):
        """Returns the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60):
        """Returns the value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, f"{expression} did not become true"
            time.sleep(0.05)
        return found

    def press(self, key: str, modifiers: int = 0):
        """Presses a key; modifiers as in the protocol, 2 is Ctrl."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers)

    @property
    def requests(self) -> list[str]:
        """The URLs of all that it has asked for."""
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    @property
    def complaints(self) -> list[dict]:
        """Exceptions, and what was logged as an error."""

        def is_bad(event):
            params = event.get("params", {})
            if event.get("method") == "Log.entryAdded":
                return params["entry"]["level"] == "error"
            is_error = event.get("method") == "Runtime.consoleAPICalled"
            return event.get("method") == "Runtime.exceptionThrown" or (
                is_error and params["type"] == "error"
            )

        return [event for event in self.events if is_bad(event)]


@contextlib.contextmanager
def page(browser: str, folder) -> Iterator[Page]:
    """Yields an empty page of a browser whose profile is in a folder."""
    theirs_in, send = os.pipe()
    receive, theirs_out = os.pipe()
    pipes = [fcntl.fcntl(pipe, fcntl.F_DUPFD, 20) for pipe in (theirs_in, theirs_out)]
    os.close(theirs_in)
    os.close(theirs_out)
    flags = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--remote-debugging-pipe", f"--user-data-dir={folder}"),
    )
    # The browser reads from 3 and writes to 4.
    redirected = f'exec "$0" "$@" 3<&{pipes[0]} 4>&{pipes[1]}'
    command = ["bash", "-c", redirected, browser, *flags]
    process = subprocess.Popen(
        command,
        pass_fds=pipes,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for pipe in pipes:
        os.close(pipe)
    try:
        yield Page(send, receive)
    finally:
        process.terminate()
        process.wait(20)
        os.close(send)
        os.close(receive)
