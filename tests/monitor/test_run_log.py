"""What a run says is in its folder."""

import logging
import re
import warnings
from pathlib import Path

import pytest

from t5jax.monitor import run_log
from t5jax.monitor.progress import ProgressBar, say


def test_all_that_is_said_and_what_ended_it(tmp_path: Path):
    def run():
        with run_log.kept() as log:
            say("before it is known where")
            log.begin(tmp_path)
            with ProgressBar(10) as bar:
                bar.print("above the bar\nin two lines")
                bar.update(3, loss=1.5)
                bar.update(4)  # Only moves the bar.
            logging.getLogger("t5jax.data.x").warning("a row is %s", "odd")
            logging.getLogger("tensorflow").warning("no GPU")
            warnings.warn("no locks", stacklevel=1)
            raise ValueError("no rows")

    for _ in range(2):
        with (
            pytest.raises(ValueError, match="no rows"),
            pytest.warns(UserWarning, match="no locks"),
        ):
            run()
    say("after it")
    lines = (tmp_path / run_log.LOG_FILE).read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    said = [
        "before it is known where",
        "above the bar",
        "in two lines",
        "step 3/10, loss 1.5",
        "warning: a row is odd",
        "warning: no GPU",
        "warning: no locks",
        "ended by ValueError: no rows",
    ]
    assert [line[20:] for line in lines] == said * 2


def test_what_has_no_other_handler_is_printed_all_the_same(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("t5jax"), "handlers", [])
    with run_log.kept() as log:
        log.begin(tmp_path)
        logging.getLogger("t5jax.buckets").warning("not uploaded")
    assert "not uploaded" in capsys.readouterr().err
    assert "not uploaded" in (tmp_path / run_log.LOG_FILE).read_text()


def test_what_ends_before_the_run_is_known_leaves_no_file(tmp_path: Path):
    with run_log.kept():
        say("nothing to do")
    assert not list(tmp_path.iterdir())
