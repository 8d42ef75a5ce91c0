"""Compute Engine, on which alone TPU7x and later exist.

Several of its machines make a slice by a workload policy with the slice's topology.
"""

from collections.abc import Sequence

from gcp.backends.backend import LABEL, SCOPE, SSH_FLAGS, State, gcloud, is_there
from gcp.settings import Settings
from gcp.steps import Commands, Step, base_name, has

GROUPS = ("compute", "instance-groups", "managed")
_TEMPLATES = ("compute", "instance-templates")
_POLICIES = ("compute", "resource-policies")
DISK = "200GB"
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
                    gcloud(
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
                gcloud(
                    s,
                    *(*_TEMPLATES, "create", s.name, f"--machine-type={s.slice.machine_type}"),
                    *(f"--image-project={image_project}", image, f"--boot-disk-size={DISK}"),
                    *("--maintenance-policy=TERMINATE", *template, *network),
                    *(f"--service-account={s.service_account}", f"--scopes={SCOPE}"),
                    *(f"--labels={LABEL}={s.name}", "--quiet"),
                ),
                ask=self._list(s, _TEMPLATES),
                is_done=is_there(
                    s, s.slice.machine_type, lambda t: t.get("properties", {}).get("machineType")
                ),
                undo=self._delete(s, _TEMPLATES),
            ),
            Step(
                f"instance group {s.name}",
                gcloud(
                    s,
                    *(*GROUPS, "create", s.name, f"--zone={s.zone}", f"--size={s.slice.hosts}"),
                    *(f"--template={s.name}", f"--base-instance-name={s.name}"),
                    # A slice with one new machine is none: all of it is made again.
                    "--default-action-on-vm-failure=do-nothing",
                    *([f"--workload-policy={policy}"] if several else []),
                    "--quiet",
                ),
                ask=self._list(s, GROUPS),
                is_done=is_there(
                    s,
                    f"{s.slice.hosts} machines",
                    lambda g: f"{g['targetSize']} machines" if "targetSize" in g else None,
                ),
                undo=self._delete(s, GROUPS),
            ),
        ]
        return steps

    def delete(self, s: Settings) -> list[Step]:
        kinds = {
            "instance group": GROUPS,
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
        if not has(s.name)(commands.ask(self._list(s, GROUPS))):
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
            [*gcloud(s, "compute", "ssh", name, zone, *SSH_FLAGS, command), "--quiet"]
            for name in names
        ]

    def _instances(self, s: Settings) -> tuple[str, ...]:
        zone = f"--zone={s.zone}"
        return gcloud(s, *GROUPS, "list-instances", s.name, zone, "--format=json")

    def _list(self, s: Settings, kind: Sequence[str]) -> tuple[str, ...]:
        where = {
            GROUPS: [f"--zones={s.zone}"],
            _POLICIES: [f"--regions={s.region}"],
            _TEMPLATES: [],
        }[tuple(kind)]
        return gcloud(s, *kind, "list", *where, "--format=json")

    def _delete(self, s: Settings, kind: Sequence[str]) -> tuple[str, ...]:
        where = {
            GROUPS: [f"--zone={s.zone}"],
            _POLICIES: [f"--region={s.region}"],
            _TEMPLATES: [],
        }[tuple(kind)]
        return gcloud(s, *kind, "delete", s.name, *where, "--quiet")


def _image(name: str) -> tuple[str, str]:
    _, project, _, _, *rest = name.split("/")
    if rest[0] == "family":
        return project, f"--image-family={rest[1]}"
    return project, f"--image={rest[0]}"
