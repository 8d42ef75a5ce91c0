"""Sources: every kind of file and data set, steps, counts, and what is wrong with each."""

import bz2
import gzip
import json
import lzma
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from t5jax.data.sources import files
from t5jax.data.sources.kinds import conll, csv, json_file, jsonl, parquet, text, tsv
from t5jax.data.sources.libraries import hf_dataset, tfds
from t5jax.data.sources.source import MALFORMED, RowStep, Source, get_field

ROWS = [{"q": f"q{i}", "a": {"text": [f"a{i}"]}} for i in range(6)]


def source(rows=ROWS):
    return Source({"train": lambda: rows})


def read(source, split="train"):
    return list(source.rows(split))


# --- The source ---------------------------------------------------------------------------------


def test_a_source_is_read_anew_each_time_and_its_order_stays():
    assert read(source()) == read(source()) == ROWS


def test_what_is_no_function_or_row_is_refused():
    with pytest.raises(ValueError, match="split 'train' of a source is a list; expected a func"):
        Source({"train": ROWS})
    with pytest.raises(ValueError, match="a source has no splits"):
        Source({})
    bad = Source({"train": lambda: [{}, "text"], "none": lambda: []})
    with pytest.raises(ValueError, match="row 1 of split 'train' is a str; expected a dict"):
        read(bad)
    with pytest.raises(ValueError, match="split 'none' has no rows$"):
        read(bad, "none")
    with pytest.raises(ValueError, match="there is no split 'test'; there are train, none"):
        read(bad, "test")


def test_steps_compose_in_their_order_and_leave_the_source_as_it_was():
    first = source()
    second = (
        first.rename({"question": "q"})
        .filter(lambda row: row["question"] != "q1", "not q1")
        .select({"x": "question", "y": "a.text.0"})
        .map(lambda row: row | {"both": row["x"] + row["y"]})
    )
    expected = [{"x": f"q{i}", "y": f"a{i}", "both": f"q{i}a{i}"} for i in (0, 2, 3, 4, 5)]
    assert read(second) == expected
    assert read(first) == ROWS
    assert list(read(first.rename({"question": "q"}))[0]) == ["a", "question"]


def test_numbers_are_those_of_the_rows_before_any_step():
    kept = source().filter(lambda row: row["q"] in ("q2", "q5")).numbered("train")
    assert [(number, row["q"]) for number, row in kept] == [(2, "q2"), (5, "q5")]


def test_every_step_counts_what_it_drops_as_it_is_read():
    kept = source().filter(lambda row: row["q"] > "q1", "late").filter(lambda row: True, "all").rows
    dropped = Counter(late=10)
    rows = kept("train", dropped)
    assert dropped == {"late": 10}
    next(rows)
    assert dropped == {"late": 12, "all": 0}
    assert len(list(rows)) == 3
    assert dropped == {"late": 12, "all": 0}


def test_a_split_of_which_nothing_is_left_says_who_dropped_it():
    empty = source().filter(lambda row: row["q"] == "q0", "first").filter(lambda row: False, "rest")
    message = "split 'train' has no rows left of 6: first dropped 5, rest dropped 1"
    with pytest.raises(ValueError, match=message):
        list(empty.rows("train", Counter(first=100)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.select({"x": "b"}), "row 4: there is no field 'b'; the row has q"),
        (lambda s: s.select({"x": "a.text.1"}), "row 0: there is no field 'a.text.1'; the row has"),
        (lambda s: s.rename({"q": "question"}), "row 0: rename.*: there is no field 'question'"),
        (
            lambda s: s.map(lambda row: {"n": row["b"]}),
            r"row 4: map\(<lambda>\): there is no field 'b'",
        ),
        (lambda s: s.filter(lambda row: row["b"], "has b"), "row 4: has b: there is no field 'b'"),
        (
            lambda s: s.map(lambda row: 3 if row else row),
            r"row 0: map.* returned a int; expected a dict",
        ),
        (lambda s: s.map(lambda row: {"n": int(row["q"])}), "row 0: invalid literal for int"),
    ],
)
def test_an_error_of_a_step_has_split_and_row(change, message):
    rows = [row | {"b": 1} for row in ROWS[:4]] + ROWS[4:]
    with pytest.raises(ValueError, match=f"split 'train', {message}"):
        read(change(source(rows)))


