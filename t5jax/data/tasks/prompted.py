"""Prompted tasks: rows and templates become SeqIO tasks.

    prompted_task(
        "en_fr",
        jsonl({"train": "train.jsonl", "validation": "dev.jsonl"}),
        {"plain": ("Translate English to French: {english}", "{french}")},
        metrics=[metrics.bleu],
    )

Several templates for one task make a model robust to the wording of prompts (Sanh et al. 2022,
arXiv:2110.08207; Longpre et al. 2023, arXiv:2301.13688). Training uses every row with every
template. In any other split row i has template i mod n, so that evaluation covers all templates
without growing the split.

Every task has variants, which are registered on demand: "en_fr:plain" has one template,
"en_fr:5shot" puts five solved training rows before each prompt, "en_fr:plain:5shot" does both.
"""

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from t5jax.checks import check_choice, did_you_mean, name_of
from t5jax.data.bridge.tf import seqio, tf
from t5jax.data.bridge.vocabulary import RunVocabulary
from t5jax.data.fingerprint import describe
from t5jax.data.prompts.fewshot import POOL_SIZE, FewShot
from t5jax.data.prompts.fitting import TooLong, reason_to_drop, shortened
from t5jax.data.prompts.given import SHOTS, as_templates, check_exemplar
from t5jax.data.prompts.template import Prompt, PromptTemplate
from t5jax.data.recipe import CHUNK, Encoder, Recipe, in_chunks, source_files
from t5jax.data.run import TRAIN_SPLIT, Run
from t5jax.data.segments import BREAK, encode_batch, shown
from t5jax.data.sources.source import Row, Source, get_field
from t5jax.data.tasks.base import TEXT, TOKENS, NumberedRow, OwnSource, check_functions
from t5jax.tokenizers import Tokenizer
from t5jax.tokenizers.training import sample

# The texts of an example, in addition to the SeqIO features "inputs" and "targets".
SOURCE_FEATURE = "prompt_source"
REFERENCES_FEATURE = "prompt_references"
CHOICES_FEATURE = "prompt_choices"

_SIDES = ("inputs", "targets")

Empty = Literal["error", "drop"]


def prompted_task(
    name: str,
    source: Source,
    templates: Sequence | Mapping[str, Any],
    *,
    metrics: Sequence[Callable],
    vocabulary: Any = None,
    postprocess: Callable[[str], Any] | None = None,
    references: str | None = None,
    too_long: TooLong = "cut",
    may_cut: str | Sequence[str] = (),
    long_inputs: TooLong = "cut",
    empty: Empty = "error",
    exemplar: str = "{inputs}\n{targets}\n\n",
    seed: int = 0,
) -> seqio.Task:
    """Registers a SeqIO task that renders rows with templates.

    Args:
      name: the name of the task in configs and mixtures.
      source: the rows; training reads its split "train".
      templates: a list, or a dict by name, of pairs of format strings (inputs, targets), where
        inputs may be a pair itself: the two segments that a BERT classifier reads; Jinja
        templates "inputs ||| targets", or `PromptTemplate`s such as those of `promptsource(file)`.
      metrics: functions of (targets, predictions), such as those of `t5jax.metrics`.
      vocabulary: the vocabulary of runs that set neither data.vocabulary nor init.model: anything
        that `t5jax.data.bridge.vocabulary.as_tokenizer` accepts; a function is called when it is
        first needed.
      postprocess: applied to both predictions and targets before metrics compare them, such as a
        function that extracts the final number of a worked answer.
      references: the field with the correct answer, a text or a list of all correct texts; dots
        select nested fields ("answers.text"). None: the rendered targets.
      too_long: what to do with targets longer than the run's targets_length. "cut": truncate them.
        "drop": exclude them from training; evaluation keeps every row. "error": raise an error.
      may_cut: the fields, or the one field, that lose their end if a prompt is longer than the
        run's inputs_length, the first one first: the context, so that the question is kept. By
        default the prompt as a whole loses its end.
      long_inputs: what to do with prompts that are too long all the same; as too_long.
      empty: what to do with a row for which a template renders an empty prompt or answer. "error":
        raise an error. "drop": training excludes the row with this template; evaluation uses the
        next template that renders it.
      exemplar: the format string of an exemplar in few-shot variants, with {inputs} and {targets}.
      seed: the seed of the draw of exemplars.
    Returns:
      The task, which is now in `seqio.TaskRegistry`.
    Raises:
      ValueError: if a template cannot be parsed, or the name is taken. When examples are read, if a
        row does not fit a template, with task, split, row and field.
    """
    check_choice(too_long, get_args(TooLong), f"too_long of task {name!r}")
    check_choice(long_inputs, get_args(TooLong), f"long_inputs of task {name!r}")
    check_choice(empty, get_args(Empty), f"empty of task {name!r}")
    try:
        parsed = as_templates(templates)
        check_exemplar(exemplar)
        check_functions(metrics)
    except ValueError as error:
        raise ValueError(f"task {name!r}: {error}") from None
    return _register(
        _Definition(
            name=name,
            source=source,
            templates=parsed,
            references=references,
            too_long=too_long,
            may_cut=(may_cut,) if isinstance(may_cut, str) else tuple(may_cut),
            long_inputs=long_inputs,
            empty=empty,
            exemplar=exemplar,
            seed=seed,
            vocabulary=RunVocabulary(vocabulary),
            metrics=tuple(metrics),
            postprocess=postprocess or (lambda text: text),
        )
    )


