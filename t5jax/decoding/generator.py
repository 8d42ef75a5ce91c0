"""From prompts to texts: padded batches of token ids, greedy decoding, and detokenization."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from t5jax import batch as features
from t5jax import sharding
from t5jax.architectures import Architecture
from t5jax.config import AxisRules
from t5jax.decoding.greedy import greedy
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


def padded_batches(
    ids: Sequence[Sequence[int]], batch_size: int, parts: int
) -> Iterator[tuple[Sequence[Sequence[int]], int, int]]:
    """Yields the sequences in batches, each with the number of rows and the length to pad it to.

    To compile few shapes, all batches have the same number of rows, and lengths are powers of two,
    at least 16.

    Args:
      ids: the token ids of each sequence.
      batch_size: the maximum number of rows.
      parts: the number of devices that share the rows, which are rounded up to a multiple.
    """
    rows = min(batch_size, _power_of_two(len(ids)))
    rows = -(-rows // parts) * parts
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        yield chunk, rows, _power_of_two(max(map(len, chunk)), least=16)


def _power_of_two(n: int, least: int = 1) -> int:
    """Returns the smallest power of two that is at least n."""
    return max(least, 1 << (n - 1).bit_length())
