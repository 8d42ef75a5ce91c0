"""The tokenizer of a classifier's targets: its classes as ids."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence

from t5jax.architectures import Architecture
from t5jax.checks import did_you_mean
from t5jax.tokenizers.common import Tokenizer

_NO_LABEL = "\0"  # No label is called that: labels are printable.


class LabelTokenizer:
    """The tokenizer of a classifier's targets: one label per text, or one per word.

    Class i has id i. They are followed by eos, and by an id for pieces of words that have no label.
    `repr()` identifies the classes and their order.
    """

    def __init__(self, labels: Sequence[str], per_word: bool = False) -> None:
        """Takes the names of the classes; per_word: a target has one label for each word."""
        self.labels, self.per_word = tuple(labels), per_word
        self._ids = {label: i for i, label in enumerate(self.labels)}
        self.eos_id = self.pad_id = self.unk_id = len(self.labels)
        self._ids[_NO_LABEL] = len(self.labels) + 1
        self.vocab_size = len(self._ids) + 1

    @staticmethod
    def of(model: Architecture) -> "LabelTokenizer | None":
        """Returns the tokenizer of a model's labels, or None if it has none."""
        if not model.labels:
            return None
        return LabelTokenizer(model.labels, model.head == "token_classification")

    def __repr__(self) -> str:
        digest = hashlib.sha256("\n".join(self.labels).encode()).hexdigest()[:12]
        each = "one a word" if self.per_word else "one a text"
        return f"LabelTokenizer({len(self.labels)} labels, {each}, sha256 {digest})"

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the labels in a target, without eos.

        Raises:
          ValueError: if a word of the target is not a label.
        """
        found = text.split() if self.per_word else [text.strip()]
        return [self._id(label) for label in found]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def _id(self, label: str) -> int:
        if label not in self._ids:
            hint = did_you_mean(label, self.labels)
            known = ", ".join(map(repr, self.labels[:20]))
            raise ValueError(
                f"{label!r:.60} is not a class of the model; {hint}model.labels has {known}"
                f"{', ...' if len(self.labels) > 20 else ''}; correct the data, or add it to "
                "model.labels"
            )
        return self._ids[label]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the labels before the first eos, with spaces between them."""
        before = itertools.takewhile(lambda i: i != self.eos_id, ids)
        return " ".join(self.labels[i] for i in before if i < len(self.labels))

    def arrange(self, inputs: str, targets: str, tokenizer: Tokenizer) -> str:
        """Returns the targets for `encode`, with an entry for each piece of the inputs.

        The label of a text is returned unchanged. The label of a word is that of its first piece;
        the word's other pieces are marked as having none.

        Args:
          inputs: a text; with labels per word, its words are separated by one space.
          targets: the label of the text, or those of its words.
          tokenizer: the tokenizer of the inputs.
        Raises:
          ValueError: if a target is not a label, if there are more or fewer labels than words, or
            if the tokenizer does not split the text word by word.
        """
        self.encode(targets)  # Checks the labels.
        if not self.per_word:
            return targets
        # A word may contain another space of Unicode's, such as one that does not break.
        words = [word for word in re.split(r"[ \t\r\n]+", inputs) if word]
        labels = targets.split()
        if len(words) != len(labels):
            raise ValueError(
                f"its inputs have {len(words)} words and its targets {len(labels)} labels "
                f"({inputs!r:.40}, {targets!r:.40}); expected a label for each word, with spaces "
                "between them"
            )
        # Some tokenizers make the space a part of the piece that follows it.
        pieces = [tokenizer.encode(f" {word}" if i else word) for i, word in enumerate(words)]
        if list(itertools.chain(*pieces)) != tokenizer.encode(inputs):
            raise ValueError(
                f"its inputs {inputs!r:.60} are not split word by word by {tokenizer}; put one "
                "space between words, and none around them"
            )
        arranged = (
            [label, *[_NO_LABEL] * (len(ids) - 1)]
            for label, ids in zip(labels, pieces, strict=True)
            if ids
        )
        return " ".join(itertools.chain(*arranged))
