"""Numbers from 0 to 9999 in English, French, German and digits: four tasks and their mixture.

The quickstart's data. The answers come from num2words, so nothing is downloaded; no number is in
more than one split. For a task of your own, copy this file to ./tasks/ and change names, rows and
prompts.
"""

import functools
import random

import seqio
from num2words import num2words

from t5jax.data import Source, bleu, char_bleu, exact_match, prompted_task, train_sentencepiece


@functools.cache
def numbers() -> list[dict]:
    """Returns every number once, in a random but fixed order."""
    rows = [
        {
            "digits": str(n),
            "english": num2words(n),
            "french": num2words(n, lang="fr"),
            "german": num2words(n, lang="de"),
        }
        for n in range(10_000)
    ]
    random.Random(0).shuffle(rows)
    return rows


SOURCE = Source(
    {
        "train": lambda: numbers()[:8000],
        "validation": lambda: numbers()[8000:9000],
        "test": lambda: numbers()[9000:],
    }
)

# Task: prompts, answer, metrics. BLEU compares n-grams of up to four words; a number in German or
# in digits is a single word, so BLEU is computed on characters there.
TASKS = {
    "numbers_en_fr": (
        [
            "Translate English to French: {english}",
            "How do you say {english} in French?",
            "{english}\nIn French:",
        ],
        "{french}",
        [exact_match, bleu],
    ),
    "numbers_en_de": (
        [
            "Translate English to German: {english}",
            "How do you say {english} in German?",
            "{english}\nIn German:",
        ],
        "{german}",
        [exact_match, char_bleu],
    ),
    "numbers_to_words": (
        ["Write in words: {digits}", "How is {digits} spelled?", "{digits}\nIn words:"],
        "{english}",
        [exact_match, bleu],
    ),
    "words_to_numbers": (
        ["Write in digits: {english}", "Which number is {english}?", "{english}\nIn digits:"],
        "{digits}",
        [exact_match, char_bleu],
    ),
}


@functools.cache
def vocabulary():
    """284 pieces learned from the training split; 384 ids with the 100 sentinels."""
    texts = [text for row in SOURCE.rows("train") for text in row.values()]
    prompts = [p.format(english="", digits="") for task in TASKS.values() for p in task[0]]
    # SentencePiece only makes a piece of a string that occurs in two different words.
    prompts += [prompt.replace(" ", "-") for prompt in prompts]
    return train_sentencepiece(texts + 100 * prompts, 284)


for name, (prompts, answer, metrics) in TASKS.items():
    templates = [(prompt, answer) for prompt in prompts]
    prompted_task(name, SOURCE, templates, metrics=metrics, vocabulary=vocabulary)

seqio.MixtureRegistry.add("numbers", list(TASKS), default_rate=1.0)
