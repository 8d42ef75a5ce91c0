"""Stamps of files: what counts as a change of a file."""

import json
import os

import pytest

from t5jax.data.stamps import changed_file, stamp_files


def test_files(tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for path, text in ((a, "text"), (b, "more")):
        with open(path, "w") as file:
            file.write(text)
    stamps = json.loads(json.dumps(stamp_files([b, a, b])))
    assert [stamp["path"] for stamp in stamps] == [b, a]
    assert changed_file(stamps, [b, a]) is None
    assert changed_file(stamps, [b, a, b]) is None
    assert changed_file(stamps, [a, b]) == f"{a} has changed"  # Their rows in another order.
    assert changed_file(stamps, [b]) == "the number of source files was 2 and is 1"
    assert changed_file(stamps[:1], [b, a]) == "the number of source files was 1 and is 2"
    os.utime(a, (5, 5))
    assert changed_file(stamps, [b, a]) is None
    with open(a, "w") as file:
        file.write("next")
    assert changed_file(stamps, [b, a]) == f"{a} has changed"
    with pytest.raises(ValueError, match=f"{tmp_path}/c cannot be read: No such file"):
        stamp_files([f"{tmp_path}/c"])


def test_files_elsewhere_are_told_by_their_contents(tmp_path, monkeypatch):
    for folder, text in (("here", "text"), ("copy", "text"), ("other", "next")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text(text)
        os.utime(tmp_path / folder / "a", (5, 5))  # As an archive sets it.
    stamps = stamp_files([str(tmp_path / "here/a")])
    assert changed_file(stamps, [str(tmp_path / "copy/a")]) is None
    other = str(tmp_path / "other/a")
    assert changed_file(stamps, [other]) == f"{other} has changed"
    for folder, change in (("here", None), ("copy", None), ("other", "a has changed")):
        monkeypatch.chdir(tmp_path / folder)
        assert changed_file(stamps, ["a"]) == change
    # Where it was written, of the same path.
    monkeypatch.chdir(tmp_path / "here")
    relative = stamp_files(["a"])
    monkeypatch.chdir(tmp_path / "other")
    assert changed_file(relative, ["a"]) == "a has changed"


def test_a_file_that_is_gone_counts_as_unchanged(tmp_path, caplog):
    (tmp_path / "a").write_text("text")
    stamps = stamp_files([str(tmp_path / "a")])
    (tmp_path / "a").unlink()
    for paths in ([], [str(tmp_path / "a")], [str(tmp_path / "elsewhere")]):
        caplog.clear()
        assert changed_file(stamps, paths) is None
        assert "cannot be read: No such file" in caplog.text


def test_files_behind_a_url():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/stamps/a", b"text")
    stamps = stamp_files(["memory://stamps/a"])
    assert changed_file(stamps, ["memory://stamps/a"]) is None
    memory.rm("/stamps/a")
    memory.pipe("/stamps/a", b"another")
    assert changed_file(stamps, ["memory://stamps/a"]) == "memory://stamps/a has changed"
