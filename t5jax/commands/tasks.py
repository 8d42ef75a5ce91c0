"""`t5jax tasks list`, `show` and `check`: from a task's file to what the model will see."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from t5jax import storage
from t5jax.commands.parse import check_options, parse, run_group
from t5jax.storage import split_lines

USAGE = """\
usage: t5jax tasks COMMAND ...

commands:
  list [PATTERN]   every task and mixture: source, splits, templates, metrics
  show NAME        rendered examples, their tokens, lengths, what is cut and what is dropped
  check NAME|all   every split reads, every template renders, targets can be learnt and scored

NAME is a task or a variant: gsm8k:worked (one template), gsm8k:5shot, gsm8k:worked:5shot.
"""


def tasks(args: list[str]) -> int | None:
    """Runs one of the commands on tasks."""
    return run_group(args, USAGE, "tasks", {"list": list_, "show": show, "check": check})


def _tokenizer(vocabulary: str):
    """Returns the tokenizer of --vocabulary; None where it is left to the tasks."""
    from t5jax.tokenizers import load_tokenizer

    return load_tokenizer(vocabulary) if vocabulary else None


def _lengths(options) -> dict[str, int]:
    """Returns --inputs-length and --targets-length by feature."""
    check_options(options, 1, "inputs_length", "targets_length")
    return {"inputs": options.inputs_length, "targets": options.targets_length}


# --- list ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class List:
    """Lists the tasks and mixtures that task files register. No row is read.

    PATTERN in front of the options is part of a name, or a glob such as "numbers_*".
    """

    task_files: tuple[str, ...] = ()
    """Python files that register tasks, in addition to ./tasks/*.py and the shipped ones."""


def list_(args: list[str]) -> None:
    """Prints a table of tasks."""
    pattern = args.pop(0) if args and not args[0].startswith("-") else ""
    options = parse(List, args, prog="t5jax tasks list [PATTERN]")
    from t5jax.data.inspector import list_tasks
    from t5jax.data.registry import load_tasks

    load_tasks(options.task_files)
    rows = [dataclasses.astuple(row) for row in list_tasks(pattern)]
    _print_table(["name", "source", "splits", "templates", "metrics"], rows)


# --- show ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Show:
    """Shows a task as the model sees it: examples, tokens, lengths, what is truncated or
    dropped."""

    name: str
    """The task or variant."""
    split: str = ""
    """The split to read. Empty: train, or the first one."""
    num: int = 3
    """Number of examples to print."""
    num_examples: int | None = 10_000
    """Number of examples for statistics, drawn from the whole split. None: all."""
    vocabulary: str = ""
    """data.vocabulary of a run. Empty: the task's own."""
    inputs_length: int = 512
    """data.inputs_length of a run; longer inputs are truncated."""
    targets_length: int = 128
    """data.targets_length of a run; longer targets are truncated."""
    png: Path | None = None
    """A file for plots of the histograms of lengths."""
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, in addition to ./tasks/*.py and the shipped ones."""


def show(args: list[str]) -> None:
    """Prints a task's examples and statistics."""
    options = parse(Show, args, prog="t5jax tasks show", positional=True)
    lengths = _lengths(options)
    check_options(options, 0, "num")
    check_options(options, 1, "num_examples")
    from t5jax.data.inspector import plot_lengths, show_task
    from t5jax.data.registry import load_tasks

    load_tasks(options.task_files)
    report = show_task(
        options.name,
        options.split,
        tokenizer=_tokenizer(options.vocabulary),
        lengths=lengths,
        num_shown=options.num,
        num_examples=options.num_examples,
    )
    _print_report(report)
    if options.png:
        output = storage.path(options.png, "--png")
        with storage.staged(output) as place:
            plot_lengths(report, place.path)
        print(f"wrote {output}", file=sys.stderr)


def _print_report(report) -> None:
    for number, example in enumerate(report.shown, start=1):
        print(f"--- example {number} of {report.task}, {report.split} ---")
        for feature, text in example.texts.items():
            ids = example.ids[feature]
            print(f"{feature}:", *split_lines(text) or [""], sep="\n  ")
            pieces = _pieces(report.tokenizers[feature], ids[:_MAX_TOKENS])
            more = "" if len(ids) <= _MAX_TOKENS else f" ... {len(ids) - _MAX_TOKENS:,} more"
            print(f"  {len(ids):,} tokens: {' '.join(pieces)}{more}")
            if len(ids) > (limit := report.features[feature].limit):
                kept = report.tokenizers[feature].decode(ids[: limit - 1])
                print(f"  cut to {limit:,}: the model sees it up to {kept[-40:]!r}")
        print()
    part = "" if report.is_whole else " drawn from all"
    print(f"lengths in tokens with eos, of {report.num_examples:,} examples{part}")
    _print_table(
        ["", "min", *(f"{p} %" for p in _PERCENTILES), "max", "mean", "cut", "unknown"],
        [_length_row(name, feature) for name, feature in report.features.items()],
        right=True,
    )
    for name, feature in report.features.items():
        print(f"{name}, {feature.limit:,} at most")
        print(*_histogram(feature), sep="\n")
        print()
    print("rows and examples dropped" + ("" if report.is_whole else " among those read"))
    if not report.dropped:
        print("  none: the task has no step that could")
    elif not any(report.dropped.values()):
        print(f"  none by {', '.join(report.dropped)}")
    else:
        _print_table(["by", "number"], [(k, f"{n:,}") for k, n in report.dropped.items()])
    vocabularies = {str(tokenizer): name for name, tokenizer in report.tokenizers.items()}
    for tokenizer, name in vocabularies.items():
        print(f"vocabulary{f' of {name}' if len(vocabularies) > 1 else ''}: {tokenizer}")


_MAX_TOKENS = 64
_PERCENTILES = (50, 90, 95, 99)


def _pieces(tokenizer, ids: list[int]) -> Iterator[str]:
    """Yields each token as its id, followed by its text in brackets if it has any."""
    # In GPT-2 all three are the same id, which is shown as eos.
    names = {tokenizer.unk_id: "<unk>", tokenizer.pad_id: "<pad>"} | {tokenizer.eos_id: "<eos>"}
    names |= {i: text for i in tokenizer.sentinel_ids if (text := tokenizer.decode([i]))}
    # Decoded after another token, since the first token of a text loses its leading space.
    before = tokenizer.encode("e")[-1:]
    start = len(tokenizer.decode(before))
    for i in ids:
        text = names.get(i) or tokenizer.decode([*before, i])[start:]
        shown = text if text.isprintable() and "�" not in text else repr(text)
        yield f"{i}[{shown}]" if text else str(i)  # A single byte of a character has none.


def _length_row(name: str, feature) -> list[str]:
    import numpy as np

    lengths = feature.lengths
    numbers = [lengths.min(), *np.percentile(lengths, _PERCENTILES), lengths.max(), lengths.mean()]
    shares = [_share(feature.truncated), _share(feature.unknown)]
    return [name, *(f"{x:,.0f}" for x in numbers), *shares]


def _share(share: float) -> str:
    if share == 0:
        return "none"
    return f"{share:.2%}" if share >= 1e-4 else "< 0.01%"


def _histogram(feature) -> Iterator[str]:
    """Yields a line for each bin of lengths: from, to, number of examples, and a bar."""
    from t5jax.data.inspector import length_bins

    counts, edges = length_bins(feature.lengths)
    most, digits = max(counts), len(f"{edges[-1]:,}")
    lines = []
    # Consecutive bins without examples share a line.
    for _, group in itertools.groupby(range(len(counts)), lambda i: i if counts[i] else -1):
        bins = list(group)
        count, low, high = counts[bins[0]], edges[bins[0]], edges[bins[-1] + 1] - 1
        last = f" to {high:>{digits},}" if high > low else ""
        bar = "█" * round(50 * count / most) or ("▏" if count else "")
        cut = "  longer than the limit" if count and low > feature.limit else ""
        lines.append((f"{low:>{digits},}{last}", f"{count:,}", bar + cut))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for bounds, count, bar in lines:
        yield f"  {bounds:<{widths[0]}}  {count:>{widths[1]}}  {bar}".rstrip()


# --- check --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Check:
    """Reads every split of tasks, every row with every template.

    Empty targets, missing data, labels that are none, and metrics that fail on the targets
    themselves are failures. Targets that are -1 or "nan", and those that the vocabulary cannot give
    back, are doubts: such a split is not sound. Prompts and documents of other splits that also
    occur in train are counted, ignoring case and white space, and so is what is cut.

    The exit status is 0 if every split is sound, 1 if one fails, and 3 if there are only doubts.
    """

    name: str
    """The task, variant or mixture. all: those of ./tasks and --task-files, or if there are none,
    those that come with t5jax."""
    vocabulary: str = ""
    """data.vocabulary of a run. Empty: each task's own."""
    inputs_length: int = 512
    """data.inputs_length of a run, for few-shot prompts and objectives."""
    targets_length: int = 512
    """data.targets_length of a run; tasks may drop or reject longer targets."""
    labels: tuple[str, ...] = ()
    """model.labels of a run with a classifier: the classes that targets must be."""
    per_word: bool = False
    """Targets have one of the labels for each word."""
    accept_doubts: bool = False
    """The exit status is 0 if there are only doubts."""
    task_files: tuple[str, ...] = ()
    """Python files that register tasks, in addition to ./tasks/*.py and the shipped ones."""


def check(args: list[str]) -> int:
    """Prints a line for each split and template; returns the exit status."""
    options = parse(Check, args, prog="t5jax tasks check", positional=True)
    lengths = _lengths(options)
    from t5jax.data.inspector import check_tasks
    from t5jax.data.registry import load_tasks
    from t5jax.tokenizers import LabelTokenizer

    load_tasks(options.task_files)
    failed = num_sound = num_parts = 0
    labels = LabelTokenizer(options.labels, options.per_word) if options.labels else None
    tokenizer = _tokenizer(options.vocabulary)
    checks = check_tasks(options.name, tokenizer=tokenizer, labels=labels, lengths=lengths)
    for part in checks:
        num_parts += 1
        failed += bool(part.error)
        where = " ".join(filter(None, (part.task, part.split, part.template)))
        if part.error:
            print(f"FAILED {where}: {part.error}", flush=True)
        else:
            notes = [f"{part.num_examples:,} examples"]
            if part.num_dropped:
                notes.append(f"{part.num_dropped:,} dropped")
            if part.num_prompts_in_train:
                others = part.num_prompts_in_train - part.num_in_train
                other = f" ({others:,} with another answer)" if others else ""
                notes.append(f"{part.num_prompts_in_train:,} also in train{other}")
            notes += [f"{n:,} {name} cut" for name, n in part.num_cut.items()]
            num_sound += not part.doubts
            state = "DOUBTFUL" if part.doubts else "ok    "
            print(f"{state} {where}: {', '.join([*notes, *part.doubts])}", flush=True)
    print(f"{num_sound} of {num_parts} are sound")
    if failed:
        return 1
    return 0 if num_sound == num_parts or options.accept_doubts else _DOUBTFUL


_DOUBTFUL = 3  # 2 is for a command that is not understood.


# --- Tables -------------------------------------------------------------------------------------


def _print_table(columns: Sequence[str], rows, *, right: bool = False) -> None:
    """Prints a table on standard output; all columns but the first may be right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        justify = "right" if right and number else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    # A file or a pipe has no width.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