def test_an_error_that_is_not_about_values_stays_what_it_is_with_a_note():
    failing = source().map(lambda row: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        read(failing)
    assert caught.value.__notes__ == ["split 'train', row 0"]


def test_what_is_no_step_is_refused():
    with pytest.raises(ValueError, match="<class 'str'> is not a step; expected one of t5jax.data"):
        source().clean(str)


def test_a_step_of_ones_own_may_make_several_rows_of_one():
    class Halves:
        name = "halves"

        def __call__(self, rows, dropped):
            for row in rows:
                yield {"x": row["q"][0]}
                yield {"x": int(row["q"][1])}

    numbered = source(ROWS[:2]).clean(Halves()).numbered("train")
    assert list(numbered) == [(0, {"x": "q"}), (0, {"x": 0}), (1, {"x": "q"}), (1, {"x": 1})]


def test_a_step_forgets_between_passes():
    def start():
        seen = []
        return lambda row: seen.append(row) or (row if len(seen) <= 2 else None)

    first_two = source().clean(RowStep("first two", start))
    assert read(first_two) == read(first_two) == ROWS[:2]


def test_fields_are_found_by_name_before_they_are_by_path():
    row = {"a.b": 1, "a": {"b": 2, "c": [{"d": 3}]}}
    assert [get_field(row, path) for path in ("a.b", "a.c.0.d", "a.c.-1.d")] == [1, 3, 3]
    with pytest.raises(ValueError, match=r"there is no field 'b'; the row has a, ' b'$"):
        get_field({"a": 1, " b": 2}, "b")
    for path in ("a.x", "a.c.1", "a.c.d", "a.b.c"):
        with pytest.raises(ValueError, match=f"there is no field '{path}'; the row has a.b, a"):
            get_field(row, path)


def test_rows_are_held_out_of_a_split():
    parts = source().hold_out("validation", every=3)
    assert parts.splits == ("train", "validation")
    assert [row["q"] for row in read(parts, "validation")] == ["q0", "q3"]
    assert [row["q"] for row in read(parts, "train")] == ["q1", "q2", "q4", "q5"]


def test_rows_of_one_value_are_held_out_together():
    rows = [{"id": i, "title": title} for i, title in enumerate("abacbdca")]
    parts = source(rows).hold_out("dev", every=2, by="title")  # a, c of a, b, c, d.
    assert [row["id"] for row in read(parts, "dev")] == [0, 2, 3, 6, 7]
    assert [row["id"] for row in read(parts, "train")] == [1, 4, 5]


def test_holding_out_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="there is a split 'train' already"):
        source().hold_out("train", every=2)
    with pytest.raises(ValueError, match="every is 1; expected 2 or more"):
        source().hold_out("validation", every=1)
    with pytest.raises(ValueError, match="there is no split 'test'"):
        source().hold_out("validation", every=2, of="test")
    with pytest.raises(ValueError, match="there is no field 'topic'; the row has q, a"):
        read(source().hold_out("validation", every=2, by="topic"))


# --- Files --------------------------------------------------------------------------------------


def test_files_are_found_when_they_are_read_in_the_order_of_their_names(tmp_path, monkeypatch):
    rows = jsonl({"train": "part-*.jsonl", "both": [tmp_path / "z.jsonl", "part-1.jsonl"]})
    monkeypatch.chdir(tmp_path)
    for name in ("z", "part-2", "part-10", "part-1"):
        Path(f"{name}.jsonl").write_text(json.dumps({"from": name}))
    assert [row["from"] for row in read(rows)] == ["part-1", "part-10", "part-2"]
    assert [row["from"] for row in read(rows, "both")] == ["z", "part-1"]
    assert rows.files("train") == ["part-1.jsonl", "part-10.jsonl", "part-2.jsonl"]
    assert rows.hold_out("dev", every=2).map(dict).files("dev") == rows.files("train")
    assert source().files("train") == []


def test_a_name_that_looks_like_a_glob_is_a_name_first(tmp_path):
    (tmp_path / "a[1].txt").write_text("this one")
    (tmp_path / "a1.txt").write_text("not this")
    assert read(text({"train": tmp_path / "a[1].txt"})) == [{"text": "this one"}]


def test_a_folder_whose_name_looks_like_a_glob(tmp_path):
    folder = tmp_path / "data[v2]" / "part"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("one\n")
    source = text({"train": tmp_path / "data[v2]" / "*" / "*.txt"})
    assert read(source) == [{"text": "one"}]


