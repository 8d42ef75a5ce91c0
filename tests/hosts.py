"""Hosts of a run, as processes on this machine."""

import random
import socket

from processes import Ended, Process


def start_host(args: list[str], env: dict[str, str]) -> Process:
    """Starts a process of `t5jax`."""
    return Process("-m", "t5jax.cli", *args, env=env)


def run_hosts(args: list[str], envs: list[dict[str, str]]) -> list[Ended]:
    """Runs a command in a process for each environment, until all have ended."""
    return [process.wait() for process in [start_host(args, env) for env in envs]]


def free_port() -> int:
    """Returns a port that is free, and so is the next one.

    It lies below those that the system gives out by itself: one of them might be another process's
    before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("", port))
                other.bind(("", port + 1))
            except OSError:
                continue
            return port


def by_address(count: int, port: int | None = None) -> list[dict[str, str]]:
    """Returns the environments of processes that are started by address."""
    address = f"localhost:{port or free_port()}"
    return [
        {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(i),
            "T5JAX_HOST_TIMEOUT": "60",
        }
        for i in range(count)
    ]
