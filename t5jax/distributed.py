"""The processes of a run: when there are several, how they start, agree and end; the accelerator.

`start` comes before anything else of jax. On a single host it starts nothing.
"""

import glob
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5jax import maintenance, storage
from t5jax.rendezvous import Rendezvous

TIMEOUT = "T5JAX_HOST_TIMEOUT"
"""Environment variable: seconds in which all processes must have come. 300 by default."""

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables of a start by address: host:port of process 0, the number of processes, and
the number of this one."""

_rendezvous: Rendezvous | None = None


def start() -> None:
    """Connects the processes of a TPU pod, of a SLURM step, or of an address in the environment.

    Raises:
      ValueError: if a process does not come in time, the environment is incomplete, or the
        accelerator is missing (`check_accelerator`).
    """
    global _rendezvous
    if not jax.distributed.is_initialized() and (place := find(os.environ)):
        address, count, index, local = place
        host, port = address.rsplit(":", 1)
        # The port beside jax's own; the last one of all has none above it.
        beside = int(port) + (1 if int(port) < 65535 else -1)
        _rendezvous = Rendezvous(f"{host}:{beside}", count, index, timeout())
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # Has no effect elsewhere.
        jax.distributed.initialize(
            address, count, index, local, initialization_timeout=round(timeout())
        )
    check_accelerator()
    _check_count(os.environ)


def find(env: Mapping[str, str]) -> tuple[str, int, int, list[int] | None] | None:
    """Returns the address of process 0, the number of processes, this one's, and its devices.

    None for a process that is alone.

    Raises:
      ValueError: if the environment has only some of the variables, or a value that is none.
    """
    if env.get(COUNT) == "1":
        return None  # On one host of a pod, say.
    given = [name for name in (ADDRESS, COUNT, INDEX) if env.get(name)]
    if ADDRESS in given or len(given) == 2:
        if len(given) < 3:
            missing = " and ".join(n for n in (ADDRESS, COUNT, INDEX) if n not in given)
            raise ValueError(
                f"{' and '.join(given)} is set, but not {missing}; set all three for several "
                "processes, or none for one"
            )
        return _by_address(env)
    if int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1 or _num_pod_hosts(env) > 1:
        # jax knows the variables of SLURM and the metadata of a pod.
        from jax._src.clusters import ClusterEnv

        found: Any = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, round(timeout())
        )
        if None not in found[:3]:
            return found
    return None


def _check_count(env: Mapping[str, str]) -> None:
    """Raises ValueError if there are not as many processes as the environment says.

    A host that does not find the others would train alone, into the same folder as they do.
    """
    expected, count = env.get(COUNT), jax.process_count()
    if expected and expected != str(count):
        processes = f"{count} process{'es' if count > 1 else ''}"
        raise ValueError(
            f"{COUNT} is {expected!r}, but this run has {processes}: the others were not found; "
            f"set {ADDRESS} and {INDEX} as well, or leave it out"
        )


def _by_address(env: Mapping[str, str]) -> tuple[str, int, int, None]:
    host, _, port = env[ADDRESS].rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(
            f"{ADDRESS} is {env[ADDRESS]!r}; expected HOST:PORT of process 0, such as 10.0.0.1:8476"
        )
    for name in (COUNT, INDEX):
        if not env[name].isdecimal():
            raise ValueError(f"{name} is {env[name]!r}; expected a number")
    count, index = int(env[COUNT]), int(env[INDEX])
    if not 0 <= index < count:
        raise ValueError(
            f"{INDEX} is {index}, and {COUNT} {count}; expected a number from 0 to {count - 1}"
        )
    return env[ADDRESS], count, index, None


def timeout() -> float:
    """Returns the seconds in which all processes must have come."""
    value = os.environ.get(TIMEOUT) or "300"
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 10**6:
        raise ValueError(f"{TIMEOUT} is {value!r}; expected a number of seconds")
    return seconds


def _num_pod_hosts(env: Mapping[str, str]) -> int:
    """Returns the number of hosts of the TPU pod that this machine belongs to."""
    if "tpu" not in (env.get("JAX_PLATFORMS") or "tpu") or not num_tpu_chips():
        return 1
    slices = int(env.get("MEGASCALE_NUM_SLICES") or 1)
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if workers is None and "TPU_SKIP_MDS_QUERY" not in env:
        workers = _metadata("worker-network-endpoints")
    return slices * len((workers or "").split(","))


def _metadata(key: str) -> str | None:
    """Returns an attribute of this machine on Google Cloud; None elsewhere."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return None


# --- The accelerator ------------------------------------------------------------------------------


def num_tpu_chips() -> int:
    """Returns how many TPU chips are in this machine, whether jax can use them or not."""
    from jax._src import hardware_utils

    return hardware_utils.num_available_tpu_chips_and_device_id()[0]


def _found() -> tuple[str, str] | None:
    """Returns which accelerator is in this machine, and the extra of t5jax for it."""
    if chips := num_tpu_chips():
        return f"{chips} TPU chip{'s' if chips > 1 else ''}", "tpu"
    if gpus := len(glob.glob("/proc/driver/nvidia/gpus/*")):
        return f"{gpus} NVIDIA GPU{'s' if gpus > 1 else ''}", "gpu"
    return None


def _platforms() -> str | None:
    """Returns what was asked for in the environment or by a caller, such as "cpu"."""
    return os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms


