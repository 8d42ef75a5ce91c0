"""Two novels, Moby-Dick and Pride and Prejudice: plain text for the pre-training objectives.

The books are the *.md files in $T5JAX_DATA/text, or in ./data/text if T5JAX_DATA is not set; the
repository mlschmitt/classic-books-markdown on GitHub has these and more. A document is a chapter;
every tenth chapter of a book is held out for validation.

    novels_spans     span corruption (T5)
    novels_ul2       a mixture of denoisers (UL2)
    novels_prefix    prefix language modelling
    novels_lm        causal language modelling
    novels_mlm       masked language modelling, for encoders; needs a vocabulary with a mask token,
                     such as --data.vocabulary google-bert/bert-base-uncased
    novels_book      which of the two novels a paragraph is from
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterator

from t5jax.data import (
    CausalLM,
    MaskedLM,
    PrefixLM,
    Source,
    SpanCorruption,
    accuracy,
    prompted_task,
    text,
    text_task,
    train_sentencepiece,
    ul2,
)

FOLDER = os.path.join(os.environ.get("T5JAX_DATA", "data"), "text")


BOOKS = text({"books": f"{FOLDER}/*.md"}, by="file")


@dataclasses.dataclass(frozen=True)
class Chapters:
    """Yields the chapters of a split, of all books."""

    held_out: bool

    def __call__(self) -> Iterator[dict]:
        for book in BOOKS.rows("books"):
            title = book["text"].split("\n")[0].removeprefix("# Title: ")
            for number, chapter in enumerate(re.split(r"\n(?=## )", book["text"])):
                if (number % 10 == 9) == self.held_out:
                    yield {"text": chapter, "book": title}

    def paths(self) -> list[str]:
        """Returns the files; a cache uses them to detect that they have changed."""
        return BOOKS.files("books")


SOURCE = Source({"train": Chapters(held_out=False), "validation": Chapters(held_out=True)})


def paragraphs(chapters: Chapters) -> Iterator[dict]:
    """Yields the paragraphs that are long enough to be recognized."""
    for chapter in chapters():
        for part in chapter["text"].split("\n\n"):
            if len(part) >= 100 and not part.startswith("#"):
                yield {"text": " ".join(part.split()), "book": chapter["book"]}


def vocabulary():
    """1,948 pieces learned from the training chapters; 2,048 ids with the 100 sentinels."""
    chapters = [row["text"].removesuffix("\n") for row in SOURCE.rows("train")]
    return train_sentencepiece([line for text in chapters for line in text.split("\n")], 1948)


for name, objective in {
    "novels_spans": SpanCorruption(),
    "novels_ul2": ul2(),
    "novels_prefix": PrefixLM(),
    "novels_lm": CausalLM(),
    "novels_mlm": MaskedLM(),
}.items():
    text_task(name, SOURCE, objective, vocabulary=vocabulary)

prompted_task(
    "novels_book",
    Source(
        {
            split: functools.partial(paragraphs, chapters)
            for split, chapters in SOURCE.functions.items()
        }
    ),
    [("{text}", "{book}")],
    metrics=[accuracy],
    vocabulary=vocabulary,
)
