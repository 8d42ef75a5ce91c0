"""Lists, shows and checks tasks, for `t5jax tasks`."""

import dataclasses
import fnmatch
import hashlib
import itertools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from t5jax.checks import did_you_mean, name_of
from t5jax.data.bridge.tf import seqio
from t5jax.data.registry import broken_files, check_mixture, own_task_names, task_names
from t5jax.data.run import TRAIN_SPLIT
from t5jax.data.tasks.foreign import kind_of
from t5jax.data.texts import TextExample, feature_tokenizers, read_examples, task_lengths
from t5jax.metrics.targets import canonical
from t5jax.tokenizers import LabelTokenizer, Tokenizer

# --- What there is ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TaskSummary:
    """One line of `t5jax tasks list`."""

    name: str
    source: str
    """The origin of rows; for a mixture, its tasks."""
    splits: str
    templates: str
    """The names of templates, or of the objective."""
    metrics: str


def list_tasks(pattern: str = "") -> list[TaskSummary]:
    """Returns the registered tasks and mixtures whose names match a pattern, without reading rows.

    Args:
      pattern: part of a name, or a glob such as "numbers_*".
    Raises:
      ValueError: if there is none.
    """
    names = task_names()
    wanted = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    chosen = fnmatch.filter(names, wanted)
    if not chosen:
        hint = did_you_mean(pattern, names)
        raise ValueError(
            f"there is no task like {pattern!r}; {hint}known are {', '.join(names) or 'none'}"
        )
    return [_summary(seqio.get_mixture_or_task(name)) for name in chosen]


def _summary(found: seqio.Task | seqio.Mixture) -> TaskSummary:
    if isinstance(found, seqio.Mixture):
        return TaskSummary(found.name, f"mixture of {_rates(found)}", "", "", "")
    kind = kind_of(found)
    templates = ", ".join(template.name for template in kind.templates)
    if kind.objective is not None:
        templates = type(kind.objective).__name__
    metrics = ", ".join(name_of(function) for function in found.metric_fns)
    return TaskSummary(found.name, kind.origin(), ", ".join(_splits(found)), templates, metrics)


def _rates(mixture: seqio.Mixture) -> str:
    rates = mixture.rate_per_task_name.items()
    return ", ".join(name if callable(rate) else f"{name} {rate:g}" for name, rate in rates)


def _splits(task: seqio.Task) -> Sequence[str]:
    try:
        return list(task.splits)
    except Exception as error:  # TFDS has to find the dataset for this.
        return [f"unknown ({type(error).__name__})"]


# --- What the model sees ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FeatureReport:
    """The lengths and tokens of one feature over the examples that were read."""

    lengths: np.ndarray
    """int32 [examples], with eos, before truncation."""
    limit: int
    """The length of this feature in a run."""
    num_unknown: int
    """Number of unknown tokens."""

    @property
    def truncated(self) -> float:
        """Fraction of examples that are longer than the limit."""
        return float(np.mean(self.lengths > self.limit))

    @property
    def unknown(self) -> float:
        """Fraction of tokens that are unknown."""
        return self.num_unknown / max(int(self.lengths.sum()), 1)


@dataclasses.dataclass(frozen=True)
class TaskReport:
    """The report of `t5jax tasks show` on one split of one task."""

    task: str
    split: str
    tokenizers: Mapping[str, Tokenizer]
    shown: list[TextExample]
    """The first of the examples that were read."""
    num_examples: int
    is_whole: bool
    """Whether all examples of the split were read."""
    features: Mapping[str, FeatureReport]
    dropped: Mapping[str, int]
    """Number of rows and examples dropped among those read, by reason."""


