"""Evaluation: loss, perplexity and a task's own metrics, with two baselines.

Every example counts exactly once: the last batch is padded with rows of weight 0.
"""

import contextlib
import dataclasses
import functools
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5jax import batch as features
from t5jax import metrics, sharding
from t5jax.architectures import Architecture, Dtype
from t5jax.checks import check_local, name_of, users_error
from t5jax.config import AxisRules, LossConfig, MeshConfig, override
from t5jax.data.batches.converters import make_converter
from t5jax.data.batches.examples import EvalExample, EvalSet, Example
from t5jax.decoding import Generator
from t5jax.losses import batch_loss
from t5jax.metrics.targets import is_list
from t5jax.models import api
from t5jax.monitor import progress, tables
from t5jax.source import Source, find
from t5jax.special_tokens import check_vocabulary, example_format
from t5jax.storage import to_json
from t5jax.tokenizers import LabelTokenizer, Tokenizer

Predict = Callable[[api.Params, Sequence[Sequence[int]]], list[str]]
"""A function of parameters and the token ids of inputs that returns a text for each example."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of one task."""

    scores: dict[str, float]
    """loss (nats per target token), perplexity, token_accuracy (percent), and the task's
    metrics."""
    sums: dict[str, float]
    """nll and tokens, to combine the losses of several tasks."""
    baselines: dict[str, dict[str, float]]
    """The task's metrics for copying the source, and for the most frequent target."""
    predictions: list[str]
    """Generated texts, in the order of the examples; empty if nothing was generated."""
    error: str = ""
    """Why there are no metrics: which of the task's functions failed, on what."""


