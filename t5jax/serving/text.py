"""The text of an answer while it is being written, and the texts that end it."""

from collections.abc import Sequence

from t5jax.tokenizers import Tokenizer

# Decoding only the last tokens keeps the time for each one constant; so many of those before are
# needed for the text not to depend on where it was cut.
_CONTEXT = 32
_WINDOW = 4 * _CONTEXT


class TextStream:
    """Turns tokens into pieces of text, which together are the text of all tokens.

    A piece ends between characters, and what may be the beginning of a stop text is held back.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, special_tokens: bool = False, stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._special_tokens = tokenizer, special_tokens
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._anchor, self._before = 0, ""  # The text before the window.
        self._sent = 0
        self.text = ""
        """The whole text so far, without what follows a stop text."""
        self.stopped = False
        """Whether a stop text has occurred."""

    def push(self, token: int) -> str:
        """Returns the text that a token adds; more of it may follow with later tokens."""
        assert not self.stopped
        self._ids.append(token)
        if len(self._ids) - self._anchor > _WINDOW:
            self._advance()
        self.text = self._before + self._decode(self._ids[self._anchor :])
        found = [at for stop in self._stop if (at := self.text.find(stop, self._search_from)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self.finish()
        return self._send(len(self.text) - self._held_back())

    def finish(self) -> str:
        """Returns the rest of the text."""
        return self._send(len(self.text))

    @property
    def _search_from(self) -> int:
        return max(0, self._sent - max(map(len, self._stop), default=0))

    def _send(self, end: int) -> str:
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _held_back(self) -> int:
        """Returns how many characters at the end may still change, or begin a stop text."""
        text = self.text
        held = len(text) - len(text.rstrip("\ufffd"))
        # A decoder may strip a space at the end until more follows.
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(text)), held, -1):
                if text.endswith(stop[:n]):
                    held = n
                    break
        return held

    def _advance(self) -> None:
        """Moves the beginning of the window, where this does not change the text."""
        whole = self._decode(self._ids[self._anchor :])
        anchor = len(self._ids) - _CONTEXT
        context = self._decode(self._ids[anchor:])
        if context.strip("\ufffd") and whole.endswith(context):
            self._before += whole[: len(whole) - len(context)]
            self._anchor = anchor

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, special_tokens=self._special_tokens)


class TokenTexts:
    """The text of single tokens, as it is within a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._anchor = (tokenizer.encode("a") or [tokenizer.unk_id])[-1]
        self._anchor_text = tokenizer.decode([self._anchor])

    def __call__(self, token: int) -> str:
        """Returns the token's text; "token_id:7" if it is a part of a character, or no text."""
        text = self._texts.get(token)
        if text is None:
            text = self._tokenizer.decode([self._anchor, token])
            text = text.removeprefix(self._anchor_text)
            if not text or "\ufffd" in text:
                text = f"token_id:{token}"
            self._texts[token] = text
        return text
