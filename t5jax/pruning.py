"""`t5jax prune` and `t5jax trim-vocabulary`: a smaller model, and what it gains and costs."""

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from t5jax import batch as features
from t5jax import storage
from t5jax.architectures import Architecture, Dtype
from t5jax.checks import check_choice
from t5jax.convert import stopping
from t5jax.evaluation import evaluate_model
from t5jax.hf import io as hf_io
from t5jax.hf.files import check_destination
from t5jax.models import api
from t5jax.prune import magnitude_masks, narrow, prunable, sparsity_of
from t5jax.prune.masks import Scope, apply_masks, check_pattern
from t5jax.prune.vocabulary import (
    renumber_generation,
    token_ids_of,
    token_ids_of_generation,
    trim_vocabulary,
)
from t5jax.source import Source, find
from t5jax.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

Pattern = Literal["unstructured", "2:4", "heads", "mlp"]

# Faster by less than this is no gain: it is about what one measurement differs from the next.
_GAIN = 1.05
# Texts whose split is compared before anything is written.
_MOST_CHECKED = 10_000


def prune_model(
    model: str | Source,
    output: str,
    *,
    sparsity: float = 0.5,
    pattern: Pattern = "unstructured",
    scope: Scope | None = None,
    keep: Sequence[str] = (),
    dtype: Dtype = "float32",
    overwrite: bool = False,
) -> str:
    """Writes a pruned model as a Hugging Face folder.

    Args:
      model: a Hub name, a Hugging Face folder, a run or one of its checkpoints; or a source.
      output: the folder to write.
      sparsity: the share to remove: of the weights, the heads or the MLP columns.
      pattern: which weights: single ones of small magnitude ("unstructured"), the two smallest of
        every four inputs ("2:4"), whole attention heads ("heads") or MLP columns ("mlp").
      scope: unstructured: choose in each layer's matrix ("layer", the default) or among all weights
        together ("global").
      keep: shell patterns of the paths of matrices that stay as they are.
      dtype: the dtype of the weights in the files.
      overwrite: replace an existing model.
    Returns:
      What was done, in a sentence.
    Raises:
      ValueError: if the model cannot be read or pruned so, or the output cannot be written.
    """
    _check(pattern, sparsity, scope, keep)
    check_destination(storage.path(output, "the folder to write"), overwrite)
    source = _find_floats(model)
    axes = api.param_axes(source.model)
    if pattern == "heads" or pattern == "mlp":
        description, params = source.read()
        smaller, params = narrow(description, params, pattern, sparsity)
        said = _sizes(description, smaller)
    else:
        paths = prunable(axes, keep)
        check_pattern(api.param_shapes(source.model), axes, paths, pattern, scope or "layer")
        smaller, params = source.read()

        @jax.jit
        def prune(params: api.Params) -> api.Params:
            masks = magnitude_masks(
                params, axes, paths, sparsity, pattern=pattern, scope=scope or "layer"
            )
            return apply_masks(params, masks)

        params = prune(params)
        found = sparsity_of(params, paths)
        said = (
            f"{found.zeros:,} of {found.weights:,} weights of {len(paths)} matrices are 0 "
            f"({found.share:.2%})"
        )
    _write(source, output, smaller, params, source.own_tokenizer(), dtype, overwrite)
    return said


def _find_floats(model: str | Source) -> Source:
    source = find(model) if isinstance(model, str) else model
    if source.is_quantized:
        raise ValueError(
            f"{source.path} is compressed already; prune or trim the model that it was made from, "
            "and compress the result"
        )
    return source


def _check(pattern: str, sparsity: float, scope: str | None, keep: Sequence[str]) -> None:
    check_choice(pattern, ("unstructured", "2:4", "heads", "mlp"), "--pattern")
    if not 0 < sparsity < 1:
        raise ValueError(f"--sparsity is {sparsity}; it must be above 0 and below 1")
    if pattern == "2:4" and sparsity != 0.5:
        raise ValueError(f"--sparsity is {sparsity}, but 2:4 removes a half; leave it out")
    if scope and pattern != "unstructured":
        raise ValueError(
            f"--scope {scope} has no use with --pattern {pattern}, which chooses in each layer; "
            "leave it out"
        )
    if keep and pattern in ("heads", "mlp"):
        raise ValueError(
            f"--keep {' '.join(keep)} has no use with --pattern {pattern}: all layers of a model "
            "have the same size; leave it out"
        )


def _sizes(before: Architecture, after: Architecture) -> str:
    changes = [
        f"{field.name} {was} -> {now}"
        for field in dataclasses.fields(before)
        if (was := getattr(before, field.name)) != (now := getattr(after, field.name))
    ]
    counts = [sum(x.size for x in jax.tree.leaves(api.param_shapes(m))) for m in (before, after)]
    return f"{', '.join(changes)}: {counts[0]:,} -> {counts[1]:,} parameters"


