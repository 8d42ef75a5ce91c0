"""What costs money, or will as soon as it is granted."""

import dataclasses
import re
from collections.abc import Mapping

from gcp.backends import State, compute, queued
from gcp.backends.backend import LABEL, gcloud
from gcp.settings import Settings
from gcp.steps import Commands, base_name


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


def tpu_zones(commands: Commands, s: Settings) -> list[str]:
    """Returns all zones that have TPUs."""
    return sorted(location["locationId"] for location in commands.ask(zones_question(s)))


def zones_question(s: Settings) -> tuple[str, ...]:
    """Returns what lists all zones that have TPUs."""
    return gcloud(s, "compute", "tpus", "locations", "list", "--format=json")


def questions(s: Settings) -> Mapping[str, tuple[str, ...]]:
    """Returns what lists all that may cost money, of this run and of others; TPUs in its zone."""
    zone, labelled = f"--zone={s.zone}", f"labels.{LABEL}:*"
    return {
        "tpu": gcloud(s, *queued.TPU_VM, "list", zone, "--format=json"),
        "queued": gcloud(s, *queued.QUEUED, "list", zone, "--format=json"),
        "instance": gcloud(
            s, "compute", "instances", "list", f"--filter={labelled}", "--format=json"
        ),
        "group": gcloud(s, *compute.GROUPS, "list", "--format=json"),
        # A machine's disk has its name, and not its labels.
        "disk": gcloud(
            *(s, "compute", "disks", "list"),
            *(f"--filter={labelled} OR name ~ ^{s.name}-", "--format=json"),
        ),
        "bucket": gcloud(s, "storage", "buckets", "list", "--format=json"),
    }


def tpus(commands: Commands, s: Settings) -> list[Resource]:
    """Returns the TPUs and the requests for some in the zone of the settings."""
    asked = questions(s)
    found = []
    for node in commands.ask(asked["tpu"]):
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
    for request in commands.ask(asked["queued"]):
        state = request.get("state", {}).get("state", "unknown")
        if base_name(request) not in nodes and queued.STATES.get(state) is not State.LOST:
            detail = f"{state}, costs once it is granted"
            found.append(Resource("queued resource", base_name(request), s.zone, detail))
    return found


def resources(commands: Commands, s: Settings) -> list[Resource]:
    """Returns what costs money now, or will as soon as a request is granted."""
    found = tpus(commands, s)
    rest = ("instance", "group", "disk", "bucket")
    answers = {kind: commands.ask(questions(s)[kind]) for kind in rest}
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
