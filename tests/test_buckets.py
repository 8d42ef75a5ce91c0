"""Objects in buckets, from a stand-in that speaks the protocol of Google Cloud Storage."""

import importlib.util
import os
import time

import pytest

from t5jax import buckets, storage


def objects(bucket) -> dict[str, bytes]:
    return bucket.buckets["bucket"]


def place(name: str):
    return storage.path(f"gs://bucket/{name}")


# --- Places ---------------------------------------------------------------------------------------


def test_a_path_in_a_bucket_is_what_it_says_however_it_comes(bucket, tmp_path):
    for given in ("gs://bucket/a/b", "gs://bucket/a/b/", type(tmp_path)("gs://bucket/a/b")):
        assert str(storage.path(given)) == "gs://bucket/a/b"
    path = place("a/b")
    assert (path.name, str(path.parent / "c")) == ("b", "gs://bucket/a/c")
    assert str(path.absolute()) == str(path.expanduser()) == "gs://bucket/a/b"
    assert storage.path("~/x") == type(tmp_path)("~/x").expanduser()
    objects(bucket)["a/b/c"] = b"x"
    assert path.is_dir()
    assert not path.is_file()
    assert (path / "c").is_file()
    assert [p.name for p in path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s3://bucket/run", "the path is s3://bucket/run; expected a path of this machine or gs:"),
        ("az://c/run", "expected a path of this machine or gs://BUCKET/NAME"),
        ("https://x.org/run", "expected a path of this machine or gs://BUCKET/NAME"),
        ("gs://", "the path is gs://, which names no bucket"),
        ("gs://Bucket/run", "which names no bucket; expected gs://BUCKET/NAME"),
        ("", "the path is empty; expected a path"),
        ("gs://elsewhere/run", "there is no bucket elsewhere; check the name, or make it: gcloud"),
    ],
)
def test_a_place_that_cannot_be_is_refused(bucket, name, message):
    with pytest.raises(ValueError, match=message):
        storage.path(name)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "no rights to gs://bucket .*Storage Object User and Storage Legacy Bucket Reader"),
        (401, "no credentials of Google Cloud that count .*gcloud auth application-default login"),
        (503, r"gs://bucket: Google Cloud Storage does not answer as it should .*several tries"),
    ],
)
def test_what_a_bucket_refuses_comes_with_the_remedy(bucket, monkeypatch, status, message):
    async def at_once(_):
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    with bucket.fault(status=status) as fault, pytest.raises(ValueError, match=message):
        place("x")
    assert 1 <= fault.seen <= 8
    place("x")  # What was refused once is asked again.


def test_without_the_extra_it_is_named(bucket, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gcsfs" else find(name, *a)
    )
    buckets.configure.cache_clear()
    buckets.path_class.cache_clear()
    with pytest.raises(ValueError, match=r"gs:// needs gcsfs.*pip install 't5jax\[gcs\]'"):
        storage.path("gs://bucket/run")


def test_the_cache_itself_is_of_this_machine(monkeypatch):
    monkeypatch.setenv("T5JAX_CACHE", "gs://bucket/cache")
    with pytest.raises(ValueError, match="T5JAX_CACHE is gs://bucket/cache; expected a folder of"):
        storage.cache_dir()


# --- Objects --------------------------------------------------------------------------------------


def test_an_object_is_written_as_a_whole_and_found_page_by_page(bucket):
    bucket.page_size = 2
    for number in range(5):
        storage.write_file(place(f"folder/{number}"), b"x" * number)
    bucket.page_size = 1000
    storage.write_file(place("folder/3"), b"new")
    found = storage.files(place("folder"))
    assert {name: size for name, (size, _) in found.items()} == {
        **{"0": 0, "1": 1, "2": 2, "3": 3, "4": 4}
    }
    assert found["3"][1] > found["4"][1]  # Written later.
    storage.remove(place("folder/3"))
    storage.remove(place("folder/3"))  # It is gone, as asked.
    assert bucket.names() == [f"folder/{n}" for n in (0, 1, 2, 4)]


