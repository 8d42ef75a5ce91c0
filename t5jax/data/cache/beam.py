"""Writes the shards of a cache with Apache Beam, on a cluster (needs the extra `beam`).

    write_caches("my_mixture", folder, run, write=make_writer(["--runner=..."]))

One worker reads the rows of a task, all workers tokenize, and each shard is written by one of them.
The shards are byte for byte those that one machine writes. Workers need t5jax, and the task files
and the cache's folder under the same paths: in a bucket, or in a folder that all of them have.
"""

import functools
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from t5jax import storage
from t5jax.data.cache.writer import Shard, ShardWriter, shard_name
from t5jax.data.recipe import Recipe

_DROPPED = "t5jax dropped rows"  # The namespace of Beam's counters.


def make_writer(
    options: Sequence[str] = (), task_files: Sequence[str] = ()
) -> Callable[[Recipe, Path, int, Counter], list[Shard]]:
    """Returns the argument `write` of `t5jax.data.cache.store.write_caches`.

    Args:
      options: options of Beam's pipelines, such as "--runner=FlinkRunner".
      task_files: Python files that register tasks, in addition to ./tasks/*.py and the shipped
      ones.
    Raises:
      ValueError: if Beam is not installed.
    """
    try:
        import apache_beam  # noqa: F401
    except ImportError:
        raise ValueError(
            "Apache Beam is not installed; pip install 't5jax[beam]', or let processes of this "
            "machine write the cache"
        ) from None
    return functools.partial(_write, list(options), list(task_files))


def _write(
    options: list[str],
    task_files: list[str],
    recipe: Recipe,
    folder: Path,
    num_shards: int,
    dropped: Counter,
) -> list[Shard]:
    import apache_beam as beam
    from apache_beam.metrics import MetricsFilter
    from apache_beam.options.pipeline_options import PipelineOptions

    read = (recipe.task, recipe.split, recipe.run, task_files)
    pipeline = beam.Pipeline(options=PipelineOptions(options))
    _ = (
        pipeline
        | beam.Create([read])
        | "Read" >> beam.FlatMap(_read)
        | "Spread" >> beam.Reshuffle()
        | "Tokenize" >> beam.Map(_tokenize, recipe.encoder, num_shards)
        | beam.GroupByKey()
        | "Write" >> beam.Map(_write_shard, str(folder.absolute()), num_shards)
    )
    result = pipeline.run()
    result.wait_until_finish()
    for counter in result.metrics().query(MetricsFilter().with_namespace(_DROPPED))["counters"]:
        dropped[counter.key.metric.name] += counter.result
    shards = []
    for name in storage.files(folder):
        if name.endswith(".npz"):
            with np.load(io.BytesIO((folder / name).read_bytes())) as saved:
                content = saved["content"].item()
                shards.append(Shard(saved["number"].item(), saved["lengths"], content))
            storage.remove(folder / name)
    return shards


# Beam compares annotations and does not support protocols, so these functions have none.
def _read(what):
    """Registers a task and yields its numbered chunks."""
    from apache_beam.metrics import Metrics

    from t5jax.data import registry
    from t5jax.data.tasks.foreign import kind_of

    name, split, run, task_files = what
    registry.load_tasks(task_files)
    dropped = Counter()
    recipe = kind_of(registry.check_mixture(name)).recipe(split, run)
    yield from enumerate(recipe.chunks(dropped))
    for step, count in dropped.items():
        Metrics.counter(_DROPPED, step).inc(count)


def _tokenize(numbered, encoder, num_shards):
    number, chunk = numbered
    return number % num_shards, (number, *encoder(chunk))


def _write_shard(grouped, folder, num_shards):
    shard, chunks = grouped
    target, name = storage.path(folder), shard_name(shard, num_shards)
    # Beam may do the same work twice at a time; each has a folder of its own, so this is harmless.
    beside = None if storage.is_remote(target) else target
    with tempfile.TemporaryDirectory(dir=beside) as made:
        scratch = Path(made)
        writer = ShardWriter(scratch, shard, num_shards)
        for _, lengths, records in sorted(chunks, key=lambda chunk: chunk[0]):
            writer.add(lengths, records)
        written = writer.close()
        saved = f"{name}.npz"
        np.savez(scratch / saved, number=shard, lengths=written.lengths, content=written.content)
        for file in (name, saved):
            storage.move(scratch / file, target / file)
