"""A trace ends with its run, however that ends."""

import jax
import pytest

from t5jax.monitor.profile import Trace


def test_a_run_that_fails_leaves_no_trace_begun(tmp_path, monkeypatch):
    """A second one could not begin in this process: of a run that goes back, or another trial."""
    called = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: called.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: called.append("stop"))

    def run():
        with Trace(tmp_path, 2, 0, 10) as trace:
            for step in range(1, 5):
                trace.before(step, lambda: None)
                assert not trace.after(step, lambda: None)
            raise ValueError("nan")

    with pytest.raises(ValueError, match="nan"):
        run()
    assert called == ["start", "stop"]
