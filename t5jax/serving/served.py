"""A model that is served: its engine, how it reads prompts, and its embeddings."""

import base64
import concurrent.futures
import copy
import dataclasses
import datetime
import functools
import json
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from t5jax import decoding
from t5jax.checks import check_characters
from t5jax.decoding import Constraint, GenerationOptions
from t5jax.serving.engine import Engine
from t5jax.serving.errors import ApiError
from t5jax.serving.requests import Request
from t5jax.serving.schemas import (
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    GenerationBody,
    Message,
    each,
)
from t5jax.serving.sizes import EngineOptions
from t5jax.serving.slots import NUM_FORCED, NUM_TOP
from t5jax.serving.text import GrowingText, TokenTexts
from t5jax.special_tokens import check_prompts, example_format

if TYPE_CHECKING:
    from t5jax.pretrained import Pretrained

_log = logging.getLogger(__name__)

_EMBEDDING_ROWS = 8
_SAME_NAME = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("presence_penalty", "frequency_penalty", "min_tokens", "num_beams", "length_penalty"),
)
# Of generation_config.json: lengths and the number of answers are asked for.
_NOT_SERVED = ("max_length", "max_new_tokens", "num_return_sequences")


class ServedModel:
    """A loaded model with a name."""

    def __init__(
        self, name: str, pretrained: "Pretrained", options: EngineOptions = EngineOptions()
    ) -> None:
        """Makes room for answers; `start` compiles.

        Args:
          name: the name in requests.
          pretrained: the model.
          options: sizes of its engine.
        Raises:
          ValueError: if there is no room, or generation_config.json asks for what is not served.
        """
        # The engine takes all adapters at once; what else is asked for is of one model.
        self.name, self.pretrained = name, pretrained.with_adapter(0)
        self._with_adapters = pretrained
        self.adapter, self.base = 0, self
        self.model, self.tokenizer = pretrained.model, pretrained.tokenizer
        self.form = example_format(self.model, self.tokenizer)
        self.token_text = TokenTexts(self.tokenizer)
        self.engine: Engine | None = None
        if self.model.kind != "encoder":
            self.engine = Engine(
                *(self.model, pretrained.params, self.tokenizer, pretrained.mesh, pretrained.rules),
                prefix_lm=pretrained.prefix_lm,
                options=options,
            )
        self._options = options
        # Embeddings and log-probabilities of prompts, one at a time.
        self._worker = concurrent.futures.ThreadPoolExecutor(1, f"t5jax-{name}")
        self._queued = 0
        self._lock = threading.Lock()
        self._warm: concurrent.futures.Future[None] | None = None
        _ = self._generation  # Raises and warns before anything is compiled.

    def adapted(self, name: str, adapter: int) -> "ServedModel":
        """Returns the model with one of its adapters, which shares the engine.

        Args:
          name: the name in requests.
          adapter: its number, from 1.
        """
        other = copy.copy(self)
        other.name, other.adapter = name, adapter
        other.pretrained = self._with_adapters.with_adapter(adapter)
        return other

    # --- Starting and stopping --------------------------------------------------------------------

    def start(self) -> None:
        """Starts compiling; one that shares another's engine begins with it."""
        if self.base is not self:
            return
        if self.engine is not None:
            self.engine.start()
        self._warm = self._worker.submit(self._compile)

    @property
    def is_ready(self) -> bool:
        """Whether it answers; what has not been compiled yet takes longer at first."""
        if self.base is not self:
            return self.base.is_ready
        if self.engine is not None:
            return self.engine.ready.is_set() and self.engine.is_alive
        return self._warm is not None and self._warm.done() and self._warm.exception() is None

    @property
    def failure(self) -> BaseException | None:
        """What went wrong, if the model cannot answer any more."""
        if self.base is not self:
            return self.base.failure
        if self.engine is not None and self.engine.failure is not None:
            return self.engine.failure
        if self._warm is not None and self._warm.done():
            return self._warm.exception()
        return None

    def stop(self, timeout: float | None = None) -> bool:
        """Finishes what has been asked for; returns whether it was in time."""
        if self.base is not self:
            return True
        done = self.engine is None or self.engine.stop(timeout)
        self._worker.shutdown(wait=False, cancel_futures=True)
        return done

    def _compile(self) -> None:
        if self.engine is not None:
            # Whoever wants to write comes first.
            while self.engine.is_alive and not self.engine.programs.is_complete.wait(0.5):
                pass
            if not self.engine.is_alive:
                return
        if self.model.kind != "decoder":
            for length in self._lengths:
                for rows in (1, _EMBEDDING_ROWS):
                    self._embed([[self.tokenizer.eos_id] * length] * rows, "mean")
        else:
            for length in self._lengths:
                self.prompt_scores([self.tokenizer.eos_id] * length)

    @property
    def _lengths(self) -> list[int]:
        most = self.max_prompt
        powers = [16]
        while powers[-1] < most:
            powers.append(2 * powers[-1])
        return [min(length, most) for length in powers]

    @property
    def max_prompt(self) -> int:
        """The maximum length of a prompt, or of a text to embed, in tokens."""
        if self.engine is not None:
            return self.engine.size.source_length or self.engine.size.length
        limit = self._options.max_source_length
        return min(limit, self.model.longest_row or limit)

    # --- Prompts ----------------------------------------------------------------------------------

    def prompt(self, given: str | Sequence[int]) -> list[int]:
        """Returns what the model reads of a text, or of token ids, which are complete."""
        if not isinstance(given, str):
            check_prompts(self.model, self.tokenizer, [given])
            return list(given)
        check_characters(given)
        return self.pretrained.prompt(given)

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, with special tokens, and with what follows an eos."""
        return self.tokenizer.decode(ids, past_eos=True)

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """Returns for each id how long `text` is of those before it."""
        found: list[int] = []
        text = GrowingText(self.tokenizer)
        for i in ids:
            found.append(len(text.text))
            text.ids.append(i)
        return found

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns what the model reads of a conversation.

        With a chat template, its text is encoded as it is, since it has the special tokens that
        begin and end it. An encoder-decoder without one reads a single message of the user.

        Raises:
          ValueError: if the model has no chat template and there are other messages.
        """
        for message in messages:
            check_characters(f"{message.text}{message.name or ''}")
        if self.tokenizer.chat_template:
            rows = [{"role": m.role, "content": m.text, "name": m.name} for m in messages]
            today = datetime.datetime.now().strftime  # As in transformers.
            text = self._template.prompt({"messages": rows}, strftime_now=today)
            return self.pretrained.chat_prompt(text)
        if self.model.kind == "encoder_decoder" and [m.role for m in messages] == ["user"]:
            return self.prompt(messages[0].text)
        single = "a single message of the role user, or " if self.model.kind != "decoder" else ""
        raise ValueError(
            f"{self.name} has no chat template, so it cannot read this conversation; send {single}"
            "a prompt to /v1/completions"
        )

    @functools.cached_property
    def _template(self) -> Any:
        from t5jax.data.prompts.chat import ChatTemplate

        return ChatTemplate().bind(self.tokenizer)

    # --- Options ----------------------------------------------------------------------------------

    def options(self, body: GenerationBody, num_answers: int) -> GenerationOptions:
        """Returns how the answers to a request are written.

        Raises:
          ValueError: if options contradict each other.
        """
        given: dict[str, Any] = {name: getattr(body, name) for name in _SAME_NAME}
        for name in ("presence_penalty", "frequency_penalty"):
            given[name] = given[name] or None
        if body.forced_tokens:
            given["forced_tokens"] = tuple(body.forced_tokens)
        if body.logit_bias:
            bias = {int(i): float(value) for i, value in body.logit_bias.items()}
            given["logit_bias"] = tuple(sorted(bias.items()))
        for name in ("forced_tokens", "logit_bias"):
            ids = [i if isinstance(i, int) else i[0] for i in given.get(name, ())]
            if ids and max(ids) >= self.model.vocab_size:
                raise ValueError(
                    f"{name} has id {max(ids)}, but {self.name} has {self.model.vocab_size}; leave "
                    "it out"
                )
        has_beams = (body.num_beams or 1) > 1
        if has_beams:
            given["num_answers"] = num_answers
        elif num_answers > 1 and given["temperature"] == 0:
            raise ValueError(
                f"{num_answers} answers with temperature 0 would all be the same; set temperature "
                "to draw tokens, or n and best_of to 1"
            )
        if given["temperature"] == 0:
            # As in OpenAI's interface, these are no contradiction.
            given |= dict.fromkeys(("top_k", "top_p", "min_p"))
        given = {name: value for name, value in given.items() if value is not None}
        options = self._options_of(tuple(sorted(given.items())))
        if num_answers > 1 and not has_beams and not options.temperature:
            options = self._options_of(tuple(sorted((given | {"temperature": 1.0}).items())))
        stop = body.stop or ()
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
        changes: dict[str, Any] = {"stop": (stop,) if isinstance(stop, str) else tuple(stop)}
        if (asked := body.response_format) is not None and asked.type != "text":
            schema = "{}"
            if asked.type == "json_schema":
                if asked.json_schema is None:
                    raise ValueError("response_format json_schema has no json_schema; add it")
                schema = json.dumps(asked.json_schema.schema_)
            elif asked.json_schema is not None:
                raise ValueError(
                    "response_format json_object takes no json_schema; set its type to json_schema"
                )
            changes["json_schema"] = schema
        return dataclasses.replace(options, seed=seed, **changes)

    def constraint(self, options: GenerationOptions) -> Constraint:
        """Returns what checks an answer to be JSON of a schema while it is written.

        Raises:
          ValueError: if the schema is invalid.
        """
        return Constraint(options, self.tokenizer, self.model.end_token_ids)

    @functools.lru_cache(maxsize=256)  # noqa: B019
    def _options_of(self, given: tuple[tuple[str, Any], ...]) -> GenerationOptions:
        return decoding.options_of(self._generation, dict(given))

    @functools.cached_property
    def _generation(self) -> dict[str, Any]:
        """What generation_config.json says of how answers are written."""
        source = self.pretrained.source
        generation = {} if source is None else source.generation()
        found = {name: value for name, value in generation.items() if name not in _NOT_SERVED}
        forced = found.get("forced_bos_token_id")
        if isinstance(forced, list) and len(forced) > NUM_FORCED:
            raise ValueError(
                f"{self.name}: generation_config.json forces {len(forced)} tokens, but the server "
                f"takes at most {NUM_FORCED}"
            )
        return found

    def max_tokens(self, body: CompletionBody | ChatBody, prompt: Sequence[int]) -> int:
        """Returns the maximum length of the answer to a prompt in tokens.

        Raises:
          ValueError: if there is no room for it.
        """
        assert self.engine is not None
        room = self.engine.room(prompt)
        asked = body.max_tokens
        if "max_tokens" not in body.model_fields_set and asked is not None:
            asked = min(asked, room)  # Nobody asked for the default.
        if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
            if asked not in (None, body.max_completion_tokens):
                raise ValueError(
                    f"max_tokens is {asked} and max_completion_tokens "
                    f"{body.max_completion_tokens}; set only one of them"
                )
            asked = body.max_completion_tokens
        if asked is None:
            return room
        if asked > room:
            raise ValueError(
                f"max_tokens is {asked}, but behind a prompt of {len(prompt)} tokens there is room "
                f"for {room}; set it to at most {room}, or shorten the prompt"
            )
        return asked

    # --- What needs no slot -----------------------------------------------------------------------

    def submit(
        self, function: Callable[..., Any], asked: Sequence[tuple[Any, ...]]
    ) -> "list[concurrent.futures.Future[Any]]":
        """Runs a method below in the thread of the model and its adapters, all calls or none.

        Args:
          function: the method.
          asked: the arguments of each call.
        Raises:
          ValueError: if they are more than may wait.
          ApiError: if too many wait already, or the server is stopping.
        """
        base, most = self.base, self._options.max_waiting
        if len(asked) > most:
            raise ValueError(
                f"{len(asked)} prompts are to be read at once, but this server takes at most "
                f"{most}; send fewer at a time"
            )

        def left(_: Any) -> None:  # Also called for one that is cancelled before it runs.
            with self._lock:
                base._queued -= 1

        with self._lock:
            if base._queued + len(asked) > most:
                raise ApiError(429, f"{base._queued} requests wait; try again", retry_after=1)
            try:
                futures = [self._worker.submit(function, *args) for args in asked]
            except RuntimeError:
                raise ApiError(503, "the server is stopping", retry_after=5) from None
            base._queued += len(futures)
        for future in futures:
            future.add_done_callback(left)
        return futures

    def prompt_scores(self, prompt: Sequence[int]) -> decoding.Score:
        """Returns the log-probabilities of a decoder's prompt after its first token."""
        from t5jax.decoding.scoring import score

        pretrained = self.pretrained
        return score(
            *(self.model, pretrained.params, [prompt[:1]], [prompt[1:]]),
            form=self.form,
            kind=self.model.kind,
            mesh=pretrained.mesh,
            rules=pretrained.rules,
            batch_size=1,
            num_top=min(NUM_TOP, self.model.vocab_size),
        )[0]

    def beams(self, request: Request) -> list[decoding.Answer]:
        """Returns the best answers to a prompt by beam search, with `options.max_tokens`.

        One program is compiled for each number of beams and power of two of lengths, when it is
        first asked for.
        """
        prompt, options, special_tokens = request.prompt, request.options, request.special_tokens
        assert options.max_tokens is not None
        pretrained = self.pretrained
        generator = decoding.Generator(
            *(self.model, self.tokenizer, pretrained.mesh, pretrained.rules),
            prefix_lm=pretrained.prefix_lm,
            special_tokens=special_tokens,
            past_eos=True,
        )
        room = decoding.power_of_two(options.max_tokens, least=16)
        if self.model.kind == "decoder" and self.model.longest_row:
            room = max(options.max_tokens, min(room, self.model.longest_row - len(prompt) + 1))
        found = generator.answers_to_prompt(pretrained.params, prompt, options, room=room)
        if not request.continues:
            return found
        texts = [GrowingText(self.tokenizer, special_tokens, a.tokens, prompt).text for a in found]
        return [dataclasses.replace(a, text=text) for a, text in zip(found, texts, strict=True)]

    def embed(self, body: EmbeddingBody) -> tuple[np.ndarray, int]:
        """Returns the vectors of texts, float32 [N, D], and the number of their tokens.

        Raises:
          ValueError: if the model has no encoder, or a text is too long.
        """
        ids = [self.prompt(given) for given in each(body.input)]
        for number, row in enumerate(ids):
            if len(row) > self.max_prompt:
                raise ValueError(
                    f"input {number} has {len(row)} tokens, but this server takes at most "
                    f"{self.max_prompt}; shorten it"
                )
        return self._embed(ids, body.pooling), sum(map(len, ids))

    def _embed(self, ids: Sequence[Sequence[int]], pooling: Any) -> np.ndarray:
        vectors = []
        for start in range(0, len(ids), _EMBEDDING_ROWS):
            chunk = list(ids[start : start + _EMBEDDING_ROWS])
            rows = 1 if len(chunk) == 1 else _EMBEDDING_ROWS  # Few shapes are compiled.
            padded = chunk + [chunk[0]] * (rows - len(chunk))
            found = self.pretrained.embed_ids(padded, pooling=pooling, batch_size=rows)
            vectors.append(found[: len(chunk)])
        return np.concatenate(vectors)


def encoded(vector: np.ndarray, encoding_format: str) -> str | list[float]:
    """Returns a float32 vector as a list of numbers, or as base64 of its bytes."""
    if encoding_format == "base64":
        return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
    return [float(x) for x in vector]
