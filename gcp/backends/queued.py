"""Queued resources of Google's Cloud TPU API, which has v4 to v6e."""

from collections.abc import Callable
from typing import Any

from gcp.backends.backend import LABEL, SCOPE, SSH_FLAGS, State, gcloud, is_there
from gcp.settings import Settings
from gcp.steps import Commands, Step, base_name, has

QUEUED = ("compute", "tpus", "queued-resources")
TPU_VM = ("compute", "tpus", "tpu-vm")
STATES = {
    "CREATING": State.WAITING,
    "ACCEPTED": State.WAITING,
    "PROVISIONING": State.WAITING,
    "WAITING_FOR_RESOURCES": State.WAITING,
    "ACTIVE": State.READY,
    "FAILED": State.LOST,
    "SUSPENDING": State.LOST,
    "SUSPENDED": State.LOST,
    "DELETING": State.LOST,
}
_LIVING_NODES = {"READY", "CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING"}


class Queued:
    """A queued resource of the run's name, with a node of that name, or one for each slice."""

    def create(self, s: Settings) -> list[Step]:
        zone = f"--zone={s.zone}"
        how = {"spot": ["--spot"], "reserved": ["--reserved"], "on-demand": []}[s.provisioning]
        if s.max_wait:
            how.append(f"--valid-until-duration={s.max_wait}")
        nodes = [f"--node-id={s.name}"]
        if s.slices > 1:
            nodes = [f"--node-count={s.slices}", f"--node-prefix={s.name}"]
        runtime = s.runtime_version or s.slice.generation.runtime
        return [
            Step(
                f"queued resource {s.name}",
                gcloud(
                    s,
                    *(*QUEUED, "create", s.name, zone, *nodes),
                    *(f"--accelerator-type={s.slice.accelerator_type}",),
                    *(f"--runtime-version={runtime}", *how, *_network(s)),
                    *(f"--service-account={s.service_account}", f"--scopes={SCOPE}"),
                    *(f"--labels={LABEL}={s.name}", "--quiet"),
                ),
                ask=self._list(s),
                is_done=is_there(s, s.slice.accelerator_type, _accelerator_type),
                undo=self._delete(s),
            )
        ]

    def delete(self, s: Settings) -> list[Step]:
        listed = gcloud(s, *TPU_VM, "list", f"--zone={s.zone}", "--format=json")
        steps = [
            Step(
                f"delete queued resource {s.name}",
                self._delete(s),
                ask=self._list(s),
                is_done=lambda answer: not has(s.name)(answer),
                when="if this lists it",
                attempts=3,
            )
        ]
        # The queued resource takes its nodes with it; this finds those that stayed behind.
        steps += [
            Step(
                f"delete TPU VM {node}",
                gcloud(s, *TPU_VM, "delete", node, f"--zone={s.zone}", "--quiet"),
                ask=listed,
                is_done=_is_gone(node),
                when="if this lists it",
                attempts=3,
            )
            for node in s.nodes
        ]
        return steps

    def state(self, commands: Commands, s: Settings) -> tuple[State, str]:
        found = [r for r in commands.ask(self._list(s)) if base_name(r) == s.name]
        if not found:
            return State.ABSENT, "no queued resource"
        word = found[0].get("state", {}).get("state", "unknown")
        state = STATES.get(word, State.WAITING)
        if state is not State.READY:
            return state, word
        nodes = commands.ask(gcloud(s, *TPU_VM, "list", f"--zone={s.zone}", "--format=json"))
        states = {base_name(node): node.get("state", "unknown") for node in nodes}
        found_states = [states.get(node, "no node") for node in s.nodes]
        words = f"{word}, node {', '.join(sorted(set(found_states)))}"
        if set(found_states) == {"READY"}:
            return State.READY, words
        # One slice alone is no run: all are made again.
        return (State.WAITING if set(found_states) <= _LIVING_NODES else State.LOST), words

    def ssh(
        self, commands: Commands, s: Settings, worker: int | None, script: str
    ) -> list[list[str]]:
        nodes, which = s.nodes, "all"
        if worker is not None:
            nodes = nodes[worker // s.slice.hosts :][:1]
            which = str(worker % s.slice.hosts)
        found = []
        for node in nodes:
            words = (*TPU_VM, "ssh", node, f"--zone={s.zone}", f"--worker={which}")
            found.append([*gcloud(s, *words, *SSH_FLAGS, f"--command={script}"), "--quiet"])
        return found

    def _list(self, s: Settings) -> tuple[str, ...]:
        return gcloud(s, *QUEUED, "list", f"--zone={s.zone}", "--format=json")

    def _delete(self, s: Settings) -> tuple[str, ...]:
        return gcloud(s, *QUEUED, "delete", s.name, f"--zone={s.zone}", "--force", "--quiet")


def _accelerator_type(request: Any) -> object:
    nodes = request.get("tpu", {}).get("nodeSpec", [])
    return base_name(nodes[0].get("node", {}).get("acceleratorType", "")) if nodes else None


def _is_gone(name: str) -> Callable[[Any], bool]:
    return lambda answer: not has(name)(answer)


def _network(s: Settings) -> list[str]:
    network = [f"--network={s.network}"] if s.network else []
    return network + ([f"--subnetwork={s.subnetwork}"] if s.subnetwork else [])
