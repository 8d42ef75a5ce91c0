"""From prompts to answers: padded batches of token ids, decoding, and detokenization."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from t5jax import batch as features
from t5jax import sharding
from t5jax.architectures import Architecture
from t5jax.config import AxisRules
from t5jax.decoding.answers import Answer, Finish, cut_at_stop, find_stop
from t5jax.decoding.batches import num_rows, power_of_two
from t5jax.decoding.beams import beam_search
from t5jax.decoding.constraints import Constraint
from t5jax.decoding.loop import Request, Written, advance, start, write
from t5jax.decoding.options import GenerationOptions
from t5jax.decoding.rows import Parts, allowed_bits, row_options
from t5jax.decoding.scoring import Score, score
from t5jax.models import api
from t5jax.special_tokens import check_prompts, example_format
from t5jax.tokenizers import Tokenizer

_BETWEEN_STOPS = 8  # Tokens that are written before stop strings are looked for.


@dataclasses.dataclass(frozen=True)
class Generator:
    """Generates answers to prompts on the devices of a mesh, and scores given ones."""

    model: Architecture
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    rules: AxisRules = AxisRules()
    prefix_lm: bool = False
    """Use bidirectional attention in a decoder's prompt, as with data.prefix_lm."""
    special_tokens: bool = True
    """Keep special tokens, such as sentinels, in the texts."""
    past_eos: bool = False
    """A tokenizer's eos that does not end an answer does not end its text either, as transformers
    has it. Otherwise it does, as in SeqIO's metrics."""
    between_batches: Callable[[], None] = lambda: None
    """Is called before each batch; what it raises ends a call."""

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
        """Returns the greedy answers, in the order of the inputs.

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
        options = GenerationOptions(max_tokens=max_tokens)
        answers = self.answers(params, inputs, options, batch_size=batch_size)
        return [one.text for one, *_ in answers]

    def answers(
        self,
        params: api.Params,
        inputs: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        batch_size: int,
        rows: int | None = None,
        first: int = 0,
    ) -> list[list[Answer]]:
        """Returns `options.num_answers` answers to each prompt, in the order of the inputs.

        An answer depends on nothing but its own prompt and number, to rounding.

        Args:
          params: as for `__call__`.
          inputs: as for `__call__`.
          options: how answers are written.
          batch_size: as for `__call__`. Of beam search, each row has as many beams.
          rows: the least number of rows of a batch, to compile one shape for several calls.
          first: the number of the first prompt, on which drawn tokens depend.
        Raises:
          ValueError: as for `__call__`; also if options do not suit the model.
        """
        form = example_format(self.model, self.tokenizer)
        prompts = [form.prompt(ids).tolist() for ids in inputs]
        return self.answers_to_prompts(
            params, prompts, options, batch_size=batch_size, rows=rows, first=first
        )

    def answers_to_prompts(
        self,
        params: api.Params,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        batch_size: int,
        rows: int | None = None,
        first: int = 0,
    ) -> list[list[Answer]]:
        """Returns the same for prompts that the model reads as they are; otherwise as `answers`."""
        self._check_ids(options)
        check_prompts(self.model, self.tokenizer, prompts)
        read = [len(p) if self.model.kind == "decoder" else 1 for p in prompts]
        limits = [options.limit(n) for n in read]
        self._check_positions(prompts, limits)
        per_prompt = options.num_answers if options.num_beams == 1 else 1
        asked = [(i, answer) for i in range(len(prompts)) for answer in range(per_prompt)]
        # Of like lengths together, so that little is padded.
        asked.sort(key=lambda one: (len(prompts[one[0]]), one))
        parts = sharding.batch_parts(self.mesh, self.rules)
        rows = num_rows(max(rows or 0, len(asked)), batch_size, parts)
        found: dict[tuple[int, int], list[Answer]] = {}
        for begin in range(0, len(asked), batch_size):
            self.between_batches()
            chunk = asked[begin : begin + batch_size]
            batch = _Batch(
                prompts=[prompts[i] for i, _ in chunk],
                limits=[limits[i] for i, _ in chunk],
                streams=[(first + i, answer) for i, answer in chunk],
                rows=rows,
            )
            found |= dict(zip(chunk, self._write(params, batch, options), strict=True))
        return [
            [one for answer in range(per_prompt) for one in found[i, answer]]
            for i in range(len(prompts))
        ]

    def answers_to_prompt(
        self, params: api.Params, prompt: Sequence[int], options: GenerationOptions, *, room: int
    ) -> list[Answer]:
        """Returns the answers to one prompt.

        Args:
          params: as for `__call__`.
          prompt: what the model reads, as `prompts` returns it.
          options: how answers are written, with `max_tokens`.
          room: the program has room for so many tokens; at least `max_tokens`.
        Raises:
          ValueError: as for `answers`.
        """
        self._check_ids(options)
        limit = options.limit(len(prompt))
        rows = num_rows(1, 1, sharding.batch_parts(self.mesh, self.rules))
        batch = _Batch([prompt], [limit], [(0, 0)], rows=rows, room=max(room, limit))
        return self._write(params, batch, options)[0]

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
            between_batches=self.between_batches,
        )

    def prompts(self, inputs: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Returns what the model reads of the inputs; arguments and errors as for `__call__`."""
        form = example_format(self.model, self.tokenizer)
        prompts = [form.prompt(ids).tolist() for ids in inputs]
        check_prompts(self.model, self.tokenizer, prompts)
        self._check_positions(prompts, [max_tokens] * len(prompts))
        return prompts

    # --- A batch ----------------------------------------------------------------------------------

    def _write(
        self, params: api.Params, batch: "_Batch", options: GenerationOptions
    ) -> list[list[Answer]]:
        """Returns the answers of each row."""
        length = power_of_two(max(map(len, batch.prompts)), least=16)
        arrays = features.prompt_batch(batch.prompts, self.kind, batch.rows, length)
        max_tokens, request = self._request(batch, options)
        with sharding.use_mesh(self.mesh, self.rules):
            arrays = sharding.shard_batch(arrays, self.mesh, self.rules)
            if options.num_beams > 1:
                return self._beams(params, arrays, max_tokens, request, options, len(batch.prompts))
            if options.stop or options.json_schema is not None or options.regex is not None:
                written = self._step_by_step(params, arrays, max_tokens, request, options, batch)
            else:
                written = write(self.model, params, arrays, max_tokens, request)
        written = jax.tree.map(np.asarray, jax.device_get(written))
        return [
            [self._answer(row, limit, written, options)] for row, limit in enumerate(batch.limits)
        ]

    def _request(self, batch: "_Batch", options: GenerationOptions) -> tuple[int, Request]:
        """Returns the most tokens that any answer may have, and what is asked."""
        parts = Parts.of([options])
        spare = batch.rows - len(batch.prompts)
        limits, max_tokens = None, batch.room or max(batch.limits)
        if min(batch.limits) < max_tokens or options.max_length is not None:
            limits = np.array([*batch.limits, *[1] * spare], np.int32)
            # A few sizes for all batches.
            if self.model.kind == "decoder" and options.max_length is not None:
                max_tokens = min(power_of_two(max_tokens, 16), options.max_length)
        rows, allowed = None, None
        if any(parts):
            streams = [*batch.streams, *[(0, 0)] * spare]
            rows = row_options([options] * batch.rows, streams)
        if parts.allows:
            bits = self._allowed_bits(options)
            allowed = np.tile(bits, (batch.rows, 1))
        return max_tokens, Request(
            limits=limits,
            rows=rows,
            allowed=allowed,
            parts=parts,
            log_probs=options.logprobs is not None,
            num_top=options.logprobs or 0,
        )

    def _allowed_bits(self, options: GenerationOptions) -> np.ndarray:
        ends, size = self.model.end_token_ids, self.tokenizer.vocab_size
        return allowed_bits(options, self.model.vocab_size, ends, size)

    def _beams(
        self,
        params: api.Params,
        arrays: Mapping[str, jax.Array],
        max_tokens: int,
        request: Request,
        options: GenerationOptions,
        num_prompts: int,
    ) -> list[list[Answer]]:
        tokens, scores = jax.device_get(
            beam_search(
                *(self.model, params, arrays, max_tokens, request),
                np.float32(options.length_penalty),
                num_beams=options.num_beams,
                num_answers=options.num_answers,
                early_stopping=options.early_stopping,
            )
        )
        answers = []
        limits = np.full(num_prompts, max_tokens) if request.limits is None else request.limits
        for row in range(num_prompts):
            own = []
            for ids, one in zip(tokens[row], scores[row], strict=True):
                kept, finish = self._ended(ids[: int(limits[row])].tolist())
                own.append(Answer(self._text(kept), kept, finish, float(one)))
            answers.append(own)
        return answers

    def _step_by_step(
        self,
        params: api.Params,
        arrays: Mapping[str, jax.Array],
        max_tokens: int,
        request: Request,
        options: GenerationOptions,
        batch: "_Batch",
    ) -> Written:
        """Writes some tokens at a time: stop strings and grammars are seen to on the host."""
        fixed, ends = self._allowed_bits(options), self.model.end_token_ids
        constraints: list[Constraint] = []
        step = _BETWEEN_STOPS
        if options.json_schema is not None or options.regex is not None:
            constraints = [Constraint(options, self.tokenizer, ends) for _ in batch.prompts]
            step = 1

        def constrained(open_rows: Sequence[int]) -> Request:
            if not constraints:
                return request
            allowed = np.tile(fixed, (batch.rows, 1))
            for row in open_rows:
                words = np.zeros_like(fixed)
                constraints[row].fill(words)
                allowed[row] &= words
            return request.replace(allowed=allowed)

        open_rows: list[int] = list(range(len(batch.prompts)))
        asked = constrained(open_rows)
        state = start(self.model, params, arrays, max_tokens, asked)
        until = 1
        while True:
            tokens_TB, is_done = jax.device_get((state.written.tokens, state.is_done))
            is_done = np.array(is_done)
            for row in open_rows:
                if constraints:
                    constraints[row].read(int(tokens_TB[until - 1, row]))
                if not is_done[row]:
                    text = self._whole_text(tokens_TB[:until, row].tolist())
                    is_done[row] = find_stop(text, options.stop) is not None
            open_rows = [row for row in open_rows if not is_done[row]]
            if not open_rows or until >= max_tokens:
                return state.written
            until = min(until + step, max_tokens)
            state = state.replace(is_done=is_done)
            state = advance(self.model, params, state, constrained(open_rows), np.int32(until))

    # --- An answer --------------------------------------------------------------------------------

    def _answer(self, row: int, limit: int, written: Written, options: GenerationOptions) -> Answer:
        tokens, finish = self._ended(written.tokens[:limit, row].tolist())
        text = self._text(tokens)
        count = cut_at_stop(tokens, self._whole_text, options.stop)
        if count is not None:
            tokens, finish = tokens[:count], "stop"
            text = self._text(tokens)
            place = find_stop(text, options.stop)
            if place is None:  # Special tokens that are not shown.
                text = self._text(tokens[: _before(tokens, self._whole_text, options.stop)])
            else:
                text = text[:place]
        log_probs, top = None, None
        if written.log_probs is not None:
            log_probs = written.log_probs[: len(tokens), row].tolist()
        if written.top_tokens is not None and written.top_log_probs is not None:
            tops = written.top_tokens[: len(tokens), row], written.top_log_probs[: len(tokens), row]
            top = [
                list(zip(ids.tolist(), values.tolist(), strict=True))
                for ids, values in zip(*tops, strict=True)
            ]
        total = None if log_probs is None else float(np.sum(log_probs))
        return Answer(text, tokens, finish, total, log_probs, top)

    def _ended(self, tokens: list[int]) -> tuple[list[int], Finish]:
        """Returns the tokens up to the one that ends the answer, and whether there is one."""
        count = len(self.model.answer(tokens))
        return tokens[: count + 1], "stop" if count < len(tokens) else "length"

    def _text(self, tokens: Sequence[int], special_tokens: bool | None = None) -> str:
        """Returns the text of an answer. As in transformers, a word that ends it is part of it."""
        answer = self.model.answer(tokens)
        end = tokens[len(answer) : len(answer) + 1]
        words = [i for i in end if i not in self.tokenizer.special_ids]
        shown = self.special_tokens if special_tokens is None else special_tokens
        past_eos = self.past_eos or not shown
        return self.tokenizer.decode([*answer, *words], special_tokens=shown, past_eos=past_eos)

    def _whole_text(self, tokens: Sequence[int]) -> str:
        """Returns the text in which stop strings are looked for, with special tokens."""
        return self._text(tokens, special_tokens=True)

    # --- Checks -----------------------------------------------------------------------------------

    def _check_ids(self, options: GenerationOptions) -> None:
        ids = {name: getattr(options, name) or () for name in ("forced_tokens", "allowed_tokens")}
        ids["logit_bias"] = [i for i, _ in options.logit_bias]
        for name, given in ids.items():
            for i in given:
                if i >= self.model.vocab_size:
                    raise ValueError(
                        f"{name} has id {i}, but model.vocab_size is {self.model.vocab_size}; "
                        "leave it out"
                    )
        if options.logprobs is not None and options.logprobs > self.model.vocab_size:
            raise ValueError(
                f"logprobs is {options.logprobs}, but there are {self.model.vocab_size} ids"
            )
        candidates = (1 + len(self.model.end_token_ids)) * options.num_beams
        if options.num_beams > 1 and candidates > self.model.vocab_size:
            raise ValueError(
                f"num_beams is {options.num_beams}, too many for {self.model.vocab_size} ids"
            )

    def _check_positions(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        positions = self.model.longest_row
        if self.model.kind != "decoder" or positions is None:
            return
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            # The last token is written, but not read.
            if len(prompt) + limit - 1 > positions:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens, and {limit} more are to be "
                    f"written, but this {self.model.family} has {positions} positions; shorten "
                    f"the prompt, or write at most {max(positions - len(prompt) + 1, 0)} tokens "
                    "(max_tokens)"
                )


@dataclasses.dataclass(frozen=True)
class _Batch:
    """The rows of a batch, without those that fill it up."""

    prompts: Sequence[Sequence[int]]
    limits: Sequence[int]
    streams: Sequence[tuple[int, int]]
    rows: int
    room: int | None = None
    """Tokens that the program has room for; None: as many as an answer may have."""


def _before(tokens: Sequence[int], text_of: Any, stop: Sequence[str]) -> int:
    """Returns the number of tokens whose text ends before the stop string begins."""
    place = find_stop(text_of(tokens), stop)
    count = len(tokens)
    while count and len(text_of(tokens[:count])) > (place or 0):
        count -= 1
    return count
