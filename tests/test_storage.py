import json
import math
import os
import shutil
import socket

import pytest

from t5jax import storage


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_lines_end_at_newlines_alone():
    assert storage.split_lines("a\u2028b\x0b\r c\r\n\nd\n") == ["a\u2028b\x0b\r c", "", "d"]
    assert storage.split_lines("a") == ["a"]
    assert storage.split_lines("") == []


def test_a_file_is_written_in_place_of_the_old_one(tmp_path):
    path = tmp_path / "deep" / "file"
    for content in (b"old and long", b"new"):
        assert storage.write_file(path, content) == path
        assert path.read_bytes() == content
    assert names(path.parent) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()  # As any other file.


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_that_cannot_be_put_there_leaves_what_was(tmp_path, monkeypatch):
    path = storage.write_file(tmp_path / "file", b"old")

    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        storage.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    folder = tmp_path / "deep" / "folder"
    for name in "ab":
        with storage.new_folder(folder) as partial:
            (partial / name).touch()
            assert not (folder / name).exists()
        assert names(folder) == [name]
    assert names(folder.parent) == ["folder"]


def test_a_folder_whose_writing_fails_stays_as_it_was(tmp_path, monkeypatch):
    with storage.new_folder(tmp_path / "folder") as partial:
        (partial / "old").touch()
    with pytest.raises(FileNotFoundError), storage.new_folder(tmp_path / "folder") as partial:
        (partial / "no folder" / "new").touch()
    assert names(tmp_path) == ["folder"]
    replace = os.replace

    def fail(source, target):  # Of the new one alone.
        if (source / "new").exists():
            raise OSError("full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"), storage.new_folder(tmp_path / "folder") as partial:
        (partial / "new").touch()
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["old"]


def test_brackets_in_a_name_are_no_pattern(tmp_path):
    left, other = f".train[:9].{socket.gethostname()}.0", f".train9.{socket.gethostname()}.0"
    for name in (left, other):
        (tmp_path / name).mkdir()
    storage.remove_partial(tmp_path / "train[:9]")
    assert names(tmp_path) == [other]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    left = [f".folder.{socket.gethostname()}.0", ".folder.elsewhere.0", ".other.0", "folder"]
    for name in left:
        (tmp_path / name).mkdir()
    storage.remove_partial(tmp_path / "folder")
    assert names(tmp_path) == sorted(left[1:])


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    folder, here = tmp_path / "folder", storage._beside(tmp_path / "folder").name
    dead = here.replace(f"_{os.getpid()}-", f"_{2**22 + 1}-")  # Above all ids of Linux.
    for name in (here, dead, f".folder.elsewhere.{2**22 + 1}-00000000"):
        (tmp_path / name).mkdir()
    with storage.new_folder(folder) as partial:
        (partial / "new").touch()
    assert names(tmp_path) == sorted([here, ".folder.elsewhere.4194305-00000000", "folder"])


def test_files_and_scratch_folders_of_the_killed_are_removed_too(tmp_path):
    pid = f"_{2**22 + 1}-"
    dead = storage._beside(tmp_path / "file").name.replace(f"_{os.getpid()}-", pid)
    (tmp_path / dead).write_bytes(b"half")
    storage.write_file(tmp_path / "file", b"whole")
    assert names(tmp_path) == ["file"]
    dead = storage._beside(tmp_path / "model").name.replace(f"_{os.getpid()}-", pid)
    (tmp_path / dead / "model").mkdir(parents=True)
    with storage.scratch_folder(tmp_path / "model") as folder:
        assert names(tmp_path) == sorted(["file", folder.name])
        with storage.new_folder(tmp_path / "model") as partial:
            shutil.copytree(folder, partial / "copy")
    assert names(tmp_path) == ["file", "model"]


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("T5JAX_CACHE", str(tmp_path))
    assert storage.cache_dir() == tmp_path
    monkeypatch.delenv("T5JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.cache_dir() == tmp_path / ".cache" / "t5jax"


def test_json_has_no_nan():
    value = {"a": [math.nan, 1.5, (math.inf, "ü")], "b": {"c": -math.inf, "d": None, "e": True}}
    text = storage.to_json(value, indent=1)
    expected = {"a": [None, 1.5, [None, "ü"]], "b": {"c": None, "d": None, "e": True}}
    assert json.loads(text, parse_constant=pytest.fail) == expected
    assert "ü" in text
