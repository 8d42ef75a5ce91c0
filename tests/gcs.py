"""A stand-in for Google Cloud Storage: its JSON protocol on loopback, with faults on request.

It speaks what the clients in use really say (gcsfs, google-cloud-storage, TensorStore): listing
with prefix, delimiter and pages; whole and ranged reads; simple, multipart and resumable uploads;
generations and preconditions; deleting, one by one and in batches; rewriting, moving, composing.
https://cloud.google.com/storage/docs/json_api
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import google_crc32c

from t5jax import buckets


def crc32c(content: bytes) -> str:
    """Returns the checksum of RFC 3720, appendix B.4, as the service writes it."""
    value = google_crc32c.value(bytes(content))
    return base64.b64encode(value.to_bytes(4, "big")).decode()


@dataclasses.dataclass
class Fault:
    """What happens to requests instead of an answer, as often as `times` says."""

    status: int = 0
    """An error to answer with. 0: none."""
    cut: bool = False
    """The body of the answer ends in its middle."""
    is_slow: bool = False
    """The answer comes when the fault is over."""
    times: int = 10**9
    method: str = ""
    """Only requests of this method. "": of any."""
    name: str = ""
    """Only requests whose URL or body's head has this."""
    seen: int = 0
    """How often it happened."""
    over: threading.Event = dataclasses.field(default_factory=threading.Event)


class Bucket:
    """A server with buckets by name; each is a dict from an object's name to its content."""

    def __init__(self, *names: str):
        self.buckets: dict[str, dict[str, bytes]] = {name: {} for name in names}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        """METHOD and URL of every request."""
        self.page_size = 1000
        self._generations: dict[tuple[str, str], int] = {}
        self._next_generation = itertools.count(1_700_000_000_000_001)
        self._uploads: dict[str, tuple[str, str, dict, bytearray]] = {}
        self._lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def environment(self) -> dict[str, str]:
        """Returns what points every client at this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }

    def names(self, prefix: str = "", bucket: str = "bucket") -> list[str]:
        return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def copy(self, prefix: str, to: Path) -> Path:
        """Copies what lies below a prefix into a folder, as `gcloud storage cp -r` does."""
        for name in self.names(f"{prefix}/"):
            file = to / name.removeprefix(f"{prefix}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.buckets["bucket"][name])
        return to

    @contextlib.contextmanager
    def fault(self, **how):
        """Makes requests fail inside of the block."""
        fault = Fault(**how)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            fault.over.set()
            self.faults.remove(fault)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    # --- Objects ---

    def put(self, bucket: str, name: str, content: bytes, conditions: dict[str, str]) -> dict:
        with self._lock:
            self._check(bucket, name, conditions)
            self.buckets[bucket][name] = bytes(content)
            self._generations[bucket, name] = next(self._next_generation)
            return self.about(bucket, name)

    def remove(self, bucket: str, name: str, conditions: dict[str, str]) -> None:
        with self._lock:
            self._check(bucket, name, conditions)
            if name not in self.buckets[bucket]:
                raise _Refused(404, f"No such object: {bucket}/{name}")
            del self.buckets[bucket][name]

    def about(self, bucket: str, name: str) -> dict:
        content = self.buckets[bucket][name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        generation = str(self._generations.setdefault((bucket, name), next(self._next_generation)))
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(content)),
            "generation": generation,
            "metageneration": "1",
            "md5Hash": md5,
            "crc32c": crc32c(content),
            "etag": generation,
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def _check(self, bucket: str, name: str, conditions: dict[str, str]) -> None:
        there = name in self.buckets[bucket]
        now = self.about(bucket, name)["generation"] if there else "0"
        wanted = conditions.get("ifGenerationMatch", now)
        if wanted != now or now == conditions.get("ifGenerationNotMatch"):
            raise _Refused(412, "At least one of the pre-conditions you specified did not hold.")

    def page(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        with self._lock:
            found: dict[str, bool] = {}
            for name in self.names(prefix, bucket):
                rest = name[len(prefix) :]
                if name < start or (end and name >= end):
                    continue
                if delimiter and delimiter in rest:
                    found[prefix + rest.split(delimiter)[0] + delimiter] = True
                else:
                    found[name] = False
            entries = sorted(found.items())
            first = int(query.get("pageToken") or 0)
            last = first + min(int(query.get("maxResults") or self.page_size), self.page_size)
            items = [self.about(bucket, name) for name, folder in entries[first:last] if not folder]
            answer: dict = {"kind": "storage#objects", "items": items}
            if folders := [name for name, folder in entries[first:last] if folder]:
                answer["prefixes"] = folders
            if last < len(entries):
                answer["nextPageToken"] = str(last)
            return answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:
        """Says nothing of a client that hangs up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)


