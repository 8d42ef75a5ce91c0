"""`t5jax compress`: a model with quantized matrices, its size, its quality and its speed."""

import dataclasses
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.traverse_util
import jax
import numpy as np

from t5jax import sharding, storage
from t5jax.checks import check_at_least
from t5jax.config import Config, MeshConfig, override
from t5jax.decoding import GenerationOptions
from t5jax.evaluation import evaluate_model
from t5jax.models import api
from t5jax.monitor import progress
from t5jax.pretrained import Pretrained, load
from t5jax.quantize import calibrate as calibration
from t5jax.quantize import files
from t5jax.quantize.calibrate import Method
from t5jax.quantize.matrices import (
    Matrix,
    Scheme,
    check_installed,
    chosen,
    num_bytes,
    quantize,
)
from t5jax.source import AdaptedSource, Source, find

_STATISTICS_BYTES = 2 * 2**30  # Of all matrices whose statistics are summed in one pass.
_PROMPTS, _NEW_TOKENS, _REPEATS = 32, 32, 3
_NOTICEABLE = 1.1  # Times of one program differ by as much from run to run.


def compress_model(
    model: str | Source,
    output: str,
    scheme: Scheme,
    *,
    kv_cache: Literal["int8"] | None = None,
    method: Method = "rtn",
    calibrate: Sequence[str] = (),
    num_calibration: int = 128,
    tasks: Sequence[str] = (),
    task_files: Sequence[str] = (),
    **evaluation: Any,
) -> dict[str, Any]:
    """Writes a model with quantized matrices, and returns what that costs and gains.

    Args:
      model: a Hub name, a Hugging Face folder, a run or one of its checkpoints; or a source.
      output: the folder to write.
      scheme: which matrices to round, and to what.
      kv_cache: "int8" keeps the keys and values of decoding in int8, too.
      method: "rtn" rounds to the nearest; "awq" and "gptq" read the inputs of a task.
      calibrate: tasks or mixtures whose training examples are read for that.
      num_calibration: the number of those examples.
      tasks: tasks on which the model is compared with the uncompressed one; none: no comparison.
      task_files: Python files that register tasks, in addition to the shipped ones and the run's.
      **evaluation: arguments of `evaluation.evaluate_model`: split, num_examples and others.
    Returns:
      "memory_bytes" and "disk_bytes" of the weights, each of the uncompressed and of the compressed
      model (of a run, on disk: as it would be exported);
      "quality", as `evaluate_model` returns it, and "examples_per_second" of both, if tasks are
      given.
    Raises:
      ValueError: if the model cannot be read or quantized so, or the output cannot be written.
    """
    source = find(model) if isinstance(model, str) else model
    if source.is_quantized:
        raise ValueError(
            f"{source.path} is compressed already; rounding it again would add its errors; "
            "compress the model that it was made of"
        )
    if isinstance(source, AdaptedSource) and source.has_prompt:
        raise ValueError(
            f"{source.path} has a soft prompt, for which the folder of a compressed model has no "
            "place; compress the model that the prompt was trained for"
        )
    folder = storage.path(output, "the folder to write")
    files.check_new(folder)
    calibration.check_method(method, scheme, calibrate)
    check_at_least(num_calibration, 1, "num_calibration (--num-calibration)")
    compressed = dataclasses.replace(source.model, kv_cache=kv_cache or source.model.kv_cache)
    matrices = chosen(source.model, scheme)
    check_installed()
    _check_training(source, scheme)
    batches = _calibration(source, calibrate, num_calibration, task_files) if calibrate else []
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    description, floats = source.read("float32", mesh)
    params = _quantize(description, floats, matrices, scheme, method, batches)
    files.save(
        folder,
        dataclasses.replace(source.config, model=compressed, adapter=None),
        params,
        scheme,
        method=method,
        calibration=calibrate,
        tokenizer=source.own_tokenizer(),
        generation=source.generation(),
    )
    result: dict[str, Any] = {
        "memory_bytes": (num_bytes(floats), num_bytes(params)),
        "disk_bytes": (_disk_bytes(source.path) or num_bytes(floats), _disk_bytes(folder)),
    }
    if tasks:
        given: dict[str, Any] = {"show": False, "task_files": task_files} | evaluation
        result["quality"] = evaluate_model(output, tasks, baseline=(str(source.path),), **given)
        result["examples_per_second"] = _speeds(
            [str(source.path), output], tasks, task_files, given.get("split", "test")
        )
    return result


def _check_training(source: Source, scheme: Scheme) -> None:
    """Warns if a model that was trained on rounded matrices is rounded in another way."""
    trained = source.config.quantize
    given = {name: getattr(scheme, name) for name in ("weights", "group", "keep")}
    other = {name: own for name, x in given.items() if (own := getattr(trained, name)) != x}
    if trained.weights and other:
        asked = ", ".join(f"quantize.{name} {value!r}" for name, value in other.items())
        warnings.warn(
            f"{source.path} was trained with {asked}, and is rounded in another way here; what it "
            "learned of rounding is of little use then",
            stacklevel=2,
        )


def _disk_bytes(folder: Path) -> int:
    """Returns the bytes of a model's weights, without tokenizer and optimizer state."""
    return sum(
        size
        for name, (size, _) in storage.files(folder).items()
        if name.endswith((".safetensors", ".bin"))
    )


# --- Rounding -------------------------------------------------------------------------------------


