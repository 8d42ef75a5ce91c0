"""Rows that are read in any order without being held: the same ones as in order."""

from collections import Counter

import numpy as np
import pytest

from t5jax.data.sources import offsets
from t5jax.data.sources.cleaning import drop_duplicates
from t5jax.data.sources.kinds import conll, csv, json_file, jsonl, text, tsv
from t5jax.data.sources.libraries import hf_dataset
from t5jax.data.sources.offsets import Unreachable
from t5jax.data.sources.reachable import Rows
from t5jax.data.sources.source import RowStep, Source

JSONL = '\n{"q": "a\u2028"}\r\n \u3000\n{"q": ""}\n\n{"q": "long ' + 30 * "é" + '"}\n{"q": "last"}'
CSV = '\nq,a\n1,"x, ""y"""\n\n2,\n" ",é\r\n'


def in_order(source, split="train"):
    rows = enumerate(source.numbered(split))
    return [(place, number, row) for place, (number, row) in rows]


def reached(source, split="train", seed=0):
    """Reads the rows in another order; returns them in order."""
    rows = Rows(source, split, in_order(source, split))
    places = np.random.default_rng(seed).permutation(len(rows))
    found = list(rows.read(places))
    assert [place for place, _, _ in found] == places.tolist()
    return sorted(found, key=lambda row: row[0])


@pytest.fixture(params=[5, 1 << 22], ids=["small blocks", "one block"])
def block(request, monkeypatch):
    monkeypatch.setattr(offsets, "_BLOCK", request.param)


@pytest.mark.parametrize(
    ("kind", "content", "options"),
    [
        (jsonl, JSONL, {}),
        (jsonl, "\ufeff" + JSONL + "\n\n", {}),
        (csv, CSV, {}),
        (csv, "\ufeff" + CSV[1:-2], {}),
        (csv, "a note\n\n" + CSV, {"skip_lines": 2}),
        (csv, CSV[5:], {"columns": ["q", "a"]}),
        (tsv, 'q\ta\n"1\tx\n\n2\t"\n \té\n', {}),
        (text, "one\n\n two \r\n\u2003\nthr\u2028ee", {}),
        (text, "eins\nzwei ä\n", {"encoding": "latin-1"}),
    ],
)
def test_lines_are_the_rows_that_are_read_in_order(kind, content, options, tmp_path, block):
    for name in ("a", "b"):  # Two files, one after the other.
        (tmp_path / name).write_bytes(content.encode(options.get("encoding", "utf-8")))
    source = kind({"train": tmp_path / "*"}, **options)
    assert len(in_order(source)) >= 4
    assert reached(source) == in_order(source)


def numbers(tmp_path, num=40):
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(f'{{"n": {n}, "third": {n // 3}}}\n' for n in range(num)))
    return jsonl({"train": path})


def test_steps_and_held_out_rows_are_the_same(tmp_path):
    class Twice:
        name = "twice"

        def __call__(self, rows, dropped):
            for row in rows:
                yield from ({"n": row["n"] + k} for k in (0, 0.5))

    source = numbers(tmp_path).filter(lambda row: row["n"] % 5 > 1, "few")
    source = source.clean(drop_duplicates("third")).map(lambda row: {"n": -row["n"]})
    source = source.hold_out("validation", every=4).clean(Twice())
    for split in ("train", "validation"):
        assert reached(source, split) == in_order(source, split)
    groups = numbers(tmp_path).hold_out("test", every=3, by="third")
    for split in ("train", "test"):
        assert reached(groups, split) == in_order(groups, split)


def test_numbers_that_are_not_equal_to_themselves_are_no_obstacle(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": NaN}\n{"n": 1}\n')
    source = jsonl({"train": tmp_path / "a.jsonl"}).map(dict)
    assert [str(row) for _, _, row in reached(source)] == ["{'n': nan}", "{'n': 1}"]


def test_what_cannot_be_read_is_left_out_or_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"n": 1}\n\n{"n": \n{"n": 3}\n')
    source = jsonl({"train": path})
    assert reached(source.skip_malformed()) == [(0, 0, {"n": 1}), (1, 2, {"n": 3})]
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3 is not JSON"):
        list(Rows(source, "train", []).read(np.array([2, 1])))


def test_data_sets_of_a_library_have_random_access_of_their_own(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"n": range(10)})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path)
    source = hf_dataset(tmp_path, {"train": "train[2:]", "both": "train[:2]+train[8:]"})
    assert [row["n"] for _, _, row in reached(source)] == list(range(2, 10))
    assert reached(source, "both") == in_order(source, "both")


@pytest.mark.parametrize(
    ("source", "content", "reason"),
    [
        (csv, 'q,a\n1,"x\ny"\n', "a line break is within quotes"),
        (csv, 'q,"a\nb"\n1,x\n', "a line break is within quotes"),
        (lambda s: text(s, by="paragraph"), "a\n", "a row is a paragraph"),
        (lambda s: jsonl(s, encoding="utf-16"), '{"n": 1}', "lines in utf-16 cannot be found"),
        (json_file, '[{"n": 1}]', "a row of such files is no line"),
        (lambda s: conll(s, ["n"]), "a\n", "a row of such files is no line"),
        (text, " \n", "is empty"),
    ],
)
def test_what_cannot_be_reached_says_why(source, content, reason, tmp_path):
    (tmp_path / "a").write_text(content, encoding="utf-16" if "utf" in reason else "utf-8")
    with pytest.raises(Unreachable, match=reason):
        Rows(source({"train": tmp_path / "a"}), "train", [])


def test_steps_that_depend_on_other_rows_are_found(tmp_path):
    def start():
        seen = Counter()
        return lambda row: row | {"count": seen.update(["rows"]) or seen["rows"]}

    source = numbers(tmp_path).clean(RowStep("counted", start))
    with pytest.raises(Unreachable, match="something else of a row alone than among others"):
        reached(source)
    with pytest.raises(Unreachable, match="they come from a function"):
        reached(Source({"train": lambda: [{}]}))