def test_a_missing_file_or_a_folder_is_an_error_when_it_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file absent-\*\.jsonl \(looked from /"):
        read(jsonl({"train": "absent-*.jsonl"}))
    with pytest.raises(ValueError, match=r"is a folder; expected a file or a glob such as .*\*"):
        read(jsonl({"train": tmp_path}))
    with pytest.raises(ValueError, match="'a.jsonl' names no split; expected {\"train\": 'a.jsonl"):
        jsonl("a.jsonl")


COMPRESSORS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}
LINES = "".join(json.dumps({"n": n, "text": f"é{n**3}"}) + "\n" for n in range(500)).encode()


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_compressed_files_are_read_whole_or_not_at_all(ending, tmp_path):
    path = tmp_path / f"a.jsonl.{ending}"
    compress = COMPRESSORS[ending]
    path.write_bytes(compress(LINES[:5000]) + compress(LINES[5000:]))  # Two, one after the other.
    rows = jsonl({"train": path})
    assert read(rows) == [{"n": n, "text": f"é{n**3}"} for n in range(500)]
    path.write_bytes(compress(LINES)[:-20])
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{ending} is cut short: its compressed data"):
        read(rows.skip_malformed())
    path.write_bytes(LINES)
    with pytest.raises(ValueError, match=rf"cannot read .*a\.jsonl\.{ending}: "):
        read(rows)


def test_files_behind_urls_are_read_like_others():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/b-1.jsonl.gz", gzip.compress(b'{"n": 1}'))
    memory.pipe("/bucket/b-0.jsonl", b'{"n": 0}\n')
    rows = jsonl({"train": "memory://bucket/b-*", "one": "memory://bucket/b-0.jsonl"})
    assert read(rows) == [{"n": 0}, {"n": 1}]
    assert read(rows, "one") == [{"n": 0}]
    assert rows.files("train") == ["memory:///bucket/b-0.jsonl", "memory:///bucket/b-1.jsonl.gz"]
    with pytest.raises(ValueError, match=r"there is no file memory://bucket/c-\* \(check its name"):
        read(jsonl({"train": "memory://bucket/c-*"}))


def test_a_store_that_does_not_answer_is_named(monkeypatch, bucket):
    monkeypatch.setattr(files, "ANSWER_WITHIN", 0.2)
    with (
        bucket.fault(is_slow=True),
        pytest.raises(ValueError, match=r"cannot read gs://bucket/x-\*\.jsonl: no answer within 0"),
    ):
        read(jsonl({"train": "gs://bucket/x-*.jsonl"}))


