"""The page of an evaluation: complete in itself, and whatever texts hold, text."""

import html.parser
import json
import re

from t5jax.data.batches.examples import EvalExample, EvalSet
from t5jax.evaluation import page
from t5jax.evaluation.scores import Answers
from t5jax.metrics import exact_match

TEXTS = ["</script><script>alert(1)</script>", "b & c", "<b>bold</b>", "d"]
EXAMPLES = [EvalExample(f"say {text}", text, text, [], []) for text in TEXTS]
TASK = EvalSet("echo<1>", EXAMPLES, [exact_match], lambda text: text)
RESULTS = {
    "echo<1>": {
        "num_examples": 4,
        "model": {"exact_match": 75.0, "loss": 0.5},
        "intervals": {"exact_match": [25.0, 100.0], "loss": [float("nan"), float("nan")]},
        "baselines": {"other & more": {"exact_match": 50.0}},
        "comparisons": {
            "other & more": {
                "exact_match": {
                    "difference": -25.0,
                    "interval": [-50.0, 0.0],
                    "verdict": "not distinguishable",
                }
            }
        },
    }
}


def rendered():
    ours = Answers([*TEXTS[:3], "x"], None, [*TEXTS[:3], "x"])
    theirs = Answers([TEXTS[0], "y", "z", "x"], None, [TEXTS[0], "y", "z", "x"])
    return page.render(
        "<model>", "test", RESULTS, {"echo<1>": (TASK, ours, {"other & more": theirs})}
    )


class Reader(html.parser.HTMLParser):
    """Collects elements with their attributes, the text of scripts, and the table's cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data
        elif self.cells:
            self.cells[-1] += data


def test_texts_are_data_and_never_markup():
    read = Reader(rendered())
    assert len(read.scripts) == 2
    data = json.loads(read.scripts[0])
    shown = data["tasks"]["echo<1>"]
    assert {row["targets"][0] for row in shown} == set(TEXTS)
    assert "innerHTML" not in read.scripts[1]
    assert "b" not in {tag for tag, _ in read.tags}


def test_nothing_is_loaded_from_elsewhere():
    text = rendered()
    assert not re.search(r"https?://|@import|url\(", text)
    assert not [attrs for _, attrs in Reader(text).tags if {"src", "href"} & attrs.keys()]


def test_the_largest_disagreement_comes_first():
    (shown,) = json.loads(Reader(rendered()).scripts[0])["tasks"].values()
    # 1 and 2 differ in score; in 0 and 3 both say the same, right or wrong.
    assert [row["index"] for row in shown] == [1, 2, 0, 3]
    assert shown[0]["says"] == [
        {"name": "", "text": "b & c", "scores": {"exact_match": 100.0}, "loss": None},
        {"name": "other & more", "text": "y", "scores": {"exact_match": 0.0}, "loss": None},
    ]


def test_scores_and_verdicts_are_in_the_table():
    read = Reader(rendered())
    cells = [" ".join(cell.split()) for cell in read.cells]
    assert cells[:5] == ["Task", "Metric", "Model", "Interval", "other & more"]
    assert cells[5:10] == [
        *("echo<1>", "exact_match", "75.00", "25.00 to 100.00"),
        "50.00 not distinguishable \u221225.00 (\u221250.00 to 0.00)",
    ]
    assert cells[11:14] == ["loss", "0.5000", "–"]


def test_a_bound_that_is_not_zero_is_not_shown_as_zero():
    shown = [page._number("accuracy", x) for x in (0.0, 0.004, -0.0004, 0.006)]
    assert shown == ["0.00", "0.004", "\u22120.0004", "0.01"]


def test_controls_have_names_and_the_page_a_language():
    tags = Reader(rendered()).tags
    assert ("html", {"lang": "en"}) in tags
    fields = [attrs["id"] for tag, attrs in tags if tag in ("input", "select")]
    assert fields == ["task", "words", "order", "differ"]
    assert sum(tag == "label" for tag, _ in tags) == len(fields)
    assert {attrs.get("scope") for tag, attrs in tags if tag == "th"} == {"col", "row"}