def show_task(
    name: str,
    split: str = "",
    *,
    tokenizer: Tokenizer | None = None,
    lengths: Mapping[str, int],
    num_shown: int = 3,
    num_examples: int | None = 10_000,
) -> TaskReport:
    """Reads the examples of a task as the model sees them.

    Args:
      name: the name of a task or a variant.
      split: the split to read; by default "train", or the first one.
      tokenizer: replaces the task's own, if the task does not fix it.
      lengths: the lengths of "inputs" and "targets" in tokens in a run.
      num_shown: the number of examples to keep.
      num_examples: the maximum number of examples, drawn from the whole split. None: all.
    Raises:
      ValueError: if it is a mixture, the split does not exist, there are no examples or no
        vocabulary, or the task cannot read a row.
    """
    task = check_mixture(name)
    if isinstance(task, seqio.Mixture):
        names = ", ".join(task.name for task in seqio.get_subtasks(task))
        raise ValueError(f"{name} is a mixture; show one of its tasks: {names}")
    splits = list(task.splits)
    split = split or ("train" if "train" in splits else splits[0])
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; there are {', '.join(splits)}")
    tokenizers = feature_tokenizers(task, tokenizer)
    dropped: Counter = Counter()
    more = None if num_examples is None else num_examples + 1
    examples = read_examples(task, split, tokenizers, lengths, dropped, more)
    shown, sizes, unknown, num_read = [], {f: [] for f in tokenizers}, Counter(), 0
    for example in itertools.islice(examples, num_examples):
        num_read += 1
        if num_read <= num_shown:
            shown.append(example)
        for feature, ids in example.ids.items():
            sizes[feature].append(len(ids))
            if tokenizers[feature].unk_id != tokenizers[feature].eos_id:
                unknown[feature] += ids.count(tokenizers[feature].unk_id)
    if not num_read:
        raise ValueError(f"{name} has no examples in its split {split!r}")
    is_whole = next(examples, None) is None
    examples.close()  # TensorFlow's threads would continue to read when Python exits.
    limits = task_lengths(task, lengths)
    features = {
        feature: FeatureReport(np.array(x, np.int32), limits[feature], unknown[feature])
        for feature, x in sizes.items()
        if x
    }
    return TaskReport(name, split, tokenizers, shown, num_read, is_whole, features, dropped)


def length_bins(lengths: np.ndarray, num_bins: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Returns the counts of a histogram of lengths, and the edges of its bins, which are rounded.

    Args:
      lengths: int [n], n > 0.
      num_bins: the maximum number of bins.
    Returns:
      Counts int64 [b] and edges int64 [b + 1]; bin i is edges[i] <= length < edges[i + 1].
    """
    low, high = int(lengths.min()), int(lengths.max())
    widths = (m * 10**e for e in itertools.count() for m in (1, 2, 5))
    width = next(w for w in widths if high // w - low // w < num_bins)
    edges = np.arange(low // width, high // width + 2) * width
    return np.histogram(lengths, bins=edges - 0.5)[0], edges


def plot_lengths(report: TaskReport, path: str | Path) -> None:
    """Plots histograms of the features' lengths with the run's limits, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    # Not pyplot, which would keep the figure and look for a display.
    size = (6 * len(report.features), 3.6)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    for i, (name, feature) in enumerate(report.features.items()):
        axes = figure.add_subplot(1, len(report.features), i + 1)
        counts, edges = length_bins(feature.lengths, 40)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color="0.55", linewidth=0)
        longer = f"{feature.truncated:.2%} are" if feature.truncated else "none is"
        label = f"limit {feature.limit:,}: {longer} longer"
        # A distant limit would compress the bars.
        if feature.limit <= 1.5 * edges[-1]:
            axes.axvline(feature.limit, color="tab:red", linewidth=1.2)
        axes.set_title(f"{name}, {label}", loc="left", fontsize="medium")
        axes.set_xlabel("Tokens with eos")
        axes.set_ylabel("Examples")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    part = "" if report.is_whole else " drawn from all"
    title = f"{report.task}, {report.split}: {report.num_examples:,} examples{part}"
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, format="png")


