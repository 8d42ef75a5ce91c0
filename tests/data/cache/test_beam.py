"""The Beam writer on Beam's local runner, beside the processes of this machine."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from t5jax import storage
from t5jax.data.cache.beam import make_writer
from t5jax.data.cache.store import write_caches
from t5jax.data.run import Run
from t5jax.tokenizers import ByteTokenizer

TASK = """
from t5jax.data.tasks.corpus import text_task
from t5jax.data.sources.cleaning import drop_duplicates
from t5jax.data.objectives.span_corruption import SpanCorruption
from t5jax.data.tasks.prompted import prompted_task
from t5jax.data.sources.source import Source

rows = [{"q": f"question {i % 900}", "text": f"Text {i}. " * (i % 9)} for i in range(1100)]
source = Source({"train": lambda: rows}).clean(drop_duplicates("q"))
prompted_task("beamed", source, [("{q}?", "{q}")], metrics=[], vocabulary="bytes")
text_task("beamed_text", Source({"train": lambda: rows}), SpanCorruption(), vocabulary="bytes")
"""
LENGTHS = {"inputs": 24, "targets": 12}


def test_without_beam_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(ValueError, match=r"pip install 't5jax\[beam\]'"):
        make_writer()


needs_beam = pytest.mark.skipif(
    not importlib.util.find_spec("apache_beam"), reason="needs the extra: pip install '.[beam]'"
)


@needs_beam
def test_the_options_for_dataflow_are_ones_that_beam_has():
    from apache_beam.options.pipeline_options import PipelineOptions

    from t5jax.commands.cache import Cache
    from t5jax.commands.parse import parse

    text = (Path(__file__).parents[3] / "docs/schedulers.md").read_text()
    (command,) = re.findall(r"^t5jax cache (c4 (?:.*\\\n)*.*)$", text, re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    options = parse(Cache, words, prog="t5jax cache", positional=True)
    given = dict(option.split("=", 1) for option in options.beam)
    found = PipelineOptions([f"--{option}" for option in options.beam]).get_all_options()
    assert {name: str(found.get(name)) for name in given} == given
    assert given["runner"] == "DataflowRunner"


@pytest.mark.slow
@needs_beam
def test_beam_writes_what_processes_write(tmp_path, bucket):
    """Into a folder, and into a bucket, in place of what was there."""
    from t5jax.data import registry
    from t5jax.data.bridge.tf import seqio

    file = tmp_path / "beamed.py"
    file.write_text(TASK)
    registry.load_tasks([str(file)])
    runner = "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"
    kinds = {"here": {"processes": 1}, "beam": {"write": make_writer([runner], [str(file)])}}
    run = Run(ByteTokenizer(), lengths=LENGTHS)
    for name, num_dropped in {"beamed": 200, "beamed_text": 0}.items():
        found = {}
        for kind, options in kinds.items():
            (report,) = write_caches(name, tmp_path / kind, run, **options)
            files = {p.name: p.read_bytes() for p in report.path.iterdir()}
            found[kind] = files, report.dropped
            assert sum(report.dropped.values()) == num_dropped
        assert found["here"] == found["beam"]
        assert len(found["here"][0]) > 3  # More than one shard.
        if name == "beamed":
            (report,) = write_caches(name, "gs://bucket/cache", run, num_shards=2, **kinds["beam"])
            (report,) = write_caches(name, "gs://bucket/cache", run, rebuild=True, **kinds["beam"])
            files = {p: (report.path / p).read_bytes() for p in storage.files(report.path)}
            assert (files, report.dropped) == found["here"]
            (report,) = write_caches(name, "gs://bucket/cache", run)
            assert not report.reason
        seqio.TaskRegistry.remove(name)