def test_rows_of_a_bucket_of_every_kind_of_file(bucket, tmp_path):
    table = pyarrow.table({"n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    bucket.buckets["bucket"] = {
        "a/rows-0.jsonl": b'{"n": 1}\n',
        "a/rows-1.jsonl.gz": gzip.compress(b'{"n": 2}\n'),
        "rows.csv": b"n\n1\n2\n",
        "rows.parquet": (tmp_path / "rows.parquet").read_bytes(),
        "rows.txt": b"1\n2\n",
    }
    rows = [{"n": 1}, {"n": 2}]
    assert read(jsonl({"train": "gs://bucket/a/rows-*"})) == rows
    assert read(csv({"train": "gs://bucket/rows.csv"})) == [{"n": "1"}, {"n": "2"}]
    assert read(parquet({"train": "gs://bucket/rows.parquet"})) == rows
    assert read(text({"train": "gs://bucket/rows.txt"})) == [{"text": "1"}, {"text": "2"}]
    for url, message in (
        ("gs://bucket/b-*", r"there is no file gs://bucket/b-\*"),
        ("gs://elsewhere/rows", "cannot read gs://elsewhere/rows: there is no bucket elsewhere"),
    ):
        with pytest.raises(ValueError, match=message):
            read(jsonl({"train": url}))


def test_what_cannot_be_asked_says_why(monkeypatch):
    from fsspec.registry import known_implementations

    library = {"class": "t5jax_no_such_module.System", "err": "Please install nolib"}
    monkeypatch.setitem(known_implementations, "nolib", library)
    with pytest.raises(ValueError, match="cannot read nolib://x/y: Please install nolib"):
        read(jsonl({"train": "nolib://x/y"}))
    with pytest.raises(ValueError, match="cannot read nope://x: Protocol not known: nope"):
        read(jsonl({"train": "nope://x"}))
    monkeypatch.setattr(files, "ANSWER_WITHIN", 0.05)
    with pytest.raises(ValueError, match=r"cannot read it: no answer within 0.05 s; check the net"):
        files.answer(threading.Event().wait, "it")


@pytest.mark.parametrize(
    ("encoding", "given", "message"),
    [
        ("utf-16", "utf-8", r', line 1 is not utf-8: byte 0xff .*byte order .*="utf-16"'),
        ("utf-16", "latin-1", r', line 1 is not latin-1: .*mark .encoding="utf-16"'),
        ("utf-16", "utf-16-le", r', line 1 is not utf-16-le: .*mark .encoding="utf-16"'),
        ("utf-32", "utf-8", r', line 1 is not utf-8: .*mark .encoding="utf-32"'),
        ("utf-8-sig", "latin-1", r', line 1 is not latin-1: .*mark .encoding="utf-8"'),
        ("utf-16-le", "utf-8", r' is not utf-8: every other byte is 0; .*encoding="utf-16-le"'),
        ("utf-16-be", "cp1252", r' is not cp1252: every other byte is 0; .*encoding="utf-16-be"'),
    ],
)
def test_a_file_in_another_encoding_names_its_own(encoding, given, message, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("q,a\nWo?,hier\n".encode(encoding))
    with pytest.raises(ValueError, match=rf"a\.csv{message}"):
        read(csv({"train": path}, encoding=given))
    right = re.search('="(.*)"', message)[1]
    assert read(csv({"train": path}, encoding=right)) == [{"q": "Wo?", "a": "hier"}]


def test_a_character_zero_is_part_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\0b\nlonger text\n")
    assert read(text({"train": tmp_path / "a.txt"})) == [{"text": "a\0b"}, {"text": "longer text"}]


def test_line_breaks_of_old_macs_are_refused_but_within_json(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\rthree")
    with pytest.raises(ValueError, match=r"a\.txt has lines that end with .r alone.*`tr"):
        read(text({"train": tmp_path / "a.txt"}))
    (tmp_path / "a.json").write_bytes(b'[{"n": 1},\r{"n": 2}\r]')
    assert read(json_file({"train": tmp_path / "a.json"})) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        (jsonl, '[{"q": 1}]', "line 1 is a JSON list; .*; json_file reads files that are one JSON"),
        (jsonl, '{\n "q": 1\n}', "line 1 is not JSON: .*; json_file reads files that are one"),
        (json_file, '{"q": 1}\n{"q": 2}', "Extra data .*; jsonl reads files with a value in each"),
        (csv, "q;a\nx;y\n", r"line 1 is 'q;a', without the delimiter ','; .*delimiter=';'"),
        (tsv, "q,a\nx,y\n", r"line 1 is 'q,a', without the delimiter '.t'; .*delimiter=','"),
    ],
)
def test_a_file_of_another_format_names_what_reads_it(source, content, message, tmp_path):
    (tmp_path / "bad").write_text(content)
    with pytest.raises(ValueError, match=message):
        read(source({"train": tmp_path / "bad"}))


# --- JSON ---------------------------------------------------------------------------------------


def test_jsonl_takes_byte_order_marks_and_leaves_blank_lines_out(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"q": "2"}\n\n \r\n{"q": "é\u2028"}\r\n', newline="")
    (tmp_path / "a.jsonl").write_text('{"q": "1"}', encoding="utf-8-sig")
    assert [row["q"] for row in read(jsonl({"train": tmp_path / "*"}))] == ["1", "2", "é\u2028"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"q": 1}\n{"q": \n', r"bad\.jsonl, line 2 is not JSON: Expecting value .column 6.$"),
        (b'{"q": 1}\n\n{"q": "\xff"}\n', r"bad\.jsonl, line 3 is not utf-8: byte 0xff after"),
        (b"[1]\n", r"bad\.jsonl, line 1 is a JSON list; expected an object"),
        (b'{"q": "\\ud83d x"}', r"bad\.jsonl, line 1 has '\\ud83d', half of a character"),
        (b"[" * 100_000, r"bad\.jsonl, line 1 is not JSON that can be read: it is nested"),
        (b"\n\n", r"bad\.jsonl is empty; expected one JSON object a line"),
    ],
)
def test_a_bad_jsonl_file_is_named_with_its_line(content, message, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(jsonl({"train": tmp_path / "bad.jsonl"}))


def test_whole_characters_of_two_halves_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "\\ud83d\\ude00"}')
    assert read(jsonl({"train": tmp_path / "a.jsonl"})) == [{"q": "😀"}]


def test_what_cannot_be_read_is_left_out_and_counted_where_the_task_says_so(tmp_path):
    good = '{"q": "é"}'.encode()
    lines = [good, b"{", b'{"q": "\xe9"}', good, b"3", b'{"q": "\\udead"}', good]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.jsonl").touch()
    dropped = Counter()
    rows = jsonl({"train": tmp_path / "*.jsonl"}).skip_malformed().filter(lambda row: True, "all")
    numbered = list(rows.numbered("train", dropped))
    assert numbered == [(0, {"q": "é"}), (3, {"q": "é"}), (6, {"q": "é"})]
    assert dropped == {MALFORMED: 5, "all": 0}
    (tmp_path / "a.jsonl").write_text("{\n{")
    with pytest.raises(ValueError, match="no rows left of 3: malformed dropped 3"):
        read(rows)


