"""`t5jax compress`: writes a model with quantized matrices."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from t5jax import sharding, storage, trees
from t5jax.checks import check_at_least
from t5jax.config import Config, MeshConfig, override
from t5jax.models import api
from t5jax.monitor import progress
from t5jax.quantize import calibrate as calibration
from t5jax.quantize import files
from t5jax.quantize.calibrate import Method
from t5jax.quantize.matrices import (
    Matrix,
    Scheme,
    check_installed,
    chosen,
    quantize,
)
from t5jax.source import Source, find

_STATISTICS_BYTES = 2 * 2**30  # Of all matrices whose statistics are summed in one pass.


def compress_model(
    model: str | Source,
    output: str,
    scheme: Scheme,
    *,
    kv_cache: Literal["int8"] | None = None,
    method: Method = "rtn",
    calibrate: Sequence[str] = (),
    num_calibration: int = 128,
    inputs_length: int | None = None,
    targets_length: int | None = None,
    task_files: Sequence[str] = (),
) -> None:
    """Writes a model with quantized matrices; see `t5jax.tradeoff` for what that costs and gains.

    Args:
      model: a Hub name, a Hugging Face folder, a run or one of its checkpoints; or a source.
      output: the folder to write.
      scheme: which matrices to round, and to what.
      kv_cache: "int8" keeps the keys and values of decoding in int8, too.
      method: "rtn" rounds to the nearest; "awq" and "gptq" read the inputs of a task.
      calibrate: tasks or mixtures whose training examples are read for that.
      num_calibration: the number of those examples.
      inputs_length: the maximum length of their inputs in tokens. None: as in the run, or 512, and
        at most what the network has positions for.
      targets_length: that of their targets. None: as in the run, or 128.
      task_files: Python files that register tasks, in addition to the shipped ones and the run's.
    Raises:
      ValueError: if the model cannot be read or quantized so, or the output cannot be written.
    """
    source = find(model) if isinstance(model, str) else model
    if source.is_quantized:
        raise ValueError(
            f"{source.path} is compressed already; rounding it again would add its errors; "
            "compress the model that it was made of"
        )
    source.check_whole()
    folder = storage.path(output, "the folder to write")
    files.check_new(folder)
    calibration.check_method(method, scheme, calibrate)
    check_at_least(num_calibration, 1, "num_calibration (--num-calibration)")
    compressed = dataclasses.replace(source.model, kv_cache=kv_cache or source.model.kv_cache)
    matrices = chosen(source.model, scheme)
    check_installed()
    _check_training(source, scheme)
    batches: list[dict[str, np.ndarray]] = []
    if calibrate:
        config = _config(source.config, inputs_length, targets_length)
        batches = _calibration(source, config, calibrate, num_calibration, task_files)
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
    flat = trees.flatten(params)
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
    return trees.unflatten(found)


def _calibration(
    source: Source,
    config: Config,
    tasks: Sequence[str],
    num_examples: int,
    task_files: Sequence[str],
) -> list[dict[str, np.ndarray]]:
    """Returns batches of training examples of tasks, the same number of each."""
    from t5jax.data import pipeline, registry  # TensorFlow and SeqIO: only where data are read.

    registry.load_tasks((*source.config.data.task_files, *task_files))
    tokenizer = source.tokenizer()
    rows = min(8, num_examples)
    batches: list[dict[str, np.ndarray]] = []
    per_task = -(-num_examples // (rows * len(tasks)))
    for task in tasks:
        registry.check_mixture(task, "--calibrate")
        changes = {"data.mixture": task, "data.batch_size": rows}
        iterator = pipeline.train_iterator(override(config, changes), tokenizer)
        batches += [next(iterator) for _ in range(per_task)]
    return batches


def _config(config: Config, inputs: int | None, targets: int | None) -> Config:
    """Returns a config whose batches have one row for each example, as long as the network reads.

    Raises:
      ValueError: if the lengths that are asked for exceed the network's positions.
    """
    data, model = config.data, config.model
    most, encodes = model.longest_row, model.kind == "encoder"
    length = {"inputs": inputs or data.inputs_length, "targets": targets or data.targets_length}
    if most is not None:
        if targets is None and not encodes:
            room = most // 2 if inputs is None else most - inputs
            length["targets"] = min(length["targets"], max(room, 1))
        if inputs is None:
            room = most if encodes else most - length["targets"]
            length["inputs"] = min(length["inputs"], max(room, 1))
        row = length["inputs"] if encodes else sum(length.values())
        if row > most:
            raise ValueError(
                f"--inputs-length {length['inputs']} and --max-tokens {length['targets']} are more "
                f"than the {most} positions that this {model.family} has; lower them"
            )
    elif model.kind == "encoder_decoder" and length["inputs"] == length["targets"]:
        length["targets"] += 1  # Statistics tell the encoder's rows from the decoder's by them.
    return override(
        config,
        {
            "data.mixture_changes": (),
            "data.cache": None,
            "data.inputs_length": length["inputs"],
            "data.targets_length": length["targets"],
        },
    )
