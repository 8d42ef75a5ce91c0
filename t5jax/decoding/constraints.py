"""Answers that match a JSON schema or a regular expression, by llguidance.

A grammar says before each token which ids may be written.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from t5jax.checks import first_line
from t5jax.decoding.endless import check_ends
from t5jax.decoding.options import GenerationOptions
from t5jax.decoding.rows import pack_bits
from t5jax.tokenizers import HuggingFaceTokenizer, Tokenizer

_WHITESPACE = r"[ \n\r\t]{0,20}"


class Constraint:
    """The grammar of one answer that is being written."""

    def __init__(self, options: GenerationOptions, tokenizer: Tokenizer, ends: tuple[int, ...]):
        """Reads the grammar.

        Args:
          options: with `json_schema` or `regex`.
          tokenizer: the tokenizer.
          ends: the ids that end an answer.
        Raises:
          ValueError: if the grammar is invalid, or this vocabulary cannot write it.
        """
        import llguidance

        self._vocabulary = _vocabulary(cast(Any, tokenizer))
        self._ends, self._problem = ends, ""
        what = "regex" if options.regex is not None else "json_schema"
        given = options.regex if options.regex is not None else options.json_schema
        with _panics(f"{what} {given!r:.200} is invalid"):
            grammar = _grammar(options, self._vocabulary.strips_space)
            problem = llguidance.LLMatcher.validate_grammar(grammar, self._vocabulary.tokenizer)
            if problem and not problem.startswith("WARNING"):
                raise ValueError(f"{what} {given!r:.200} is invalid: {_reason(problem)}")
            self._matcher = llguidance.LLMatcher(self._vocabulary.tokenizer, grammar, log_level=0)

    def fill(self, words: np.ndarray) -> None:
        """Sets which ids may come next.

        Args:
          words: int32 [W], one bit for each id of the network.
        Raises:
          ValueError: if the vocabulary has no token for what must come next.
        """
        if self._problem:
            raise ValueError(self._problem)
        with _panics("the json_schema or regex fails"):
            self._fill(words)

    def _fill(self, words: np.ndarray) -> None:
        from llguidance.numpy import fill_next_token_bitmask

        words[:] = 0
        is_whole = self._matcher.is_accepting()
        if not self._matcher.is_stopped():
            mask = np.zeros((1, len(self._vocabulary.is_text)), np.int32)
            fill_next_token_bitmask(self._matcher, mask)
            mask &= self._vocabulary.is_text
            size = min(len(words), mask.shape[1])
            words[:size] = mask[0, :size]
        problem = self._matcher.get_error() if self._matcher.is_error() else ""
        # It takes what the tokenizer makes of a text that must follow, such as the unknown token.
        if problem and "forced bytes" not in problem:
            raise ValueError(f"the json_schema or regex fails: {_reason(problem)}")
        for i in self._ends:
            bit = np.int32(np.uint32(1 << i % 32).view(np.int32))
            words[i // 32] = words[i // 32] | bit if is_whole else words[i // 32] & ~bit
        if problem or not words.any():
            raise ValueError(
                "this model's vocabulary has no token for what the json_schema or regex asks for "
                "next; ask for a text that it can write (T5's own vocabulary, for example, has no "
                "braces)"
            )

    def read(self, token: int) -> None:
        """Takes note of the token that was written; `fill` says what is wrong with it."""
        try:
            with _panics("the json_schema or regex fails"):
                if token not in self._ends and not self._matcher.consume_token(token):
                    # Of what `fill` allows, other options have left nothing.
                    self._problem = (
                        f"id {token} was written, which the json_schema or regex does not allow: "
                        "other options, such as forced_tokens, allowed_tokens, suppressed_tokens "
                        "and logit_bias, leave no id that it does; leave them out"
                    )
        except ValueError as error:
            self._problem = str(error)


@contextlib.contextmanager
def _panics(what: str) -> Iterator[None]:
    """Raises ValueError where llguidance panics, whose exception is not an `Exception`."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"{what}: it is nested too deeply") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {first_line(error)}") from None


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer):
        import llguidance

        eos = [tokenizer.eos_id]
        if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.is_byte_level:
            self.tokenizer = llguidance.LLTokenizer(tokenizer.to_json(), eos_token=eos)
        else:
            wrapper = llguidance.TokenizerWrapper(_Pieces(tokenizer))
            self.tokenizer = llguidance.LLTokenizer(wrapper, eos_token=eos)
        size = self.tokenizer.vocab_size
        is_text = np.array(
            [
                i not in tokenizer.special_ids and self.tokenizer.decode_bytes([i]) != b""
                for i in range(size)
            ]
        )
        self.is_text = pack_bits(is_text)
        """Int32 words, one bit for each id that is text."""
        ids = tokenizer.encode("a")
        begins_with_space = self.tokenizer.decode_bytes(ids[:1]).startswith(b" ")
        self.strips_space = begins_with_space and not tokenizer.decode(ids).startswith(" ")
        """Whether the space before a text's first word is part of its token, and not of the
        text."""


class _Pieces:
    """What llguidance asks of a tokenizer whose pieces have "▁" for a space, or of bytes."""

    def __init__(self, tokenizer: Any):
        self.tokens = tokenizer.token_bytes()
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < len(self.tokens))
        self._unk_id = tokenizer.unk_id
        self._ids = {text: i for i, text in reversed([*enumerate(self.tokens)]) if text}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str | bytes) -> list[int]:
        """Returns ids with exactly these bytes, the longest first.

        The tokenizer itself would put a space in front of a text that goes on within a sentence.
        """
        rest, ids = text.encode() if isinstance(text, str) else text, []
        while rest:
            sizes = range(min(self._longest, len(rest)), 0, -1)
            size = next((n for n in sizes if rest[:n] in self._ids), 1)
            ids.append(self._ids.get(rest[:size], self._unk_id))
            rest = rest[size:]
        return ids


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> _Vocabulary:
    return _Vocabulary(tokenizer)


def _grammar(options: GenerationOptions, strips_space: bool) -> str:
    """Returns the grammar, which allows a space in front that is not part of the text."""
    import llguidance

    if options.regex is not None:
        regex = f" ?({options.regex})" if strips_space else options.regex
        grammar: str = llguidance.LLMatcher.grammar_from_regex(regex)
        return grammar
    try:
        schema = json.loads(options.json_schema or "")
    except ValueError as error:
        raise ValueError(f"json_schema {options.json_schema!r:.80} is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError(f"json_schema {options.json_schema!r:.80} is no JSON object")
    check_ends(schema)
    # Otherwise a model may write spaces without end.
    schema = {"x-guidance": {"whitespace_pattern": _WHITESPACE}} | (schema or {"type": "object"})
    space = '" "? ' if strips_space else ""
    return f"%llguidance {{}}\nstart: {space}json\njson: %json {json.dumps(schema)}\n"


def _reason(problem: str) -> str:
    """Returns a message of llguidance in one line, without the grammar that we wrote."""
    if problem.startswith("NoExtensionBias"):
        return "nothing that could come next leads to a text that it allows; loosen it"
    lines = [line.strip() for line in problem.split("<state>")[0].split("\n")]
    kept = [line for line in lines if line and "|" not in line and set(line) != {"^"}]
    text = " ".join(kept)
    return text.split("): ", 1)[-1] if text.startswith("at ") else text
