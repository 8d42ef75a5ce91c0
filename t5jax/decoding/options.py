"""What a user may ask of decoding, and what a model's generation_config.json asks by default."""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from t5jax.checks import check_at_least, check_choice, check_positive

_log = logging.getLogger(__name__)

EarlyStopping = Literal["true", "false", "never"]


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How answers are written. The defaults are plainly greedy, one answer for each prompt.

    Names are those of transformers' GenerationConfig where it has one; as in vLLM, temperature 0
    means the most probable token (do_sample=False), and anything above it means sampling.
    """

    max_tokens: int | None = None
    """Maximum length of an answer in tokens. None: as max_length says, or 64."""
    max_length: int | None = None
    """Maximum length of what a decoder reads and writes in tokens: its prompt, or the token that
    starts an answer, and the answer."""
    min_tokens: int = 0
    """No id ends an answer before it has this many tokens; a stop text may."""
    temperature: float = 0.0
    """Logits are divided by it, and a token is drawn. 0: the most probable token."""
    top_k: int = 0
    """Only draw one of the k most probable tokens. 0: any."""
    top_p: float = 1.0
    """Only draw one of the most probable tokens that together have this probability."""
    min_p: float = 0.0
    """Only draw a token whose probability is at least this, times that of the most probable."""
    seed: int = 0
    """The tokens of each answer depend on it, on the number of the prompt and of the answer, and
    not on other prompts."""
    repetition_penalty: float = 1.0
    """Logits of tokens that a decoder has read or written are divided by it if positive, and
    multiplied by it otherwise."""
    no_repeat_ngram_size: int = 0
    """No sequence of this many tokens occurs twice in what a decoder reads and writes. 0: any
    may."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has, as often as it has them."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Ids, and what is added to their logits; as in OpenAI's interface -100 bans an id, and 100
    leaves hardly anything else."""
    num_beams: int = 1
    """Beam search with this many beams. 1: none."""
    length_penalty: float = 1.0
    """A beam's score is the sum of its log-probabilities divided by its length to this power."""
    early_stopping: EarlyStopping = "false"
    """When beam search ends. true: once there are num_beams answers; false: once better ones are
    unlikely; never: once there can be none."""
    num_answers: int = 1
    """Answers to each prompt: several samples, or the best beams."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these texts."""
    forced_tokens: tuple[int, ...] = ()
    """Ids that every answer begins with."""
    suppressed_tokens: tuple[int, ...] = ()
    """Ids that are never written."""
    allowed_tokens: tuple[int, ...] | None = None
    """The only ids that are written, besides those that end a text. None: all."""
    json_schema: str | None = None
    """A JSON schema that every answer satisfies; "{}" allows any JSON object."""
    regex: str | None = None
    """A regular expression that every answer matches as a whole."""
    logprobs: int | None = None
    """Return the log-probability of each token, and this many alternatives."""

    def __post_init__(self) -> None:
        """Checks every option by itself and with the others.

        Raises:
          ValueError: for a value out of range, or options that contradict each other.
        """
        for name in ("max_tokens", "max_length", "num_beams", "num_answers"):
            if getattr(self, name) is not None:
                check_at_least(getattr(self, name), 1, name)
        for name in ("min_tokens", "top_k", "temperature", "no_repeat_ngram_size", "seed"):
            check_at_least(getattr(self, name), 0, name)
        if self.logprobs is not None:
            check_at_least(self.logprobs, 0, "logprobs")
        check_positive(self.repetition_penalty, "repetition_penalty")
        numbers = ("temperature", "repetition_penalty", "length_penalty")
        for name in (*numbers, "presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be in [0, 1]")
        if self.seed >= 2**64:
            raise ValueError(f"seed is {self.seed}; it must be below 2^64")
        check_choice(self.early_stopping, ("true", "false", "never"), "early_stopping")
        if "" in self.stop:
            raise ValueError("stop has an empty text, which every answer contains; leave it out")
        for name in ("forced_tokens", "suppressed_tokens", "allowed_tokens"):
            for i in getattr(self, name) or ():
                check_at_least(i, 0, f"an id of {name}")
        for i, bias in self.logit_bias:
            check_at_least(i, 0, "an id of logit_bias")
            if not math.isfinite(bias):
                raise ValueError(f"logit_bias of id {i} is {bias}; it must be a finite number")
        if len(dict(self.logit_bias)) < len(self.logit_bias):
            raise ValueError("logit_bias has an id twice; give each once")
        self._check_together()

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; an answer "
                "cannot have both; raise max_tokens"
            )
        if self.temperature == 0:
            drawn = {"top_k": (self.top_k, 0), "top_p": (self.top_p, 1), "min_p": (self.min_p, 0)}
            given = [f"{name} {value}" for name, (value, off) in drawn.items() if value != off]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} would change nothing, since the most probable token is "
                    "taken (temperature 0); set temperature to draw tokens, 1 for the model's own "
                    "probabilities"
                )
        if self.num_beams == 1:
            changed = self.length_penalty != 1, self.early_stopping != "false"
            for name, is_changed in zip(("length_penalty", "early_stopping"), changed, strict=True):
                if is_changed:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, but is for beam search; set num_beams, "
                        "or leave it out"
                    )
            if self.num_answers > 1 and self.temperature == 0:
                raise ValueError(
                    f"num_answers is {self.num_answers}, but they would all be the most probable "
                    "tokens; set temperature to draw them, or num_beams for the best beams"
                )
        else:
            self._check_beams()
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("json_schema and regex are both set; an answer can only follow one")
        both = set(self.forced_tokens) & set(self.suppressed_tokens)
        if both:
            raise ValueError(f"id {min(both)} is both in forced_tokens and suppressed_tokens")
        if self.allowed_tokens is not None:
            if not set(self.allowed_tokens) - set(self.suppressed_tokens):
                raise ValueError("allowed_tokens leaves no id that could be written; add some")
            missing = set(self.forced_tokens) - set(self.allowed_tokens)
            if missing:
                raise ValueError(f"id {min(missing)} of forced_tokens is not in allowed_tokens")

    def _check_beams(self) -> None:
        if self.temperature:
            raise ValueError(
                f"num_beams is {self.num_beams} and temperature {self.temperature}: beam search "
                "draws no tokens; set temperature to 0, or num_beams to 1"
            )
        if self.num_answers > self.num_beams:
            raise ValueError(
                f"num_answers is {self.num_answers}, but there are only {self.num_beams} beams; "
                "raise num_beams"
            )
        for name in ("stop", "json_schema", "regex", "logprobs"):
            if getattr(self, name) not in (None, ()):
                raise ValueError(
                    f"{name} cannot be combined with beam search (num_beams {self.num_beams}); set "
                    "num_beams to 1"
                )

    # --- Lengths ----------------------------------------------------------------------------------

    def limit(self, num_read: int) -> int:
        """Returns how many tokens an answer may have.

        Args:
          num_read: the number of tokens that the decoder reads before, its start token included.
        Raises:
          ValueError: if max_length leaves no room for an answer.
        """
        if self.max_tokens is not None:
            return self.max_tokens
        if self.max_length is None:
            return max(DEFAULT_MAX_TOKENS, self.min_tokens)
        if num_read >= self.max_length:
            raise ValueError(
                f"a prompt has {num_read} tokens, but max_length is {self.max_length}, which "
                "includes it; set max_tokens, or a larger max_length"
            )
        return self.max_length - num_read