# --- Whether it can be read ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Check:
    """The result for one split of one task, with one template if it has templates."""

    task: str
    split: str
    template: str
    num_examples: int
    num_dropped: int
    error: str
    """Empty if there is none."""
    num_prompts_in_train: int = 0
    """Prompts or documents that also occur in "train", ignoring case, white space and Unicode forms
    (NFKC). 0 for "train" itself; not known for prompts with exemplars."""
    num_in_train: int = 0
    """Those that occur there with the same answer."""
    num_cut: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Number of examples of which a feature is cut."""
    doubts: tuple[str, ...] = ()
    """What is wrong with it, though it can be read."""


def check_tasks(
    name: str,
    *,
    tokenizer: Tokenizer | None = None,
    labels: LabelTokenizer | None = None,
    lengths: Mapping[str, int],
) -> Iterator[Check]:
    """Reads every split of tasks, each row with each template, and yields the results.

    Args:
      name: the name of a task, a variant or a mixture, or "all": those of the user, or if there are
        none, those that come with t5jax.
      tokenizer: replaces the tasks' own, if they do not fix them.
      labels: the classes of a classifier, which targets must be.
      lengths: the lengths of "inputs" and "targets" in tokens in a run.
    Raises:
      ValueError: if the name is not registered. Errors of tasks are yielded.
    """
    names = own_task_names() if name == "all" else [name]
    for path, error in broken_files().items() if name == "all" else ():
        yield Check(path.stem, "", "", 0, 0, error)
    tasks = {t.name: t for n in names for t in seqio.get_subtasks(check_mixture(n))}
    for task in tasks.values():
        try:
            splits = sorted(task.splits, key=lambda split: split != TRAIN_SPLIT)
        except Exception as error:
            yield Check(task.name, "", "", 0, 0, _message(error))
            continue
        for template, part in kind_of(task).parts(task):
            in_train: set[bytes] = set()
            for split in splits:
                yield _check(part, split, template, tokenizer, labels, lengths, in_train)


def _check(
    task, split: str, template: str, tokenizer, labels, lengths, in_train: set[bytes]
) -> Check:
    """Checks one split of a task with one template.

    Args:
      in_train: the `_hashes` of train, which is checked first and fills it.
    """
    dropped: Counter = Counter()
    num_examples, error, doubles = 0, "", Counter()
    kind = kind_of(task)
    is_corpus = kind.objective is not None

    def compare(texts):
        prompt, row = _hashes(texts)
        if split == TRAIN_SPLIT:
            in_train.update((prompt, row))
        else:
            doubles.update(prompts=prompt in in_train, rows=row in in_train)

    targets = _Targets(task)
    num_cut: Counter = Counter()
    try:
        tokenizers = feature_tokenizers(task, tokenizer)
        eos_ids = {name: tokenizer.eos_id for name, tokenizer in tokenizers.items()}
        if labels is not None:
            eos_ids["targets"] = labels.eos_id
        # Classes are not written, and an encoder's vocabulary writes nothing.
        writes = labels is None and not is_corpus and tokenizers["targets"].mask_id is None
        for example in read_examples(task, split, tokenizers, lengths, dropped, labels=labels):
            missing = set(task.output_features) - set(example.ids)
            empty = [f for f, ids in example.ids.items() if not set(ids) - {eos_ids[f]}]
            if missing or "targets" in empty:
                what = "no " + ", ".join(sorted(missing)) if missing else "empty targets"
                raise ValueError(f"example {num_examples} has {what}")
            num_examples += 1
            if not is_corpus:
                limits = {name: n for name, n in lengths.items() if name in example.ids}
                if labels is not None:
                    del limits["targets"]
                num_cut.update(name for name, n in limits.items() if len(example.ids[name]) > n)
                targets.add(example, tokenizers["targets"] if writes else None)
            if not is_corpus and not kind.shots:
                compare([example.texts[name] for name in task.output_features])
        if not num_examples:
            raise ValueError("there are no examples")
        if is_corpus:  # Its examples are pieces of documents, which depend on the lengths.
            for document in kind.texts(split):
                compare([document])
        targets.try_metrics()
    except Exception as problem:
        error = _message(problem)
    found = doubles["prompts"], doubles["rows"]
    return Check(
        task.name,
        split,
        template,
        num_examples,
        dropped.total(),
        error,
        *found,
        num_cut=num_cut,
        doubts=tuple(targets.doubts()),
    )


class _Targets:
    """Looks for targets that are none, and for what no model can answer."""

    # As pandas, Python, JSON, Excel and SQL write what is missing.
    _MISSING = ("nan", "NaN", "None", "null", "<NA>", "#N/A", "NULL", "\\N")
    _NUM_TRIED = 256
    _MANY = 100  # That many equal targets are no accident.

    def __init__(self, task: seqio.Task):
        self._task, self._rng = task, random.Random(0)
        self._num_read, self._counts = 0, Counter()
        self._first = ""
        self._changed: tuple[str, str] | None = None
        self._tried: list[TextExample] = []
        self._imperfect: dict[str, float] = {}

    def add(self, example: TextExample, tokenizer: Tokenizer | None) -> None:
        """Looks at the targets of an example.

        Args:
          example: the example.
          tokenizer: has to give the targets back; None if they are not written.
        """
        text = example.texts["targets"].strip()
        self._num_read += 1
        self._first = text if self._num_read == 1 else self._first
        self._counts["same"] += text == self._first
        self._counts["decimals"] += _DECIMALS.fullmatch(text) is not None
        self._counts[text if text in self._MISSING else _number_of_label(text)] += 1
        if tokenizer is not None:
            back = tokenizer.decode(example.ids["targets"]).strip()
            if canonical(back) != canonical(text):
                self._counts["changed"] += 1
                self._changed = self._changed or (text, back)
        if len(self._tried) < self._NUM_TRIED:
            self._tried.append(example)
        elif (place := self._rng.randrange(self._num_read)) < self._NUM_TRIED:
            self._tried[place] = example

    def try_metrics(self) -> None:
        """Scores targets as if they were predictions.

        Raises:
          ValueError: if a metric or the postprocessing fails.
        """
        task = self._task
        if not self._tried or not task.predict_metric_fns:
            return
        texts = [_labels_alone(example.texts["targets"]) for example in self._tried]
        targets, predictions = texts, texts
        if task.postprocessor:
            try:
                targets = [
                    task.postprocess_fn(text, example=example.row, is_target=True)
                    for text, example in zip(texts, self._tried, strict=True)
                ]
                predictions = [
                    task.postprocess_fn(text, example=example.row, is_target=False)
                    for text, example in zip(texts, self._tried, strict=True)
                ]
            except Exception as error:
                raise ValueError(f"its postprocess fails on its targets: {error!r}") from None
        for metric in task.predict_metric_fns:
            try:
                scores = metric(targets, predictions)
            except Exception as error:
                what = f"its metric {name_of(metric)} fails on its own targets"
                raise ValueError(f"{what}: {_message(error)}") from None
            self._imperfect |= {
                name: value
                for name, value in scores.items()
                if name in ("accuracy", "exact_match", "em") and value < 100
            }

    def doubts(self) -> Iterator[str]:
        """Yields what is wrong with the targets."""
        counts = self._counts
        for word in self._MISSING:
            if counts[word] > (word == "null"):  # Once, it is German.
                yield f"{counts[word]:,} targets are {word!r}"
        if counts["no label"] and counts["no label"] + counts["label"] == self._num_read:
            yield f"{counts['no label']:,} targets are -1, which often says that there is no label"
        if counts["decimals"]:
            yield (
                f"{counts['decimals']:,} targets are numbers with 10 decimals or more; round them, "
                "as {score:.1f} does"
            )
        if self._num_read == counts["same"] >= self._MANY:
            yield f"all {self._num_read:,} targets are {self._first!r:.40}"
        if counts["changed"]:
            text, back = self._changed
            yield (
                f"{counts['changed']:,} targets come back from the vocabulary changed: "
                f"{text!r:.40} as {back!r:.40}"
            )
        for name, score in self._imperfect.items():
            yield f"the targets themselves score {name} {score:.2f}"


_DECIMALS = re.compile(r"-?\d*\.\d{10,}")


def _labels_alone(text: str) -> str:
    """Returns a target without the marks of pieces that have no label."""
    return " ".join(text.replace("\0", "").split()) if "\0" in text else text


def _number_of_label(text: str) -> str:
    """Returns whether a text is the number of a label, or -1, which is none."""
    if text in ("-1", "-1.0"):
        return "no label"
    return "label" if text.removesuffix(".0").isdecimal() else "other"


def _hashes(texts: Sequence[str]) -> tuple[bytes, bytes]:
    """Returns hashes of the first text and of all, which are equal if only the form differs."""
    plain = [" ".join(unicodedata.normalize("NFKC", x).lower().split()) for x in texts]
    first, whole = (
        hashlib.blake2b(x.encode(errors="surrogatepass"), digest_size=8).digest()
        for x in (plain[0], "\0".join(plain))
    )
    return first, whole


def _message(error: Exception) -> str:
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
