"""The notice that Google Compute Engine gives before it takes a machine: maintenance, preemption.

A TPU cannot be moved while it runs, so its machine is stopped for maintenance; a Spot machine is
taken when it is needed elsewhere. The metadata server says so some seconds before, at addresses
that answer when their value changes:
https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
https://cloud.google.com/compute/docs/instances/create-use-preemptible
"""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

_MACHINE = Path("/sys/class/dmi/id/product_name")
# Names below /computeMetadata/v1/instance, and the value of each that says that the end is near.
_NOTICES = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
_WAIT = 60
"""Seconds after which the server answers without a change."""
_PAUSE = 10.0
"""Seconds before it is asked again after an error."""


def metadata_host() -> str | None:
    """Returns the metadata server, None on a machine that is not Google's."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    try:
        return "metadata.google.internal" if "Google" in _MACHINE.read_text() else None
    except OSError:
        return None


class Notice:
    """Listens until `stop`, in threads; calls a function at the first notice."""

    def __init__(self, on_notice: Callable[[str], None]):
        """Begins to listen; does nothing on a machine that is not Google's."""
        self._on_notice, self._stopped, self._lock = on_notice, False, threading.Lock()
        if host := metadata_host():
            for name, value in _NOTICES.items():
                arguments = (f"http://{host}/computeMetadata/v1/instance/{name}", value)
                threading.Thread(target=self._listen, args=arguments, daemon=True).start()

    def _listen(self, url: str, value: str) -> None:
        etag, pause = "0", threading.Event()
        while not self._stopped:
            query = f"{url}?wait_for_change=true&timeout_sec={_WAIT}&last_etag={etag}"
            request = urllib.request.Request(query, headers={"Metadata-Flavor": "Google"})
            try:
                with urllib.request.urlopen(request, timeout=_WAIT + 10) as answer:
                    etag, found = answer.headers.get("ETag", "0"), answer.read(100).decode()
            except urllib.error.HTTPError as error:
                if error.code == 404:  # This machine has no such notice.
                    return
                pause.wait(_PAUSE)
            except (OSError, ValueError):
                pause.wait(_PAUSE)
            else:
                if found.strip() == value:
                    self._tell(url.rpartition("/")[2])
                    return

    def _tell(self, name: str) -> None:
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._on_notice(name)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
