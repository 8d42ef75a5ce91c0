"""The two ways to a TPU on Google Cloud: queued resources, and Compute Engine.

Google's Cloud TPU API with its queued resources has v4 to v6e. TPU7x and later only exist as
machines of Compute Engine, of which several make a slice by a workload policy with its topology.
Whether something is there is read from lists, never from an error: what could not be asked is not
absent.
"""

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from gcp.settings import Settings
from gcp.steps import Commands, Step, base_name, has

LABEL = "t5jax"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
DISK = "200GB"
# A host that has gone says nothing: without these, ssh would wait for it for hours.
_SSH_FLAGS = tuple(
    f"--ssh-flag=-o{option}"
    for option in ("ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=8")
)


class State(enum.Enum):
    """What there is of a slice."""

    ABSENT = "absent"
    WAITING = "waiting"
    READY = "ready"
    LOST = "lost"
    """Preempted, failed or stopped: to be deleted, and made again."""


@dataclasses.dataclass(frozen=True)
class Resource:
    """Something that costs money."""

    kind: str
    name: str
    zone: str
    detail: str
    """What Google calls its state, or its size."""
    accelerator: str = ""
    """As in a file of settings; empty for what is no TPU."""
    provisioning: str = ""


class Backend(Protocol):
    """What is asked of each way."""

    def create(self, s: Settings) -> list[Step]:
        """Returns the steps to a slice, or to a request for one."""

    def delete(self, s: Settings) -> list[Step]:
        """Returns the steps that leave nothing of it."""

    def state(self, commands: Commands, s: Settings) -> tuple[State, str]:
        """Returns what there is, and in Google's words."""

    def ssh(
        self, commands: Commands, s: Settings, worker: int | None, script: str
    ) -> list[list[str]]:
        """Returns the commands that run a script on one worker, or on all (None)."""


def choose(s: Settings) -> Backend:
    """Returns the way to the slice of a run.

    Raises:
      ValueError: if the one that was asked for does not have it, or needs more fields.
    """
    generation = s.slice.generation
    backend = s.backend or ("queued" if generation.accelerator else "compute")
    if backend == "queued":
        if not generation.accelerator:
            raise ValueError(
                f"queued resources have no {generation.name}: it only exists on Compute Engine and "
                'GKE; set backend = "compute", or leave it out'
            )
        _refuse(s, "queued", ("reservation", "vm_image"))
        if s.max_wait and s.provisioning == "reserved":
            raise ValueError("max_wait is for requests that wait in a queue; leave it out")
        return Queued()
    if not generation.machine:
        raise ValueError(f"Compute Engine has no {generation.name}; leave backend out")
    _refuse(s, "compute", ("max_wait", "runtime_version"))
    if s.slices > 1:
        raise ValueError(
            f"slices is {s.slices}, and backend compute has one; take a larger slice, or JobSet on "
            "GKE: launchers/gke/multislice"
        )
    if not s.vm_image:
        raise ValueError(
            "backend compute needs vm_image, the image of its machines; list those with software "
            "for TPUs: gcloud compute images list --project=ubuntu-os-accelerator-images "
            '--no-standard-images, and set vm_image = "projects/ubuntu-os-accelerator-images/'
            'global/images/family/FAMILY"'
        )
    if (s.provisioning == "reserved") != bool(s.reservation):
        raise ValueError('reservation = "NAME" and provisioning = "reserved" belong together')
    return Compute()


def _refuse(s: Settings, backend: str, names: Sequence[str]) -> None:
    for name in names:
        if getattr(s, name):
            raise ValueError(f"{name} has no effect on backend {backend}; leave it out")


def _is_there(
    s: Settings, expected: object, kind: Callable[[Any], object]
) -> Callable[[Any], bool]:
    """Returns whether a list has the run's resource, of the kind that its file asks for.

    Raises:
      ValueError: that function, if it is of another kind, which would be used, and paid for.
    """

    def is_there(answer: Any) -> bool:
        found = [resource for resource in answer if base_name(resource) == s.name]
        for other in {kind(resource) for resource in found} - {expected, None, ""}:
            raise ValueError(
                f"{s.name} is there already, with {other}, and the file asks for {expected}; "
                "`delete` it first, or give this run another name"
            )
        return bool(found)

    return is_there


