"""Several processes are one run: they start, write, resume, evaluate and end together."""

import json
import math
import re
import signal
import socket
import threading
import time
import types

import jax
import pytest
from jax.experimental import multihost_utils

import tiny
from hosts import by_address, free_port, run_hosts, start_host
from t5jax import checkpoint, distributed, rendezvous, sharding
from t5jax.cli import START_AGAIN, main
from t5jax.config import to_json
from t5jax.evaluation import Evaluator
from t5jax.rendezvous import Rendezvous
from t5jax.train import train
from tiny import assert_same_bits, make_config, read_metrics

SECTIONS = {
    "eval": {"every": 2, "batch_size": 8, "num_examples": 8, "num_samples": 1},
    "checkpoint": {"every": 2},
}


def config_of(run_dir, steps, **sections):
    return make_config(run_dir, train={"steps": steps, "log_every": 1}, **SECTIONS | sections)


@pytest.fixture
def two_devices(monkeypatch):
    def make_mesh(*config):
        return tiny._make_mesh(*config, devices=jax.devices()[:2])

    monkeypatch.setattr(sharding, "make_mesh", make_mesh)


def slurm(count):
    port = str(free_port())
    return [
        {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_NUM_TASKS": str(count),
            "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(i),
            "SLURM_LOCALID": str(i),
            "JAX_COORDINATOR_PORT": port,
            "T5JAX_HOST_TIMEOUT": "60",
        }
        for i in range(count)
    ]


def while_asked_to_stop(function):
    def call(*args):
        signal.raise_signal(signal.SIGTERM)
        return function(*args)

    return call


@pytest.mark.slow(seconds=40)
@pytest.mark.usefixtures("two_devices")
def test_two_processes_go_on_with_the_bits_of_one_and_three_answer(tmp_path, bucket, monkeypatch):
    """Into a bucket, of which each writes its own part of a checkpoint.

    The one was stopped in an evaluation, which the two make.
    """
    several, one = tmp_path / "several", tmp_path / "one"
    service = {**bucket.environment(), "T5JAX_CACHE": str(tmp_path / "cache")}
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", while_asked_to_stop(Evaluator.evaluate))
        with pytest.raises(distributed.Preempted):
            train(config_of("gs://bucket/run", 2))
    config = tmp_path / "config.json"
    config.write_text(to_json(config_of("gs://bucket/run", 4)))
    first, second = run_hosts(["train", str(config)], [e | service for e in slurm(2)])
    assert (first.status, second.status) == (0, 0), (first.err, second.err)
    assert "parameters on 2 cpu devices (data 2, 2 processes)" in first.err
    assert "going on from step 2" in first.err
    assert "capitals: " in first.err
    bucket.copy("run", several)
    # One process speaks and writes.
    of_libraries = re.compile(r"Gloo|\.cc:\d+\]")
    assert all(map(of_libraries.search, second.err.splitlines())), second.err
    assert len(list((several / "tensorboard").iterdir())) == 2  # One of each start.
    assert (several / "loss.png").exists()
    train(config_of(one, 4))
    assert_same_bits(several, one, 4)
    assert read_metrics(several) == read_metrics(one)
    losses = [checkpoint.validation_loss(run / "checkpoints/2") for run in (several, one)]
    assert losses[0] == losses[1] < math.inf

    # Three answer together; one writes.
    words = "".join(f"capitals: {word}\n" for word in ("a", "ab", "abc", "d", "dc"))
    bucket.buckets["bucket"]["in.txt"] = words.encode()
    command = ["infer", "gs://bucket/run", "--input", "gs://bucket/in.txt", "--max-tokens", "3"]
    together = [*command, "--output", "gs://bucket/out.jsonl", "--batch-size", "3"]
    ended = run_hosts(together, [e | service for e in by_address(3)])
    assert [e.status for e in ended] == [0] * 3, [e.err for e in ended]
    assert "wrote gs://bucket/out.jsonl: 5 prompts" in ended[0].err
    assert main([*command, "--output", str(tmp_path / "alone.jsonl")]) == 0
    written = bucket.buckets["bucket"]["out.jsonl"], (tmp_path / "alone.jsonl").read_bytes()
    both = [[json.loads(line) for line in content.splitlines()] for content in written]
    together, alone = ([line["answers"][0]["tokens"] for line in lines] for lines in both)
    assert together == alone


