"""Tables of scores and samples, for a terminal and in Markdown."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

Results = Mapping[str, Mapping[str, Any]]


LEGEND = (
    "Beside a baseline: + the model is better, - worse, = not distinguishable (95 % intervals)."
)
_MARKS = {"better": "+", "worse": "-", "not distinguishable": "="}


def results_table(results: Results) -> Any:
    """Returns a rich.table.Table of scores, one row per task and metric, with their baselines.

    A score of the model that is not better than every baseline is yellow.

    Args:
      results: as returned by `evaluation.evaluate_model`.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    head, rows = _result_rows(results)
    table.add_column("task (examples)", overflow="fold")
    table.add_column("metric", overflow="fold")
    for title in head[2:-1]:
        table.add_column(title, justify="right", overflow="fold", max_width=16)
    previous = None
    for task, metric, *cells, num_examples in rows:
        cells[0] = _plain_text(
            cells[0], style="yellow" if _beaten(results[task], metric) else "bold"
        )
        # A task's name is shown in its first row only.
        name = "" if task == previous else f"{task} ({num_examples})"
        table.add_row(_plain_text(name), _plain_text(metric), *cells)
        previous = task
    return table


def _beaten(scores: Mapping[str, Any], metric: str) -> bool:
    """Returns whether a score of the model is not better than that of every baseline."""
    for name, row in scores.get("baselines", {}).items():
        if metric in row:
            found = scores.get("comparisons", {}).get(name, {}).get(metric)
            if found and found["verdict"] != "better":
                return True
            sign = -1 if metric in scores.get("lower_is_better", ()) else 1
            if not found and not sign * scores["model"][metric] > sign * row[metric]:
                return True
    return False


def results_markdown(results: Results) -> str:
    """Returns the table of `results_table` as Markdown, with the task's name in every row."""
    head, rows = _result_rows(results)
    rule = ["---", "---"] + ["---:"] * (len(head) - 2)
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [head, rule, *rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _result_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    baselines = list(
        dict.fromkeys(name for scores in results.values() for name in scores.get("baselines", {}))
    )
    head = ["task", "metric", "model", *baselines, "examples"]
    rows = []
    for task, scores in results.items():
        for metric, value in scores["model"].items():
            cells = [_score(metric, value)]
            for name in baselines:
                other = scores.get("baselines", {}).get(name, {}).get(metric)
                found = scores.get("comparisons", {}).get(name, {}).get(metric)
                mark = f" {_MARKS[found['verdict']]}" if found else ""
                cells.append("–" if other is None else f"{_score(metric, other)}{mark}")
            rows.append([task, metric, *cells, f"{scores['num_examples']:,}"])
    return head, rows


def _score(metric: str, value: float) -> str:
    """Formats percentages with two decimals, losses with four."""
    four = metric.endswith("loss") or metric == "bits_per_byte"
    return f"{value:.4f}" if four else f"{value:.2f}"


def samples_table(
    inputs: Sequence[str],
    targets: Sequence[Any],
    predictions: Sequence[str],
    *,
    title: str = "",
    max_chars: int = 400,
) -> Any:
    """Returns a rich.table.Table of predictions with their inputs and targets.

    Args:
      inputs: N texts.
      targets: N texts or lists of references, or other values, which are shown as text.
      predictions: N texts.
      title: the table's title.
      max_chars: the middle of longer texts is left out.
    Raises:
      ValueError: if the lengths differ.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, show_header=False, title=_plain_text(title) if title else None)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for source, target, prediction in _samples(inputs, targets, predictions):
        style = "green" if prediction in target else ""
        table.add_row("input", _plain_text(_cut(source, max_chars)))
        table.add_row("target", _plain_text(_cut(" | ".join(target), max_chars)))
        text = _plain_text(_cut(prediction, max_chars), style=style)
        table.add_row("prediction", text, end_section=True)
    return table


def samples_markdown(
    inputs: Sequence[str],
    targets: Sequence[Any],
    predictions: Sequence[str],
    *,
    max_chars: int = 2000,
) -> str:
    """Returns the content of `samples_table` as Markdown, for a writer's `write_texts`."""
    return "\n".join(
        f"- input: {_code(source, max_chars)}\n"
        f"- target: {' or '.join(_code(text, max_chars) for text in target)}\n"
        f"- prediction: {_code(prediction, max_chars)}\n"
        for source, target, prediction in _samples(inputs, targets, predictions)
    )


def _samples(
    inputs: Sequence[str], targets: Sequence[Any], predictions: Sequence[str]
) -> list[tuple[str, list[str], str]]:
    if not len(inputs) == len(targets) == len(predictions):
        raise ValueError(
            f"samples are {len(inputs)} inputs, {len(targets)} targets and {len(predictions)} "
            "predictions; expected the same number of each"
        )
    references = [
        [str(value) for value in (target if isinstance(target, (list, tuple)) else [target])]
        for target in targets
    ]
    return list(zip(inputs, references, predictions, strict=True))


def _cut(text: str, max_chars: int) -> str:
    """Removes the middle: a prompt's instruction is at the start and its question at the end."""
    if len(text) <= max_chars:
        return text
    half = (max_chars - 3) // 2
    return f"{text[:half]} … {text[len(text) - half :]}"


def _code(text: str, max_chars: int) -> str:
    return "`" + _cut(" ".join(text.split()), max_chars).replace("`", "'") + "`"


def _plain_text(text: str, style: str = "") -> Any:
    """Returns rich text without markup, and without control characters."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else "�" for c in text), style=style)


def print_note(text: str, file: TextIO | None = None) -> None:
    """Prints a sentence about a table as `print_table` does."""
    print_table(_plain_text(text, style="dim"), file)


def print_table(table: Any, file: TextIO | None = None) -> None:
    """Prints a rich table on `file`, by default stderr, as wide as the terminal or $COLUMNS.

    In a file or a pipe, which have no width, it has up to 160 columns. While a ProgressBar is
    shown, use its `print` instead.
    """
    from rich.console import Console

    file = file or sys.stderr
    is_bounded = file.isatty() or "COLUMNS" in os.environ
    Console(file=file, width=None if is_bounded else 160).print(table)