def _network(s: Settings) -> list[str]:
    network = [f"--network={s.network}"] if s.network else []
    return network + ([f"--subnetwork={s.subnetwork}"] if s.subnetwork else [])


def _gcloud(s: Settings, *words: str) -> tuple[str, ...]:
    return ("gcloud", *words, f"--project={s.project}")


# --- Queued resources -----------------------------------------------------------------------------

_QUEUED = ("compute", "tpus", "queued-resources")
_TPU_VM = ("compute", "tpus", "tpu-vm")
_QUEUED_STATES = {
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
                _gcloud(
                    s,
                    *(*_QUEUED, "create", s.name, zone, *nodes),
                    *(f"--accelerator-type={s.slice.accelerator_type}",),
                    *(f"--runtime-version={runtime}", *how, *_network(s)),
                    *(f"--service-account={s.service_account}", f"--scopes={SCOPE}"),
                    *(f"--labels={LABEL}={s.name}", "--quiet"),
                ),
                ask=self._list(s),
                is_done=_is_there(s, s.slice.accelerator_type, _accelerator_type),
                undo=self._delete(s),
            )
        ]

    def delete(self, s: Settings) -> list[Step]:
        listed = _gcloud(s, *_TPU_VM, "list", f"--zone={s.zone}", "--format=json")
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
                _gcloud(s, *_TPU_VM, "delete", node, f"--zone={s.zone}", "--quiet"),
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
        state = _QUEUED_STATES.get(word, State.WAITING)
        if state is not State.READY:
            return state, word
        nodes = commands.ask(_gcloud(s, *_TPU_VM, "list", f"--zone={s.zone}", "--format=json"))
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
            words = (*_TPU_VM, "ssh", node, f"--zone={s.zone}", f"--worker={which}")
            found.append([*_gcloud(s, *words, *_SSH_FLAGS, f"--command={script}"), "--quiet"])
        return found

    def _list(self, s: Settings) -> tuple[str, ...]:
        return _gcloud(s, *_QUEUED, "list", f"--zone={s.zone}", "--format=json")

    def _delete(self, s: Settings) -> tuple[str, ...]:
        return _gcloud(s, *_QUEUED, "delete", s.name, f"--zone={s.zone}", "--force", "--quiet")


def _accelerator_type(request: Any) -> object:
    nodes = request.get("tpu", {}).get("nodeSpec", [])
    return base_name(nodes[0].get("node", {}).get("acceleratorType", "")) if nodes else None


def _is_gone(name: str) -> Callable[[Any], bool]:
    return lambda answer: not has(name)(answer)


# --- Compute Engine -------------------------------------------------------------------------------

_GROUPS = ("compute", "instance-groups", "managed")
_TEMPLATES = ("compute", "instance-templates")
_POLICIES = ("compute", "resource-policies")
_STARTING = {"PROVISIONING", "STAGING", "PENDING", "REPAIRING", ""}


