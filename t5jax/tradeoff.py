"""What a smaller model gains and costs: bytes, its speed here, and its quality on tasks."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from t5jax.architectures import Architecture
from t5jax.config import override
from t5jax.decoding import GenerationOptions
from t5jax.evaluation import check_evaluation, evaluate_model
from t5jax.hf.files import weight_files
from t5jax.models import api
from t5jax.pretrained import Pretrained, load
from t5jax.quantize import files as quantized_files
from t5jax.source import AdaptedSource, Source, find

_PROMPTS, _NEW_TOKENS, _REPEATS = 32, 32, 3
_NOTICEABLE = 1.1  # Times of one program differ by as much from run to run.


@dataclasses.dataclass(frozen=True)
class Tradeoff:
    """Of pairs, the first is the model before, the second the smaller one."""

    memory_bytes: tuple[int, int]
    """Of the weights; float32, where they are not quantized."""
    disk_bytes: tuple[int, int]
    """Of the weights' files; of a run or an adapter, those of its merged export."""
    quality: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """What `evaluate_model` returns of the smaller model, with the other as its baseline."""
    examples_per_second: tuple[float, float] | None = None
    """Of 32 greedy tokens each, fewer where a network has few positions, or of an encoder's
    vectors; None: not measured."""

    def lines(self) -> Iterator[str]:
        """Yields what there is to say, as lines of text."""
        for (before, after), what in (
            (self.memory_bytes, "in memory, float32"),
            (self.disk_bytes, "on disk"),
        ):
            yield f"{what}: {_size(before)} before, {_size(after)} after, {after / before:.1%}"
        for task, found in self.quality.items():
            for comparisons in found["comparisons"].values():
                for metric, each in comparisons.items():
                    low, high = each["interval"]
                    interval = f"[{low:+.4g}, {high:+.4g}]"
                    if math.isnan(low):
                        interval = "(too few examples for an interval)"
                    yield (
                        f"{task} {metric}: {found['model'][metric]:.4g}, against the model before "
                        f"{each['difference']:+.4g} {interval}, {each['verdict']}"
                    )
        if self.examples_per_second is not None:
            slow, fast = self.examples_per_second
            gain = fast / slow
            is_gain = gain >= _NOTICEABLE
            says = f"{gain:.2f} times as fast" if is_gain else f"no gain ({gain:.2f} times)"
            yield f"speed here: {slow:.1f} examples/s before, {fast:.1f} after: {says}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def check(before: Source, tasks: Sequence[str] = (), **evaluation: Any) -> None:
    """Raises ValueError if `measure` would, of the tasks: before there is a smaller model.

    Args:
      before: the model as it is.
      tasks: as for `measure`.
      **evaluation: as for `check_evaluation`.
    """
    if tasks:
        check_evaluation(before, tasks, **evaluation)


def measure(
    before: str,
    after: str,
    tasks: Sequence[str] = (),
    *,
    base: str = "",
    split: str = "test",
    task_files: Sequence[str] = (),
    **evaluation: Any,
) -> Tradeoff:
    """Compares a smaller model with the one that it was made from.

    Args:
      before: the model as it was: a Hub name, a folder, a run or a checkpoint.
      after: the folder of the smaller one.
      tasks: tasks on which quality and speed are measured; none: bytes alone.
      base: of an adapter before: where its base is now. Empty: where the adapter says.
      split: the split of the tasks.
      task_files: Python files that register tasks.
      **evaluation: further arguments of `evaluate_model`, such as num_examples.
    Raises:
      ValueError: if a model or a task cannot be found or read.
    """
    sources = find(before, base=base), find(after)
    in_memory = _memory_bytes(sources[0]), _memory_bytes(sources[1])
    on_disk = _disk_bytes(sources[0]) or in_memory[0], _disk_bytes(sources[1])
    if not tasks:
        return Tradeoff(in_memory, on_disk)
    quality = evaluate_model(
        sources[1],
        tasks,
        split=split,
        baseline=(sources[0],),
        task_files=task_files,
        show=False,
        **evaluation,
    )
    models = load(before, base=base), load(after)
    length = evaluation.get("inputs_length")
    speeds = _speeds(models, tasks, task_files, split, length)
    return Tradeoff(in_memory, on_disk, quality, speeds)


def _memory_bytes(source: Source) -> int:
    if source.is_quantized:
        return quantized_files.num_bytes(source.path)
    return sum(4 * x.size for x in jax.tree.leaves(api.param_shapes(source.model)))


def _disk_bytes(source: Source) -> int:
    """Returns the bytes of the files of a model's weights; 0 of a run or an adapter."""
    if source.is_checkpoint or isinstance(source, AdaptedSource):
        return 0
    if source.is_quantized:
        return sum(path.stat().st_size for path in source.path.glob("*.safetensors"))
    return sum(path.stat().st_size for path in weight_files(source.path))


# --- Speed ----------------------------------------------------------------------------------------


def _speeds(
    models: Sequence[Pretrained],
    tasks: Sequence[str],
    task_files: Sequence[str],
    split: str,
    length: int | None,
) -> tuple[float, float]:
    """Returns the examples per second of both; the fastest of three times, in turns, counts."""
    calls = [(model, _inputs(model, tasks, task_files, split, length)) for model in models]
    times: list[list[float]] = [[], []]
    for repeat in range(_REPEATS + 1):
        for (model, inputs), own in zip(calls, times, strict=True):
            start = time.perf_counter()
            _run(model, inputs)
            if repeat:  # The first one compiles.
                own.append(time.perf_counter() - start)
    slow, fast = (len(inputs) / min(own) for (_, inputs), own in zip(calls, times, strict=True))
    return slow, fast


def _inputs(
    model: Pretrained,
    tasks: Sequence[str],
    task_files: Sequence[str],
    split: str,
    length: int | None,
) -> list[list[int]]:
    """Returns the ids of some of the tasks' prompts."""
    from t5jax.data import pipeline, registry

    assert model.source is not None
    length = length or model.source.config.data.inputs_length
    changes = {"eval.num_examples": _PROMPTS, "data.inputs_length": length}
    config = override(model.source.config, changes)
    registry.load_tasks((*config.data.task_files, *task_files))
    sets = pipeline.eval_sets(config, split, model.tokenizer, registry.match(tasks, split))
    most, _ = _room(model.model)
    ids = [example.input_ids for each in sets for example in each.examples][:_PROMPTS]
    return ids if most is None else [each[-most:] for each in ids]


def _room(model: Architecture) -> tuple[int | None, int]:
    """Returns the most tokens of a prompt, None for no limit, and those that are written."""
    positions = model.longest_row
    if positions is None or model.kind == "encoder":
        return positions, _NEW_TOKENS
    return positions // 2, min(_NEW_TOKENS, positions // 2)


def _run(model: Pretrained, inputs: list[list[int]]) -> None:
    if model.model.kind == "encoder":
        model.embed_ids(inputs)
        return
    # All of them as long, whatever a model would end with.
    _, new = _room(model.model)
    options = GenerationOptions(max_tokens=new, min_tokens=new)
    generator = model._generator(False)
    generator.answers(model.params, inputs, options, batch_size=len(inputs))
