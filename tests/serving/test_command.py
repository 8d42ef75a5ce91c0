"""`t5jax serve`: what it refuses before a model is loaded, and how models are named."""

import socket

import pytest

from command_line import fails, run
from t5jax.commands.serve import _models, read_keys
from t5jax.serving.protection import is_loopback

KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give one or more"),
        (("model", "--host", "0.0.0.0"), "--api-key-file"),
        (("model", "--host", "example.com"), "--api-key-file"),
        (("model", "--slots", "0"), "--slots is 0"),
        (("model", "--port", "70000"), "--port is 70000"),
        (("model", "--max-seconds", "0"), "--max-seconds"),
        (("model", "--api-key-file", "nowhere"), "nowhere"),
        (("a=x", "--model", "a=y"), "two models"),
        (("=x",), "NAME=MODEL"),
        (("model", "--slot", "3"), "--slots"),
        (("model", "--max-seconds", "inf"), "--max-seconds is inf; it must be a finite number"),
        (("model", "--drain-seconds", "inf"), "--drain-seconds is inf"),
        (("model-that-is-nowhere-at-all/", "--port", "0"), "model-that-is-nowhere-at-all"),
    ],
)
def test_mistakes(capsys, args, message):
    assert message in fails(capsys, "serve", *args)


def test_an_address_is_tried_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = fails(capsys, "serve", "model", "--port", port)
    assert f"cannot listen on --host 127.0.0.1 --port {port}: Address already in use" in message


def test_help_names_every_option(capsys):
    status, out, _ = run(capsys, "serve", "--help")
    assert not status
    for option in ("MODEL", "--host", "--api-key-file", "--slots", "--max-length", "--drain"):
        assert option in out


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no key"), ("# only a comment\n", "no key"), ("hush7\n", "key 1"), ("a b" * 9, "key 1")],
)
def test_keys_that_are_none(tmp_path, content, message):
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_keys(file)
    shown = str(error.value).replace(str(file), "")
    assert "hush7" not in shown, "a key must not be shown"


def test_keys_are_lines(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# mine\n{KEY}\n\n  {KEY}2  \n")
    assert read_keys(file) == (KEY, f"{KEY}2")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "[::1]"])
def test_this_machine(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.evil.com"])
def test_other_machines(host):
    assert not is_loopback(host)


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    models, rest = _models(
        ["runs/mine", "google/flan-t5-small", "--model", "b=x", "--port", "3", "--model=c=y=z"]
    )
    assert models == {
        "mine": "runs/mine",
        "google/flan-t5-small": "google/flan-t5-small",
        "b": "x",
        "c": "y=z",
    }
    assert rest == ["--port", "3"]