DEFAULT_MAX_TOKENS = 64

# --- generation_config.json -----------------------------------------------------------------------

_SAME_NAME = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("num_beams", "length_penalty", "early_stopping", "max_length"),
)
_OTHER_NAME = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "num_answers",
    "suppress_tokens": "suppressed_tokens",
    "forced_bos_token_id": "forced_tokens",
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_BEAMS = ("length_penalty", "early_stopping")
_FRACTIONS = ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty")
# What transformers does without being asked, where tokens are drawn.
_TOP_K = 50
# What else changes answers, with the values that do not.
_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1, 1.0),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "bad_words_ids": (),
    "begin_suppress_tokens": ([],),
    "forced_eos_token_id": (),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "top_h": (),
    "guidance_scale": (1, 1.0),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "penalty_alpha": (),
    "diversity_penalty": (0, 0.0),
    "num_beam_groups": (1,),
    "stop_strings": (),
    "max_time": (),
    "token_healing": (False,),
    "watermarking_config": (),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
}


def options_of(
    generation: Mapping[str, Any], given: Mapping[str, Any] | None = None
) -> GenerationOptions:
    """Returns the options that transformers' `generate` takes for a folder, and logs them.

    Args:
      generation: the content of the folder's generation_config.json.
      given: what the user sets, by the names of `GenerationOptions`, which wins; None is not set.
        A temperature says whether tokens are drawn.
    Raises:
      ValueError: if they contradict each other.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    theirs = {k: v for k, v in generation.items() if v is not None}
    draws = bool(theirs.get("do_sample", False))
    file: dict[str, Any] = {}
    for name in (*_SAME_NAME, *_OTHER_NAME):
        if name in theirs:
            file[_OTHER_NAME.get(name, name)] = _value(name, theirs[name])
    named = set(file)
    if "forced_tokens" in file and not file["forced_tokens"]:
        del file["forced_tokens"]
    # A user who asks for beams, or for the most probable token, does not want what is for drawing.
    if given.get("num_beams", 1) > 1 and "temperature" not in given:
        draws = False
    if "temperature" in given:
        draws = given["temperature"] > 0
    drawing = [name for name in _SAMPLING if name in given]
    if drawing and "temperature" not in given:
        draws = True
    if draws:
        file = {"temperature": 1.0, "top_k": _TOP_K} | file
        if not file["temperature"]:
            file["temperature"] = 1.0
        if "temperature" in given and given.get("num_beams") is None:
            file.pop("num_beams", None)
    else:
        file = {name: value for name, value in file.items() if name not in _SAMPLING}
    if given.get("num_beams", file.get("num_beams", 1)) == 1:
        file = {name: value for name, value in file.items() if name not in _BEAMS}
    if "max_tokens" in given or "max_tokens" in file:
        file.pop("max_length", None)
    if given.get("max_length") is not None:
        file.pop("max_tokens", None)
    taken = {name: value for name, value in file.items() if name not in given}
    options = GenerationOptions(**(taken | given))
    default = GenerationOptions()
    said = [
        f"{name} {value if not isinstance(value, tuple) else ' '.join(map(str, value))}"
        for name, value in taken.items()
        if name in named and value != getattr(default, name)
    ]
    if said:
        _say("generation_config.json: %s, as transformers takes it", ", ".join(said))
    if "top_k" in taken and "top_k" not in named:
        _say(
            "one of the %s most probable tokens is drawn, as in transformers; top_k 0: any", _TOP_K
        )
    ignored = [
        f"{name} {theirs[name]}"
        for name, neutral in _NOT_IMPLEMENTED.items()
        if name in theirs and theirs[name] not in neutral
    ]
    if ignored:
        _say(
            "generation_config.json sets %s, which is not implemented; its own answers differ",
            ", ".join(ignored),
        )
    return options


@functools.lru_cache(maxsize=64)
def _say(message: str, *args: object) -> None:
    """Logs once, and not for every call of `generate`."""
    _log.warning(message, *args)


def _value(name: str, value: Any) -> Any:
    """Returns a value of generation_config.json as that of an option.

    Raises:
      ValueError: if it is of another type than transformers writes.
    """
    ids = value if isinstance(value, list) else [value]
    if name in ("forced_bos_token_id", "suppress_tokens") and all(type(i) is int for i in ids):
        return tuple(ids)
    if name == "early_stopping" and isinstance(value, (bool, str)):
        return value if isinstance(value, str) else json.dumps(value)
    if name in _FRACTIONS and type(value) in (int, float):
        return float(value)
    if name not in (*_FRACTIONS, "early_stopping") and type(value) is int:
        return value
    raise ValueError(
        f"generation_config.json: {name} is {value!r:.60}, a {type(value).__name__}, which "
        "transformers does not write; correct it there"
    )
