"""What a project needs once: APIs, a bucket, and a service account with few rights."""

from collections.abc import Callable
from typing import Any

from gcp.settings import Settings
from gcp.steps import Step, base_name, has


def set_up(s: Settings) -> list[Step]:
    """Returns the steps from an empty project, with billing switched on, to one that can run.

    The machines' service account may read and write the objects of this bucket, and read the
    secrets and the container images that the run names; nothing else of the project.
    """
    project, bucket = f"--project={s.project}", f"gs://{s.bucket}"
    member = f"serviceAccount:{s.service_account}"
    services = ["compute", "iam", "storage", "tpu"]
    registry = s.image.split("/") if "-docker.pkg.dev/" in s.image else []
    if s.secrets:
        services.append("secretmanager")
    if registry:
        services.append("artifactregistry")
    steps = [
        Step(
            f"API {service}",
            ("gcloud", "services", "enable", f"{service}.googleapis.com", project, "--quiet"),
            ask=("gcloud", "services", "list", "--enabled", project, "--format=json"),
            is_done=_is_enabled(f"{service}.googleapis.com"),
        )
        for service in services
    ]
    steps += [
        # Old checkpoints are deleted all the time: kept for a week, they would cost many times as
        # much as the run's own.
        Step(
            f"bucket {s.bucket}",
            (
                *("gcloud", "storage", "buckets", "create", bucket, project),
                *(f"--location={s.region}", "--uniform-bucket-level-access"),
                *("--public-access-prevention", "--soft-delete-duration=0", "--quiet"),
            ),
            ask=("gcloud", "storage", "buckets", "list", project, "--format=json"),
            is_done=has(s.bucket),
        ),
        Step(
            f"service account {s.service_account_id}",
            (
                *("gcloud", "iam", "service-accounts", "create", s.service_account_id, project),
                *("--display-name=Machines of t5jax", "--quiet"),
            ),
            ask=("gcloud", "iam", "service-accounts", "list", project, "--format=json"),
            is_done=lambda answer: any(a.get("email") == s.service_account for a in answer),
        ),
        _binding(
            f"objects of {s.bucket}",
            ("storage", "buckets"),
            (bucket, project),
            member,
            "roles/storage.objectUser",
        ),
        # Orbax asks for the bucket's properties before it deletes a checkpoint.
        _binding(
            f"properties of {s.bucket}",
            ("storage", "buckets"),
            (bucket, project),
            member,
            "roles/storage.legacyBucketReader",
        ),
    ]
    for secret in sorted(set(s.secrets.values())):
        role = "roles/secretmanager.secretAccessor"
        steps.append(_binding(f"secret {secret}", ("secrets",), (secret, project), member, role))
    if registry:
        where = (registry[2], f"--location={registry[0].removesuffix('-docker.pkg.dev')}")
        steps.append(
            _binding(
                f"images of {registry[2]}",
                ("artifacts", "repositories"),
                (*where, f"--project={registry[1]}"),
                member,
                "roles/artifactregistry.reader",
            )
        )
    return steps


def _binding(
    what: str, kind: tuple[str, ...], resource: tuple[str, ...], member: str, role: str
) -> Step:
    return Step(
        f"right to the {what}",
        (
            *("gcloud", *kind, "add-iam-policy-binding", *resource),
            *(f"--member={member}", f"--role={role}", "--quiet"),
        ),
        ask=("gcloud", *kind, "get-iam-policy", *resource, "--format=json"),
        is_done=_is_bound(member, role),
        attempts=5,  # A new account is not known everywhere at once.
    )


def _is_enabled(name: str) -> Callable[[Any], bool]:
    return lambda answer: any(
        service.get("config", {}).get("name") == name or base_name(service) == name
        for service in answer
    )


def _is_bound(member: str, role: str) -> Callable[[Any], bool]:
    return lambda answer: any(
        binding["role"] == role and member in binding.get("members", ())
        for binding in (answer or {}).get("bindings", ())
    )