@dataclasses.dataclass(frozen=True)
class _Definition:
    """The arguments of `prompted_task`, some of which a variant changes."""

    name: str
    source: Source
    templates: tuple[PromptTemplate, ...]
    references: str | None
    too_long: TooLong
    may_cut: tuple[str, ...]
    long_inputs: TooLong
    empty: Empty
    exemplar: str
    seed: int
    vocabulary: RunVocabulary
    metrics: tuple[Callable, ...]
    postprocess: Callable[[str], Any]
    shots: int = 0


def _register(task: _Definition) -> seqio.Task:
    return PromptedSource(task).register(
        task.vocabulary,
        postprocess_fn=_postprocess_fn(task.postprocess),
        metric_fns=list(task.metrics),
    )


# --- Variants -----------------------------------------------------------------------------------


def register_variant(name: str) -> None:
    """Registers the variant of a prompted task that a name refers to, unless it is registered.

    Args:
      name: "task:template", "task:5shot" or "task:template:5shot". Other names are ignored.
    Raises:
      ValueError: if the task does not have the template, or has no training rows for exemplars.
    """
    if name in seqio.TaskRegistry.names() or name in seqio.MixtureRegistry.names():
        return
    task, wanted = _base_of(name)
    if task is None:
        return
    templates, shots = task.templates, 0
    if wanted and (match := SHOTS.fullmatch(wanted[-1])):
        shots = int(match[1])
        wanted = wanted[:-1]
    if wanted:
        templates = tuple(t for t in templates if t.name == wanted[0])
    if not templates or len(wanted) > 1:
        known = [f"{task.name}:{t.name}" for t in task.templates]
        hint = did_you_mean(name, known)
        raise ValueError(
            f"task {task.name!r} has no variant {name!r}; {hint}there are {', '.join(known)}, each "
            f"also with exemplars ({known[0]}:5shot), and {task.name}:5shot"
        )
    if shots and any(template.is_pair for template in templates):
        raise ValueError(
            f"{name!r} asks for exemplars, but a template of task {task.name!r} has two texts, "
            "before which they cannot be put; leave them out, or write both texts as one"
        )
    if shots and TRAIN_SPLIT not in task.source.splits:
        raise ValueError(
            f"{name!r} needs exemplars, but task {task.name!r} has no split {TRAIN_SPLIT!r} to "
            f"draw them from; there are {', '.join(task.source.splits)}"
        )
    _register(dataclasses.replace(task, name=name, templates=templates, shots=shots))


