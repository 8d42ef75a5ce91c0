import dataclasses
import functools
import json
import linecache
import os
import re
import subprocess
import sys
import textwrap
import types

import pytest

from t5jax.data.fingerprint import describe, digest
from t5jax.data.sources.kinds import jsonl

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


def load(code: str, *, module="t5jax_task_example", has_source=True, file="", **names) -> dict:
    """Returns the names of a module with this code, whose source is there, or not."""
    code = textwrap.dedent(code)
    file = file or f"/home/user/tasks/example_{has_source}_{hash(code)}.py"
    if has_source:
        linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    names = {"__name__": module} | names
    exec(compile(code, file, "exec"), names)
    return names


def of_task(code: str, **options):
    return describe(load(code, **options)["task"])


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
        (".sub(", ".split("),  # A method's name.
        ("limit = 3", "limit = 4"),
    ],
)
@pytest.mark.parametrize("has_source", [True, False])
def test_what_code_does_counts(old, new, has_source):
    assert old in BASE
    changed = BASE.replace(old, new)
    assert of_task(BASE, has_source=has_source) != of_task(changed, has_source=has_source)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return text + SUFFIXES[0]", "return text + SUFFIXES[0]  # As ever."),
        ("    memory = {}\n", "\n\n    memory = {}\n"),
        ("import functools, re", "import re, functools, os"),
    ],
)
@pytest.mark.parametrize("has_source", [True, False])
def test_how_it_is_written_does_not(old, new, has_source):
    assert old in BASE
    changed = BASE.replace(old, new)
    assert of_task(BASE, has_source=has_source) == of_task(changed, has_source=has_source)


def test_annotations_and_docstrings_do_not_count():
    changed = BASE.replace(
        "def helper(text):", 'def helper(text: str) -> str:\n        """Adds."""'
    )
    assert of_task(BASE) == of_task(changed)


@pytest.mark.parametrize(
    ("code", "other"),
    [
        ("task = lambda row: row.lower()", "task = lambda row: row.upper()"),
        (
            "def task(row, limit=3): return row[:limit]",
            "def task(row, limit=4): return row[:limit]",
        ),
        ("def task(row, *, limit=3): return row", "def task(row, *, limit=4): return row"),
        ("def task(row, n): return row, n", "def task(row, *, n): return row, n"),
        ("def task(row): return row[1:]", "def task(row): return row[:1]"),
        ("def task(row): return f'{row}a'", "def task(row): return f'{row!r}a'"),
        ("def task(row): return {**row}", "def task(row): return {None: row}"),
        ("def task(row): return 1", "def task(row): return 1.0"),
        ("def task(rows): yield rows", "async def task(rows): yield rows"),
        (
            "LIMIT = 3\ndef task(row): return row[:LIMIT]",
            "LIMIT = 4\ndef task(row): return row[:LIMIT]",
        ),
        (
            "def f(x): return x\nclass A:\n  def g(self): return 1\nclass B(A): pass\ntask = B()",
            "def f(x): return x\nclass A:\n  def g(self): return 2\nclass B(A): pass\ntask = B()",
        ),
        (
            "class A:\n  @property\n  def g(self): return 1\ntask = A()",
            "class A:\n  @property\n  def g(self): return 2\ntask = A()",
        ),
        (
            "class A:\n  @staticmethod\n  def g(x): return x\ntask = A",
            "class A:\n  @staticmethod\n  def g(x): return -x\ntask = A",
        ),
    ],
)
def test_small_changes_count(code, other):
    assert of_task(code) != of_task(other)
    assert of_task(code) == of_task(code + "\n")
    assert of_task(other) == of_task("\n" + other)


def test_functions_in_one_line_are_told_apart():
    line = "a, b, c, d = lambda x: x, lambda x: x + 1, lambda x: lambda y: x, lambda x: lambda y: y"
    names = load(line)
    assert len({digest(names[name]) for name in "abcd"}) == 4
    alone = load("a = lambda x: x\nb = lambda x: x + 1\nc = lambda x: lambda y: x")
    assert all(describe(names[name]) == describe(alone[name]) for name in "abc")
    inner, other = names["c"](1), names["d"](1)
    assert digest(inner) != digest(other)


def test_a_helper_of_another_module_counts():
    def told(code):
        helpers = types.ModuleType("helpers")
        helpers.__dict__.update(load(code, module="helpers"))
        task = "def task(row): return helpers.clean(row)"
        return describe(load(task, has_source=True, helpers=helpers)["task"])

    assert told("def clean(row): return row") != told("def clean(row): return row[1:]")
    assert told("def clean(row): return row") == told("def clean(row): return row  # All.")