class Evaluator:
    """Evaluates parameters of one model; compiles once for each shape."""

    def __init__(
        self,
        model: Architecture,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        rules: AxisRules,
        *,
        batch_size: int,
        max_tokens: int,
        generate: bool = True,
        prefix_lm: bool = False,
        predict: Predict | None = None,
    ):
        """Compiles nothing yet.

        Args:
          model: the description of the model.
          tokenizer: its tokenizer.
          mesh: the devices.
          rules: how arrays are sharded over them.
          batch_size: the number of rows per batch.
          max_tokens: the maximum number of tokens to generate for each example.
          generate: if False, only compute the loss.
          prefix_lm: use bidirectional attention among a decoder's inputs, as with data.prefix_lm.
          predict: generates the texts. None: greedy decoding. The labels of a classifier are always
            those with the largest logits.
        Raises:
          ValueError: if the mesh does not divide the batch evenly.
        """
        sharding.check_batch_size(batch_size, mesh, rules, "eval.batch_size")
        self._model, self._mesh, self._rules = model, mesh, rules
        self._format = example_format(model, tokenizer)
        self._batch_size, self._generate = batch_size, generate
        generator = Generator(model, tokenizer, mesh, rules, prefix_lm)
        self._kind, self._tokenizer = generator.kind, tokenizer
        self._predict = predict or functools.partial(
            generator, max_tokens=max_tokens, batch_size=batch_size
        )
        # Another way of generating has limits of its own.
        self._generator, self._max_tokens = None if predict else generator, max_tokens
        # Only cross-entropy, since perplexity must not depend on the training loss.
        plain = LossConfig(z_loss=0.0, label_smoothing=0.0)
        self._losses = jax.jit(lambda params, batch: batch_loss(model, params, batch, plain)[1])
        self._labels = LabelTokenizer.of(model)
        self._classes = jax.jit(
            lambda params, batch: api.logits(model, params, batch).argmax(axis=-1)
        )

    def evaluate(self, params: api.Params, eval_set: EvalSet) -> Result:
        """Evaluates one task; an error of the task's own code is part of the result."""
        sums = self._sum_losses(params, eval_set)
        loss = _per_token(sums, "nll")
        scores = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": 100 * _per_token(sums, "correct"),
        }
        if not self._predicts(eval_set):
            return Result(scores, sums, {}, [])
        if self._labels:
            predictions = self._classify(params, eval_set)
        else:
            predictions = self._predict(params, [e.input_ids for e in eval_set.examples])
        try:
            found = _score(eval_set, eval_set.examples, predictions)
        except ValueError as error:
            return Result(scores, sums, {}, predictions, error=str(error))
        return Result(scores | found, sums, _baselines(eval_set, predictions), predictions)

    def check(self, eval_set: EvalSet) -> None:
        """Reads the prompts, and scores the targets as their own predictions.

        It takes no time, where the first evaluation may come after hours.

        Raises:
          ValueError: if there is no room for an answer to a prompt, or the task's postprocessing or
            one of its metrics fails.
        """
        if not self._predicts(eval_set):
            return
        if self._generator and not self._labels:
            try:
                self._generator.prompts([e.input_ids for e in eval_set.examples], self._max_tokens)
            except ValueError as error:
                raise ValueError(f"task {eval_set.task}: {error}") from None
        few = eval_set.examples[:: -(-len(eval_set.examples) // _TRIED)]
        for examples in (few, eval_set.examples):
            try:
                _score(eval_set, examples, [self._text_of_target(e) for e in examples])
                return
            except ValueError as error:
                # A few may be of one class, which a metric may not bear.
                if examples is eval_set.examples:
                    raise ValueError(
                        f"{error} (tried on the targets as their own predictions)"
                    ) from error

    def _predicts(self, eval_set: EvalSet) -> bool:
        predicts = self._model.kind != "encoder" or self._labels is not None
        return bool(self._generate and eval_set.metric_fns and predicts)

    def _text_of_target(self, example: EvalExample) -> str:
        if self._labels:
            classes = [i for i in example.target_ids[:-1] if i < len(self._model.labels)]
            return self._labels.decode(classes)
        return self._tokenizer.decode(self._model.answer(example.target_ids))

    def _sum_losses(self, params, eval_set: EvalSet) -> dict[str, float]:
        total = Counter()
        for batch in self._batches(eval_set):
            total.update(jax.device_get(self._losses(params, self._shard(batch))))
        return {name: float(value) for name, value in total.items()}

    def _batches(self, eval_set: EvalSet) -> Iterator[features.Batch]:
        """Yields batches with inputs and targets, all of one shape but for the last one's rows."""
        examples = eval_set.examples
        sides = ["inputs", "targets"] if any(e.input_ids for e in examples) else ["targets"]
        inputs, targets = self._lengths(examples)
        spec = features.BatchSpec(
            self._batch_size, inputs, targets, kind=self._kind, has_pairs=eval_set.has_pairs
        )
        convert = make_converter(spec, self._format)
        for start in range(0, len(examples), self._batch_size):
            chunk = examples[start : start + self._batch_size]
            yield convert([[_as_example(e, sides)] for e in chunk])

    def _lengths(self, examples: Sequence[EvalExample]) -> tuple[int, int]:
        """Returns the lengths of inputs and targets in which all examples fit."""
        targets = [len(e.target_ids) for e in examples]
        if self._kind == "encoder":
            inputs = [len(e.input_ids) + bool(self._labels) for e in examples]
            rows = inputs
        elif self._kind == "encoder_decoder" or any(e.input_ids for e in examples):
            inputs = [len(self._format.prompt(e.input_ids)) for e in examples]
            rows = [i + t for i, t in zip(inputs, targets, strict=True)]
        else:
            inputs, rows = [0], targets
        longest = self._model.longest_row
        shape = _rounded(max(inputs)) if max(inputs) else 0, _rounded(max(targets))
        if longest is None or max(rows) > longest:
            return shape
        # A row that fits must not be rounded up beyond the positions.
        if self._kind == "encoder":
            return min(shape[0], longest), shape[1]
        inputs_length = min(shape[0], longest - 1)
        return inputs_length, min(shape[1], longest - inputs_length)

    def _classify(self, params, eval_set: EvalSet) -> list[str]:
        """Returns the most probable label of each text, or of each of its words."""
        texts = []
        for batch in self._batches(eval_set):
            asked_BS = batch[features.ENCODER_LOSS_WEIGHTS] > 0
            classes_BS = np.asarray(jax.device_get(self._classes(params, self._shard(batch))))
            texts += [
                self._labels.decode(classes[asked].tolist())
                for classes, asked in zip(classes_BS, asked_BS, strict=False)
            ]
        return texts

    def _shard(self, batch):
        batch = features.pad_rows(batch, self._batch_size)
        return sharding.shard_batch(batch, self._mesh, self._rules)


def mean_loss(results: Sequence[Result]) -> float:
    """Returns the mean loss over all target tokens of several tasks, in nats."""
    sums = {name: sum(r.sums[name] for r in results) for name in ("nll", "tokens")}
    return _per_token(sums, "nll")


def as_table(results: dict[str, tuple[EvalSet, Result]]) -> dict[str, dict]:
    """Returns results as plain values, for `monitor.tables` and JSON files."""
    return {
        task: {
            "num_examples": len(eval_set.examples),
            "model": result.scores,
            **result.baselines,
        }
        for task, (eval_set, result) in results.items()
    }


def evaluate_model(
    model: str | Source,
    mixture: str = "",
    *,
    split: str = "test",
    task_files: Sequence[str] = (),
    batch_size: int = 64,
    num_examples: int | None = None,
    inputs_length: int | None = None,
    max_tokens: int | None = None,
    dtype: Dtype | None = None,
    mesh: MeshConfig | jax.sharding.Mesh = MeshConfig(),
    rules: AxisRules | None = None,
    num_samples: int = 0,
    json: Path | None = None,
    show: bool = True,
) -> dict[str, dict]:
    """Evaluates a model, prints a table of the results, and returns them as plain values.

    Args:
      model: a Hub name, a Hugging Face folder, a run or one of its checkpoints; or a source.
      mixture: the task or mixture. Empty: the one that the run was trained on.
      split: the split of the task.
      task_files: Python files that register tasks, in addition to ./tasks/*.py, the shipped ones
        and the run's.
      batch_size: the number of rows per batch.
      num_examples: the maximum number of examples of each task. None: all.
      inputs_length: the maximum length of inputs in tokens; longer ones are truncated. None: as in
        the run, or 512.
      max_tokens: the maximum length of targets and answers in tokens. None: as in the run, or 128.
      dtype: the dtype of computation and parameters. None: as in training.
      mesh: the devices.
      rules: how arrays are sharded over them; an axis that they do not divide stays whole. None: as
        in the run.
      num_samples: the number of predictions to print for each task.
      json: a file for the scores, in addition to the table.
      show: print the table on standard output.
    Raises:
      ValueError: if the model or the task cannot be found or read, or the task's postprocessing or
        metrics fail.
    """
    from t5jax.data import pipeline, registry  # TensorFlow and SeqIO: only where data are read.

    if json:
        check_local(json, "--json")
    if json and not json.parent.is_dir():
        raise ValueError(f"--json {json}: there is no folder {json.parent}; make it first")
    source = find(model) if isinstance(model, str) else model
    trained = source.config.data
    mixture = mixture or trained.mixture
    if not mixture:
        raise ValueError(f"{source.path} does not say what it was trained on; give --mixture NAME")
    task_files = (*trained.task_files, *task_files)
    config = override(
        source.config,
        {
            "data.mixture": mixture,
            # A mixture that is given replaces those of the run.
            "data.mixture_changes": trained.mixture_changes if mixture == trained.mixture else (),
            "data.task_files": task_files,
            "data.inputs_length": trained.inputs_length if inputs_length is None else inputs_length,
            "data.targets_length": trained.targets_length if max_tokens is None else max_tokens,
            "eval.split": split,
            "eval.batch_size": batch_size,
            "eval.num_examples": num_examples,
        },
    )
    registry.load_tasks(task_files)
    mesh = sharding.make_mesh(mesh) if isinstance(mesh, MeshConfig) else mesh
    rules = source.rules(mesh, rules)
    sharding.check_batch_size(batch_size, mesh, rules, "batch_size")
    description, params = source.read(dtype, mesh, rules)
    tokenizer = source.tokenizer()
    check_vocabulary(description, tokenizer)
    eval_sets = pipeline.eval_sets(config, tokenizer=tokenizer)
    results = {}
    with sharding.use_mesh(mesh, rules):
        evaluator = Evaluator(
            description,
            tokenizer,
            mesh,
            rules,
            batch_size=batch_size,
            max_tokens=config.data.targets_length,
            prefix_lm=trained.prefix_lm,
        )
        for eval_set in eval_sets:
            evaluator.check(eval_set)
        for eval_set in progress.track(eval_sets, f"evaluating on {split}"):
            result = evaluator.evaluate(params, eval_set)
            if result.error:
                raise ValueError(result.error)
            results[eval_set.task] = eval_set, result
            if num_samples and result.predictions:
                columns = eval_set.samples(result.predictions, num_samples)
                tables.print_table(tables.samples_table(*columns, title=eval_set.task))
    table = as_table(results)
    if show:
        tables.print_table(tables.results_table(table), sys.stdout)
    if json:
        json.write_text(to_json(table, indent=2) + "\n", encoding="utf-8")
    return table


# --- A task's own code ----------------------------------------------------------------------------

_TRIED = 64  # Targets on which metrics are tried first: enough for most, and quick with all.


def _score(
    eval_set: EvalSet, examples: Sequence[EvalExample], predictions: Sequence[str]
) -> dict[str, float]:
    """Returns the scores of a task's metrics.

    Raises:
      ValueError: if its code fails, with task, function and text.
    """
    targets = [example.targets for example in examples]
    try:
        return metrics.compute(
            targets, _postprocess(eval_set, examples, predictions), eval_set.metric_fns
        )
    except ValueError as error:
        raise ValueError(f"task {eval_set.task}: {error}") from error


def _postprocess(
    eval_set: EvalSet, examples: Sequence[EvalExample], texts: Sequence[str]
) -> list[Any]:
    values = []
    for example, text in zip(examples, texts, strict=True):
        row = {} if example.row is None else {"example": example.row}
        try:
            values.append(eval_set.postprocess(text, **row))
        except Exception as error:  # Of a user's code.
            raise ValueError(
                f"postprocess {name_of(eval_set.postprocess)} fails on the prediction "
                f"{text!r:.80}: {users_error(error)}"
            ) from error
    return values


def _baselines(eval_set: EvalSet, predictions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns the scores of trivial predictors, without one that the task's code cannot read."""
    examples, metric_fns = eval_set.examples, eval_set.metric_fns
    targets = [example.targets for example in examples]
    # What one answer is, a list of tags or a text, the model's own answers show.
    lists = any(map(is_list, _postprocess(eval_set, examples, predictions)))
    baselines = functools.partial(metrics.baselines, metric_fns=metric_fns, lists=lists)
    copies: list[Any] | None = None
    with contextlib.suppress(ValueError):
        copies = _postprocess(eval_set, examples, [example.source for example in examples])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A constant has no correlation.
        with contextlib.suppress(ValueError):
            return baselines(copies, targets, targets)
        found = {}
        for sources, frequent in ((copies, None), (None, targets)):
            with contextlib.suppress(ValueError):
                found |= baselines(sources, targets, frequent)
    return found


# --- Numbers --------------------------------------------------------------------------------------


def _per_token(sums: Mapping[str, float], name: str) -> float:
    """Returns a sum divided by the number of target tokens; NaN if there are none."""
    return sums[name] / sums["tokens"] if sums["tokens"] else math.nan


def _as_example(example: EvalExample, sides: Sequence[str]) -> Example:
    ids = {"inputs": example.input_ids, "targets": example.target_ids}
    return {name: np.array(ids[name], np.int32) for name in sides}


def _rounded(length: int) -> int:
    """Returns a length rounded up to a multiple of 8: tasks share shapes."""
    return -(-max(length, 1) // 8) * 8
