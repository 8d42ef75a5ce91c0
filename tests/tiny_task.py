"""Tasks for runs of seconds, registered through data.task_files.

Write letters as capitals; say with which letter a word begins, or of each of two which it is.
"""

import random

from t5jax.data import Source, accuracy, exact_match, prompted_task


def rows(split, size):
    rng = random.Random(split)
    words = ["".join(rng.choices("abcd", k=rng.randint(1, 4))) for _ in range(size)]
    return [{"word": word, "capitals": word.upper()} for word in words]


SOURCE = Source({s: lambda s=s, n=n: rows(s, n) for s, n in [("train", 40), ("validation", 11)]})

prompted_task(
    "capitals",
    SOURCE,
    [("capitals: {word}", "{capitals}")],
    metrics=[exact_match],
    vocabulary="bytes",
)
prompted_task("first_letter", SOURCE, ["{{word}} ||| letter {{word[0]}}"], metrics=[accuracy])
prompted_task(
    "letters",
    SOURCE,
    ["{{word[0]}} {{word}} ||| {{word[0]}} {{word[-1]}}"],
    metrics=[accuracy],
)
