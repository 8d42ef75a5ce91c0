"""Questions answered by a span of a paragraph, in English and German, in parallel.

XQuAD (Artetxe et al. 2020, arXiv:1910.11856): 1,190 questions on 240 paragraphs of 48 articles. Its
files xquad.en.json and xquad.de.json, of the repository google-deepmind/xquad, are read in
$T5JAX_DATA/tasks; the folder is ./data/tasks where T5JAX_DATA is not set. Another language is
another line in `LANGUAGES`. From the hub instead, in one line (a row has no title there):

    hf_dataset("google/xquad", {"all": "validation"}, name="xquad.en")

It was made to test models that have learnt from SQuAD: the split "all" is that test. To learn from
it as well there are train, validation and test, of different articles, the same in every language.
"""

import os

import seqio

from t5jax.data.prompts import prompted_task
from t5jax.data.sources import json_file
from t5jax.data.vocabularies import train_sentencepiece
from t5jax.metrics import squad

FOLDER = os.path.join(os.environ.get("T5JAX_DATA", "data"), "tasks")
LANGUAGES = {"en": ("Question", "Answer"), "de": ("Frage", "Antwort")}


def with_answers(row: dict) -> dict:
    """Returns the row with the texts of its answers alone."""
    return row | {"answers": [answer["text"] for answer in row["answers"]]}


def questions(language: str):
    """Returns the questions of a language, each with its paragraph and the title of its article."""
    file = f"{FOLDER}/xquad.{language}.json"
    return (
        json_file({"train": file, "all": file}, rows="data.paragraphs.qas")
        .hold_out("test", every=6, of="train", by="title")
        .hold_out("validation", every=6, of="train", by="title")
        .map(with_answers)
    )


SOURCES = {language: questions(language) for language in LANGUAGES}


def vocabulary():
    """3,996 pieces learned from both languages; with the 100 sentinels they make 4,096 ids."""
    rows = [row for source in SOURCES.values() for row in source.rows("train")]
    return train_sentencepiece([row["context"] + " " + row["question"] for row in rows], 3996)


for language, (question, answer) in LANGUAGES.items():
    prompted_task(
        f"xquad_{language}",
        SOURCES[language],
        {
            "after": (f"{{context}}\n{question}: {{question}}\n{answer}:", "{answers[0]}"),
            "before": (f"{question}: {{question}}\n{{context}}\n{answer}:", "{answers[0]}"),
        },
        metrics=[squad],
        references="answers",
        vocabulary=vocabulary,
    )

seqio.MixtureRegistry.add(
    "xquad", [f"xquad_{language}" for language in LANGUAGES], default_rate=1.0
)
