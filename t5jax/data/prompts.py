"""Prompted tasks: rows and templates become one SeqIO task.

    prompted_task(
        "en_fr",
        jsonl({"train": "train.jsonl", "validation": "dev.jsonl"}),
        [("Translate English to French: {english}", "{french}")],
        metrics=[metrics.bleu],
    )

Several templates for one task make a model robust to how a question is put (Sanh et al. 2022,
arXiv:2110.08207; Longpre et al. 2023, arXiv:2301.13688). Training reads every row under every
template. In any other split row i has template i mod n, so that an evaluation covers all templates
at the split's own size.
"""

import dataclasses
import itertools
import json
import numbers
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from t5jax.data.sources import Row, Source
from t5jax.data.tf import seqio, tf
from t5jax.data.vocabularies import RunVocabulary

TRAIN_SPLIT = "train"

SHUFFLE_BUFFER = 10_000
"""Examples among which training draws the next at random. A longer source in a telling order (by
class, say) should be shuffled once, on disk."""

# The texts of an example, beside the SeqIO features "inputs" and "targets".
SOURCE_FEATURE = "prompt_source"
REFERENCES_FEATURE = "prompt_references"

_FORMATTER = string.Formatter()
_CHUNK = 256  # Rows that cross from Python to TensorFlow at once.


@dataclasses.dataclass(frozen=True)
class Template:
    """How a row reads as a prompt and its answer.

    Both are Python format strings over the row's fields: "{question}", "{score:.1f}",
    "{answers[text][0]}"; "{{" is a brace.
    """

    inputs: str
    targets: str
    name: str = ""
    """What error messages call it; by default its prompt."""

    def __post_init__(self):
        for side in ("inputs", "targets"):
            _fields(getattr(self, side), f"{side} of template {self}")

    def __str__(self):
        return repr(self.name or self.inputs)

    def render(self, row: Row) -> tuple[str, str, str]:
        """Returns the prompt, the answer, and the values in the prompt joined by spaces.

        Raises:
          ValueError: for a field that the row lacks, or whose value is no text and no number.
        """
        source = [str(_value(field, row)) for field in _fields(self.inputs, "inputs")]
        for field in _fields(self.targets, "targets"):
            _value(field, row)
        return self.inputs.format_map(row), self.targets.format_map(row), " ".join(source)


def prompted_task(
    name: str,
    source: Source,
    templates: Sequence[Template | tuple[str, str]],
    *,
    metrics: Sequence[Callable],
    vocabulary: Any = None,
    postprocess: Callable[[str], Any] | None = None,
    references: str | None = None,
) -> seqio.Task:
    """Registers a SeqIO task that reads rows through templates.

    Args:
      name: what configs and mixtures call it.
      source: the rows; its split "train" is what training reads.
      templates: `Template`s or pairs (inputs, targets).
      metrics: functions of (targets, predictions), such as those of `t5jax.metrics`.
      vocabulary: used by runs that name none themselves, neither by data.vocabulary nor by
        init.model: whatever `t5jax.data.vocabularies.as_tokenizer` takes; a function is called
        when it is needed first.
      postprocess: what texts go through before metrics compare them, predictions and targets
        alike, such as a function that finds the final number of a worked answer.
      references: field with the right answer, a text, or a list of all texts that are right.
        None: the rendered targets.
    Returns:
      The task, which is in `seqio.TaskRegistry` now.
    Raises:
      ValueError: for templates that cannot be read, and for a name that is taken. When examples
        are read: for a row that does not fit a template, with split, row and field.
    """
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        raise ValueError(f"there is a task or mixture {name!r} already; choose another name")
    if not templates:
        raise ValueError(f"task {name!r} has no templates; give at least one (inputs, targets)")
    try:
        parsed = [_as_template(template) for template in templates]
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from None
    feature = seqio.Feature(RunVocabulary(vocabulary), add_eos=True)
    return seqio.TaskRegistry.add(
        name,
        source=_PromptedSource(name, source, parsed, references),
        output_features={"inputs": feature, "targets": feature},
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        postprocess_fn=_postprocess_fn(postprocess or (lambda text: text)),
        metric_fns=list(metrics),
        shuffle_buffer_size=None,  # The source shuffles.
    )


def read(function: Callable[[], Any]) -> Any:
    """Returns `function()`, which reads a data set.

    What a source or a template has raised is raised as it was, not as TensorFlow wraps it.
    """
    try:
        return function()
    except tf.errors.OpError as error:
        found = re.search(_ERROR_KEY.format(r"(\d+)"), str(error))
        if found is None:
            raise
    # Not within `except`: the wrapping's traceback would keep the data set alive, and reading.
    raise _errors[int(found[1])]


