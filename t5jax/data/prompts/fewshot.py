"""Few-shot prompts: solved training rows before the row to solve. No TensorFlow.

Brown et al. 2020 (arXiv:2005.14165), section 2. The exemplars of a row depend only on (seed, split,
row), so that every run, restart and host uses the same ones. They never include the row itself or
one with the same prompt, and only as many are used as fit into the inputs.
"""

import itertools
import logging
import math
import random
from collections.abc import Iterator, Sequence

from t5jax.data.prompts.template import Prompt, PromptTemplate
from t5jax.data.sources.source import Row
from t5jax.tokenizers import Tokenizer

_log = logging.getLogger(__name__)

POOL_SIZE = 10_000
"""Exemplars are drawn from this many rows of the training split, which are drawn from all of it and
held in memory."""


class FewShot:
    """Draws exemplars for the rows of one template."""

    def __init__(
        self,
        template: PromptTemplate,
        rows: Sequence[tuple[int, Row]],
        shots: int,
        *,
        form: str,
        seed: int,
        tokenizer: Tokenizer | None = None,
        inputs_length: int | None = None,
    ):
        """Renders nothing yet.

        Args:
          template: the template of the row and the exemplars.
          rows: the training rows to draw from, with their numbers, in order.
          shots: the number of exemplars per prompt.
          form: the format string of an exemplar, with {inputs} and {targets}.
          seed: the seed of the draws.
          tokenizer: counts the tokens of a prompt.
          inputs_length: the maximum length of a whole prompt in tokens with eos; exemplars that do
            not fit are left out. None, or without a tokenizer: all are kept.
        """
        self._template, self._rows, self._shots = template, rows, shots
        self._form, self._seed = form, seed
        self._tokenizer, self._limit = tokenizer, math.inf
        if tokenizer is not None and inputs_length is not None:
            self._limit = inputs_length
        # What has been rendered and counted of the training rows.
        self._prompts: dict[int, Prompt] = {}
        self._costs: dict[int, int] = {}
        self._told = False

    def render(self, row: Row, number: int, split: str) -> Prompt:
        """Returns the row's prompt with exemplars in front, and its answer.

        Args:
          row: its fields.
          number: of the row in its split.
          split: its name.
        Raises:
          ValueError: where there are not enough training rows, or one cannot be rendered.
        """
        prompt = self._template.render(row, number)
        if prompt.is_empty:
            return prompt
        drawn = self._draw(prompt, f"{self._seed} {split} {number}")
        chosen = list(itertools.islice(drawn, self._shots))
        if len(chosen) < self._shots:
            raise ValueError(
                f"there are {len(chosen)} training rows that can be exemplars for it; expected "
                f"at least {self._shots}; add rows, or ask for fewer shots"
            )
        chosen = self._fitting(chosen, prompt)
        few = self._with_exemplars(row, number, chosen)
        # The tokens at the seams may be others than those of the parts: what counts is the whole.
        while chosen and self._count(few.inputs) >= self._limit:
            chosen.pop()
            few = self._with_exemplars(row, number, chosen)
        if len(chosen) < self._shots and not self._told:
            self._told = True
            _log.warning(
                "template %s: only %d of %d exemplars fit into inputs of %d tokens, in row %d and "
                "perhaps in others; raise data.inputs_length (`t5jax eval --inputs-length`)",
                *(self._template, len(chosen), self._shots, self._limit, number),
            )
        return few

    def _with_exemplars(self, row: Row, number: int, chosen: Sequence[int]) -> Prompt:
        exemplars = [(self._rows[i][1], self._prompts[i]) for i in chosen]
        return self._template.render_few_shot(row, number, exemplars, self._form)

    def _draw(self, prompt: Prompt, key: str) -> Iterator[int]:
        """Yields places in `rows` in random order, until there are no more."""
        rng, seen = random.Random(key), set()
        while len(seen) < len(self._rows):
            i = rng.randrange(len(self._rows))
            if i in seen:
                continue
            seen.add(i)
            exemplar = self._prompt(i)
            # A training row meets itself here, and an evaluation's row its double.
            if exemplar.inputs != prompt.inputs and not exemplar.is_empty:
                yield i

    def _prompt(self, i: int) -> Prompt:
        if i not in self._prompts:
            number, row = self._rows[i]
            try:
                self._prompts[i] = self._template.render(row, number)
            except ValueError as error:
                raise ValueError(f"exemplar, which is training row {number}: {error}") from None
        return self._prompts[i]

    def _fitting(self, chosen: Sequence[int], prompt: Prompt) -> list[int]:
        """Returns those that find room after the ones before, each counted by itself."""
        room = self._limit - 1 - self._count(prompt.inputs)  # eos takes the one.
        fitting = []
        for i in chosen:
            if i not in self._costs:
                inputs, targets, _ = self._prompts[i]
                self._costs[i] = self._count(self._form.format(inputs=inputs, targets=targets))
            if self._costs[i] <= room:
                fitting.append(i)
                room -= self._costs[i]
        return fitting

    def _count(self, text: str) -> int:
        return 0 if self._limit == math.inf else len(self._tokenizer.encode(text))
