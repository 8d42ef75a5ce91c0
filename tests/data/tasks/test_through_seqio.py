"""t5jax's tasks are ordinary tasks of SeqIO's registry."""

import pytest

from t5jax.data.bridge.tf import elements, seqio
from t5jax.data.bridge.vocabulary import TokenizerVocabulary
from t5jax.data.objectives.mixture import ul2
from t5jax.data.run import Run
from t5jax.data.sources.source import Source
from t5jax.data.tasks.corpus import text_task
from t5jax.data.tasks.foreign import kind_of
from t5jax.data.tasks.prompted import prompted_task
from t5jax.tokenizers import ByteTokenizer

pytestmark = pytest.mark.usefixtures("clean_registries")

LENGTHS = {"inputs": 24, "targets": 20}
ROWS = [{"q": f"question {i} {'x' * i}", "a": f"answer {i}"} for i in range(40)]


class ShiftedBytes(ByteTokenizer):
    """Bytes with other ids, which tell whose vocabulary was used."""

    def encode(self, text):
        return [i % 256 + 3 for i in super().encode(text)]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


def make_task(kind: str) -> seqio.Task:
    if kind == "prompted":
        templates = [("{q}", "{a}"), ("{q}?", "{a}")]
        return prompted_task(
            "task", Source({"train": lambda: ROWS, "test": lambda: ROWS}), templates, metrics=[],
            vocabulary="bytes",
        )  # fmt: skip
    texts = Source({"train": lambda: [{"text": row["q"]} for row in ROWS]})
    return text_task("task", texts, ul2("", "", ""), vocabulary="bytes")


def tokens(examples) -> list[tuple]:
    return [(tuple(e["inputs"].tolist()), tuple(e["targets"].tolist())) for e in examples]


def through_seqio(task: seqio.Task, split="train", **options) -> list[tuple]:
    options = {"shuffle": False, "seed": 0} | options
    return tokens(elements(task.get_dataset(LENGTHS, split, **options)))


def ours(task, tokenizer=None, split="train"):
    return tokens(kind_of(task).once(split, Run(tokenizer or ByteTokenizer(), lengths=LENGTHS)))


@pytest.mark.parametrize("kind", ["prompted", "text"])
def test_seqio_reads_the_same_examples(kind):
    task = make_task(kind)
    expected = ours(task)
    assert through_seqio(task) == expected
    assert through_seqio(task.replace(name="other")) == expected
    if kind == "prompted":
        assert through_seqio(task, "test") == ours(task, split="test") != expected
        shuffled = through_seqio(task, shuffle=True, num_epochs=2)
        assert sorted(shuffled) == sorted(expected * 2)
        assert shuffled[:80] != expected
        shards = [seqio.ShardInfo(i, 2) for i in range(2)]
        parts = [through_seqio(task, shard_info=shard) for shard in shards]
        assert sorted(parts[0] + parts[1]) == sorted(expected)


@pytest.mark.parametrize("kind", ["prompted", "text"])
def test_seqios_helpers_give_a_task_another_vocabulary(kind):
    task, shifted = make_task(kind), ShiftedBytes()
    other = seqio.helpers.mixture_or_task_with_new_vocab(
        "task", "shifted_task", new_vocab=TokenizerVocabulary(shifted)
    )
    assert seqio.TaskRegistry.get("shifted_task") is other
    assert through_seqio(other) == ours(task, shifted) != ours(task)
    if kind == "text":
        return
    truncated = seqio.helpers.mixture_or_task_with_truncated_data(
        "task", "few", split_sizes={"train": 3}
    )
    few = through_seqio(truncated)
    assert few == ours(task)[: 2 * 3]
