"""The classes of a classifier as ids."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence

from t5jax.architectures import Architecture
from t5jax.checks import did_you_mean
from t5jax.tokenizers.common import Tokenizer

_NO_LABEL = "\0"  # No label is called that: labels are printable.


class LabelTokenizer:
    """A classifier's classes, as the tokenizer of its targets: one label a text, or one a word.

    Class i has id i. What ends a target, and in targets of words what has no label, come after the
    classes. `repr()` names the classes in their order.
    """

    def __init__(self, labels: Sequence[str], per_word: bool = False):
        """Takes the names of the classes; per_word: a target has a label for each word."""
        self.labels, self.per_word = tuple(labels), per_word
        self._ids = {label: i for i, label in enumerate(self.labels)}
        self.eos_id = self.pad_id = self.unk_id = len(self.labels)
        self._ids[_NO_LABEL] = len(self.labels) + 1
        self.vocab_size = len(self._ids) + 1

    @staticmethod
    def of(model: Architecture) -> "LabelTokenizer | None":
        """Returns that of a model that classifies, None for any other."""
        if not model.labels:
            return None
        return LabelTokenizer(model.labels, model.head == "token_classification")

    def __repr__(self):
        digest = hashlib.sha256("\n".join(self.labels).encode()).hexdigest()[:12]
        each = "one a word" if self.per_word else "one a text"
        return f"LabelTokenizer({len(self.labels)} labels, {each}, sha256 {digest})"

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the labels in a target, without eos.

        Raises:
          ValueError: for what is no label.
        """
        found = text.split() if self.per_word else [text.strip()]
        return [self._id(label) for label in found]

    def _id(self, label: str) -> int:
        if label not in self._ids:
            hint = did_you_mean(label, self.labels)
            known = ", ".join(map(repr, self.labels[:20]))
            raise ValueError(
                f"{label!r:.60} is no class of the model; {hint}model.labels has {known}"
                f"{', ...' if len(self.labels) > 20 else ''}; correct the data, or add it to "
                "model.labels"
            )
        return self._ids[label]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the labels before the first eos, with spaces between them."""
        before = itertools.takewhile(lambda i: i != self.eos_id, ids)
        return " ".join(self.labels[i] for i in before if i < len(self.labels))

    def arrange(self, inputs: str, targets: str, tokenizer: Tokenizer) -> str:
        """Returns the targets as `encode` shall read them: with what inputs' pieces have a label.

        A text's label stays what it is. A word's goes to the first of the word's pieces, and the
        others have none; so there is something for every piece of the inputs.

        Args:
          inputs: a text; of words, with one space between them.
          targets: its label, or its words' labels.
          tokenizer: of the inputs.
        Raises:
          ValueError: for what is no label, for more or fewer labels than words, and for words that
            the tokenizer does not split one by one.
        """
        self.encode(targets)  # Raises for what is no label.
        if not self.per_word:
            return targets
        words, labels = inputs.split(), targets.split()
        if len(words) != len(labels):
            raise ValueError(
                f"its inputs have {len(words)} words and its targets {len(labels)} labels "
                f"({inputs!r:.40}, {targets!r:.40}); expected a label for each word, with spaces "
                "between them"
            )
        # Where a space belongs to the piece behind it, it is there.
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
