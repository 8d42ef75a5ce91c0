"""From prompts to texts: padded batches of token ids, greedy decoding, and detokenization."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from t5jax import batch as features
from t5jax import sharding
from t5jax.architectures import Architecture
from t5jax.config import AxisRules
from t5jax.decoding.batches import padded_batches
from t5jax.decoding.greedy import greedy
from t5jax.decoding.scoring import Score, score
from t5jax.models import api
from t5jax.special_tokens import check_prompts, example_format
from t5jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Generator:
    """Generates the greedy answer to each prompt on the devices of a mesh."""

    model: Architecture
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    rules: AxisRules = AxisRules()
    prefix_lm: bool = False
    """Use bidirectional attention in a decoder's prompt, as with data.prefix_lm."""
    special_tokens: bool = True
    """Keep special tokens, such as sentinels, in the texts."""

    @property
    def kind(self) -> features.Kind:
        return "prefix_lm" if self.prefix_lm else self.model.kind

    def __call__(
        self,
        params: api.Params,
        inputs: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        batch_size: int,
    ) -> list[str]:
        """Returns the answers, in the order of the inputs.

        Args:
          params: the parameters of the model, arranged for decoding or not.
          inputs: the token ids of each prompt with eos, like the inputs of an example.
          max_tokens: the maximum length of an answer in tokens.
          batch_size: the maximum number of prompts per batch, rounded up to a multiple of the
            devices that share it.
        Raises:
          ValueError: for a prompt with an id that has no embedding, or after which a decoder has no
            positions for so many tokens.
        """
        prompts = self.prompts(inputs, max_tokens)
        parts = sharding.batch_parts(self.mesh, self.rules)
        texts: list[str] = []
        for chunk, rows, length in padded_batches(prompts, batch_size, parts):
            batch = features.prompt_batch(chunk, self.kind, rows, length)
            with sharding.use_mesh(self.mesh, self.rules):
                batch = sharding.shard_batch(batch, self.mesh, self.rules)
                tokens_BT = greedy(self.model, params, batch, max_tokens)
            tokens_BT = np.asarray(jax.device_get(tokens_BT))[: len(chunk)]
            texts += [self._text(row.tolist()) for row in tokens_BT]
        return texts

    def score(
        self,
        params: api.Params,
        inputs: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        *,
        batch_size: int,
        num_top: int = 0,
    ) -> list[Score]:
        """Returns the log-probabilities of given answers, in their order.

        Args:
          params: the parameters of the model, arranged for decoding or not.
          inputs: as for `__call__`; without any, the beginning of a text.
          answers: the token ids of the answer to each prompt. What ends a text, with which
            targets of a task end, is only scored if it is among them.
          batch_size: the maximum number of prompts per batch.
          num_top: the number of most probable tokens to return at each place.
        Raises:
          ValueError: for an id that has no embedding, or too few positions for prompt and answer.
        """
        form = example_format(self.model, self.tokenizer)
        prompts = [form.prompt(ids).tolist() for ids in inputs]
        check_prompts(self.model, self.tokenizer, prompts)
        return score(
            *(self.model, params, prompts, answers),
            form=form,
            kind=self.kind,
            mesh=self.mesh,
            rules=self.rules,
            batch_size=batch_size,
            num_top=num_top,
        )

    def prompts(self, inputs: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Returns what the model reads of the inputs, with the same arguments and errors."""
        form = example_format(self.model, self.tokenizer)
        prompts = [form.prompt(ids).tolist() for ids in inputs]
        check_prompts(self.model, self.tokenizer, prompts)
        self._check_positions(prompts, max_tokens)
        return prompts

    def _text(self, tokens: list[int]) -> str:
        """Returns the text of an answer. As in transformers, a word that ends it is part of it."""
        answer = self.model.answer(tokens)
        end = tokens[len(answer) : len(answer) + 1]
        words = [i for i in end if i not in self.tokenizer.special_ids]
        if not self.special_tokens:  # The tokenizer's eos need not be one that ends an answer.
            answer = [i for i in answer if i != self.tokenizer.eos_id]
        return self.tokenizer.decode([*answer, *words], special_tokens=self.special_tokens)

    def _check_positions(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        positions = self.model.longest_row
        if self.model.kind != "decoder" or positions is None:
            return
        for number, prompt in enumerate(prompts):
            # The last token is written, but not read.
            if len(prompt) + max_tokens - 1 > positions:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens, and {max_tokens} more are to be "
                    f"written, but this {self.model.family} has {positions} positions; shorten "
                    f"the prompt, or write at most {max(positions - len(prompt) + 1, 0)} tokens "
                    "(max_tokens)"
                )
