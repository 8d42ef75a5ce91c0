"""A stand-in of Google Cloud: answers gcloud's commands, records them, fails, preempts, takes time.

In tests it is the `Machine` of `gcp.steps`. `install` puts it on the path as a program `gcloud`,
whose state is a file.
"""

import json
import os
import pickle
import re
import shlex
import stat
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

PROVISION = 120.0
"""Seconds from a request to its machines."""
STATE = "GOOGLE_CLOUD_STANDIN"
"""Environment variable of the program: the file of its state."""
NOT_FOUND = (1, "", "ERROR: (gcloud) NOT_FOUND: the resource was not found")


class Host(types.SimpleNamespace):
    """A machine of a slice, with one service."""

    def __init__(self, name: str = ""):
        super().__init__(name=name, copied=False, service="none", since=0.0)


class GoogleCloud:
    """One project. Runs need `work` seconds, of which each 600 are kept in the bucket."""

    def __init__(self, *, work: float = 1500.0, hosts: int = 1):
        self.now, self.calls = 0.0, []
        self.apis, self.buckets, self.accounts = set(), {}, set()
        self.objects, self.bindings, self.secrets = {}, {}, {"hf-token"}
        self.queued, self.nodes, self.groups, self.templates, self.policies = {}, {}, {}, {}, {}
        self.hosts = {}
        self.zones: set[str] = set()
        """Zones in which something was asked for; what is in one is listed in all of these."""
        self.num_hosts, self.work, self.saved = hosts, work, 0.0
        self.preempt_at: list[float] = []
        self.crash: Callable[[GoogleCloud], bool] = lambda cloud: False
        self.fail_at: set[int] = set()
        """Numbers of calls that fail, from 1."""
        self.fail_after_effect = False
        self.on_call: Callable[[GoogleCloud, list[str]], None] = lambda cloud, words: None

    # --- A machine, as in gcp.steps ---

    def run(self, command: Sequence[str]) -> tuple[int, str, str]:
        self.calls.append(list(command))
        self.on_call(self, list(command))
        self._advance(1.0)
        fails = len(self.calls) in self.fail_at
        if fails and not self.fail_after_effect:
            return 1, "", "ERROR: (gcloud) HttpError 503: the service is unavailable"
        answer = self._answer(list(command))
        if fails:
            return 1, "", "ERROR: (gcloud) the connection was reset"
        return answer

    def follow(self, command: Sequence[str]) -> int:
        status, output, _ = self.run(command)
        print(output, end="")
        return status

    def sleep(self, seconds: float) -> None:
        self._advance(seconds)

    def time(self) -> float:
        return self.now

    # --- What a test asks ---

    @property
    def costs(self) -> list[str]:
        """What is billed, or will be as soon as it is granted."""
        waiting = [n for n, q in self.queued.items() if q["state"] == "ACCEPTED"]
        return sorted({*waiting, *self.nodes, *self.groups})

    @property
    def is_finished(self) -> bool:
        return self.saved >= self.work

    # --- Time ---

    def _advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            step = min(30.0, end - self.now)
            self.now += step
            self._tick()

    def _tick(self) -> None:
        for request in self.queued.values():
            if request["state"] == "ACCEPTED" and self.now >= request["at"] + PROVISION:
                request["state"] = "ACTIVE"
                for node in request["nodes"]:
                    self.nodes[node] = {"state": "READY", "type": request["type"]}
                    self._boot(node)
        for name, group in self.groups.items():
            if group["state"] == "STAGING" and self.now >= group["at"] + PROVISION:
                group["state"] = "RUNNING"
                self._boot(name)
        ready = [n for n in self.hosts if self.hosts[n]]
        if ready and self.preempt_at and self.now >= self.preempt_at[0]:
            self.preempt_at.pop(0)
            self._preempt(ready[0])
        for name in (*self.queued, *self.groups):
            hosts = self._hosts_of(name)
            running = [host for host in hosts if host.service == "running"]
            if running and len(running) == len(hosts):
                since = max(host.since for host in hosts)
                if self.crash(self):
                    hosts[-1].service = "failed"
                elif self.now >= since + self.work - self.saved:
                    self.saved = self.work
                    for host in hosts:
                        host.service = "finished"

    def _boot(self, name: str) -> None:
        self.hosts[name] = [Host(f"{name}-w{i}") for i in range(self.num_hosts)]

    def _hosts_of(self, name: str) -> list[Host]:
        """Returns the hosts of a run, which may have several slices."""
        nodes = self.queued[name]["nodes"] if name in self.queued else [name]
        return [host for node in nodes for host in self.hosts.get(node, [])]

    def _preempt(self, node: str) -> None:
        """Takes one slice, with which its run ends."""
        requests = [name for name, request in self.queued.items() if node in request["nodes"]]
        (name,) = requests or [node]
        hosts = self._hosts_of(name)
        if all(host.service == "running" for host in hosts):
            done = self.now - max(host.since for host in hosts)
            self.saved = min(self.work, self.saved + done // 600 * 600)
        for host in hosts:
            host.service = "failed"
        self.hosts[node] = []
        if requests:
            if len(self.queued[name]["nodes"]) == 1:  # Of several, the others stay, and cost.
                self.queued[name]["state"] = "SUSPENDED"
            self.nodes[node]["state"] = "PREEMPTED"
        else:
            self.groups[name]["state"] = "TERMINATED"

    # --- gcloud ---

    def _answer(self, words: list[str]) -> tuple[int, str, str]:
        assert words[0] == "gcloud", words
        plain = [word for word in words[1:] if not word.startswith("--")]
        flags = dict(word[2:].partition("=")[::2] for word in words[1:] if word.startswith("--"))
        assert "project" in flags, words
        for length in range(len(plain), 0, -1):
            method = getattr(self, "_" + "_".join(plain[:length]).replace("-", "_"), None)
            if method:
                answer = method(plain[length:], flags)
                if isinstance(answer, tuple):
                    return answer
                return 0, answer if isinstance(answer, str) else json.dumps(answer), ""
        raise AssertionError(f"unknown: {shlex.join(words)}")

    def _services_list(self, _, flags):
        return [{"config": {"name": name}} for name in sorted(self.apis)]

    def _services_enable(self, names, flags):
        self.apis.update(names)
        return ""

    def _storage_buckets_list(self, _, flags):
        return [{"name": name, "location": where} for name, where in self.buckets.items()]

    def _storage_buckets_create(self, names, flags):
        self.buckets[names[0].removeprefix("gs://")] = flags["location"]
        return ""

    def _iam_service_accounts_list(self, _, flags):
        return [{"email": email} for email in sorted(self.accounts)]

    def _iam_service_accounts_create(self, names, flags):
        self.accounts.add(f"{names[0]}@{flags['project']}.iam.gserviceaccount.com")
        return ""

    def _get_policy(self, resource):
        bound = self.bindings.get(resource, {})
        bindings = [{"role": role, "members": sorted(who)} for role, who in bound.items()]
        return {"etag": "x", "bindings": bindings} if bindings else {"etag": "x"}

    def _add_binding(self, resource, flags):
        assert flags["member"].removeprefix("serviceAccount:") in self.accounts
        bound = self.bindings.setdefault(resource, {})
        bound.setdefault(flags["role"], set()).add(flags["member"])
        return self._get_policy(resource)

    def _storage_buckets_get_iam_policy(self, names, flags):
        return self._get_policy(names[0])

    def _storage_buckets_add_iam_policy_binding(self, names, flags):
        return self._add_binding(names[0], flags)

    def _secrets_get_iam_policy(self, names, flags):
        assert names[0] in self.secrets
        return self._get_policy(names[0])

    def _secrets_add_iam_policy_binding(self, names, flags):
        return self._add_binding(names[0], flags)

    def _artifacts_repositories_get_iam_policy(self, names, flags):
        return self._get_policy(names[0])

    def _artifacts_repositories_add_iam_policy_binding(self, names, flags):
        return self._add_binding(names[0], flags)

    def _storage_rsync(self, names, flags):
        folder, target = Path(names[0]), names[1]
        for path in (path for path in folder.rglob("*") if path.is_file()):
            name = f"{target}/{path.relative_to(folder).as_posix()}"
            self.objects[name] = path.read_text() if path.suffix in (".sh", ".env") else ""
        return ""

    def _storage_ls(self, names, flags):
        found = [name for name in sorted(self.objects) if name.startswith(names[0].rstrip("*"))]
        if not found:
            return 1, "", "ERROR: (gcloud.storage.ls) One or more URLs matched no objects."
        return "\n".join(found) + "\n"

    def _storage_cat(self, names, flags):
        return "".join(self.objects[name] for name in names)

    def _storage_cp(self, names, flags):
        self.objects[names[1]] = ""
        return ""

    def _storage_rm(self, names, flags):
        del self.objects[names[0]]
        return ""

    def _compute_tpus_locations_list(self, _, flags):
        return [{"locationId": zone} for zone in (*self.zones, "europe-west4-a")]

    def _compute_tpus_queued_resources_list(self, _, flags):
        path = "projects/{project}/locations/{zone}/queuedResources/".format(**flags)
        if flags["zone"] not in self.zones:
            return []
        return [
            {
                "name": path + name,
                "state": {"state": request["state"]},
                "tpu": {"nodeSpec": [{"node": {"acceleratorType": request["type"]}}]},
            }
            for name, request in self.queued.items()
        ]

    def _compute_tpus_queued_resources_create(self, names, flags):
        assert names[0] not in self.queued
        self.zones.add(flags["zone"])
        count, prefix = int(flags.get("node-count", 0)), flags.get("node-prefix")
        nodes = [f"{prefix}-{i}" for i in range(count)] or [flags["node-id"]]
        kind = flags["accelerator-type"]
        request = {"at": self.now, "state": "ACCEPTED", "type": kind, "nodes": nodes}
        self.queued[names[0]] = request
        return ""

    def _compute_tpus_queued_resources_delete(self, names, flags):
        if names[0] not in self.queued:
            return NOT_FOUND
        assert "force" in flags
        for node in self.queued.pop(names[0])["nodes"]:
            self.nodes.pop(node, None)
            self.hosts.pop(node, None)
        return ""

    def _compute_tpus_tpu_vm_list(self, _, flags):
        path = "projects/{project}/locations/{zone}/".format(**flags)
        if flags["zone"] not in self.zones:
            return []
        return [
            {
                "name": f"{path}nodes/{name}",
                "state": node["state"],
                "acceleratorType": f"{path}acceleratorTypes/{node['type']}",
                "schedulingConfig": {"spot": True},
            }
            for name, node in self.nodes.items()
        ]

    def _compute_tpus_tpu_vm_delete(self, names, flags):
        if names[0] not in self.nodes:
            return NOT_FOUND
        for kind in (self.nodes, self.hosts):
            kind.pop(names[0], None)
        return ""

    def _compute_tpus_tpu_vm_ssh(self, names, flags):
        hosts = self.hosts.get(names[0], [])
        if flags["worker"] != "all":
            hosts = hosts[int(flags["worker"]) :][:1]
        if not hosts:
            return 255, "", "ssh: connect to host: connection timed out"
        return "".join(self._on_host(host, flags["command"]) for host in hosts)

    def _compute_ssh(self, names, flags):
        for hosts in self.hosts.values():
            for host in hosts:
                if host.name == names[0]:
                    return self._on_host(host, flags["command"])
        return 255, "", "ssh: connect to host: connection timed out"

    def _on_host(self, host: Host, script: str) -> str:
        one = re.match(r'test "\$\(hostname\)" != (\S+) \|\| ', script)
        if one and one[1] != host.name:
            return ""
        if "rsync" in script:
            assert any(name.endswith("/run.sh") for name in self.objects), "nothing to copy"
            host.copied = True
            return ""
        word = re.search(r"worker\.sh (\w+)", script[script.index("bash") :]).group(1)
        if word == "status":
            code = " 1" if host.service == "failed" else " 0"
            return f"t5jax-status {host.name} {host.service}{code if host.copied else ''}\n"
        assert host.copied or script.startswith("test ! -f")
        if word == "start" and host.service != "running":
            host.service, host.since = "running", self.now
        elif word == "stop":
            host.service = "none"
        return f"a line of {host.name}'s log\n" if word in ("log", "tail") else ""

    def _compute_instances_list(self, _, flags):
        return [
            {
                "name": host.name,
                "zone": "https://compute/zones/us-east5-a",
                "status": "RUNNING",
                "machineType": "https://compute/machineTypes/tpu7x-standard-4t",
                "scheduling": {"provisioningModel": "SPOT"},
            }
            for name in self.groups
            for host in self.hosts.get(name, [])
        ]

    def _compute_disks_list(self, _, flags):
        return []

    def _compute_instance_groups_managed_list(self, _, flags):
        return [
            {
                "name": n,
                "targetSize": self.num_hosts,
                "instanceTemplate": f"https://x/{n}",
                "zone": "https://compute/zones/us-east5-b",
            }
            for n in self.groups
        ]

    def _compute_instance_groups_managed_create(self, names, flags):
        policy = flags.get("workload-policy", "").rpartition("/")[2]
        if flags["template"] not in self.templates or (policy and policy not in self.policies):
            return NOT_FOUND
        self.groups[names[0]] = {"at": self.now, "state": "STAGING"}
        return ""

    def _compute_instance_groups_managed_list_instances(self, names, flags):
        if names[0] not in self.groups:
            return NOT_FOUND
        state = self.groups[names[0]]["state"]
        path = "https://compute/instances/"
        return [
            {"instance": f"{path}{names[0]}-w{i}", "instanceStatus": state}
            for i in range(self.num_hosts)
        ]

    def _compute_instance_groups_managed_delete(self, names, flags):
        if names[0] not in self.groups:
            return NOT_FOUND
        del self.groups[names[0]]
        self.hosts.pop(names[0], None)
        return ""

    def _compute_instance_templates_list(self, _, flags):
        return [
            {"name": name, "properties": {"machineType": flags["machine-type"]}}
            for name, flags in self.templates.items()
        ]

    def _compute_instance_templates_create(self, names, flags):
        self.templates[names[0]] = flags
        return ""

    def _compute_instance_templates_delete(self, names, flags):
        assert names[0] not in self.groups, "is in use"
        if names[0] not in self.templates:
            return NOT_FOUND
        del self.templates[names[0]]
        return ""

    def _compute_resource_policies_list(self, _, flags):
        return [{"name": name} for name in self.policies]

    def _compute_resource_policies_create_workload_policy(self, names, flags):
        self.policies[names[0]] = flags
        return ""

    def _compute_resource_policies_delete(self, names, flags):
        assert names[0] not in self.groups, "is in use"
        if names[0] not in self.policies:
            return NOT_FOUND
        del self.policies[names[0]]
        return ""


def install(folder: Path, cloud: GoogleCloud) -> dict[str, str]:
    """Writes a program `gcloud` into a folder; returns the environment in which it is found."""
    folder.mkdir(parents=True, exist_ok=True)
    program, state = folder / "gcloud", folder / "state"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    save(cloud, state)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", STATE: str(state)}


def save(cloud: GoogleCloud, state: Path) -> None:
    for name in ("crash", "on_call"):  # Functions of a test.
        cloud.__dict__.pop(name, None)
    state.write_bytes(pickle.dumps(cloud.__dict__))


def load(state: Path) -> GoogleCloud:
    cloud = GoogleCloud()
    cloud.__dict__.update(pickle.loads(state.read_bytes()))
    return cloud


def main() -> int:
    """Answers one command of a shell."""
    path = Path(os.environ[STATE])
    cloud = load(path)
    cloud.sleep(PROVISION)  # No time passes between the commands of a page.
    status, output, errors = cloud.run(["gcloud", *sys.argv[1:]])
    save(cloud, path)
    sys.stdout.write(output)
    sys.stderr.write(errors)
    return status


if __name__ == "__main__":
    import google_cloud  # Under this name its classes are in the file.

    sys.exit(google_cloud.main())
