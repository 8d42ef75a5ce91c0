"""A secret that is planted where users have theirs is in nothing that is printed or saved."""

import json
import logging
import subprocess
import sys
import textwrap
import warnings

import pytest

import tiny
from command_line import run
from t5jax.cli import main
from t5jax.config import to_json
from t5jax.data import stamps
from t5jax.monitor import environment
from t5jax.secrets import redact
from tiny import contents, make_config, one_device  # noqa: F401

SECRET = "Xk7-planted-9Qz"
# In parts, so that nobody takes them for real ones.
HF, OPENAI = "hf" + "_abcdefghijklmnopqrstuvwx", "sk" + "-proj-abcdefghijklmnop1234"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"postgresql://me:{SECRET}@host:5432/db", "postgresql://me:***@host:5432/db"),
        (f"https://{SECRET}@host/data.jsonl is gone", "https://***@host/data.jsonl is gone"),
        (
            f"https://host/x?a=1&access_token={SECRET}&b=2",
            "https://host/x?a=1&access_token=***&b=2",
        ),
        (
            f"train x --tracker.api-key {SECRET} --steps 3",
            "train x --tracker.api-key *** --steps 3",
        ),
        (f"HF_TOKEN={SECRET} t5jax", "HF_TOKEN=*** t5jax"),
        (f"401: Bearer {SECRET}", "401: Bearer ***"),
        (f"log in with {HF}, or {OPENAI}", "log in with hf_***, or sk-***"),
    ],
)
def test_a_secret_is_hidden(text, shown):
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "the tokenizer /home/me/tokenizer.json has no token that ends a text",
        "train x --data.vocabulary bytes --eval.max-tokens 123456789 --train.steps=100000000",
        "gs://bucket/runs/a@b: no checkpoint; see https://host:8080/path?page=12345678",
        "eos_token is '</s>_longer_than_8', expected tokens=12345678 of a key=value pair",
    ],
)
def test_other_text_is_left_as_it_is(text):
    assert redact(text) == text


def test_what_is_logged_hides_it_though_a_library_logs_first():
    """absl, which Orbax imports, sets up logging in a form of its own where nobody has."""
    code = f"""
        import logging
        from absl import logging as absl
        from t5jax.cli import main
        main(["nothing"])
        absl.info("first")
        logging.getLogger("t5jax.x").warning("postgresql://me:{SECRET}@host")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    assert lines[1:] == ["t5jax: WARNING: postgresql://me:***@host"]


def test_values_of_variables_that_are_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("TOKENIZERS_FOLDER", "no-secret-here")
    file = tmp_path / "key-of-a-service.json"
    file.write_text("")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    text = f"refused: {SECRET}; {file} in no-secret-here"
    assert redact(text) == f"refused: ***; {file} in no-secret-here"


def test_planted_in_a_run_it_is_nowhere(monkeypatch, capsys, tmp_path):
    """In variables, on the command line, and in what libraries log and warn."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    path = tmp_path / "config.json"
    path.write_text(to_json(make_config(tmp_path / "run", train={"steps": 1}, eval=tiny.NO_EVAL)))
    url = f"postgresql://me:{SECRET}x@host/db"
    monkeypatch.setattr("sys.argv", ["t5jax", "train", str(path), "--storage", url])
    told = []
    real = environment.record

    def record(folder, devices):
        logging.getLogger("of.a.library").error("refused %s", SECRET)
        warnings.warn(f"cannot reach {url}", stacklevel=1)
        told.append(folder)
        real(folder, devices)

    monkeypatch.setattr(environment, "record", record)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, out, err = run(capsys, "train", path)
    assert status == 0, err
    assert told
    assert SECRET not in out + err
    for name, content in contents(tmp_path / "run").items():
        assert SECRET.encode() not in content, name
    (start,) = environment.read(tmp_path / "run")
    assert start["command"].endswith("--storage postgresql://me:***@host/db")


@pytest.mark.parametrize(
    "args",
    [
        ["train", "{config}", "--init.model", "{url}"],
        ["train", "{config}", "--run-dir", "{url}"],
        ["eval", "{url}"],
        ["infer", "{url}", "--prompt", "a"],
        ["export", "{url}", "out"],
        ["serve", "{url}"],
        ["compress", "{url}", "out", "--weights", "int8"],
        ["import", "{url}", "out"],
        ["report", "{url}"],
        ["runs", "{url}"],
        ["cache", "capitals", "{url}", "--task-files", tiny.TASK_FILE],
        ["sweep", "{config}", "--space", "train.seed=choice(1,2)", "--run-dir", "{url}"],
        ["sweep", "{config}", "--space", "train.seed=choice(1,2)", "--storage", "{url}"],
        ["{url}"],
    ],
    ids=lambda args: " ".join(args[:1]),
)
def test_no_command_says_the_password_in_a_url(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(to_json(make_config(tmp_path / "run", train={"steps": 1})))
    url = f"https://me:{SECRET}@host.invalid/model"
    words = [word.format(config=config, url=url) for word in args]
    try:
        status = main(words)
    except SystemExit as error:  # tyro's own answer.
        status = error.code
    out, err = capsys.readouterr()
    assert status not in (0, None)
    assert SECRET not in out + err
    for name, content in contents(tmp_path).items():
        assert SECRET.encode() not in content, name


def test_stamps_of_files_keep_no_password(monkeypatch):
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda path: (MemoryFileSystem(), "/a"))
    monkeypatch.setattr(MemoryFileSystem, "ukey", lambda self, name: "7")
    url = f"https://me:{SECRET}@host/a.jsonl"
    found = stamps.stamp_files([url])
    assert SECRET not in json.dumps(found)
    assert stamps.changed_file(found, [url]) is None