def check_accelerator() -> None:
    """Raises ValueError where jax would compute on a CPU, and nobody has asked for that.

    That is where JAX_PLATFORMS names what is not there, and where it is not set and the machine has
    an accelerator that jax cannot use.
    """
    asked = _platforms()
    try:
        platform = jax.default_backend()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"jax cannot use the accelerator ({reason}); mend that, or set JAX_PLATFORMS to cpu "
            "to compute on the CPU"
        ) from None
    if platform == "cpu" and not asked and (found := _found()):
        what, extra = found
        raise ValueError(
            f"this machine has {what}, but jax only finds the CPU; pip install 't5jax[{extra}]', "
            "end other processes that hold it, or set JAX_PLATFORMS to cpu to compute on the CPU"
        )


# --- Agreement ------------------------------------------------------------------------------------


def is_main() -> bool:
    """Returns whether this process writes what all have in common: files, tables, progress."""
    return jax.process_index() == 0


def check_same(value: str, what: str, remedy: str) -> None:
    """Raises ValueError, in every process, if a value differs among the processes.

    Args:
      value: of this process.
      what: the value, as the error calls it.
      remedy: what is to be done.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    others = [i for i, row in enumerate(digests) if (row != digests[0]).any()]
    if others:
        where = ", ".join(f"{i}{_host(i)}" for i in others)
        raise ValueError(
            f"{what} of process{'es' if len(others) > 1 else ''} {where} differs from that of "
            f"process 0{_host(0)}; {remedy}"
        )


def from_first_process(function: Callable[[], Any]) -> Any:
    """Returns on every host what a function returns on the first one: JSON values, or its error.

    Hosts need not share a disk, and must not differ in what they do next.
    """
    if jax.process_count() == 1:
        return function()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    content = b""
    if jax.process_index() == 0:
        try:
            found = {"value": function()}
        except (ValueError, OSError) as error:
            found = {"error": str(error)}
        content = json.dumps(found).encode()
    size = int(broadcast_one_to_all(np.array(len(content))))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(content)] = np.frombuffer(content, np.uint8)
    found = json.loads(np.asarray(broadcast_one_to_all(buffer)).tobytes())
    if "error" in found:
        raise ValueError(found["error"])
    return found["value"]


def wait_for_all(what: str) -> None:
    """Returns when all processes have come here; `what` names the place."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def check_shared(folder: Path) -> None:
    """Raises ValueError, in every process, if a folder is not the same one for all of them."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    token = np.frombuffer(os.urandom(8), np.uint8)
    token = np.asarray(multihost_utils.broadcast_one_to_all(token))
    probe = folder / f".shared-{token.tobytes().hex()}"
    if is_main():
        storage.write_file(probe, b"")
    wait_for_all("the probe is written")
    seen = np.asarray(multihost_utils.process_allgather(np.array(probe.exists())))
    if is_main():
        storage.remove(probe)
    if missing := [f"{i}{_host(i)}" for i, sees in enumerate(seen) if not sees]:
        raise ValueError(
            f"{folder} is another folder for process{'es' if len(missing) > 1 else ''} "
            f"{', '.join(missing)} than for process 0{_host(0)}; choose one that all hosts share"
        )


def _host(index: int) -> str:
    return f" ({_rendezvous.names[index]})" if _rendezvous else ""


# --- The end --------------------------------------------------------------------------------------


class Preempted(Exception):
    """The run was asked to stop; the same command goes on from the step that is saved."""


# Of this process, in all of its runs: JAX wants numbers that rise by one at each call.
_calls = itertools.count(1)


class StopRequest:
    """Whether this run is asked to stop, by SIGTERM; a context manager.

    Schedulers and clouds send it some seconds before they end a process or take its machine; on a
    machine of Google's this process sends it to itself when the machine is about to be taken.
    Outside of the context it ends the process, as it does by default.
    """

    def __init__(self) -> None:
        self.asked = False
        """Whether `reached` has said so."""
        self._signalled = False
        self._previous: Any = None
        self._notice: maintenance.Notice | None = None

    def __enter__(self) -> "StopRequest":
        # Of several processes JAX listens. Only the main thread may set a handler.
        is_main_thread = threading.current_thread() is threading.main_thread()
        if jax.process_count() == 1 and is_main_thread:
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        if self._previous is not None or jax.process_count() > 1:
            self._notice = maintenance.Notice(_send_sigterm)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._notice:
            self._notice.stop()
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _ask(self, *about: object) -> None:
        self._signalled = True

    def reached(self) -> bool:
        """Returns whether to stop now; call it in each step, and between the batches of what lasts.

        Of several processes each has to call it equally often. All are told so at the same call,
        the next one that none has made when one of them was asked.
        """
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            self.asked |= bool(multihost_utils.reached_preemption_sync_point(next(_calls)))
        else:
            self.asked = self._signalled
        return self.asked

    def check(self) -> None:
        """Raises Preempted if `reached`."""
        if self.reached():
            raise Preempted("asked to stop (SIGTERM)")


def _send_sigterm(notice: str) -> None:
    print(f"t5jax: this machine is about to be taken ({notice})", file=sys.stderr, flush=True)
    # To the thread that handles it. Sent to the process, another might take it, and this one would
    # not hear of it before what it waits for has come.
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def leave() -> None:
    """Says to the other processes that this one ends as it should."""
    if _rendezvous:
        _rendezvous.leave()


def fail(message: str) -> bool:
    """Says to the others why this process fails; returns whether there are any.

    It must end by `os._exit` then: jax would wait for the others, and they for this process.
    """
    if _rendezvous:
        _rendezvous.fail(message)
    return _rendezvous is not None