class _Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_) -> None: ...

    def _answer(self) -> None:
        body = self._read_body()
        self.bucket.requests.append(f"{self.command} {self.path}")
        fault = self._fault(body)
        if fault and fault.is_slow:
            fault.over.wait()
        try:
            if fault and fault.status:
                raise _Refused(fault.status, f"made to fail with {fault.status}")
            status, headers, content = self._respond(body)
        except _Refused as refused:
            error = {"code": refused.status, "message": str(refused)}
            status, headers, content = refused.status, {}, _json({"error": error})
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault and fault.cut:
            content, self.close_connection = content[: len(content) // 2], True
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _fault(self, body: bytes) -> Fault | None:
        with self.bucket._lock:
            for fault in self.bucket.faults:
                told = urllib.parse.unquote(self.path) + body[:400].decode(errors="replace")
                if fault.method in ("", self.command) and fault.name in told and fault.times:
                    fault.times -= 1
                    fault.seen += 1
                    return fault
        return None

    def _respond(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "batch":
            return self._batch(body)
        uploads = parts[0] == "upload"
        parts = parts[parts.index("b") + 1 :] if "b" in parts else []
        if not parts:
            return 200, {}, _json({"items": [{"name": name} for name in self.bucket.buckets]})
        name, *rest = parts
        if name not in self.bucket.buckets:
            raise _Refused(404, "The specified bucket does not exist.")
        if uploads:
            return self._upload(name, query, body)
        if not rest:
            return 200, {}, _json({"kind": "storage#bucket", "name": name, "id": name})
        if len(rest) == 1:
            return 200, {}, _json(self.bucket.page(name, query))
        return self._object(name, rest[1], rest[2:], query, body)

    def _object(self, bucket, name, verb, query, body) -> tuple[int, dict[str, str], bytes]:
        objects = self.bucket.buckets[bucket]
        if verb and verb[0] == "compose":
            sources = [source["name"] for source in json.loads(body)["sourceObjects"]]
            self._must_exist(bucket, *sources)
            whole = b"".join(objects[source] for source in sources)
            return 200, {}, _json(self.bucket.put(bucket, name, whole, query))
        if verb and verb[0] in ("rewriteTo", "copyTo", "moveTo"):
            self._must_exist(bucket, name)
            to_bucket, to = (bucket, verb[2]) if verb[0] == "moveTo" else (verb[2], verb[4])
            about = self.bucket.put(to_bucket, to, objects[name], query)
            if verb[0] == "moveTo":
                self.bucket.remove(bucket, name, {})
            moved = about if verb[0] != "rewriteTo" else {"done": True, "resource": about}
            return 200, {}, _json(moved)
        if self.command == "DELETE":
            self.bucket.remove(bucket, name, query)
            return 204, {}, b""
        self._must_exist(bucket, name)
        with self.bucket._lock:
            content, about = objects[name], self.bucket.about(bucket, name)
        if query.get("alt") != "media":
            return 200, {}, _json(about)
        headers = {
            "Content-Type": "application/octet-stream",
            "x-goog-generation": about["generation"],
            "x-goog-stored-content-encoding": "identity",
            "x-goog-stored-content-length": about["size"],
            "x-goog-hash": f"md5={about['md5Hash']}",
            "ETag": about["etag"],
        }
        wanted = self.headers.get("Range")
        if not wanted:
            return 200, headers, content
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        size = len(content)
        start = int(first) if first else max(size - int(last), 0)
        end = min(int(last) + 1, size) if first and last else size
        if start >= size:
            raise _Refused(416, "range not satisfiable")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return 206, headers, content[start:end]

    def _must_exist(self, bucket: str, *names: str) -> None:
        for name in names:
            if name not in self.bucket.buckets[bucket]:
                raise _Refused(404, f"No such object: {bucket}/{name}")

    def _upload(self, bucket, query, body) -> tuple[int, dict[str, str], bytes]:
        if upload := query.get("upload_id"):
            return self._continue_upload(upload, body)
        kind = query.get("uploadType")
        if kind == "media":
            return 200, {}, _json(self.bucket.put(bucket, query["name"], body, query))
        if kind == "multipart":
            about, content = _two_parts(self.headers["Content-Type"], body)
            name = query.get("name") or about["name"]
            return 200, {}, _json(self.bucket.put(bucket, name, content, query))
        about = json.loads(body or b"{}")
        name = query.get("name") or about["name"]
        upload = f"upload-{len(self.bucket._uploads)}"
        self.bucket._check(bucket, name, query)
        self.bucket._uploads[upload] = (bucket, name, query, bytearray())
        where = f"{self.bucket.url}/upload/storage/v1/b/{bucket}/o?upload_id={upload}"
        return 200, {"Location": where}, b""

    def _continue_upload(self, upload, body) -> tuple[int, dict[str, str], bytes]:
        bucket, name, conditions, so_far = self.bucket._uploads[upload]
        extent, _, total = self.headers.get("Content-Range", "bytes */*")[6:].partition("/")
        if extent != "*":
            so_far[int(extent.split("-")[0]) :] = body
        elif "Content-Range" not in self.headers:
            so_far[:], total = body, str(len(body))
        if total != "*" and len(so_far) == int(total):
            return 200, {}, _json(self.bucket.put(bucket, name, so_far, conditions))
        return 308, {"Range": f"bytes=0-{len(so_far) - 1}"} if so_far else {}, b""

    def _batch(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        answers = []
        for line in body.decode().splitlines():
            if line.startswith("DELETE "):
                parts = urllib.parse.urlsplit(line.split()[1]).path.strip("/").split("/")
                bucket, name = urllib.parse.unquote(parts[3]), urllib.parse.unquote(parts[5])
                try:
                    self.bucket.remove(bucket, name, {})
                    answers.append("HTTP/1.1 204 No Content\r\n\r\n")
                except (_Refused, KeyError):
                    answers.append('HTTP/1.1 404 Not Found\r\n\r\n{"error": {"code": 404}}\r\n')
        whole = "".join(f"--batch\r\nContent-Type: application/http\r\n\r\n{a}" for a in answers)
        return (
            200,
            {"Content-Type": "multipart/mixed; boundary=batch"},
            f"{whole}--batch--".encode(),
        )


def _two_parts(content_type: str, body: bytes) -> tuple[dict, bytes]:
    """Returns an object's description and its content, of a multipart upload."""
    boundary = content_type.split("boundary=")[1].strip("'\"").encode()
    _, first, rest = body.split(b"--" + boundary, 2)
    second = rest[: rest.rindex(b"--" + boundary + b"--")]
    parts = []
    for part in (first, second):
        mark = b"\r\n\r\n" if b"\r\n\r\n" in part[:400] else b"\n\n"
        content = part.split(mark, 1)[1]
        parts.append(content.removesuffix(b"\r\n" if mark == b"\r\n\r\n" else b"\n"))
    return json.loads(parts[0]), parts[1]


def _json(value) -> bytes:
    return json.dumps(value).encode()


# --- In tests -------------------------------------------------------------------------------------


@functools.cache
def _server() -> Bucket:
    """Returns the one server of this process: some clients read where it is only once."""
    return Bucket()


def served(monkeypatch, cache):
    """Yields the server, which every client takes for Google's, with an empty gs://bucket."""
    from t5jax.data.sources import files

    server = _server()
    server.buckets.clear()
    server.buckets["bucket"] = {}
    server.faults.clear()
    server.requests.clear()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("T5JAX_CACHE", str(cache))
    monkeypatch.setattr(files, "ANSWER_WITHIN", 600.0)  # Of a machine that has much else to do.
    buckets.check_bucket.cache_clear()
    yield server
    buckets.check_bucket.cache_clear()