def _write(
    source: Source,
    output: str,
    model: Architecture,
    params: api.Params,
    tokenizer: Tokenizer | None,
    dtype: Dtype,
    overwrite: bool,
    generation: dict[str, Any] | None = None,
) -> None:
    hf_io.save_params(
        output,
        model,
        params,
        dtype=dtype,
        tokenizer=tokenizer,
        generation=stopping(source.generation() if generation is None else generation, model),
        overwrite=overwrite,
    )


# --- Vocabularies -------------------------------------------------------------------------------


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
    source = _find_floats(model)
    tokenizer, description = source.tokenizer(), source.model
    if not isinstance(tokenizer, (SentencePieceTokenizer, HuggingFaceTokenizer)):
        raise ValueError(
            f"the vocabulary of {source.path} is {tokenizer}, which has no pieces to leave out; "
            "take a model with a SentencePiece vocabulary or a tokenizer.json"
        )
    counts: Counter[int] = Counter()
    texts: dict[str, None] = {}
    for one, ids in _read(tokenizer, tasks, text, task_files):
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
    _write(
        *(source, output, smaller, params, trimmed, dtype, overwrite),
        renumber_generation(generation, kept),
    )
    total = sum(counts.values())
    covered = sum(n for i, n in counts.items() if i in set(kept.tolist()))
    return (
        f"{tokenizer.vocab_size:,} -> {trimmed.vocab_size:,} ids, {covered / total:.2%} of the "
        f"texts' {total:,} tokens; {_sizes(description, smaller)}"
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


# --- What it gains and costs --------------------------------------------------------------------


def report(
    before: str,
    after: str,
    *,
    tasks: Sequence[str] = (),
    split: str = "test",
    task_files: Sequence[str] = (),
    num_examples: int | None = None,
    batch_size: int = 64,
    max_tokens: int | None = None,
    show: Callable[[str], None] = print,
) -> None:
    """Shows what a smaller model takes, how fast it is here, and on tasks how good.

    Args:
      before: the model as it was.
      after: the folder of the smaller one.
      tasks: tasks on which both are compared, each score with an interval.
      split: the split of the tasks.
      task_files: Python files that register tasks.
      num_examples: the maximum number of examples of each task. None: all.
      batch_size: the number of rows per batch.
      max_tokens: the maximum length of answers in tokens.
      show: what a line is given to.
    """
    sources = [find(before), find(after)]
    sizes = [_bytes(source) for source in sources]
    for what, *numbers in zip(("on disk", "in memory"), *sizes, strict=True):
        known = [f"{n:,}" if n else "unknown" for n in numbers]
        share = f" ({numbers[1] / numbers[0]:.1%})" if all(numbers) else ""
        show(f"bytes {what}: {known[0]} -> {known[1]}{share}")
    seconds = _seconds([source.read() for source in sources])
    gain = seconds[0] / seconds[1]
    verdict = f"{gain:.2f} times as fast" if gain >= _GAIN else "no gain"
    show(
        f"a forward pass of {_ROWS} x {_LENGTH} tokens here: {1e3 * seconds[0]:.1f} -> "
        f"{1e3 * seconds[1]:.1f} ms: {verdict}"
    )
    if tasks:
        evaluate_model(
            after,
            tasks,
            split=split,
            baseline=(before,),
            task_files=task_files,
            num_examples=num_examples,
            batch_size=batch_size,
            max_tokens=max_tokens,
        )


def _bytes(source: Source) -> tuple[int, int]:
    """Returns the bytes of the weights' files, 0 where they are a run's, and of float32 arrays."""
    suffixes = (".safetensors", ".bin")
    on_disk = sum(f.stat().st_size for f in source.path.iterdir() if f.suffix in suffixes)
    shapes = jax.tree.leaves(api.param_shapes(source.model))
    return on_disk, sum(x.size * x.dtype.itemsize for x in shapes)


_ROWS, _LENGTH = 8, 64


def _seconds(models: Sequence[tuple[Architecture, api.Params]]) -> list[float]:
    """Returns how long a forward pass of each model takes: the median of 9 that take turns."""
    calls = [_forward(*each) for each in models]
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(9):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return list(map(statistics.median, times))


def _forward(model: Architecture, params: api.Params) -> Callable[[], Any]:
    length = min(_LENGTH, model.longest_row or _LENGTH)
    tokens = jnp.asarray(np.random.default_rng(0).integers(model.vocab_size, size=(_ROWS, length)))
    names = []
    if model.kind != "decoder":
        names += [features.ENCODER_INPUT_TOKENS, features.ENCODER_SEGMENT_IDS]
    if model.kind != "encoder":
        names += [features.DECODER_INPUT_TOKENS, features.DECODER_SEGMENT_IDS]
    batch = {n: jnp.ones_like(tokens) if "segment" in n else tokens for n in names}
    run = jax.jit(lambda params: api.hidden(model, params, batch))
    return lambda: jax.block_until_ready(run(params))
