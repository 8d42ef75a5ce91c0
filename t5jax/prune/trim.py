"""`t5jax trim-vocabulary`: writes a model with the pieces that texts need."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from t5jax import storage
from t5jax.architectures import Dtype
from t5jax.hf.files import check_destination
from t5jax.monitor.progress import track
from t5jax.prune.folder import find_floats, sizes, write
from t5jax.prune.vocabulary import (
    renumber_generation,
    token_ids_of,
    token_ids_of_generation,
    trim_vocabulary,
)
from t5jax.source import Source
from t5jax.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

# Texts whose split is compared before anything is written.
_MOST_CHECKED = 10_000


def trim_model(
    model: str | Source,
    output: str,
    *,
    tasks: Sequence[str] = (),
    text: Sequence[str] = (),
    task_files: Sequence[str] = (),
    min_count: int = 1,
    dtype: Dtype = "float32",
    overwrite: bool = False,
) -> str:
    """Writes a model with the pieces of its vocabulary that texts need, as a Hugging Face folder.

    Special tokens, bytes and sentinels stay. A text of which all pieces stay is split as before,
    and has the same logits.

    Args:
      model: as for `prune_model`.
      output: the folder to write.
      tasks: names of tasks, whose examples of all splits count.
      text: text files.
      task_files: Python files that register tasks.
      min_count: how often a piece occurs at least, to stay; single characters always do.
      dtype: the dtype of the weights in the files.
      overwrite: replace an existing model.
    Returns:
      What was done, in a sentence.
    Raises:
      ValueError: if there are no texts, or the tokenizer is of a kind that cannot be trimmed.
    """
    if not tasks and not text:
        raise ValueError(
            "there is nothing that says which pieces to keep; give --tasks NAME, or --text FILE "
            "with the texts that the model is for"
        )
    check_destination(storage.path(output, "the folder to write"), overwrite)
    source = find_floats(model)
    tokenizer, description = source.tokenizer(), source.model
    if not isinstance(tokenizer, (SentencePieceTokenizer, HuggingFaceTokenizer)):
        raise ValueError(
            f"the vocabulary of {source.path} is {tokenizer}, which has no pieces to leave out; "
            "take a model with a SentencePiece vocabulary or a tokenizer.json"
        )
    counts: Counter[int] = Counter()
    texts: dict[str, None] = {}
    for one, ids in track(_read(tokenizer, tasks, text, task_files), "texts"):
        counts.update(ids)
        if len(texts) < _MOST_CHECKED:
            texts[one] = None
    generation = source.generation()
    used = {i for i, n in counts.items() if n >= min_count or _is_character(tokenizer, i)}
    fixed = token_ids_of(description) | token_ids_of_generation(generation)
    used |= tokenizer.special_ids | {i for i in fixed if i < tokenizer.vocab_size}
    trimmed, kept = tokenizer.trimmed(used)
    # Ids of the description that the tokenizer does not know would be lost.
    missing = sorted(fixed - set(kept.tolist()))
    if missing:
        raise ValueError(
            f"{source.path} names the token ids {missing}, which its tokenizer does not have; "
            "correct its config.json first"
        )
    _check_split(tokenizer, trimmed, kept, texts)
    _, params = source.read()
    padded = tokenizer.vocab_size < description.vocab_size
    smaller, params = trim_vocabulary(description, params, kept, padded=padded)
    write(
        *(source, output, smaller, params, trimmed, dtype, overwrite),
        renumber_generation(generation, kept),
    )
    total = sum(counts.values())
    covered = sum(n for i, n in counts.items() if i in set(kept.tolist()))
    return (
        f"{tokenizer.vocab_size:,} -> {trimmed.vocab_size:,} ids, {covered / total:.2%} of the "
        f"texts' {total:,} tokens; {sizes(description, smaller)}"
    )


def _is_character(tokenizer: Tokenizer, i: int) -> bool:
    return len(tokenizer.decode([i]).strip()) == 1


def _read(
    tokenizer: Tokenizer, tasks: Sequence[str], files: Sequence[str], task_files: Sequence[str]
) -> Iterator[tuple[str, list[int]]]:
    """Yields texts and the ids that the model gets of them."""
    if files:
        from t5jax.data.sources.kinds import text

        for row in text({"files": tuple(files)}).rows("files"):
            for line in (row["text"], row["text"] + "\n"):  # The end of a line may be a piece.
                yield line, tokenizer.encode(line)
    if tasks:
        yield from _read_tasks(tokenizer, tasks, task_files)


def _read_tasks(
    tokenizer: Tokenizer, names: Sequence[str], task_files: Sequence[str]
) -> Iterator[tuple[str, list[int]]]:
    from t5jax.data.registry import check_mixture, load_tasks
    from t5jax.data.texts import feature_tokenizers, read_examples, subtasks

    load_tasks(task_files)
    # An objective fills rows of this length; other examples are whole.
    lengths = {"inputs": 512, "targets": 512}
    for task in subtasks([check_mixture(name, "--tasks") for name in names]):
        tokenizers = dict.fromkeys(feature_tokenizers(task, tokenizer), tokenizer)
        for split in task.splits:
            for example in read_examples(task, split, tokenizers, lengths, Counter()):
                for name, ids in example.ids.items():
                    yield example.texts[name], ids


def _check_split(
    before: Tokenizer, after: Tokenizer, kept: np.ndarray, texts: Iterable[str]
) -> None:
    """Raises ValueError if a text of pieces that are kept is not split as before."""
    there = set(kept.tolist())
    for text in dict.fromkeys(texts):
        ids = before.encode(text)
        if set(ids) <= there and (now := kept[after.encode(text)].tolist()) != ids:
            raise ValueError(
                f"the trimmed vocabulary would split {text[:80]!r} into {now[:20]}, not into "
                f"{ids[:20]}; its tokenizer has a rule that trimming does not know: leave this "
                "vocabulary whole"
            )