def variants(task_name: str) -> list[str]:
    """Returns the names of a prompted task's variants, where N stands for any number."""
    task, wanted = _base_of(task_name)
    if task is None or wanted:
        return []
    names = [f"{task_name}:{template.name}" for template in task.templates]
    if TRAIN_SPLIT in task.source.splits:
        names += [f"{n}:Nshot" for n in (task_name, *names)]
    return names


def _base_of(name: str) -> tuple[_Definition | None, list[str]]:
    """Returns the prompted task that a name begins with, and the remaining parts."""
    parts = name.split(":")
    for end in range(1, len(parts) + 1):
        base = ":".join(parts[:end])
        if base in seqio.TaskRegistry.names():
            source = seqio.TaskRegistry.get(base).source
            if isinstance(source, PromptedSource):
                return source.definition, parts[end:]
    return None, []


# --- Reading ------------------------------------------------------------------------------------


class PromptedSource(OwnSource):
    """The rendered rows of a task. `examples` reads them without TensorFlow."""

    features = dict.fromkeys(_SIDES, TOKENS) | dict.fromkeys(
        ("inputs_pretokenized", "targets_pretokenized", SOURCE_FEATURE, REFERENCES_FEATURE), TEXT
    )

    def __init__(self, definition: _Definition):
        super().__init__(definition.name, definition.source)
        self.definition = definition
        self.templates, self.shots = definition.templates, definition.shots
        self.has_pairs = any(template.is_pair for template in definition.templates)
        if any(template.has_choices for template in definition.templates):
            self.features = self.features | {CHOICES_FEATURE: TEXT}

    def parts(self, task):
        parts = []
        for template in self.templates:
            definition = dataclasses.replace(self.definition, templates=(template,))
            parts.append((template.name, PromptedSource(definition).replace_in(task)))
        return parts

    def fingerprint(self, tokenizer: Tokenizer | None = None) -> dict:
        """Returns what the texts depend on in addition to rows and lengths, as JSON values.

        Args:
          tokenizer: the run's tokenizer, whose chat template may be used.
        """
        task = self.definition
        found: dict[str, Any] = {
            "templates": [repr(template) for template in self._bound(tokenizer)],
            "references": task.references,
            "too_long": task.too_long,
            "empty": task.empty,
            "shots": task.shots,
        }
        if task.shots:
            found |= {"exemplar": task.exemplar, "seed": task.seed}
        if self.has_pairs:
            found |= {"second texts": [getattr(t, "second", "") for t in self.templates]}
        if self._fits_inputs:
            found |= {"may_cut": task.may_cut, "long_inputs": task.long_inputs}
        return found

    @property
    def _fits_inputs(self) -> bool:
        """Whether texts depend on the length of inputs, apart from exemplars."""
        return bool(self.definition.may_cut) or self.definition.long_inputs != "cut"

    def examples(
        self,
        split: str,
        dropped: Counter | None = None,
        run: Run | None = None,
    ) -> Iterator[dict[str, str]]:
        """Yields the rendered texts of a split, the same ones in the same order each time.

        Args:
          split: the name of the split.
          dropped: counts dropped rows, by reason.
          run: the run, whose tokenizer counts tokens and may have a chat template. Without it or
            its lengths, all exemplars are kept and no target is too long.
        Returns:
          Dicts of the prompt ("inputs"), the answer ("targets"), the values in the prompt
          (SOURCE_FEATURE), the correct answers as JSON (REFERENCES_FEATURE), empty if they are
          the targets, and if a template has them, the answer choices as JSON (CHOICES_FEATURE).
        Raises:
          ValueError: if a row cannot be read or rendered, with task, split, row and template.
        """
        return self._rendered(self.rows(split, dropped), split, dropped, run)

    def texts(self, split):
        for example in self.examples(split):
            for name in _SIDES:
                yield from example[name].split(BREAK)

    def _rendered(
        self,
        rows: Iterable[NumberedRow],
        split: str,
        dropped: Counter | None,
        run: Run | None,
    ) -> Iterator[dict[str, str]]:
        """Yields what `examples` does, of these rows of a split."""
        dropped = Counter() if dropped is None else dropped
        tokenizer, labels, lengths = run or (None, None, {})
        is_train = split == TRAIN_SPLIT
        renderers = self._renderers(split, tokenizer, lengths.get("inputs"))
        for place, number, row in rows:
            first = 0 if is_train else place % len(renderers)
            for template, render in renderers[first:] + renderers[:first]:
                try:
                    prompt = shortened(
                        render,
                        row,
                        number,
                        self.definition.may_cut,
                        tokenizer,
                        lengths.get("inputs"),
                    )
                    if not prompt.is_empty and prompt.inputs.count(BREAK) != template.is_pair:
                        raise ValueError(
                            f"it has the character {BREAK!r}, which is none for texts; remove it "
                            "by Source.clean(remove_control_characters())"
                        )
                    references = self._references_of(row)
                    if labels is not None and not prompt.is_empty:
                        arranged = labels.arrange(prompt.inputs, prompt.targets, tokenizer)
                        prompt = prompt._replace(targets=arranged)
                        # Metrics compare with the labels that a model is asked for: a word without
                        # pieces has none, nor has one beyond the cut.
                        length = lengths.get("targets")
                        asked = labels.encode(arranged)[: length and length - 1]
                        references = references or json.dumps(labels.decode(asked))
                    choices = {}
                    if CHOICES_FEATURE in self.features:
                        asked = template.answer_choices(row, number)
                        choices[CHOICES_FEATURE] = json.dumps(asked)
                    sides = {"inputs": tokenizer, "targets": labels or tokenizer}
                    reason = self._reason_to_drop(prompt, is_train, sides, lengths)
                except ValueError as error:
                    where = f"split {split!r}, row {number}, template {template}"
                    raise ValueError(f"task {self.task!r}: {where}: {error}") from None
                if reason and is_train:
                    dropped[f"{reason} (template {template})"] += 1
                if not reason:
                    yield {
                        "inputs": prompt.inputs,
                        "targets": prompt.targets,
                        SOURCE_FEATURE: prompt.source,
                        REFERENCES_FEATURE: references,
                        **choices,
                    }
                    if not is_train:
                        break
            else:
                if not is_train:
                    dropped["rendered by no template"] += 1

    def _renderers(self, split: str, tokenizer, inputs_length: int | None):
        """Returns pairs of a template and its function of (row, number)."""
        bound = self._bound(tokenizer)
        if not self.shots:
            return [(template, template.render) for template in bound]
        pool, task = self._pool, self.definition

        def renderer(template):
            few_shot = FewShot(
                template,
                pool,
                task.shots,
                form=task.exemplar,
                seed=task.seed,
                tokenizer=tokenizer,
                inputs_length=inputs_length,
            )
            return lambda row, number: few_shot.render(row, number, split)

        return [(template, renderer(template)) for template in bound]

    @functools.cached_property
    def _pool(self) -> list[tuple[int, Row]]:
        """The training rows from which exemplars are drawn."""
        rows = ((number, row) for _, number, row in self.rows(TRAIN_SPLIT))
        if self.source.is_endless(TRAIN_SPLIT):
            rows = itertools.islice(rows, POOL_SIZE)
        return sample(rows, POOL_SIZE)

    def _bound(self, tokenizer: Tokenizer | None) -> list[PromptTemplate]:
        if tokenizer is None:
            return list(self.templates)
        try:
            return [template.bind(tokenizer) for template in self.templates]
        except ValueError as error:
            raise ValueError(f"task {self.task!r}: {error}") from None

    def _reason_to_drop(self, prompt: Prompt, is_train: bool, tokenizers, lengths) -> str:
        """Returns why an example is dropped, or "" if it is kept.

        Raises:
          ValueError: if the task does not allow that.
        """
        task = self.definition
        if prompt.is_empty:
            if task.empty == "drop":
                return "nothing rendered"
            side = "targets" if prompt.inputs.strip() else "inputs"
            raise ValueError(
                f"its {side} are empty; filter such rows out (Source.filter), or let "
                'prompted_task(..., empty="drop") leave them out'
            )
        rules = {"inputs": task.long_inputs, "targets": task.too_long}
        return reason_to_drop(prompt, rules, tokenizers, lengths, is_train)

    def _references_of(self, row: Row) -> str:
        field = self.definition.references
        if field is None:
            return ""
        value = get_field(row, field)
        if isinstance(value, str):
            return json.dumps(value)
        is_list = isinstance(value, Sequence) and len(value) > 0
        if not is_list or not all(isinstance(text, str) for text in value):
            raise ValueError(
                f"references field {field!r} is {value!r:.60}; expected a text or a list of texts"
            )
        return json.dumps(list(value))

    def encode(self, rows, split, run, dropped=None):
        """Yields the examples of rows in order, as tokens and texts."""
        examples: Iterator[dict[str, Any]] = self._rendered(rows, split, dropped, run)
        tokenizers = {"inputs": run.tokenizer, "targets": run.labels or run.tokenizer}
        for chunk in in_chunks(examples, CHUNK):
            for side, tokenizer in tokenizers.items():
                ids = encode_batch(tokenizer, [example[side] for example in chunk])
                for example, tokens in zip(chunk, ids, strict=True):
                    example[f"{side}_pretokenized"] = shown(example[side], tokenizer).encode()
                    example[side] = np.array([*tokens, tokenizer.eos_id], np.int32)
            for example in chunk:
                for feature in (SOURCE_FEATURE, REFERENCES_FEATURE, CHOICES_FEATURE):
                    if feature in example:
                        example[feature] = example[feature].encode()
                yield example

    def finish(self, run):
        """Returns a function that returns examples unchanged: nothing about them is random."""
        return lambda example, *seeds: example

    def recipe(self, split, run):
        tokenizer, labels, lengths = run
        content: dict[str, Any] = {
            "its templates or how they are read": self.fingerprint(tokenizer),
            "the code of its rows": describe(self.source),
        }
        files = source_files(self.source, split)
        if self.shots:
            files += source_files(self.source, TRAIN_SPLIT)
        if self.shots or self._fits_inputs:
            content["data.inputs_length"] = lengths["inputs"]
        if self.definition.too_long != "cut":
            content["data.targets_length"] = lengths["targets"]

        def chunks(dropped):
            texts = self.examples(split, dropped, run)
            return in_chunks(({f: text[f] for f in _SIDES} for text in texts), CHUNK)

        eos_ids = {"inputs": tokenizer.eos_id, "targets": (labels or tokenizer).eos_id}
        encoder = Encoder(_SIDES, eos_ids, tokenizer, labels)
        return Recipe(self.task, split, run, chunks, encoder, content, files)


def _postprocess_fn(postprocess: Callable[[str], Any]) -> Callable:
    """Returns the function in the form in which SeqIO's evaluators call it."""

    def postprocess_fn(text: str, example: Mapping | None = None, is_target: bool = False):
        encoded = tf.compat.as_str(example[REFERENCES_FEATURE]) if is_target else ""
        answer = json.loads(encoded) if encoded else text
        return [postprocess(a) for a in answer] if isinstance(answer, list) else postprocess(answer)

    postprocess_fn.__name__ = name_of(postprocess)
    return postprocess_fn
