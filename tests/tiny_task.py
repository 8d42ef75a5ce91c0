"""A task for runs of seconds: write letters as capitals. Registered through data.task_files."""

import random

from t5jax.data.prompts import prompted_task
from t5jax.data.sources import Source
from t5jax.metrics import exact_match


def rows(split, size):
    rng = random.Random(split)
    words = ["".join(rng.choices("abcd", k=rng.randint(1, 4))) for _ in range(size)]
    return [{"word": word, "capitals": word.upper()} for word in words]


prompted_task(
    "capitals",
    Source({s: lambda s=s, n=n: rows(s, n) for s, n in [("train", 40), ("validation", 11)]}),
    [("capitals: {word}", "{capitals}")],
    metrics=[exact_match],
    vocabulary="bytes",
)
