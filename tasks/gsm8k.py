"""GSM8K: grade-school math questions with worked answers, 7,473 for training and 1,319 for test.

Cobbe et al. 2021 (arXiv:2110.14168). The files train.jsonl and test.jsonl of the repository
openai/grade-school-math are expected as gsm8k.train.jsonl and gsm8k.test.jsonl in
$T5JAX_DATA/tasks, or in ./data/tasks if T5JAX_DATA is not set. To read them from the Hub instead:

    hf_dataset("openai/gsm8k", {"train": "train", "test": "test"}, name="main")

There is no validation split, so every 15th row of train is held out for it. As in the paper, an
answer is correct if its final number is.
"""

import os
import random
import re

from t5jax.data import exact_match, jsonl, prompted_task, train_sentencepiece

FOLDER = os.path.join(os.environ.get("T5JAX_DATA", "data"), "tasks")


def plain(row: dict) -> dict:
    """Returns the row with the final number as a field, without calculator notes (<<3*4=12>>)."""
    answer = re.sub("<<.*?>>", "", row["answer"])
    return {"question": row["question"], "answer": answer, "number": final_number(answer)}


def final_number(text: str) -> str:
    """Returns the number after "####", otherwise the last number of the text, otherwise ""."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.rpartition("####")[2])
    number = numbers[-1].replace(",", "") if numbers else ""
    return number.rstrip("0").rstrip(".") if "." in number else number


SOURCE = (
    jsonl({"train": f"{FOLDER}/gsm8k.train.jsonl", "test": f"{FOLDER}/gsm8k.test.jsonl"})
    .hold_out("validation", every=15, of="train")
    .map(plain)
)


def vocabulary():
    """1,948 pieces learned from 2,000 rows of all; 2,048 ids with the 100 sentinels."""
    rows = random.Random(0).sample(list(SOURCE.rows("train")), 2000)
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