def test_of_two_who_create_a_file_one_succeeds(bucket, tmp_path):
    for path in (place("lock"), tmp_path / "lock"):
        assert storage.create(path, b"mine")
        assert not storage.create(path, b"theirs")
    assert objects(bucket)["lock"] == (tmp_path / "lock").read_bytes() == b"mine"


def test_errors_that_pass_are_tried_again(bucket, monkeypatch):
    async def at_once(_):
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    path = place("file")
    with bucket.fault(status=503, times=2, method="POST") as fault:
        storage.write_file(path, b"content")
    assert fault.seen == 2
    with bucket.fault(cut=True, times=1, name="alt=media") as fault:
        assert storage.local(path).read_bytes() == b"content"
    assert fault.seen == 1


# --- Copies ---------------------------------------------------------------------------------------


def test_a_copy_is_made_once_and_again_when_it_has_changed(bucket):
    objects(bucket).update({"m/config.json": b"{}", "m/deep/w": b"w", "m/big": b"x" * 100})
    copy = storage.local(place("m"), lambda names: [n for n in names if n != "big"])
    assert {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()} == {
        *("config.json", "deep/w")
    }
    reads = len([r for r in bucket.requests if "alt=media" in r])
    assert storage.local(place("m"), lambda names: [n for n in names if n != "big"]) == copy
    assert len([r for r in bucket.requests if "alt=media" in r]) == reads
    storage.write_file(place("m/config.json"), b"[]")
    other = storage.local(place("m"), lambda names: [n for n in names if n != "big"])
    assert (other / "config.json").read_bytes() == b"[]"
    assert (copy / "config.json").read_bytes() == b"{}"  # Who reads it still does.
    os.utime(copy.parent, (0, 0))
    storage.local(place("m"), lambda names: [n for n in names if n != "big"])
    assert not copy.exists()
    with pytest.raises(ValueError, match="there is no model gs://bucket/none; check the name"):
        storage.local(place("none"), what="model")


def test_a_copy_that_is_not_what_was_written_is_refused(bucket):
    objects(bucket)["file"] = b"content"
    with bucket.fault(cut=True, name="alt=media"), pytest.raises(ValueError, match="gs://bucket"):
        buckets.download("gs://bucket/file", {"": buckets.Object(9, "1")}, storage.cache_dir())


def test_no_object_is_copied_out_of_its_folder(bucket):
    objects(bucket)["m/../../evil"] = b"x"
    with pytest.raises(ValueError, match=r"\.\./\.\./evil is no name of a file"):
        storage.local(place("m"))


def test_a_copy_needs_room(bucket, monkeypatch):
    objects(bucket)["file"] = b"content"
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(ValueError, match="make room, set T5JAX_CACHE .*or mount the bucket"):
        storage.local(place("file"))


class Usage:
    free = 3


# --- Folders --------------------------------------------------------------------------------------


def write_folder():
    with storage.new_folder(place("out"), "config.json") as partial:
        for name in ("a", "config.json", "z"):
            (partial / name).write_bytes(b"newest")


def test_a_folder_is_complete_with_its_last_file(bucket):
    objects(bucket).update({"out/config.json": b"old", "out/old": b"old", "outer": b"kept"})
    with storage.new_folder(place("out"), "config.json") as partial:
        for name in ("a", "config.json", "z"):
            (partial / name).write_bytes(b"new")
        assert objects(bucket)["out/config.json"] == b"old"
    assert bucket.names() == ["out/a", "out/config.json", "out/z", "outer"]
    assert objects(bucket)["out/config.json"] == b"new"
    # Stopped in between: no mixture of old and new counts as a folder.
    refuse = bucket.fault(status=403, method="POST", name='"name": "out/z"')
    with refuse, pytest.raises(ValueError, match="no rights to gs://bucket/out/z"):
        write_folder()
    assert "out/config.json" not in objects(bucket)
    assert not list(storage.cache_dir().glob("upload-*"))


