"""Models by name: found here, downloaded from a hub of ours, or taken from the cache."""

import http.server
import json
import re
import shutil
import threading

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from conformance.cases import random_params
from conformance.families import T5 as SMALL
from t5jax.hf import io
from t5jax.hf.hub import _needed, resolve


@pytest.fixture
def folder(tmp_path):
    """A whole model."""
    io.save_params(tmp_path / "model", SMALL, random_params(SMALL))
    return tmp_path / "model"


def assert_loads(folder):
    params = io.load_params(folder, io.read_config(folder))
    jax.tree.map(np.testing.assert_array_equal, params, random_params(SMALL))


def test_resolve_finds_folders_and_refuses_paths(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; expected the folder"):
        resolve(tmp_path / "file")
    with pytest.raises(ValueError, match=r"there is no folder \./nowhere/model; give one that"):
        resolve("./nowhere/model")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Points huggingface_hub at an empty cache and a server that a test may start."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def use(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            url + "/{repo_id}/resolve/{revision}/{filename}",
        )

    use("http://127.0.0.1:9")  # Nobody listens there.
    return use


def test_no_network_and_no_copy(hub):
    with pytest.raises(
        ValueError, match="somebody/model is no folder here, the hub cannot be"
    ) as e:
        resolve("somebody/model")
    assert "give its folder" in str(e.value)
    assert "\n" not in str(e.value)


def test_no_network_but_a_copy_in_the_cache(hub, folder, tmp_path):
    commit = "0" * 39 + "1"
    repo = tmp_path / "cache" / "models--somebody--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)
    with pytest.warns(UserWarning, match="somebody/model is taken from its cache"):
        found = resolve("somebody/model")
    assert_loads(found)


def test_files_that_are_downloaded():
    small = ["config.json", "spiece.model", "tokenizer.json", "vocab.txt"]
    other = ["README.md", "flax_model.msgpack", "tf_model.h5", "onnx/model.safetensors", "x.bin"]
    binary = ["pytorch_model.bin"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert _needed(small + other + binary + shards) == small + shards
    assert _needed(small + other + binary) == small + binary


def test_download(hub, folder):
    """From a server that speaks as much of the hub's protocol as a download needs."""
    commit = "0" * 39 + "2"
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    (folder / "README.md").write_text("not wanted")
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked.append(self.path)
            names = sorted(p.name for p in folder.iterdir())
            sizes = {name: (folder / name).stat().st_size for name in names}
            if re.match(r"/api/models/somebody/model(/revision/\w+)?(\?|$)", self.path):
                siblings = [{"rfilename": name} for name in names]
                self.answer(json.dumps({"id": "m", "sha": commit, "siblings": siblings}).encode())
            elif self.path.startswith(f"/api/models/somebody/model/tree/{commit}"):
                entries = [
                    {"type": "file", "path": n, "size": sizes[n], "oid": f"{i:040}"}
                    for i, n in enumerate(names)
                ]
                self.answer(json.dumps(entries).encode())
            elif (name := self.path.rpartition("/")[2]) in names:
                self.answer((folder / name).read_bytes(), f'"{names.index(name):040}"')
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET

        def answer(self, body, etag=None):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            if etag:
                self.send_header("ETag", etag)
                self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        hub(f"http://127.0.0.1:{server.server_port}")
        found = resolve("somebody/model")
        assert resolve("somebody/model", "v2") == found
        assert any("/revision/v2" in path for path in asked)
        with pytest.raises(ValueError, match="somebody/none is neither a folder here nor a model"):
            resolve("somebody/none")
    finally:
        server.shutdown()
        server.server_close()
    names = {p.name for p in found.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert not [path for path in asked if "pytorch_model" in path]
    assert_loads(found)
    # Afterwards without the hub.
    with pytest.warns(UserWarning, match="is taken from its cache"):
        assert resolve("somebody/model") == found
