"""XQuAD: questions answered by a span of a paragraph, in parallel in English and German.

Artetxe et al. 2020 (arXiv:1910.11856): 1,190 questions on 240 paragraphs of 48 articles. The files
xquad.en.json and xquad.de.json of the repository google-deepmind/xquad are expected in
$T5JAX_DATA/tasks, or in ./data/tasks if T5JAX_DATA is not set. To add a language, add a line to
`LANGUAGES`. To read them from the Hub instead (where rows have no title):

    hf_dataset("google/xquad", {"all": "validation"}, name="xquad.en")

XQuAD was made to test models trained on SQuAD; the split "all" is that test set. For training there
are also train, validation and test, which consist of different articles, the same in every
language.
"""

import os

import seqio

from t5jax.data import json_file, prompted_task, squad, train_sentencepiece

FOLDER = os.path.join(os.environ.get("T5JAX_DATA", "data"), "tasks")
LANGUAGES = {"en": ("Question", "Answer"), "de": ("Frage", "Antwort")}


def with_answers(row: dict) -> dict:
    """Returns the row with the texts of its answers."""
    return row | {"answers": [answer["text"] for answer in row["answers"]]}


def questions(language: str):
    """Returns the questions in a language, each with its paragraph and the title of its article."""
    file = f"{FOLDER}/xquad.{language}.json"
    return (
        json_file({"train": file, "all": file}, rows="data.paragraphs.qas")
        .hold_out("test", every=6, of="train", by="title")
        .hold_out("validation", every=6, of="train", by="title")
        .map(with_answers)
    )


SOURCES = {language: questions(language) for language in LANGUAGES}


def vocabulary():
    """3,996 pieces learned from both languages; 4,096 ids with the 100 sentinels."""
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
