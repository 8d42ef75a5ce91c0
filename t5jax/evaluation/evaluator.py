"""What a model says of the examples of a task: probabilities, answers, and scores of both.

Every example counts exactly once: the last batch is padded with rows of weight 0. What is said of
an example depends neither on the batch that it is in nor on the devices.
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from t5jax import batch as features
from t5jax import decoding, sharding
from t5jax.architectures import Architecture
from t5jax.config import AxisRules
from t5jax.data.batches.converters import make_converter
from t5jax.data.batches.examples import EvalExample, EvalSet, Example
from t5jax.evaluation.scores import Answer, Answers, is_choice, ranks, score
from t5jax.metrics.statistics import ratio
from t5jax.models import api
from t5jax.special_tokens import example_format
from t5jax.tokenizers import LabelTokenizer, Tokenizer

_log = logging.getLogger(__name__)

Predict = Callable[[api.Params, Sequence[Sequence[int]]], list[str]]
"""A function of parameters and the token ids of inputs that returns a text for each example."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of one task."""

    scores: dict[str, float]
    """loss (nats per target token), perplexity, token_accuracy (percent), and the task's
    metrics."""
    answers: list[Answer]
    """What the model said of each example."""
    error: str = ""
    """Why there are no metrics: which of the task's functions failed, on what."""

    @property
    def predictions(self) -> list[str]:
        """Generated texts, in the order of the examples; empty if nothing was generated."""
        return [a.prediction for a in self.answers if a.prediction is not None]


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
        between_batches: Callable[[], None] = lambda: None,
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
          between_batches: is called before each batch, and before texts are scored; what it raises
            ends an evaluation.
        Raises:
          ValueError: if the mesh does not divide the batch evenly.
        """
        sharding.check_batch_size(batch_size, mesh, rules, "eval.batch_size")
        self._model, self._mesh, self._rules = model, mesh, rules
        self._format = example_format(model, tokenizer)
        self._batch_size, self._generate = batch_size, generate
        self._between_batches = between_batches
        generator = decoding.Generator(
            model, tokenizer, mesh, rules, prefix_lm, between_batches=between_batches
        )
        self._kind, self._tokenizer = generator.kind, tokenizer
        self._predict = predict or functools.partial(
            generator, max_tokens=max_tokens, batch_size=batch_size
        )
        # Another way of generating has limits of its own.
        self._generator, self._max_tokens = None if predict else generator, max_tokens
        self._ranker = generator
        self._labels = LabelTokenizer.of(model)
        self._classes = jax.jit(
            lambda params, batch: sharding.constrain(
                api.logits(model, params, batch).argmax(axis=-1), None, None
            )
        )

    def evaluate(self, params: api.Params, eval_set: EvalSet) -> Result:
        """Evaluates one task; an error of the task's own code is part of the result."""
        (answers,) = self.answers(params, eval_set)
        self._between_batches()
        try:
            return Result(score(eval_set, Answers.of(eval_set, answers)), answers)
        except ValueError as error:
            texts = dataclasses.replace(eval_set, metric_fns=(), score_fns=())
            return Result(score(texts, Answers.of(texts, answers)), answers, error=str(error))

    def answers(
        self, params: api.Params, eval_set: EvalSet, *, start: int = 0, most: int | None = None
    ) -> Iterator[list[Answer]]:
        """Yields what the model says of the examples, in order.

        Args:
          params: the parameters.
          eval_set: the task.
          start: the number of the first example to ask for.
          most: the number of examples to ask for at a time. None: all at once.
        """
        examples = eval_set.examples
        batches = self._batch_maker(eval_set)
        for first in range(start, len(examples), most or max(len(examples), 1)):
            last = first + (most or len(examples))
            chunk = examples[first:last]
            losses = self._score(params, batches(chunk))
            choices = self._rank(params, chunk) if ranks(eval_set) else [() for _ in chunk]
            texts: Sequence[str | None] = [None] * len(chunk)
            if self._predicts(eval_set):
                texts = (
                    self._classify(params, batches(chunk))
                    if self._labels
                    else self._predict(params, [e.input_ids for e in chunk])
                )
            yield [self._answer(*each) for each in zip(chunk, losses, texts, choices, strict=True)]

    def _answer(
        self,
        example: EvalExample,
        loss: tuple[float, int, int],
        text: str | None,
        choices: tuple[float, ...],
    ) -> Answer:
        sizes = 0, 0
        if self._model.kind != "encoder":
            target = self._text_of_target(example)
            # Words as in lm-evaluation-harness: what stands between white space.
            sizes = len(target.encode("utf-8", "surrogatepass")), len(re.split(r"\s+", target))
        return Answer(*loss, *sizes, text, choices)

    @property
    def _reads_text(self) -> bool:
        """Whether targets are texts, and not words that a masked model fills in."""
        return self._model.kind != "encoder" or self._labels is not None

    def _rank(self, params: api.Params, examples: Sequence[EvalExample]) -> list[tuple[float, ...]]:
        """Returns the log-probabilities of each example's answer choices.

        Those of an encoder-decoder end as its targets do. Those of a decoder have no end: it may
        not have learned that an answer ends.
        """
        ends = [] if self._model.kind == "decoder" else [self._tokenizer.eos_id]
        asked = [(e.input_ids, choice) for e in examples for choice in e.choices]
        scores = self._ranker.score(
            params,
            [ids for ids, _ in asked],
            [[*self._tokenizer.encode(choice), *ends] for _, choice in asked],
            batch_size=self._batch_size,
        )
        totals = iter([score.total for score in scores])
        return [tuple(next(totals) for _ in e.choices) for e in examples]

    def check(self, eval_set: EvalSet) -> None:
        """Reads the prompts, and scores the targets as their own predictions.

        It takes no time, where the first evaluation may come after hours.

        Raises:
          ValueError: if there is no room for an answer to a prompt, or the task's postprocessing or
            one of its metrics fails.
        """
        if not self._predicts(eval_set) and not eval_set.score_fns:
            return
        if self._generator and not self._labels and self._predicts(eval_set):
            try:
                self._generator.prompts([e.input_ids for e in eval_set.examples], self._max_tokens)
            except ValueError as error:
                raise ValueError(f"task {eval_set.task}: {error}") from None
        if self._model.kind == "encoder" and ranks(eval_set):
            raise ValueError(
                f"task {eval_set.task}: rank_accuracy is of the probabilities of answers, which "
                f"{self._model.family}, an encoder, does not write; leave it out, and take accuracy"
            )
        few = eval_set.examples[:: -(-len(eval_set.examples) // _TRIED)]
        for examples in (few, eval_set.examples):
            part = dataclasses.replace(eval_set, examples=examples)
            right = [
                Answer(-1.0, 1, 1, 1, 1, self._text_of_target(e), tuple(-1.0 for _ in e.choices))
                for e in examples
            ]
            try:
                score(part, Answers.of(part, right))
                break
            except ValueError as error:
                # A few may be of one class, which a metric may not bear.
                if examples is eval_set.examples:
                    raise ValueError(
                        f"{error} (tried on the targets as their own predictions)"
                    ) from error
        if ranks(eval_set):
            self._check_choices(eval_set)

    def _check_choices(self, eval_set: EvalSet) -> None:
        """Raises ValueError if the answer choices of a task cannot be ranked, or none is right."""
        choices = dict.fromkeys(c for e in eval_set.examples for c in e.choices)
        for choice in choices:
            if self._model.kind == "decoder" and not len(self._tokenizer.encode(choice)):
                raise ValueError(
                    f"task {eval_set.task}: the answer choice {choice!r} has no tokens, so that it "
                    "would always be the most probable one; leave it out"
                )
        wrong = [e for e in eval_set.examples if not is_choice(eval_set, e)]
        if not wrong:
            return
        message = (
            f"task {eval_set.task}: of {len(wrong)} of {len(eval_set.examples)} examples no answer "
            f"choice is the target, such as {wrong[0].targets!r:.80} with the choices "
            f"{', '.join(map(repr, wrong[0].choices))}"
        )
        if len(wrong) == len(eval_set.examples):
            raise ValueError(f"{message}; give the choices as the targets are written")
        _log.warning("%s; rank_accuracy counts them as wrong", message)

    def _predicts(self, eval_set: EvalSet) -> bool:
        return bool(self._generate and eval_set.metric_fns and self._reads_text)

    def _text_of_target(self, example: EvalExample) -> str:
        if self._labels:
            classes = [i for i in example.target_ids[:-1] if i < len(self._model.labels)]
            return self._labels.decode(classes)
        return self._tokenizer.decode(self._model.answer(example.target_ids))

    def _score(
        self, params: api.Params, batches: Iterator[features.Batch]
    ) -> list[tuple[float, int, int]]:
        """Returns for each row its log-probability, its target tokens, and the hits among them."""
        encodes = self._model.kind == "encoder"
        weights = features.ENCODER_LOSS_WEIGHTS if encodes else features.DECODER_LOSS_WEIGHTS
        found: list[tuple[float, int, int]] = []
        for batch in batches:
            of_model = decoding.log_probs(self._model, params, self._shard(batch))
            log_probs_BT, is_greedy_BT = jax.device_get(of_model)
            for row, counts in enumerate(batch[weights] > 0):
                log_prob = float(np.sum(log_probs_BT[row, counts], dtype=np.float64))
                hits = is_greedy_BT[row, counts]
                found.append((log_prob, len(hits), int(hits.sum())))
        return found

    def _batch_maker(
        self, eval_set: EvalSet
    ) -> Callable[[Sequence[EvalExample]], Iterator[features.Batch]]:
        """Returns a function that makes batches of some of the examples, all of one shape."""
        examples = eval_set.examples
        sides = ["inputs", "targets"] if any(e.input_ids for e in examples) else ["targets"]
        inputs, targets = self._lengths(examples)
        spec = features.BatchSpec(
            self._batch_size,
            inputs,
            targets,
            kind=self._kind,
            has_pairs=eval_set.has_pairs,
            pads_with_eos=self._model.pads_with_eos,
        )
        convert = make_converter(spec, self._format)

        def batches(chosen: Sequence[EvalExample]) -> Iterator[features.Batch]:
            for start in range(0, len(chosen), self._batch_size):
                chunk = chosen[start : start + self._batch_size]
                yield convert([[_as_example(e, sides)] for e in chunk])

        return batches

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

    def _classify(self, params: api.Params, batches: Iterator[features.Batch]) -> list[str]:
        """Returns the most probable label of each text, or of each of its words."""
        assert self._labels is not None
        texts: list[str] = []
        for batch in batches:
            asked_BS = batch[features.ENCODER_LOSS_WEIGHTS] > 0
            classes_BS = np.asarray(jax.device_get(self._classes(params, self._shard(batch))))
            texts += [
                self._labels.decode(classes[asked].tolist())
                for classes, asked in zip(classes_BS, asked_BS, strict=False)
            ]
        return texts

    def _shard(self, batch: features.Batch) -> dict[str, jax.Array]:
        self._between_batches()
        batch = features.pad_rows(batch, self._batch_size)
        return sharding.shard_batch(batch, self._mesh, self._rules)


def mean_loss(results: Sequence[Result]) -> float:
    """Returns the mean loss over all target tokens of several tasks, in nats."""
    answers = [answer for result in results for answer in result.answers]
    return ratio(-sum(a.log_prob for a in answers), sum(a.num_tokens for a in answers))


_TRIED = 64  # Targets on which metrics are tried first: enough for most, and quick with all.


def _as_example(example: EvalExample, sides: Sequence[str]) -> Example:
    ids = {"inputs": example.input_ids, "targets": example.target_ids}
    return {name: np.array(ids[name], np.int32) for name in sides}


def _rounded(length: int) -> int:
    """Returns a length rounded up to a multiple of 8: tasks share shapes."""
    return -(-max(length, 1) // 8) * 8