class Compute:
    """A managed instance group; several hosts have a workload policy of the slice's topology."""

    def create(self, s: Settings) -> list[Step]:
        template = ["--reservation-affinity=specific", f"--reservation={s.reservation}"]
        if s.provisioning != "reserved":
            template = [
                f"--provisioning-model={'SPOT' if s.provisioning == 'spot' else 'STANDARD'}"
            ]
        if s.provisioning == "spot":
            template.append("--instance-termination-action=STOP")
        image_project, image = _image(s.vm_image)
        network = [f"--subnet={s.subnetwork}", f"--region={s.region}"] if s.subnetwork else []
        network = ([f"--network={s.network}"] if s.network else []) + network
        several = s.slice.hosts > 1
        steps = []
        if several:
            steps.append(
                Step(
                    f"workload policy {s.name}",
                    _gcloud(
                        s,
                        *(*_POLICIES, "create", "workload-policy", s.name, f"--region={s.region}"),
                        *("--type=HIGH_THROUGHPUT", f"--accelerator-topology={s.slice.shape}"),
                        "--quiet",
                    ),
                    ask=self._list(s, _POLICIES),
                    is_done=has(s.name),
                    undo=self._delete(s, _POLICIES),
                )
            )
        policy = f"projects/{s.project}/regions/{s.region}/resourcePolicies/{s.name}"
        steps += [
            Step(
                f"instance template {s.name}",
                _gcloud(
                    s,
                    *(*_TEMPLATES, "create", s.name, f"--machine-type={s.slice.machine_type}"),
                    *(f"--image-project={image_project}", image, f"--boot-disk-size={DISK}"),
                    *("--maintenance-policy=TERMINATE", *template, *network),
                    *(f"--service-account={s.service_account}", f"--scopes={SCOPE}"),
                    *(f"--labels={LABEL}={s.name}", "--quiet"),
                ),
                ask=self._list(s, _TEMPLATES),
                is_done=_is_there(
                    s, s.slice.machine_type, lambda t: t.get("properties", {}).get("machineType")
                ),
                undo=self._delete(s, _TEMPLATES),
            ),
            Step(
                f"instance group {s.name}",
                _gcloud(
                    s,
                    *(*_GROUPS, "create", s.name, f"--zone={s.zone}", f"--size={s.slice.hosts}"),
                    *(f"--template={s.name}", f"--base-instance-name={s.name}"),
                    # A slice with one new machine is none: all of it is made again.
                    "--default-action-on-vm-failure=do-nothing",
                    *([f"--workload-policy={policy}"] if several else []),
                    "--quiet",
                ),
                ask=self._list(s, _GROUPS),
                is_done=_is_there(
                    s,
                    f"{s.slice.hosts} machines",
                    lambda g: f"{g['targetSize']} machines" if "targetSize" in g else None,
                ),
                undo=self._delete(s, _GROUPS),
            ),
        ]
        return steps

    def delete(self, s: Settings) -> list[Step]:
        kinds = {
            "instance group": _GROUPS,
            "instance template": _TEMPLATES,
            "workload policy": _POLICIES,
        }
        return [
            Step(
                f"delete {kind} {s.name}",
                self._delete(s, words),
                ask=self._list(s, words),
                is_done=lambda answer: not has(s.name)(answer),
                when="if this lists it",
                attempts=3,
            )
            for kind, words in kinds.items()
        ]

    def state(self, commands: Commands, s: Settings) -> tuple[State, str]:
        if not has(s.name)(commands.ask(self._list(s, _GROUPS))):
            return State.ABSENT, "no instance group"
        found = [m.get("instanceStatus") or "" for m in commands.ask(self._instances(s))]
        running = found.count("RUNNING")
        words = f"{running} of {s.slice.hosts} machines run"
        if lost := sorted({word for word in found if word not in ("RUNNING", *_STARTING)}):
            return State.LOST, f"{words}, others are {', '.join(lost)}"
        if running == s.slice.hosts:
            return State.READY, words
        return State.WAITING, words

    def ssh(
        self, commands: Commands, s: Settings, worker: int | None, script: str
    ) -> list[list[str]]:
        names = ["INSTANCE"]
        if not commands.dry_run:
            names = sorted(base_name(m["instance"]) for m in commands.ask(self._instances(s)))
            if worker is not None:
                names = names[worker : worker + 1]
        zone, command = f"--zone={s.zone}", f"--command={script}"
        return [
            [*_gcloud(s, "compute", "ssh", name, zone, *_SSH_FLAGS, command), "--quiet"]
            for name in names
        ]

    def _instances(self, s: Settings) -> tuple[str, ...]:
        zone = f"--zone={s.zone}"
        return _gcloud(s, *_GROUPS, "list-instances", s.name, zone, "--format=json")

    def _list(self, s: Settings, kind: Sequence[str]) -> tuple[str, ...]:
        where = {
            _GROUPS: [f"--zones={s.zone}"],
            _POLICIES: [f"--regions={s.region}"],
            _TEMPLATES: [],
        }[tuple(kind)]
        return _gcloud(s, *kind, "list", *where, "--format=json")

    def _delete(self, s: Settings, kind: Sequence[str]) -> tuple[str, ...]:
        where = {
            _GROUPS: [f"--zone={s.zone}"],
            _POLICIES: [f"--region={s.region}"],
            _TEMPLATES: [],
        }[tuple(kind)]
        return _gcloud(s, *kind, "delete", s.name, *where, "--quiet")


