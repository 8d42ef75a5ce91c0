"""`t5jax doctor`."""

import dataclasses

from t5jax.commands.parse import parse


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Checks what a run needs: versions, devices, memory, folders, the compiler.

    Each finding says what it found and, where something is wrong, what mends it. The exit status is
    1 if something is.
    """

    folder: tuple[str, ...] = ()
    """Folders to check that runs write to, besides the cache."""


def doctor(args: list[str]) -> int:
    options = parse(Doctor, args, prog="t5jax doctor")
    from t5jax.doctor import examine

    wrong = 0
    for finding in examine(options.folder):
        wrong += bool(finding.remedy)
        print(f"{'wrong' if finding.remedy else 'ok':5}  {finding.what}: {finding.found}")
        if finding.remedy:
            print(f"{'':7}{finding.remedy}")
    return int(wrong > 0)
