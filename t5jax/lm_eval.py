"""A model of t5jax for EleutherAI's lm-evaluation-harness.

    from lm_eval import simple_evaluate
    from t5jax.lm_eval import LM

    simple_evaluate(model=LM("google/flan-t5-small"), tasks=["arc_easy"])

or on the command line, with all options of `lm_eval`:

    python -m t5jax.lm_eval run --model t5jax --model_args pretrained=MODEL --tasks arc_easy

Texts are read as the harness's own `hf` backend reads them: a context with the special tokens of
the model's tokenizer, a continuation without; an encoder-decoder reads the context in its encoder,
and what is too long loses its start.
"""

import datetime
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from t5jax import decoding, pretrained
from t5jax.architectures import Dtype
from t5jax.checks import check_at_least
from t5jax.decoding.scoring import score
from t5jax.special_tokens import example_format

_log = logging.getLogger(__name__)

_DEFAULT_LENGTH = 2048
_OPTIONS = (
    *("top_k", "top_p", "min_p", "seed", "num_beams", "repetition_penalty", "no_repeat_ngram_size"),
)
"""Settings of a task's generation_kwargs that are those of `GenerationOptions`."""


@register_model("t5jax")
class LM(TemplateLM):
    """A T5 or GPT for `lm_eval.simple_evaluate`."""

    def __init__(
        self,
        pretrained: "str | pretrained.Pretrained",
        *,
        batch_size: int | str = 32,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: Dtype | None = None,
        base: str = "",
        **ignored: Any,
    ):
        """Loads a model.

        Args:
          pretrained: a Hub name, a Hugging Face folder, a run or one of its checkpoints; or a model
            that `t5jax.load` returned.
          batch_size: the number of rows per batch; "auto": 32.
          max_length: the maximum length of a context and its continuation in tokens; for an
            encoder-decoder, of a context. None: that of the model's positions, or 2048.
          max_gen_toks: the maximum number of tokens to generate for tasks that do not say.
          dtype: as for `t5jax.load`.
          base: as for `t5jax.load`.
          **ignored: settings that the harness gives to every model.
        Raises:
          ValueError: if the model cannot be loaded or writes no text, or a setting is unknown.
        """
        super().__init__()
        unknown = ignored.keys() - {"max_batch_size", "device"}
        if unknown:
            raise ValueError(
                f"model_args has {', '.join(sorted(unknown))}; expected pretrained, batch_size, "
                "max_length, max_gen_toks, dtype or base"
            )
        loaded = _load(pretrained, dtype, base)
        if loaded.model.kind == "encoder":
            raise ValueError(
                f"{loaded.model.family} is an encoder and writes no text, so the harness cannot "
                "ask it; `t5jax eval` evaluates classifiers"
            )
        self.loaded = loaded
        self.backend = "causal" if loaded.model.kind == "decoder" else "seq2seq"
        self._form = example_format(loaded.model, loaded.tokenizer)
        self._generator = decoding.Generator(
            loaded.model,
            loaded.tokenizer,
            loaded.mesh,
            loaded.rules,
            loaded.prefix_lm,
            special_tokens=False,
        )
        automatic = isinstance(batch_size, str) and batch_size.startswith("auto")
        self.batch_size = 32 if automatic else int(batch_size)
        check_at_least(self.batch_size, 1, "batch_size")
        self.max_length = int(max_length or loaded.model.longest_row or _DEFAULT_LENGTH)
        self.max_gen_toks = int(max_gen_toks)

    # --- Tokens -----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.loaded.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the tokens of a text, with those that begin and end it unless told otherwise."""
        tokenizer = self.loaded.tokenizer
        ids = tokenizer.encode(string)
        bos = tokenizer.special_tokens.get("bos_token")
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False  # A chat template has written it.
        if add_special_tokens is False:
            return list(ids)
        return self._form.prompt([*ids, tokenizer.eos_id]).tolist()

    def _context(self, text: str, room: int) -> list[int]:
        """Returns the tokens of a prompt, whose start is lost if it is longer than the room."""
        ids = self.tok_encode(text)
        start = self._form.prompt_start if self.backend == "causal" else ()
        # The generator writes the token that begins a text again.
        return ids if len(ids) <= room else ids[len(ids) - max(room - len(start), 1) :]

    @property
    def tokenizer_name(self) -> str:
        return repr(self.loaded.tokenizer)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns what the model reads of a conversation, by its own template.

        Raises:
          ValueError: if it has none, or the template refuses the conversation.
        """
        today = datetime.datetime.now().strftime  # As in transformers.
        settings = {"continues": not add_generation_prompt, "strftime_now": today}
        try:
            return self._template.prompt({"messages": chat_history}, **settings)
        except ValueError:
            # As in the `hf` backend: some templates take no system message.
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            _log.warning("the chat template refuses a system message, which is left out")
            return self._template.prompt({"messages": rest}, **settings)

    @functools.cached_property
    def _template(self) -> Any:
        from t5jax.data.prompts.chat import ChatTemplate

        if not self.loaded.tokenizer.chat_template:
            raise ValueError(
                f"{self.loaded.tokenizer} has no chat template; leave --apply_chat_template out"
            )
        return ChatTemplate().bind(self.loaded.tokenizer)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns the template's text, which the harness notes."""
        return self.loaded.tokenizer.chat_template or ""

    # --- Requests ---------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether greedy decoding writes it.

        Args:
          requests: texts as a key for the harness's cache, or None; tokens of the context; tokens
            of the continuation.
        """
        contexts, continuations = [], []
        for _, context, continuation in requests:
            room = self.max_length
            if self.backend == "causal":
                room = self.max_length + 1 - len(continuation)  # The last token is not read.
                if room < 1:
                    raise ValueError(
                        f"a continuation has {len(continuation)} tokens, and the model "
                        f"{self.max_length} positions; raise max_length, or take another task"
                    )
            contexts.append(context[-room:])
            continuations.append(continuation)
        model = self.loaded
        found = score(
            *(model.model, model.params, contexts, continuations),
            form=self._form,
            kind=self._generator.kind,
            mesh=model.mesh,
            rules=model.rules,
            batch_size=self.batch_size,
        )
        answers = [(one.total, bool(np.all(one.is_greedy))) for one in found]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of each whole text, in windows where it is too long."""
        windows, numbers = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                numbers.append(number)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows)
        for number, (log_prob, _) in zip(numbers, answers, strict=True):
            totals[number] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each context, up to the first of its stop sequences."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(key, []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
            stop, most = settings.pop("until"), int(settings.pop("max_gen_toks"))
            options = _options(settings, stop, most)
            room = self.max_length - (most if self.backend == "causal" else 0)
            if room < 1:
                raise ValueError(
                    f"max_gen_toks is {most}, and the model has {self.max_length} positions; "
                    "lower it (--gen_kwargs max_gen_toks=N), or raise max_length"
                )
            contexts = [self._context(requests[number].args[0], room) for number in numbers]
            found = self._generator.answers(
                self.loaded.params, contexts, options, batch_size=self.batch_size
            )
            for number, (answer, *_) in zip(numbers, found, strict=True):
                texts[number] = postprocess_generated_text(answer.text, stop, None)
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts


def _options(
    settings: Mapping[str, Any], stop: Sequence[str], max_tokens: int
) -> decoding.GenerationOptions:
    """Returns the options of a task's generation_kwargs, as the harness has normalized them.

    Raises:
      ValueError: for a setting that is unknown here.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    samples, temperature = given.pop("do_sample", None), given.pop("temperature", None)
    if samples is False:
        temperature = 0.0
    elif samples and temperature is None:
        temperature = 1.0
    if not temperature:  # As in the `hf` backend, what is for drawing has no effect.
        given = {k: v for k, v in given.items() if k not in ("top_k", "top_p", "min_p")}
    if unknown := sorted(given.keys() - set(_OPTIONS)):
        raise ValueError(
            f"generation_kwargs has {', '.join(unknown)}; expected until, max_gen_toks, do_sample, "
            f"temperature, {', '.join(_OPTIONS)}; leave it out (--gen_kwargs)"
        )
    return decoding.GenerationOptions(
        max_tokens=max_tokens,
        stop=tuple(text for text in stop if text),
        temperature=float(temperature or 0.0),
        **given,
    )


def _load(
    model: "str | pretrained.Pretrained", dtype: Dtype | None, base: str
) -> "pretrained.Pretrained":
    if not isinstance(model, pretrained.Pretrained):
        return pretrained.load(str(model), dtype=dtype, base=base)
    if (dtype is not None and dtype != model.dtype) or base:
        name, value = ("base", base) if base else ("dtype", dtype)
        raise ValueError(f"{name} is {value}, but the model is loaded already; leave it out")
    return model


def main() -> None:
    """Runs the command line of lm-evaluation-harness, to which this model is known."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
