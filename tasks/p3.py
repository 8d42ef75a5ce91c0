"""Some of T0's tasks (Sanh et al. 2022, arXiv:2110.08207): the Hub's rows, promptsource's prompts.

The repository bigscience-workshop/promptsource is expected as $T5JAX_DATA/promptsource, or in
./data if T5JAX_DATA is not set; nothing of it is installed:

    git clone --depth 1 https://github.com/bigscience-workshop/promptsource data/promptsource

The mixture p3 has the tasks by their sizes, at most 500,000 rows each, as T0's does. To add a data
set that has a file of templates there, add a line to `SETS`.
"""

import dataclasses
import os
from collections.abc import Iterator

from t5jax.data import Source, accuracy, hf_dataset, mixture, prompted_task, promptsource, rouge

FOLDER = os.path.join(os.environ.get("T5JAX_DATA", "data"), "promptsource")

TEST, BOTH = {"validation": "test"}, {"validation": "validation"}
# Folder of templates: the data set on the Hub, its configuration, what validates, a metric.
SETS = {
    "ag_news": ("fancyzhx/ag_news", None, TEST, accuracy),
    "amazon_polarity": ("fancyzhx/amazon_polarity", None, TEST, accuracy),
    "cnn_dailymail/3.0.0": ("abisee/cnn_dailymail", "3.0.0", BOTH, rouge),
    "dbpedia_14": ("fancyzhx/dbpedia_14", None, TEST, accuracy),
    "glue/mrpc": ("nyu-mll/glue", "mrpc", BOTH, accuracy),
    "glue/qqp": ("nyu-mll/glue", "qqp", BOTH, accuracy),
    "imdb": ("stanfordnlp/imdb", None, TEST, accuracy),
    "paws/labeled_final": ("google-research-datasets/paws", "labeled_final", BOTH, accuracy),
    "rotten_tomatoes": ("cornell-movie-review-data/rotten_tomatoes", None, BOTH, accuracy),
    "sciq": ("allenai/sciq", None, BOTH, accuracy),
    "wiki_qa": ("microsoft/wiki_qa", None, BOTH, accuracy),
    "yelp_review_full": ("Yelp/yelp_review_full", None, TEST, accuracy),
}


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Says why there are no rows, to who asks for some."""

    why: str

    def __call__(self) -> Iterator[dict]:
        raise ValueError(f"{self.why}; clone promptsource to {FOLDER}, or set T5JAX_DATA")


def add(name: str, path: str, configuration: str | None, splits: dict, metric) -> str:
    """Registers the task of a data set; returns its name."""
    task = "p3_" + name.replace("/", "_")
    source = hf_dataset(path, {"train": "train", **splits}, configuration)
    try:
        file = f"{FOLDER}/promptsource/templates/{name}/templates.yaml"
        templates = promptsource(file)
    except ValueError as error:
        templates = [("{prompt}", "{answer}")]
        source = Source(dict.fromkeys(source.functions, Unreadable(str(error))))
    prompted_task(
        task,
        source,
        templates,
        metrics=[metric],
        empty="drop",
        vocabulary="google/t5-v1_1-base",
    )
    return task


TASKS = [add(name, *found) for name, found in SETS.items()]
mixture("p3", TASKS, rates="proportional", cap=500_000)