def _quantize(
    model: Any,
    params: api.Params,
    matrices: Sequence[Matrix],
    scheme: Scheme,
    method: Method,
    batches: Sequence[dict[str, np.ndarray]],
) -> api.Params:
    """Returns parameters with quantized matrices on the host, rounded one layer at a time."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    nearest = jax.jit(quantize, static_argnums=(1, 2))
    found = dict(flat)
    parts = (
        [matrices] if method == "rtn" else calibration.parts(matrices, method, _STATISTICS_BYTES)
    )
    for part in parts:
        statistics = None
        if method != "rtn":
            statistics = calibration.gather(model, params, batches, part, method)
        for matrix in progress.track(part, f"rounding to {scheme.weights}"):
            x = flat[matrix.path]
            layers = []
            for layer, each in enumerate(x if matrix.stacked else [x]):
                if statistics is None or matrix.is_table:
                    leaf = nearest(each, matrix, scheme)
                else:
                    known = statistics.of(matrix.path, layer)
                    leaf = calibration.quantize(each, matrix, scheme, method, known)
                layers.append(jax.device_get(leaf))
            stacked = jax.tree.map(lambda *each: np.stack(each), *layers)
            found[matrix.path] = stacked if matrix.stacked else layers[0]
    return flax.traverse_util.unflatten_dict(found, sep="/")


def _calibration(
    source: Source, tasks: Sequence[str], num_examples: int, task_files: Sequence[str]
) -> list[dict[str, np.ndarray]]:
    """Returns batches of training examples of tasks, the same number of each."""
    from t5jax.data import pipeline, registry  # TensorFlow and SeqIO: only where data are read.

    registry.load_tasks((*source.config.data.task_files, *task_files))
    tokenizer = source.tokenizer()
    rows = min(8, num_examples)
    batches: list[dict[str, np.ndarray]] = []
    per_task = -(-num_examples // (rows * len(tasks)))
    for task in tasks:
        config = _data_of(source.config, task, rows)
        iterator = pipeline.train_iterator(config, tokenizer)
        batches += [next(iterator) for _ in range(per_task)]
    return batches


def _data_of(config: Config, task: str, rows: int) -> Config:
    """Returns a config whose batches have rows of one task."""
    data = config.data
    same = data.inputs_length == data.targets_length
    return override(
        config,
        {
            "data.mixture": task,
            "data.mixture_changes": (),
            "data.cache": None,
            "data.batch_size": rows,
            # Statistics tell the encoder's rows from the decoder's by their length.
            "data.targets_length": data.targets_length + int(same),
        },
    )


# --- Speed ----------------------------------------------------------------------------------------


def _speeds(
    models: Sequence[str], tasks: Sequence[str], task_files: Sequence[str], split: str
) -> tuple[float, ...]:
    """Returns the examples per second of models: greedy answers of up to 32 tokens, or embeddings.

    Each is timed three times, in turn with the others; the fastest time counts.
    """
    loaded = [load(name) for name in models]
    inputs = _inputs(loaded[0], tasks, task_files, split)
    times: list[list[float]] = [[] for _ in loaded]
    for repeat in range(_REPEATS + 1):
        for model, own in zip(loaded, times, strict=True):
            start = time.perf_counter()
            _run(model, inputs)
            if repeat:  # The first one compiles.
                own.append(time.perf_counter() - start)
    return tuple(len(inputs) / min(own) for own in times)


def _inputs(
    model: Pretrained, tasks: Sequence[str], task_files: Sequence[str], split: str
) -> list[list[int]]:
    from t5jax.data import pipeline, registry

    assert model.source is not None
    config = override(model.source.config, {"eval.num_examples": _PROMPTS})
    registry.load_tasks((*config.data.task_files, *task_files))
    sets = pipeline.eval_sets(config, split, model.tokenizer, registry.match(tasks, split))
    return [example.input_ids for each in sets for example in each.examples][:_PROMPTS]


def _run(model: Pretrained, inputs: list[list[int]]) -> None:
    if model.model.kind == "encoder":
        model.embed_ids(inputs)
        return
    options = GenerationOptions(max_tokens=_NEW_TOKENS)
    generator = model._generator(False)
    generator.answers(model.params, inputs, options, batch_size=len(inputs))


# --- Report ---------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> Iterator[str]:
    """Yields what `compress_model` returns as lines of text."""
    for name, what in {"memory_bytes": "in memory, float32", "disk_bytes": "on disk"}.items():
        before, after = result[name]
        if before and after:
            yield f"{what}: {_size(before)} before, {_size(after)} after, {after / before:.1%}"
    for task, found in result.get("quality", {}).items():
        for comparisons in found["comparisons"].values():
            for metric, each in comparisons.items():
                low, high = each["interval"]
                yield (
                    f"{task} {metric}: {found['model'][metric]:.4g}, against the uncompressed "
                    f"{each['difference']:+.4g} [{low:+.4g}, {high:+.4g}], {each['verdict']}"
                )
    if "examples_per_second" in result:
        before, after = result["examples_per_second"]
        gain = after / before
        says = f"{gain:.2f} times as fast" if gain >= _NOTICEABLE else f"no gain ({gain:.2f} times)"
        yield f"speed here: {before:.1f} examples/s before, {after:.1f} after: {says}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def print_report(result: dict[str, Any]) -> None:
    """Prints the report on standard output."""
    for line in report(result):
        print(line, file=sys.stdout)
