"""Four workers on one study in PostgreSQL, of which one is killed in a trial."""

import glob
import json
import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hosts import free_port
from processes import Process
from t5jax.config import Config, EvalConfig, TrainConfig
from t5jax.monitor import log
from t5jax.sweep import SweepOptions, parse_space, sweep

psycopg = pytest.importorskip("psycopg")
pytest.importorskip("optuna")

SPACE = ["train.seed=int(1, 6)", "optimizer.learning_rate=choice(1e-4, 1e-3)"]
STEPS = 4

# What a worker runs: training is a formula that takes a moment and goes on where its metrics end.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from t5jax.monitor import log
import t5jax.sweep.sweep
from t5jax.sweep import sweep
sys.path[:0] = [{folder!r}, {folder!r} + "/.."]
from test_postgres import asked

module = sys.modules["t5jax.sweep.sweep"]  # The package has a function of that name.
module.HEARTBEAT, module.GRACE = 1, 600
_, run_dir, url, how = sys.argv
if how == "elsewhere":  # Where it cannot be seen which processes are gone.
    module.socket.gethostname = lambda: "another machine"
trained = 0


def train(config, *, watch):
    global trained
    trained += 1
    path = Path(config.run_dir)
    path.mkdir(parents=True, exist_ok=True)
    for step in range(len(log.read_metrics(path)) + 1, {steps} + 1):
        time.sleep(0.03)
        scalars = {{"validation/loss": config.train.seed + 1 / step}}
        with open(path / log.METRICS_FILE, "a") as file:
            file.write(json.dumps({{"step": step, "time": 0.0, **scalars}}) + chr(10))
        watch(step, scalars)
        if how == "dies" and trained == 2 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    return path


sweep(*asked(run_dir, url), train=train)
"""


def asked(run_dir: str, url: str):
    """Returns the arguments of the sweep."""
    config = Config(run_dir=run_dir, train=TrainConfig(steps=STEPS), eval=EvalConfig(every=1))
    return config, parse_space(SPACE, config), SweepOptions(1, sampler="grid", storage=url)


@pytest.fixture
def postgres(tmp_path):
    """Yields the URL of a database of a server that is there for the test alone."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"))
    program = found[-1] if found else shutil.which("postgres")
    if program is None:
        pytest.skip("there is no PostgreSQL: apt-get install postgresql")
    folder, user = tmp_path / "postgres", {}
    folder.mkdir()
    if os.getuid() == 0:  # It refuses to run as root.
        try:
            user = {"user": pwd.getpwnam("postgres").pw_uid}
        except KeyError:
            pytest.skip("there is no account for PostgreSQL: adduser postgres")
        shutil.chown(folder, "postgres")
        for above in tmp_path.parents:
            if above.stat().st_uid == 0 and above != Path("/"):
                above.chmod(above.stat().st_mode | 0o111)
        tmp_path.chmod(0o711)
    bin_, port = Path(program).parent, free_port()
    quiet = {"stdout": subprocess.DEVNULL, "cwd": folder, **user}
    make = [bin_ / "initdb", "-D", folder / "data", "-U", "t5jax", "-A", "trust", "--no-sync"]
    subprocess.run(make, check=True, **quiet)
    # Durability is not what is tested.
    options = ["-c", "fsync=off", "-c", f"unix_socket_directories={folder}"]
    serve = [bin_ / "postgres", "-D", folder / "data", "-p", str(port), "-h", "127.0.0.1", *options]
    server = subprocess.Popen(serve, stderr=subprocess.DEVNULL, **quiet)
    ready = [bin_ / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
    until = time.monotonic() + 300
    while subprocess.run(ready, **quiet).returncode:
        assert time.monotonic() < until
        time.sleep(0.05)
    yield f"postgresql://t5jax@127.0.0.1:{port}/postgres"
    server.send_signal(signal.SIGINT)  # It does not wait for its clients, such as this process.
    server.wait()


@pytest.mark.slow
def test_four_workers_on_one_study_lose_no_trial_and_do_none_twice(postgres, tmp_path):
    folder = tmp_path / "sweep"
    code = WORKER.format(folder=str(Path(__file__).parent), steps=STEPS)
    dies = ["dies", "", "", ""]
    workers = [Process("-c", code, folder, postgres, how) for how in dies]
    ended = [worker.wait() for worker in workers]
    assert [e.status for e in ended] == [-9, 0, 0, 0], [e.err for e in ended]
    # Later, on another machine: it goes on with what gives no sign of life any more.
    with psycopg.connect(postgres) as connection:
        connection.execute("update trial_heartbeats set heartbeat = heartbeat - interval '1 day'")
    last = Process("-c", code, folder, postgres, "elsewhere").wait()
    assert last.status == 0, last.err

    study = sweep(*asked(str(folder), postgres), train=None)
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    cells = [(t.params["train.seed"], t.params["optimizer.learning_rate"]) for t in complete]
    assert sorted(cells) == [(s, r) for s in range(1, 7) for r in (1e-4, 1e-3)]
    (failed,) = [t for t in study.trials if t.state.name == "FAIL"]
    (again,) = [t for t in complete if t.system_attrs.get("failed_trial") == failed.number]
    assert again.params == failed.params
    # What it had reported counts, and each step was done once, in the trial's own run.
    assert failed.intermediate_values.keys() == {1, 2}
    assert again.intermediate_values.keys() == {1, 2, 3, 4}
    for trial in complete:
        number = trial.system_attrs.get("failed_trial", trial.number)
        steps = [line["step"] for line in log.read_metrics(folder / f"trial-{number:04d}")]
        assert steps == [1, 2, 3, 4]
    assert json.loads((folder / "best.json").read_text())["train"]["seed"] == 1


def test_a_database_that_cannot_be_reached_is_named(tmp_path):
    url = "postgresql://me:secret-word@127.0.0.1:1/db"
    with pytest.raises(ValueError, match="the sweep's database .* cannot be opened: .*refused"):
        sweep(*asked(str(tmp_path / "s"), url), train=print)