# An exception cannot pass through TensorFlow, a number in a message can.
_errors: list[Exception] = []
_ERROR_KEY = "t5jax source error {}!"


class _PromptedSource(seqio.DataSource):
    """Rendered rows as a SeqIO source."""

    def __init__(self, task: str, source: Source, templates: list[Template], references):
        super().__init__(splits=source.splits, performs_internal_shuffling=True)
        self._task, self._source = task, source
        self._templates, self._references = templates, references

    supports_arbitrary_sharding = False

    def list_shards(self, split):
        return [split]

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **_):
        # There is one shard, so SeqIO never asks for a part of it.
        text = tf.TensorSpec([None], tf.string)
        names = ("inputs", "targets", SOURCE_FEATURE, REFERENCES_FEATURE)
        dataset = tf.data.Dataset.from_generator(
            lambda: self._chunks(split), output_signature=dict.fromkeys(names, text)
        ).unbatch()
        # Texts fill the buffer faster than tokens, and SeqIO repeats the data after this, so that
        # each epoch has every example once.
        return dataset.shuffle(SHUFFLE_BUFFER, seed=seed) if shuffle else dataset

    def _chunks(self, split: str) -> Iterator[dict[str, list[str]]]:
        examples = self._examples(split)
        try:
            while chunk := list(itertools.islice(examples, _CHUNK)):
                yield {name: [example[name] for example in chunk] for name in chunk[0]}
        except Exception as error:
            if isinstance(error, ValueError):
                error = ValueError(f"task {self._task!r}: {error}")
            _errors.append(error)
            raise RuntimeError(_ERROR_KEY.format(len(_errors) - 1)) from None

    def _examples(self, split: str) -> Iterator[dict[str, str]]:
        n = len(self._templates)
        for number, row in enumerate(self._source.rows(split)):
            for i in range(n) if split == TRAIN_SPLIT else [number % n]:
                try:
                    inputs, targets, source = self._templates[i].render(row)
                    references = self._references_of(row)
                except ValueError as error:
                    where = f"split {split!r}, row {number}, template {self._templates[i]}"
                    raise ValueError(f"{where}: {error}") from None
                yield {
                    "inputs": inputs,
                    "targets": targets,
                    SOURCE_FEATURE: source,
                    REFERENCES_FEATURE: references,
                }

    def _references_of(self, row: Row) -> str:
        if self._references is None:
            return ""
        value = row.get(self._references)
        if isinstance(value, str):
            return json.dumps(value)
        if not value or not all(isinstance(text, str) for text in value):
            raise ValueError(
                f"references field {self._references!r} is {value!r}; expected a text or a list "
                f"of texts; the row has {', '.join(row)}"
            )
        return json.dumps(list(value))


def _postprocess_fn(postprocess: Callable[[str], Any]) -> Callable:
    """Returns the function in the form in which SeqIO's evaluators call it."""

    def postprocess_fn(text: str, example: Mapping | None = None, is_target: bool = False):
        encoded = tf.compat.as_str(example[REFERENCES_FEATURE]) if is_target else ""
        answer = json.loads(encoded) if encoded else text
        return [postprocess(a) for a in answer] if isinstance(answer, list) else postprocess(answer)

    return postprocess_fn


def _as_template(template: Template | tuple[str, str]) -> Template:
    if isinstance(template, Template):
        return template
    if isinstance(template, str) or len(template) != 2:
        raise ValueError(
            f"{template!r} is not a template; expected a list of pairs (inputs, targets), such as "
            '[("Translate to French: {english}", "{french}")]'
        )
    return Template(*template)


def _fields(text: str, what: str) -> list[str]:
    """Returns the fields that a format string names.

    Raises:
      ValueError: for a text that is not a format string over named fields.
    """
    try:
        parsed = list(_FORMATTER.parse(text))
    except ValueError as error:
        raise ValueError(f"{what}: {error} in {text!r}; write {{{{ for a brace") from None
    fields = [field for _, field, _, _ in parsed if field is not None]
    for field in fields:
        if not re.match(r"[^\W\d]", field):
            raise ValueError(f"{what}: {{{field}}} in {text!r} must be the name of a field")
    if not fields:
        raise ValueError(f"{what}: {text!r} names no field; expected something like {{question}}")
    return fields


def _value(field: str, row: Row):
    try:
        value, _ = _FORMATTER.get_field(field, (), row)
    except (LookupError, AttributeError, TypeError):
        raise ValueError(f"there is no field {field!r}; the row has {', '.join(row)}") from None
    if not isinstance(value, (str, numbers.Number)):
        raise ValueError(
            f"field {field!r} is {value!r:.60}, a {type(value).__name__}; a template needs texts "
            "or numbers, which Source.map(function) can make of it"
        )
    return value
