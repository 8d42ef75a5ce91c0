"""Grade-school mathematics: 7,473 questions with worked answers to learn from, 1,319 for the test.

GSM8K (Cobbe et al. 2021, arXiv:2110.14168). Its files train.jsonl and test.jsonl, of the repository
openai/grade-school-math, are read as gsm8k.train.jsonl and gsm8k.test.jsonl in $T5JAX_DATA/tasks;
the folder is ./data/tasks where T5JAX_DATA is not set. From the hub instead, in one line:

    hf_dataset("openai/gsm8k", {"train": "train", "test": "test"}, name="main")

There is no validation split, so every 15th row of train becomes one. An answer is right where its
final number is, which is how the paper counts.
"""

import itertools
import os
import re

from t5jax.data.prompts import prompted_task
from t5jax.data.sources import jsonl
from t5jax.data.vocabularies import train_sentencepiece
from t5jax.metrics import exact_match

FOLDER = os.path.join(os.environ.get("T5JAX_DATA", "data"), "tasks")


def plain(row: dict) -> dict:
    """Returns the row with its number apart, and without notes for a calculator (<<3*4=12>>)."""
    answer = re.sub("<<.*?>>", "", row["answer"])
    return {"question": row["question"], "answer": answer, "number": final_number(answer)}


def final_number(text: str) -> str:
    """Returns the number behind "####", or else the last one of a text, or else nothing."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.rpartition("####")[2])
    number = numbers[-1].replace(",", "") if numbers else ""
    return number.rstrip("0").rstrip(".") if "." in number else number


SOURCE = (
    jsonl({"train": f"{FOLDER}/gsm8k.train.jsonl", "test": f"{FOLDER}/gsm8k.test.jsonl"})
    .hold_out("validation", every=15, of="train")
    .map(plain)
)


def vocabulary():
    """1,948 pieces learned from 2,000 rows; with the 100 sentinels they make 2,048 ids."""
    rows = itertools.islice(SOURCE.rows("train"), 2000)
    return train_sentencepiece([text for row in rows for text in row.values()], 1948)


prompted_task(
    "gsm8k",
    SOURCE,
    {
        "worked": ("Question: {question}\nAnswer, step by step:", "{answer}"),
        "number": ("Question: {question}\nAnswer with a number:", "{number}"),
    },
    metrics=[exact_match],
    postprocess=final_number,
    vocabulary=vocabulary,
)
