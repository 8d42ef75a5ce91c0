"""The text of an answer while it is being written, and the texts that end it."""

from collections.abc import Sequence

from t5jax.decoding.answers import find_stop
from t5jax.tokenizers import Tokenizer

# Decoding only the last tokens keeps the time for each one constant; so many of those before are
# needed for the text not to depend on where it was cut.
_CONTEXT = 16
_WINDOW = 4 * _CONTEXT
# A tokenizer that cleans up removes the first space of each.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class TextStream:
    """Turns tokens into pieces of text, which together are the text of all tokens.

    A piece ends between characters, and what may be the beginning of a stop text is held back. As
    in `Generator`, stop texts are also found among special tokens that are not shown; and here
    across them, so that no text that is shown contains one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        special_tokens: bool = False,
        stop: Sequence[str] = (),
        before: Sequence[int] = (),
    ) -> None:
        """Begins a text.

        Args:
          tokenizer: the tokenizer.
          special_tokens: keep special tokens in the text.
          stop: what ends it.
          before: the tokens of the text that it goes on.
        """
        self._tokenizer, self._stop, self._before_it = tokenizer, tuple(stop), before
        self._shown = self._searched = GrowingText(tokenizer, special_tokens, before=before)
        self._hides = not special_tokens
        self._end: str | None = None
        self._sent = self._safe = 0
        self.stopped = False
        """Whether a stop text has occurred."""

    @property
    def text(self) -> str:
        """The whole text so far, without what follows a stop text."""
        return self._shown.text if self._end is None else self._end

    @property
    def _is_one(self) -> bool:
        return self._searched is self._shown

    def push(self, token: int) -> None:
        """Adds a token."""
        assert not self.stopped
        is_hidden = self._hides and token in self._tokenizer.special_ids
        if is_hidden and self._stop and self._is_one:
            ids, before = self._shown.ids, self._before_it
            self._searched = GrowingText(self._tokenizer, True, ids, before)
        self._shown.ids.append(token)
        if not self._is_one:
            self._searched.ids.append(token)
        if not self._stop:
            return
        text = self._searched.text
        start = max(0, self._safe - max(map(len, self._stop)))
        place = find_stop(text[start:], self._stop)
        if place is not None:
            self.stopped, self._end = True, self._before(start + place)
        elif not self._is_one and (shown := find_stop(self._shown.text, self._stop)) is not None:
            self.stopped, self._end = True, self._shown.text[:shown]
        self._safe = len(text) - self._held_back(text)

    def take(self) -> str:
        """Returns what the tokens since the last call add to the text; more may follow with later
        tokens."""
        text = self.text
        if self.stopped:
            return self._send(len(text))
        held = self._held_back(text)
        if not self._is_one:
            held = max(held, self._held_back(self._searched.text))
        return self._send(len(text) - held)

    def finish(self) -> str:
        """Returns the rest of the text."""
        return self._send(len(self.text))

    def _send(self, end: int) -> str:
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _before(self, place: int) -> str:
        """Returns the text that is shown before a place in the one that is searched."""
        if self._is_one:
            return self._shown.text[:place]
        if (shown := find_stop(self._shown.text, self._stop)) is not None:
            return self._shown.text[:shown]
        count = len(self._shown.ids)
        while count and len(self._searched.begin(count)) > place:
            count -= 1
        return self._shown.begin(count)

    def _held_back(self, text: str) -> int:
        """Returns how many characters at the end may still change, or begin a stop text."""
        whole = text.rstrip("\ufffd")  # Parts of a character.
        held = 0
        for sought in (*self._stop, *(_CLEANED if self._tokenizer.cleans_up else ())):
            for n in range(min(len(sought) - 1, len(whole)), held, -1):
                if whole.endswith(sought[:n]):
                    held = n
                    break
        return len(text) - len(whole) + held


class GrowingText:
    """The text of tokens of which there are ever more."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        special_tokens: bool = True,
        ids: Sequence[int] = (),
        before: Sequence[int] = (),
    ) -> None:
        """Reads the first tokens.

        Args:
          tokenizer: the tokenizer.
          special_tokens: keep special tokens in the text.
          ids: the tokens.
          before: those of a text that this one goes on: some tokenizers leave out the space in
            front of a text's first word, but not of one that follows.
        """
        self.ids = list(ids)
        self._tokenizer, self._special_tokens = tokenizer, special_tokens
        self._ids_before = _last_of(before, tokenizer)
        self._skipped = len(self._decode_all(self._ids_before))
        self._num_read, self._text = 0, ""
        self._anchor, self._before = 0, ""  # The text before the window.

    @property
    def text(self) -> str:
        if self._num_read < len(self.ids):
            self._num_read = len(self.ids)
            window = self._decode(self._anchor)
            self._text = (self._before + window)[self._skipped :]
            if len(self._ids_before) + len(self.ids) - self._anchor > _WINDOW:
                self._advance(window)
        return self._text

    def begin(self, count: int) -> str:
        """Returns the text of the first tokens."""
        return self._decode_all([*self._ids_before, *self.ids[:count]])[self._skipped :]

    def _advance(self, window: str) -> None:
        """Moves the beginning of the window, where this does not change the text."""
        anchor = len(self._ids_before) + len(self.ids) - _CONTEXT
        context = self._decode(anchor)
        if context.strip("\ufffd") and window.endswith(context):
            self._before += window[: len(window) - len(context)]
            self._anchor = anchor

    def _decode(self, start: int) -> str:
        """Returns the text from a token on, counted with those before."""
        own = start - len(self._ids_before)
        return self._decode_all(
            self.ids[own:] if own >= 0 else [*self._ids_before[start:], *self.ids]
        )

    def _decode_all(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, special_tokens=self._special_tokens, past_eos=True)


def _last_of(before: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Returns the last tokens of a text, none if what follows may change their own text."""
    if tokenizer.cleans_up:  # Across the place where they end, too.
        return []
    last = list(before[-_CONTEXT:])
    if tokenizer.eos_id in last:  # At which decoding ends.
        last = last[len(last) - last[::-1].index(tokenizer.eos_id) :]
    return [] if tokenizer.decode(last).endswith("\ufffd") else last


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
            text = self._tokenizer.decode([self._anchor, token], past_eos=True)
            text = text.removeprefix(self._anchor_text)
            if not text or "\ufffd" in text:
                text = f"token_id:{token}"
            self._texts[token] = text
        return text
