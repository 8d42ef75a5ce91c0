"""The second start of a config compiles nothing; where its time went, and a trace of its steps."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from t5jax import compilation
from t5jax.monitor import log
from t5jax.train import train
from tiny import make_config, one_device  # noqa: F401

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """The folder of t5jax's programs, which are kept there as from the command line."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("T5JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path / "cache/programs"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def cache_events():
    events = []

    def listen(event, **about):
        if event.startswith("/jax/compilation_cache/cache_"):
            events.append(event.rpartition("/")[-1])

    jax.monitoring.register_event_listener(listen)
    yield events
    jax.monitoring.unregister_event_listener(listen)


def test_a_second_start_compiles_nothing(tmp_path, programs, cache_events, capsys):
    def start(name):
        jax.clear_caches()  # As in a new process.
        cache_events.clear()
        train(make_config(tmp_path / name, train=TRAIN, eval={"every": 0}))
        return [cache_events.count(f"cache_{what}") for what in ("misses", "hits")]

    TRAIN = {"steps": 5, "log_every": 1, "profile": 2}
    compilation.keep_programs()
    misses, _ = start("first")
    assert misses > 0
    assert list(programs.rglob("*-cache"))
    assert start("second")[0] == 0
    assert cache_events.count("cache_hits") >= misses

    # Its time, in parts that sum to the whole.
    err = capsys.readouterr().err
    assert " s: steps " in err
    *_, line = (line for line in log.read_metrics(tmp_path / "second") if "time/steps" in line)
    parts = {name: value for name, value in line.items() if name.startswith("time/")}
    assert list(parts) == [
        f"time/{part}"
        for part in ("steps", "input", "compile", "checkpoint", "evaluation", "other")
    ]
    assert min(parts["time/steps"], parts["time/compile"], parts["time/checkpoint"]) > 0
    assert parts["time/evaluation"] == 0

    # Steps 4 and 5 are traced, in a form that jax reads as xprof does.
    assert "traced steps 4 to 5: xprof --logdir" in err
    (file,) = (tmp_path / "second/profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    assert any("host" in plane.name.lower() for plane in planes)


def test_programs_are_kept_where_the_user_says_or_not_at_all(programs, monkeypatch, tmp_path):
    monkeypatch.setenv("T5JAX_KEEP_PROGRAMS", "0")
    compilation.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.delenv("T5JAX_KEEP_PROGRAMS")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation.keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_programs_are_kept_in_a_bucket(programs, cache_events, bucket):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/programs")
    compilation.keep_programs()
    for _ in range(2):
        jax.clear_caches()
        jax.jit(lambda x: x * 3 + 1)(1.0)
    assert {event: cache_events.count(event) for event in cache_events}["cache_hits"] >= 1
    assert any(name.endswith("-cache") for name in bucket.names("programs/"))