def _image(name: str) -> tuple[str, str]:
    _, project, _, _, *rest = name.split("/")
    if rest[0] == "family":
        return project, f"--image-family={rest[1]}"
    return project, f"--image={rest[0]}"


# --- What costs money -----------------------------------------------------------------------------


def tpu_zones(commands: Commands, s: Settings) -> list[str]:
    """Returns all zones that have TPUs."""
    found = commands.ask(_gcloud(s, "compute", "tpus", "locations", "list", "--format=json"))
    return sorted(location["locationId"] for location in found)


def billable_questions(s: Settings) -> Mapping[str, tuple[str, ...]]:
    """Returns what lists all that may cost money, of this run and of others; TPUs in its zone."""
    zone, labelled = f"--zone={s.zone}", f"labels.{LABEL}:*"
    return {
        "tpu": _gcloud(s, *_TPU_VM, "list", zone, "--format=json"),
        "queued": _gcloud(s, *_QUEUED, "list", zone, "--format=json"),
        "instance": _gcloud(
            s, "compute", "instances", "list", f"--filter={labelled}", "--format=json"
        ),
        "group": _gcloud(s, *_GROUPS, "list", "--format=json"),
        # A machine's disk has its name, and not its labels.
        "disk": _gcloud(
            *(s, "compute", "disks", "list"),
            *(f"--filter={labelled} OR name ~ ^{s.name}-", "--format=json"),
        ),
        "bucket": _gcloud(s, "storage", "buckets", "list", "--format=json"),
    }


def billable_tpus(commands: Commands, s: Settings) -> list[Resource]:
    """Returns the TPUs and the requests for some in the zone of the settings."""
    questions = billable_questions(s)
    found = []
    for node in commands.ask(questions["tpu"]):
        scheduling = node.get("schedulingConfig", {})
        spot = scheduling.get("spot") or scheduling.get("preemptible")
        found.append(
            Resource(
                "TPU VM",
                base_name(node),
                s.zone,
                node.get("state", "unknown"),
                node.get("acceleratorType", "").rpartition("/")[2],
                "spot" if spot else "on-demand",
            )
        )
    # Of several slices, the nodes have a number behind the request's name.
    nodes = {n for r in found for n in (r.name, re.sub(r"-\d+$", "", r.name))}
    for request in commands.ask(questions["queued"]):
        state = request.get("state", {}).get("state", "unknown")
        if base_name(request) not in nodes and _QUEUED_STATES.get(state) is not State.LOST:
            detail = f"{state}, costs once it is granted"
            found.append(Resource("queued resource", base_name(request), s.zone, detail))
    return found


def billable(commands: Commands, s: Settings) -> list[Resource]:
    """Returns what costs money now, or will as soon as a request is granted."""
    found = billable_tpus(commands, s)
    rest = ("instance", "group", "disk", "bucket")
    answers = {kind: commands.ask(billable_questions(s)[kind]) for kind in rest}
    for machine in answers["instance"]:
        zone = base_name(machine.get("zone", s.zone))
        model = machine.get("scheduling", {}).get("provisioningModel", "STANDARD")
        found.append(
            Resource(
                "instance",
                base_name(machine),
                zone,
                machine.get("status", "unknown"),
                base_name(machine.get("machineType", "")),
                "spot" if model == "SPOT" else "on-demand",
            )
        )
    for group in answers["group"]:
        if base_name(group.get("instanceTemplate", "")) == s.name or base_name(group) == s.name:
            size, zone = group.get("targetSize", "?"), base_name(group.get("zone", s.zone))
            found.append(Resource("instance group", base_name(group), zone, f"keeps {size}"))
    for disk in answers["disk"]:
        size = f"{disk.get('sizeGb', '?')} GB"
        found.append(Resource("disk", base_name(disk), base_name(disk.get("zone", "")), size))
    for bucket in answers["bucket"]:
        if base_name(bucket) == s.bucket or "t5jax" in bucket.get("labels", {}):
            found.append(
                Resource("bucket", base_name(bucket), bucket.get("location", ""), "by its size")
            )
    return found
