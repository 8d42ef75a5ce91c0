"""SciTLDR: one-sentence summaries of papers, from their abstracts; 1,992, 619 and 618 of them.

SciTLDR-A of Cachola et al. 2020 (arXiv:2004.15011). The files train.jsonl, dev.jsonl and test.jsonl
of SciTLDR-Data/SciTLDR-A in the repository allenai/scitldr are expected as SciTLDR-A.train.jsonl
and so on in $T5JAX_DATA/tasks, or in ./data/tasks if T5JAX_DATA is not set.

In validation and test a paper has up to four summaries, by its authors and reviewers; a prediction
is scored against the one it matches best. In training there is one.
"""

import os

from t5jax.data import jsonl, prompted_task, rouge, train_sentencepiece

FOLDER = os.path.join(os.environ.get("T5JAX_DATA", "data"), "tasks")
SOURCE = jsonl(
    {
        "train": f"{FOLDER}/SciTLDR-A.train.jsonl",
        "validation": f"{FOLDER}/SciTLDR-A.dev.jsonl",
        "test": f"{FOLDER}/SciTLDR-A.test.jsonl",
    }
)


def vocabulary():
    """3,996 pieces learned from the training split; 4,096 ids with the 100 sentinels."""
    texts = [" ".join(row["source"] + row["target"]) for row in SOURCE.rows("train")]
    return train_sentencepiece(texts, 3996)


prompted_task(
    "scitldr",
    SOURCE,
    {
        "summarize": "Summarize in one sentence: {{ source | join(' ') }} ||| {{ target[0] }}",
        "tldr": "{{ source | join(' ') }}\nTL;DR: ||| {{ target[0] }}",
        "titled": (
            "{% if title %}{{ title }}\n{% endif %}{{ source | join(' ') }}\n"
            "What is the paper's point? ||| {{ target[0] }}"
        ),
    },
    metrics=[rouge],
    references="target",
    vocabulary=vocabulary,
)
