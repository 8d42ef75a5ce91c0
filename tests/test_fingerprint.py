import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest

from t5jax.data.fingerprint import changed_file, describe, digest, stamp_files

BASE = """
    import functools, re
    SUFFIXES = ["a", "b"]
    PATTERN = re.compile("x+")
    memory = {}

    def helper(text):
        return text + SUFFIXES[0]

    @functools.cache
    def rows():
        memory["read"] = True
        return [helper(PATTERN.sub("y", text)) for text in ("p", "q") if text in {"p", "q", "r"}]

    class Step:
        limit = 3
        def __call__(self, row):
            return row[:3]

    task = functools.partial(map, lambda row: Step()(row), rows)
"""


def load(code: str) -> dict:
    """Returns the names of a module with this code, described as a task file's."""
    names = {"__name__": "t5jax_task_example"}
    exec(compile(textwrap.dedent(code), "/home/user/tasks/example.py", "exec"), names)
    return names


def of_task(code: str):
    return describe(load(code)["task"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return text + SUFFIXES[0]", "return SUFFIXES[0] + text"),
        ('["a", "b"]', '["c", "b"]'),
        ('"x+"', '"x"'),
        ('"x+"', '"x+", re.I'),
        ("row[:3]", "row[:4]"),
        ("map,", "filter,"),
        ('("p", "q")', '("p", "s")'),
        ("Step()(row)", "Step()(row) * 2"),
    ],
)
def test_what_code_does_counts(old, new):
    assert old in BASE
    assert of_task(BASE) != of_task(BASE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return text + SUFFIXES[0]", "return text + SUFFIXES[0]  # As ever."),
        ("    memory = {}\n", "\n\n    memory = {}\n"),
        ("import functools, re", "import re, functools, os"),
    ],
)
def test_how_it_is_written_does_not(old, new):
    assert old in BASE
    assert of_task(BASE) == of_task(BASE.replace(old, new))


def test_reading_changes_nothing():
    names = load(BASE)
    before = describe(names["task"])
    names["rows"]()
    assert names["memory"]
    assert describe(names["task"]) == before
    assert json.loads(json.dumps(before)) == before


def test_it_is_the_same_in_every_process():
    code = (
        f"from t5jax.data.fingerprint import describe\nnames = {{'__name__': 'm'}}\n"
        f"exec(compile({textwrap.dedent(BASE)!r}, '/home/m.py', 'exec'), names)\n"
        "print(describe(names['task']))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in "123"
    }
    assert len(found) == 1


def test_values():
    @dataclasses.dataclass(frozen=True)
    class Settings:
        size: int
        names: tuple = ()

    def closure(suffix):
        return lambda text: text + suffix

    different = [
        Settings(1),
        Settings(2),
        Settings(1, ("a",)),
        closure("a"),
        closure("b"),
        functools.partial(int, base=2),
        functools.partial(int, base=3),
        "text",
        b"text",
        1,
        True,
        None,
        1.5,
        ["a"],
        {"a": 1},
        re.compile("a"),
        len,
        sorted,
    ]
    digests = [repr(describe(value)) for value in different]
    assert len(set(digests)) == len(different)
    assert describe(closure("a")) == describe(closure("a"))
    assert describe({"b", "a", "c"}) == describe({"c", "b", "a"})
    assert digest(Settings(1)) == digest(Settings(1))


def test_cycles_end():
    row = {"name": "row"}
    row["self"] = row

    class Node:
        pass

    node = Node()
    node.next = node
    assert describe(row) == {"name": "row", "self": "see 0"}
    assert "see" in repr(describe(node))


def test_files(tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for path in (a, b):
        with open(path, "w") as file:
            file.write("text")
    stamps = stamp_files([b, a])
    assert changed_file(stamps, [a, b]) is None
    assert changed_file(stamps, [a]) == f"there are other source files ({b}, for one)"
    os.utime(a, (5, 5))
    assert changed_file(stamps, [a, b]) is None
    with open(a, "w") as file:
        file.write("next")
    assert changed_file(stamps, [a, b]) == f"{a} has changed"
    with pytest.raises(ValueError, match=f"{tmp_path}/c cannot be read: No such file"):
        stamp_files([f"{tmp_path}/c"])


def test_files_behind_a_url():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/stamps/a", b"text")
    stamps = stamp_files(["memory://stamps/a"])
    assert changed_file(stamps, ["memory://stamps/a"]) is None
    memory.rm("/stamps/a")
    memory.pipe("/stamps/a", b"another")
    assert changed_file(stamps, ["memory://stamps/a"]) == "memory://stamps/a has changed"