NESTED = {
    "version": 1,
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {"context": "C0", "qas": [{"q": "0"}, {"q": "1", "title": "own"}]},
                {"context": "C1", "qas": []},
                {"context": "C2", "qas": [{"q": "2"}]},
            ],
        }
    ],
}


def test_json_rows_take_the_fields_around_them(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(NESTED))
    assert read(json_file({"train": tmp_path / "a.json"}, rows="data.paragraphs.qas")) == [
        {"version": 1, "title": "T", "context": "C0", "q": "0"},
        {"version": 1, "title": "own", "context": "C0", "q": "1"},
        {"version": 1, "title": "T", "context": "C2", "q": "2"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    assert read(json_file({"train": tmp_path / "list.json"})) == ROWS


@pytest.mark.parametrize(
    ("value", "rows", "message"),
    [
        (NESTED, "", "a.json: the whole file is an object with version, data; expected a list"),
        (NESTED, "data.title", r"a.json: data\[0\].title is 'T'; expected a list of rows"),
        (NESTED, "data.qas", r"a.json: data\[0\] has no 'qas'; it has title, paragraphs"),
        ({"a": [1]}, "a", r"a.json: a\[0\] is a JSON int; expected an object"),
    ],
)
def test_json_without_rows_says_where_it_went_wrong(value, rows, message, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
        read(json_file({"train": tmp_path / "a.json"}, rows=rows))


def test_a_json_file_that_is_none_is_named_with_its_line(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"q": 1},\n{"q" 2}]')
    with pytest.raises(ValueError, match=r"a.json is not JSON: Expecting ':' delimiter .line 3, c"):
        read(json_file({"train": tmp_path / "a.json"}))


# --- Tables -------------------------------------------------------------------------------------


def test_csv_reads_quotes_line_ends_and_marks(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffq,a\r\n"x, ""y""\n2",é\r\n\r\n1,\r\n'.encode())
    rows = csv({"train": tmp_path / "a.csv"})
    assert read(rows) == [{"q": 'x, "y"\n2', "a": "é"}, {"q": "1", "a": ""}]
    named = csv({"train": tmp_path / "a.csv"}, columns=["x", "y"])
    assert read(named)[0] == {"x": "q", "y": "a"}
    (tmp_path / "a.csv").write_text("q;" + "a" * 200_000 + "\n1;2\n")
    assert read(csv({"train": tmp_path / "a.csv"}, delimiter=";")) == [
        {"q": "1", "a" * 200_000: "2"}
    ]


def test_tsv_takes_quotes_as_they_are(tmp_path):
    (tmp_path / "a.tsv").write_text('q\ta\n"x\t5" y\n')
    assert read(tsv({"train": tmp_path / "a.tsv"})) == [{"q": '"x', "a": '5" y'}]


@pytest.mark.parametrize(
    ("content", "malformed"),
    [
        ('0,"zero', [1]),  # It would end with the file.
        ('0,"zero\nx,"y', [1, 2]),
        ('0,"zero\n1,one\n2,two\n3,three",x', [1, 4]),  # It would hide two rows.
        ('0,"zero" x', [1]),
        ("0", [1]),
    ],
)
def test_a_stray_quote_spoils_its_own_line_alone(tmp_path, content, malformed):
    lines = content.split("\n")
    later = [f'{i},"row {i}"' for i in range(len(lines), 500)]
    (tmp_path / "a.csv").write_text("\n".join(["number,text", *lines, *later]) + "\n")
    rows = csv({"train": tmp_path / "a.csv"})
    with pytest.raises(ValueError, match=r"a\.csv, line 2 (is not CSV|has 1 values)"):
        read(rows)
    dropped = Counter()
    found = [int(row["number"]) for row in rows.skip_malformed().rows("train", dropped)]
    assert found == [i for i in range(500) if i + 1 not in malformed]
    assert dropped["malformed"] == len(malformed)


def test_quoted_values_have_line_breaks(tmp_path):
    (tmp_path / "a.csv").write_text('q,a\n"1\n2,3\n4,5\n6",7\n8,"9\n10"\n')
    expected = [{"q": "1\n2,3\n4,5\n6", "a": "7"}, {"q": "8", "a": "9\n10"}]
    assert read(csv({"train": tmp_path / "a.csv"})) == expected


def test_columns_without_a_name_and_lines_to_skip(tmp_path):
    (tmp_path / "a.csv").write_text(",Review.Text,,q\n0,a,b,c\n")
    row = {"column_1": "0", "Review.Text": "a", "column_3": "b", "q": "c"}
    assert read(csv({"train": tmp_path / "a.csv"})) == [row]
    (tmp_path / "b.tsv").write_text("made by hand\nq\tq\n1\t2\n")
    rows = tsv({"train": tmp_path / "b.tsv"}, columns=["a", "b"], skip_lines=2)
    assert read(rows) == [{"a": "1", "b": "2"}]
    with pytest.raises(ValueError, match="skip_lines is -1; it must be at least 0"):
        csv({"train": "a.csv"}, skip_lines=-1)


ODD = "a\u2028b\u0085c\x0cd\x1ce\rf"  # What str.splitlines splits, and a lone \r.


def test_only_line_feeds_end_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(f"{ODD}\r\ntwo\n".encode())
    assert read(text({"train": tmp_path / "a.txt"})) == [{"text": ODD}, {"text": "two"}]
    (tmp_path / "a.tsv").write_bytes(f"q\ta\n{ODD}\t1\r\n".encode())
    assert read(tsv({"train": tmp_path / "a.tsv"})) == [{"q": ODD, "a": "1"}]
    (tmp_path / "a.csv").write_bytes(f'q,a\n"{ODD}",1\r\n'.encode())
    assert read(csv({"train": tmp_path / "a.csv"})) == [{"q": ODD, "a": "1"}]
    (tmp_path / "a.jsonl").write_text('{"q": "a\u2028b\u0085c"}\n')
    assert read(jsonl({"train": tmp_path / "a.jsonl"})) == [{"q": "a\u2028b\u0085c"}]


def test_sentences_in_conlls_form(tmp_path):
    (tmp_path / "a.txt").write_text(
        "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\n# NN I-NP O\n\n\nPeter NNP B-NP B-PER\n"
    )
    rows = conll({"train": tmp_path / "a.txt"}, ["words", None, None, "tags"])
    assert read(rows) == [
        {"words": ["EU", "#"], "tags": ["B-ORG", "O"]},
        {"words": ["Peter"], "tags": ["B-PER"]},
    ]
    (tmp_path / "a.conllu").write_text(
        "# text = du\n1-2\tdu\t_\n1\tde\tADP\n2\tle\tDET\n2.1\tx\tX\n\n"
    )
    rows = conll({"train": tmp_path / "a.conllu"}, ["id", "form", "upos"], delimiter="\t")
    assert read(rows) == [{"id": ["1", "2"], "form": ["de", "le"], "upos": ["ADP", "DET"]}]
    short = conll({"train": tmp_path / "a.txt"}, ["words", "tags"])
    with pytest.raises(ValueError, match=r"a\.txt, line 3 has 4 values; expected 2: words, tags"):
        read(short)
    dropped = Counter()
    with pytest.raises(ValueError, match="malformed dropped 2"):
        list(short.skip_malformed().rows("train", dropped))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"q,a\n1,2\n\n3\n", r"a\.csv, line 4 has 1 values; expected 2: q, a"),
        (b'q,a\n"1\n",2,3\n', r"a\.csv, line 2 has 3 values; expected 2"),
        (b'q,a\n"1,2\n3,4\n', r"a\.csv, line 2 is not CSV: unexpected end of data"),
        (b"q,a\n1,\xe9\n", r"a\.csv, line 2 is not utf-8: byte 0xe9"),
        (b"q,q\n1,2\n", r"a\.csv, line 1 names a column twice: q, q; .* skip_lines=1"),
        (b"q,a\n1,2\nq,a\n", r"a\.csv, line 3 repeats the names of the columns, q, a"),
        (b"\n", r"a\.csv is empty; expected a line of column names"),
        (b"q,a\n", "split 'train' has no rows"),
    ],
)
def test_a_bad_csv_file_is_named_with_its_line(content, message, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(csv({"train": tmp_path / "a.csv"}))


def test_bad_records_of_a_table_are_counted_where_the_task_says_so(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'q,a\n1,2\n3\n4,\xe9\n"5"x,6\n7,8\n')
    dropped = Counter()
    rows = csv({"train": tmp_path / "a.csv"}).skip_malformed().rows("train", dropped)
    assert list(rows) == [{"q": "1", "a": "2"}, {"q": "7", "a": "8"}]
    assert dropped == {MALFORMED: 3}


def test_parquet_reads_the_columns_that_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = {"q": ["x", None], "n": [{"m": [1]}, {"m": []}], "b": ["é".encode(), b"\xff"]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert read(parquet({"train": path})) == [
        {"q": "x", "n": {"m": [1]}, "b": "é"},
        {"q": None, "n": {"m": []}, "b": b"\xff"},
    ]
    assert read(parquet({"train": path}, columns=["n"])) == [{"n": {"m": [1]}}, {"n": {"m": []}}]
    with pytest.raises(ValueError, match="a.parquet has no column z; it has q, n, b"):
        read(parquet({"train": path}, columns=["z"]))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="a.parquet is not a whole Parquet file: Parquet magic"):
        read(parquet({"train": path}))


# --- Text ---------------------------------------------------------------------------------------


def test_text_is_read_by_line_paragraph_or_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n two \r\n\r\n \r\nthree\r\n".encode())

    def texts(by):
        return [row["text"] for row in read(text({"train": tmp_path / "a.txt"}, by=by))]

    assert texts("line") == ["one", " two ", "three"]
    assert texts("paragraph") == ["one\n two ", "three"]
    assert texts("file") == ["one\n two \n\n \nthree\n"]
    with pytest.raises(ValueError, match="by is 'word'; expected one of line, paragraph, file"):
        texts("word")


@pytest.mark.parametrize("by", ["line", "paragraph", "file"])
def test_empty_text_is_an_error(by, tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="a.txt is empty; expected text"):
        read(text({"train": tmp_path / "a.txt"}, by=by))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_are_read_where_they_are_named(encoding, tmp_path):
    (tmp_path / "a.txt").write_bytes("ja\nnää\n".encode(encoding))
    rows = {"train": tmp_path / "a.txt"}
    assert read(text(rows, encoding=encoding)) == [{"text": "ja"}, {"text": "nää"}]
    with pytest.raises(ValueError, match=r"line \d is not utf-8: byte 0x(e4|ff) after '(n|)'; sav"):
        read(text(rows))
    with pytest.raises(ValueError, match="encoding 'utf-9' is unknown; expected a name such as"):
        text(rows, encoding="utf-9")


# --- Data sets ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        data = datasets.Dataset.from_list(ROWS)
        data.save_to_disk(folder / "single")
        datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(
            folder / "disk"
        )
        (folder / "files").mkdir()
        data.to_json(folder / "files/train.jsonl")
        yield folder


def test_hugging_face_data_sets_are_read_from_folders_and_files(hf_folder):
    splits = {"train": "train", "half": "train[:50%]"}
    rows = hf_dataset(hf_folder / "files", splits)
    assert read(rows) == ROWS
    assert read(rows, "half") == ROWS[:3]
    assert read(hf_dataset(hf_folder / "disk", {"dev": "test"}), "dev") == ROWS[1:2]
    file = str(hf_folder / "files/train.jsonl")
    streamed = hf_dataset("json", {"train": "train"}, data_files=file, streaming=True)
    assert read(streamed) == ROWS


@pytest.mark.parametrize("name", ["single", "disk"])
def test_splits_and_slices_of_what_save_to_disk_wrote(hf_folder, name):
    parts = {"train": "train[:60%]", "dev": "train[60%:]", "all": "train", "two": "train[1:3]"}
    rows = hf_dataset(hf_folder / name, parts)
    assert read(rows, "all") == ROWS
    kept = round(0.6 * len(ROWS))
    assert (read(rows, "train"), read(rows, "dev")) == (ROWS[:kept], ROWS[kept:])
    assert read(rows, "two") == ROWS[1:3]
    with pytest.raises(ValueError, match=r"there is no such split; the folder has train"):
        read(hf_dataset(hf_folder / name, {"train": "dev"}))
    with pytest.raises(ValueError, match=r"to which name, revision cannot apply"):
        read(hf_dataset(hf_folder / name, {"train": "train"}, "en", revision="main"))
    files = rows.files("train")
    assert files
    assert all(str(hf_folder / name) in file for file in files)
    assert any(file.endswith(".arrow") for file in files)


def test_the_files_of_a_hugging_face_data_set_are_known(hf_folder, monkeypatch):
    file = str(hf_folder / "files/train.jsonl")
    assert hf_dataset(hf_folder / "files", {"train": "train"}).files("train") == [file]
    monkeypatch.chdir(hf_folder)
    for data_files in ("files/*.jsonl", ["files/train.jsonl"], {"train": ["files/train.jsonl"]}):
        rows = hf_dataset("json", {"train": "train"}, data_files=data_files)
        assert list(map(os.path.abspath, rows.files("train"))) == [file]
    rows = hf_dataset(hf_folder / "files", {"train": "train"}, data_files="train.jsonl")
    assert rows.files("train") == [file]
    assert hf_dataset("someone/texts", {"train": "train"}, data_files="a.csv").files("train") == []


def test_a_hugging_face_data_set_that_is_not_there_is_named(hf_folder, monkeypatch):
    with pytest.raises(ValueError, match=r"files', split 'test': Unknown split \"test\""):
        read(hf_dataset(hf_folder / "files", {"test": "test"}), "test")
    with pytest.raises(ValueError, match=r"data set '/no/where', split 'train': Couldn't find"):
        read(hf_dataset("/no/where", {"train": "train"}))
    with pytest.raises(
        ValueError, match="data set 'no/where', split 'train': Couldn't reach 'no/w"
    ):
        read(hf_dataset("no/where", {"train": "train"}))  # Tests are offline.
    with pytest.raises(ValueError, match="hf_dataset takes no token"):
        hf_dataset("no/where", {"train": "train"}, token="secret")


def test_a_hub_that_does_not_answer_is_named_within_seconds(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def dataset_info(self, path, **_):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    with pytest.raises(ValueError, match=r"'no/where': there is no such folder, and the hub does "):
        read(hf_dataset("no/where", {"train": "train"}))


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """One data set, written by TFDS itself in both formats."""
    folder = tmp_path_factory.mktemp("tfds")
    import numpy as np
    import tensorflow_datasets as library

    from t5jax.data.bridge import tf  # noqa: F401  First, so that it is quiet.

    class Toy(library.core.GeneratorBasedBuilder):
        VERSION = library.core.Version("1.0.0")

        def _info(self):
            features = {
                "text": library.features.Text(),
                "label": library.features.ClassLabel(names=["no", "yes"]),
                "answers": library.features.Sequence(
                    {"text": library.features.Text(), "start": np.int32}
                ),
            }
            features = library.features.FeaturesDict(features)
            return library.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            return enumerate(TFDS_ROWS)

    for format in ("tfrecord", "array_record"):
        Toy(data_dir=folder / format, file_format=format).download_and_prepare()
    return folder


TFDS_ROWS = [
    {"text": f"é{i}", "label": i % 2, "answers": {"text": ["a", "b"][:i], "start": [7, 8][:i]}}
    for i in range(3)
]


def test_tfds_data_sets_are_read_in_both_formats(tfds_folder):
    for format in ("tfrecord", "array_record"):
        rows = tfds("toy", {"train": "train", "one": "train[1:2]"}, data_dir=tfds_folder / format)
        assert read(rows) == TFDS_ROWS
        assert read(rows, "one") == TFDS_ROWS[1:2]


def test_a_tfds_data_set_that_is_not_there_is_named(tfds_folder, tmp_path):
    with pytest.raises(ValueError, match="TFDS data set 'toy', split 'x': Unknown split 'x'"):
        read(tfds("toy", {"train": "x"}, data_dir=tfds_folder / "tfrecord"))
    with pytest.raises(ValueError, match=r"data set 'no_such', split 'train': Dataset no_such not"):
        read(tfds("no_such", {"train": "train"}, data_dir=tmp_path))
    with pytest.raises(ValueError, match=r"is not prepared in .*/glue/sst2/2.0.0; prepare it with"):
        read(tfds("glue/sst2:2.0.0", {"train": "train"}, data_dir=tmp_path))


def test_array_records_and_files_are_read_without_tensorflow(tfds_folder):
    code = """
import sys
from t5jax.data.sources import cleaning, libraries
rows = libraries.tfds("toy", {"train": "train"}, data_dir=sys.argv[1])
assert len(list(rows.clean(cleaning.drop_duplicates("text")).rows("train"))) == 3
assert not {"tensorflow", "seqio"} & set(sys.modules), "imported"
"""
    command = [sys.executable, "-c", code, str(tfds_folder / "array_record")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- Real files ---------------------------------------------------------------------------------


def test_real_files_are_read_whole(request):
    folder = request.config.rootpath.parent / "shared/data"
    if not folder.exists():
        pytest.skip(f"{folder} is absent")
    gsm8k = jsonl({"train": folder / "tasks/gsm8k.train.jsonl"}).hold_out("validation", every=20)
    assert (len(read(gsm8k)), len(read(gsm8k, "validation"))) == (7099, 374)
    xquad = json_file({"test": folder / "tasks/xquad.de.json"}, rows="data.paragraphs.qas")
    rows = read(xquad, "test")
    assert len(rows) == 1190
    assert len({row["context"] for row in rows}) == 240
    assert all(row["answers"][0]["text"] in row["context"] for row in rows)
    novel = folder / "text/moby_dick.md"
    paragraphs = [row["text"] for row in read(text({"train": novel}, by="paragraph"))]
    content = novel.read_text(encoding="utf-8")
    assert "".join("".join(paragraphs).split()) == "".join(content.split())
    assert len(paragraphs) > 1000