@pytest.mark.slow
def test_when_one_is_asked_to_stop_or_killed_the_others_stop_too(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(to_json(config_of(tmp_path / "run", 10**6, eval={"every": 0})))

    def start_two():
        processes = [start_host(["train", str(config)], env) for env in by_address(2)]
        processes[0].wait_for("step 2/" if not saved else "going on")
        return processes

    # One gets the signal, and all save the same step.
    saved = ""
    processes = start_two()
    processes[1].kill(signal.SIGTERM)
    ended = [process.wait() for process in processes]
    assert [e.status for e in ended] == [START_AGAIN] * 2, [e.err for e in ended]
    (saved,) = {re.search(r"step (\d+) is saved; the same command goes", e.err)[1] for e in ended}
    assert str(checkpoint.latest_checkpoint(tmp_path / "run").name) == saved

    # One is killed, and the others name it.
    processes = start_two()
    assert f"going on from step {saved} " in processes[0].err
    processes[0].wait_for(f"step {int(saved) + 2}/")
    processes[1].kill()
    ended = processes[0].wait()
    assert ended.status == 1
    message = f"t5jax: error: process 1 on {socket.gethostname()} has stopped; the same command on"
    assert message in ended.err


def test_the_number_of_a_call_rises_by_one(monkeypatch):
    """So that of several processes all hear at the same call that one was asked to stop."""
    numbers = []

    def reached(number):
        numbers.append(number)
        return len(numbers) == 4

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", reached)
    first, second = distributed.StopRequest(), distributed.StopRequest()
    assert [request.reached() for request in (first, first, second)] == [False] * 3
    with pytest.raises(distributed.Preempted):
        second.check()
    assert second.reached()  # Once asked it stays asked.
    assert numbers == list(range(numbers[0], numbers[0] + 5))


# --- Meeting --------------------------------------------------------------------------------------


def meet(count, present, timeout=60.0, counts=None):
    """Lets processes meet, as threads; returns what each has: its rendezvous or its error."""
    address, found = f"localhost:{free_port()}", {}

    def one(index):
        try:
            found[index] = Rendezvous(address, (counts or {}).get(index, count), index, timeout)
        except ValueError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_know_the_names_of_all_and_part_in_peace():
    found = meet(3, [0, 1, 2])
    name = socket.gethostname()
    assert [found[i].names for i in range(3)] == [[name] * 3] * 3
    for one in found.values():
        one.leave()


def test_the_absent_are_named_to_those_who_came(monkeypatch):
    now, receive = 0.0, rendezvous._receive

    def receive_in_time(connection):
        nonlocal now
        message = receive(connection)
        now = 60.0  # When the one has come, the time for the others is over.
        return message

    clock = types.SimpleNamespace(monotonic=lambda: now, sleep=time.sleep)
    monkeypatch.setattr(rendezvous, "time", clock)
    monkeypatch.setattr(rendezvous, "_receive", receive_in_time)
    found = meet(4, [0, 2])
    name = socket.gethostname()
    expected = (
        f"processes 1, 3 of 4 did not come within 60 s; there are 0 ({name}), 2 ({name}). Start "
        "the same command on every host"
    )
    assert set(found) == {0, 2}
    assert all(message.startswith(expected) for message in found.values())


def test_without_process_0_the_others_say_where_it_should_be():
    assert meet(2, [1], timeout=0.5)[1].startswith("process 0 of 2 did not come within 0.5 s (loc")


def test_two_processes_that_count_differently_are_told():
    found = meet(2, [0, 1], counts={1: 3})
    assert all("counts 3 processes, and process 0 2" in message for message in found.values())


# --- When a process is one of several -------------------------------------------------------------

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "h:80", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def test_another_number_of_processes_than_was_said_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES is '4', but this run has 1 process: "):
        distributed.start()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    distributed.start()


def test_find():
    assert distributed.find({}) is None
    assert distributed.find(ADDRESS) == ("h:80", 2, 1, None)
    assert distributed.find(ADDRESS | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    # A batch script of SLURM is one process, whatever the job has allocated.
    assert distributed.find({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None


def test_a_tpu_host_is_one_of_a_pod_or_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(distributed, "num_tpu_chips", lambda: 4)
    monkeypatch.setattr(distributed, "_metadata", lambda key: asked.append(key) or "a,b")
    assert distributed._num_pod_hosts({"TPU_WORKER_HOSTNAMES": "localhost"}) == 1
    assert distributed._num_pod_hosts({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}) == 4
    assert (
        distributed._num_pod_hosts({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}) == 2
    )
    assert not asked
    assert distributed._num_pod_hosts({}) == 2
    assert distributed._num_pod_hosts({"JAX_PLATFORMS": "cpu"}) == 1
    monkeypatch.setattr(distributed, "num_tpu_chips", lambda: 0)
    assert distributed._num_pod_hosts({"TPU_WORKER_HOSTNAMES": "a,b"}) == 1
    assert asked == ["worker-network-endpoints"]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_NUM_PROCESSES is set, but not JAX_PROCESS_ID; set all three"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "is set, but not JAX_COORDINATOR_ADDRESS; set all"),
        ({"JAX_COORDINATOR_ADDRESS": "h"}, "JAX_COORDINATOR_ADDRESS is 'h'; expected HOST:PORT"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; expected a number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2, and JAX_NUM_PROCESSES 2; .* from 0 to 1"),
    ],
)
def test_an_incomplete_environment_is_refused(env, message):
    with pytest.raises(ValueError, match=message):
        distributed.find(ADDRESS | env)


def test_a_time_out_is_a_number(monkeypatch):
    monkeypatch.setenv("T5JAX_HOST_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="T5JAX_HOST_TIMEOUT is 'soon'; expected a number of sec"):
        distributed.timeout()


def test_a_cpu_in_place_of_an_accelerator_is_refused(monkeypatch):
    distributed.check_accelerator()  # JAX_PLATFORMS is cpu here.
    monkeypatch.setattr(distributed, "num_tpu_chips", lambda: 4)
    distributed.check_accelerator()
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(distributed, "_platforms", lambda: None)
    with pytest.raises(ValueError, match=r"has 4 TPU chips, but jax only .* 't5jax\[tpu\]'.* cpu"):
        distributed.check_accelerator()
    monkeypatch.setattr(distributed, "num_tpu_chips", lambda: 0)
    distributed.check_accelerator()

    def fails():
        raise RuntimeError("Unable to initialize backend 'tpu': no device\nmore")

    monkeypatch.setattr(jax, "default_backend", fails)
    with pytest.raises(ValueError, match=r"cannot use the acc.* \(Unable to .*: no device\); mend"):
        distributed.check_accelerator()