def test_the_python_that_runs_it_does_not_count():
    # Computed by Python 3.11 and by 3.12: caches of either are read by the other.
    assert digest(load(BASE)["task"]) == "2f732d51738f214d"
    # What 3.11 and 3.12 parse or compile in different ways.
    line = """a, b = lambda: True, lambda w, x: f"{x:>{w[0]}} {w!r}" if [y for y in w] else u"" """
    assert digest([load(line)[name] for name in "ab"]) == "a25ab7162e8b0c75"


def test_where_our_own_code_lies_does_not_count():
    code = "def step(row): return files.find(row)"
    files = types.ModuleType("t5jax.data.files")
    here = load(code, module="t5jax.data.sources", files=files)["step"]
    there = load("def step(row): return find(row)", module="t5jax.data.a.b")["step"]
    other = load("def step(row): return lose(row)", module="t5jax.data.a.b")["step"]
    assert describe(here) == describe(there) != describe(other)
    task = "def task(row):\n  from t5jax.X import y\n  return y(row)"
    assert of_task(task.replace("X", "data.a")) == of_task(task.replace("X", "data.b"))


def test_a_source_that_was_changed_since_it_was_loaded_is_not_believed():
    file, other = "/home/user/tasks/edited.py", "def task(row): return row[::-1]"
    names = load("def task(row): return row", file=file)
    before = describe(names["task"])
    new = load(other, file=file)
    assert describe(names["task"]) not in (before, describe(new["task"]))
    assert describe(new["task"]) == of_task(other)


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
    assert describe({0, 8}) == describe({8, 0})  # Which iterate in the order they were made in.
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


def test_where_the_files_of_a_source_lie_does_not_count():
    def told(*patterns):
        return describe(jsonl({"train": list(patterns)}))

    same = [told("/a/b/train.jsonl"), told("train.jsonl"), told("gs://bucket/train.jsonl")]
    assert same[0] == same[1] == same[2]
    assert told("/a/*/x/train-*.jsonl") == told("data/*/x/train-*.jsonl")
    different = [told("a/train.jsonl"), told("a/dev.jsonl"), told("a/*.jsonl"), told("*/a.jsonl")]
    assert len({repr(x) for x in different}) == 4
    assert told("a.jsonl", "b.jsonl") != told("b.jsonl", "a.jsonl")
    # A task's own function, which reads a source of its module.
    code = """
        from t5jax.data.sources.kinds import text
        BOOKS = text({"books": "FOLDER/*.md"}, by="file")
        def chapters():
            return BOOKS.rows("books")
    """
    here, there, other = (
        describe(load(code.replace("FOLDER/*", files))["chapters"])
        for files in ("/here/*", "/there/*", "/here/a*")
    )
    assert here == there != other


# --- Other modules of the user --------------------------------------------------------------------

HELPERS = """
    from collections import deque
    table = {"a": 1}
    recent = deque([1])
    seen = {}

    def clean(row):
        seen[row] = 1
        return table[row], recent, seen
"""


@pytest.mark.parametrize(
    "task",
    [
        "import helpers\ndef task(row): return helpers.clean(row)",
        "import package.helpers\ndef task(row): return package.helpers.clean(row)",
        "from package import helpers as h\ndef task(row): return h.clean(row)",
        "def task(row):\n    import helpers\n    return helpers.clean(row)",
        "def task(row):\n    from package.helpers import clean as c\n    return c(row)",
        "import helpers\ndef task(row): return getattr(helpers, 'clean')(row)",
        "import helpers\ndef task(row): return helpers.table, helpers.recent, helpers.seen",
        "from helpers import *\ndef task(row): return clean(row)",
    ],
)
@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ('"a": 1', '"a": 2', True),
        ("deque([1])", "deque([2])", True),
        ("seen = {}", 'seen = {"b": 1}', True),
        ("seen = {}", "seen = {}  # What was there.", False),
    ],
)
def test_modules_of_the_user_count(task, old, new, counts, tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for code in (HELPERS, HELPERS.replace(old, new)):
        for name in ("helpers", "package", "package.helpers"):
            sys.modules.pop(name, None)
        for folder in ("", "package"):
            (tmp_path / folder / "helpers.py").write_text(textwrap.dedent(code))
        linecache.clearcache()
        found.append(of_task(task))
    assert (found[0] != found[1]) == counts


def test_what_functions_change_counts_as_it_is_defined():
    code = """
        known = {"a": 1}
        def task(row):
            known.setdefault(row, len(known))
            return known[row]
    """
    names = load(code)
    before = describe(names["task"])
    names["task"]("b")
    assert describe(names["task"]) == before
    assert of_task(code.replace('"a": 1', '"a": 2')) != before