# --- Files that grow ------------------------------------------------------------------------------


def test_what_grows_is_joined_to_what_is_there(bucket, monkeypatch):
    monkeypatch.setattr("t5jax.buckets.growing._APPENDS_ABOVE", 4)
    objects(bucket)["out.jsonl"] = b"first\n"
    with storage.staged(place("out.jsonl"), beside=[".run.json"], every=1000) as staged:
        assert staged.path.read_bytes() == b"first\n"
        with staged.path.open("ab") as file:
            file.write(b"second\n")
        staged.path.with_name("out.jsonl.run.json").write_bytes(b"{}")
        staged.sync()
        assert objects(bucket)["out.jsonl"] == b"first\nsecond\n"
        assert sum("compose" in r for r in bucket.requests) == 1
        staged.sync()  # Nothing has changed.
        assert sum("compose" in r for r in bucket.requests) == 1
        # Rewritten, in the same place or in another: sent anew.
        staged.path.write_bytes(b"other, and longer than before\n")
        staged.sync()
        assert objects(bucket)["out.jsonl"] == b"other, and longer than before\n"
        storage.write_file(staged.path, b"short\n")
    assert objects(bucket) == {"out.jsonl": b"short\n", "out.jsonl.run.json": b"{}"}
    assert not list((storage.cache_dir() / "staged").iterdir())


def test_what_another_process_has_written_is_not_joined_to(bucket, monkeypatch):
    monkeypatch.setattr("t5jax.buckets.growing._APPENDS_ABOVE", 4)
    objects(bucket)["log"] = b"first\n"

    def write_beside_another():
        with storage.staged(place("log"), every=1000) as staged:
            storage.write_file(place("log"), b"theirs\n")
            with staged.path.open("ab") as file:
                file.write(b"second\n")

    with pytest.raises(ValueError, match=r"gs://bucket/log has been written by another .*lies in"):
        write_beside_another()
    assert objects(bucket)["log"] == b"theirs\n"
    (kept,) = (storage.cache_dir() / "unsent").iterdir()
    assert (kept / "log").read_bytes() == b"first\nsecond\n"


def test_a_thread_uploads_meanwhile_and_a_killed_process_leaves_no_copy(bucket):
    left = storage.cache_dir() / "staged" / "0123"
    left.mkdir(parents=True)
    with (
        storage.staged(place("other"), folder=True) as other,
        storage.staged(place("run"), folder=True, every=0.02) as staged,
    ):
        assert not left.exists()
        assert other.path.exists()
        (staged.path / "log").write_text("line\n")
        until = time.monotonic() + 60
        while "run/log" not in bucket.names():
            assert time.monotonic() < until
            time.sleep(0.02)


def test_a_process_that_does_not_write_uploads_nothing(bucket):
    objects(bucket).update({"run/log": b"x", "run/state": b"y"})
    fetch = "log".__eq__
    with storage.staged(place("run"), folder=True, fetch=fetch, writes=False) as staged:
        assert [p.name for p in staged.path.iterdir()] == ["log"]
        (staged.path / "log").write_bytes(b"z")
        staged.sync()
    assert objects(bucket)["run/log"] == b"x"


def test_the_stand_in_speaks_as_the_service_does(bucket):
    """What the tests above rest on: of a client whose own errors are known."""
    fs = buckets.filesystem()
    fs.pipe_file("bucket/a", b"0123456789")
    assert fs.cat_file("bucket/a", 2, 5) == b"234"
    with pytest.raises(FileNotFoundError):
        fs.cat_file("bucket/b")
    fs.mv("bucket/a", "bucket/b")
    fs.cp("bucket/b", "bucket/c")
    assert fs.ls("bucket") == ["bucket/b", "bucket/c"]
    with fs.open("bucket/large", "wb", block_size=2**18) as file:  # Resumable, in pieces.
        file.write(b"x" * (2**19 + 5))
    assert fs.info("bucket/large")["size"] == 2**19 + 5
