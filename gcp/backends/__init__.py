"""The two ways to a TPU on Google Cloud: queued resources, and Compute Engine."""

from collections.abc import Sequence

from gcp.backends.backend import Backend, State
from gcp.backends.compute import Compute
from gcp.backends.queued import Queued
from gcp.settings import Settings

__all__ = ["Backend", "State", "choose"]


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
