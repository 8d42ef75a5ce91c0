"""The notice of Google's metadata server, here on loopback, that a machine is about to be taken."""

import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from t5jax import distributed, maintenance


@pytest.fixture
def metadata(monkeypatch):
    """Yields the values of the server; what is set there is told to who listens."""
    values, changed = {"maintenance-event": "NONE", "preempted": "FALSE"}, threading.Condition()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            name = url.path.removeprefix("/computeMetadata/v1/instance/")
            if self.headers["Metadata-Flavor"] != "Google" or name not in values:
                self.send_error(403 if name in values else 404)
                return
            with changed:
                if query["last_etag"] != "0":
                    changed.wait_for(lambda: values[name] != query["last_etag"], timeout=60)
            self.send_response(200)
            self.send_header("ETag", values[name])
            self.end_headers()
            self.wfile.write(values[name].encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(maintenance, "_PAUSE", 0.01)

    def change(name, value):
        with changed:
            values[name] = value
            changed.notify_all()

    yield change
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")],
)
def test_a_run_is_asked_to_stop_before_its_machine_is_taken(name, value, metadata, capsys):
    with distributed.StopRequest() as request:
        metadata("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")  # It goes on elsewhere.
        time.sleep(0.1)
        assert not request.reached()
        metadata(name, value)
        until = time.monotonic() + 60
        # Not one long wait, which a signal that comes just before the system call does not end.
        while not request.reached() and time.monotonic() < until:
            time.sleep(0.01)
        assert request.reached()
    assert f"this machine is about to be taken ({name})" in capsys.readouterr().err


def test_after_the_run_a_notice_does_nothing(metadata):
    told = []
    notice = maintenance.Notice(told.append)
    notice.stop()
    metadata("preempted", "TRUE")
    assert not threading.Event().wait(0.2)
    assert told == []


def test_another_machine_is_not_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(maintenance, "_MACHINE", tmp_path / "product_name")
    assert maintenance.metadata_host() is None
    (tmp_path / "product_name").write_text("Standard PC\n")
    assert maintenance.metadata_host() is None
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    assert maintenance.metadata_host() == "metadata.google.internal"
