"""The file that describes a run on Google Cloud: where, on what, and which command."""

import dataclasses
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gcp.slices import Slice, parse

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|AIza[\w-]{30,}|ya29\.[\w-]{16,}|gh[pousr]_\w{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_NAME = r"[a-z]([-a-z0-9]{0,37}[a-z0-9])?"


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run. Fields without a default have to be in the file."""

    name: str
    """Name of the slice and of all that belongs to it."""
    project: str
    """Project's id."""
    zone: str
    """Zone that has the accelerator, such as us-east5-b."""
    bucket: str
    """Name of the bucket for the run, without gs://. set-up creates it."""
    accelerator: str
    """Slice, such as v5litepod-8, v5p-128 or tpu7x:2x2x2."""
    command: str
    """Command, the same on every host; `t5jax train` without --run-dir gets one in the bucket."""
    slices: int = 1
    """Slices of this shape that train together, joined by the data center's network; queued alone.
    Between them is the axis mesh.dcn."""
    backend: str = ""
    """queued (the Cloud TPU API, v4 to v6e) or compute (Compute Engine). Empty: queued, where it
    has the accelerator."""
    provisioning: str = "on-demand"
    """on-demand, spot or reserved."""
    reservation: str = ""
    """Compute Engine's reservation, for reserved."""
    max_wait: str = ""
    """How long a request may wait in the queue, such as 6h; queued alone. Empty: for ever."""
    max_dollars_per_hour: float | None = None
    """A slice that costs more is not made."""
    files: tuple[str, ...] = ()
    """Files and folders that the command needs, such as my_config.py or tasks; beside this file."""
    image: str = ""
    """Container image to run in. Empty: t5jax is installed from this checkout and its lock file."""
    vm_image: str = ""
    """Image of the machines, projects/PROJECT/global/images/family/FAMILY; compute alone."""
    runtime_version: str = ""
    """Software of a TPU VM; queued alone. Empty: the one for the accelerator."""
    network: str = ""
    """VPC network. Empty: the project's default."""
    subnetwork: str = ""
    """Subnetwork. Empty: the network's own."""
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Environment variables of the command."""
    secrets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Environment variables whose values are secrets of Secret Manager: name of the secret."""
    folder: Path = Path()
    """Where the file lies."""

    @property
    def slice(self) -> Slice:
        return parse(self.accelerator)

    @property
    def nodes(self) -> list[str]:
        """Names of the slices."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{i}" for i in range(self.slices)]

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return self.slice.hosts * self.slices

    @property
    def region(self) -> str:
        return self.zone.rpartition("-")[0]

    @property
    def service_account(self) -> str:
        return f"{self.service_account_id}@{self.project}.iam.gserviceaccount.com"

    @property
    def service_account_id(self) -> str:
        return "t5jax-runs"

    @property
    def launch(self) -> str:
        """Folder of the bucket with what the hosts install and start."""
        return f"gs://{self.bucket}/launch/{self.name}"

    @property
    def argv(self) -> list[str]:
        """The command's words, with the folder of the run."""
        words = shlex.split(self.command)
        if words[:2] == ["t5jax", "train"] and _run_dir(words) is None:
            words += ["--run-dir", f"gs://{self.bucket}/runs/{self.name}"]
        return words


def _run_dir(words: list[str]) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option in ("--run-dir", "--run_dir"):
            return value if equals else following
    return None


def load(path: Path) -> Settings:
    """Returns the settings of a TOML file.

    Raises:
      ValueError: if it cannot be read, lacks a field, or has one that is wrong.
    """
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; copy gcp/example.toml to begin with") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    try:
        return _check(found, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check(found: dict[str, Any], folder: Path) -> Settings:
    fields = {f.name: f for f in dataclasses.fields(Settings) if f.name != "folder"}
    if unknown := sorted(found.keys() - fields.keys()):
        raise ValueError(f"{unknown[0]} is no field; known are {', '.join(fields)}")
    required = [n for n, f in fields.items() if f.default is f.default_factory]
    if missing := [name for name in required if not found.get(name)]:
        raise ValueError(
            f"{' and '.join(missing)} must be set; nothing is taken from gcloud's configuration"
        )
    for name, value in found.items():
        _check_type(name, value, str(fields[name].type))
    found["files"] = tuple(found.get("files", ()))
    settings = Settings(**found, folder=folder)
    _check_values(settings)
    return settings


def _check_type(name: str, value: Any, kind: str) -> None:
    if "tuple" in kind:
        right = isinstance(value, list) and all(isinstance(item, str) for item in value)
        expected = 'a list of texts, such as ["tasks"]'
    elif "Mapping" in kind:
        right = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
        expected = f'texts, such as [{name}] with NAME = "value"'
    elif kind == str(int):
        right, expected = type(value) is int and value > 0, "a whole number, at least 1"
    elif "float" in kind:
        right = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        expected = "a number above 0"
    else:
        right, expected = isinstance(value, str), f'a text: {name} = "..."'
    if not right:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _check_values(s: Settings) -> None:
    patterns = {
        "name": (_NAME, "up to 39 small letters, digits and -, such as t5-base"),
        "project": (r"[a-z][-a-z0-9:.]{4,61}[a-z0-9]", "a project's id, such as my-project-1234"),
        # Some zones are for accelerators alone, such as us-central1-ai1a.
        "zone": (r"[a-z]+-[a-z]+\d+-([a-z]|ai\d+[a-z])", "a zone, such as us-east5-b"),
        "bucket": (r"[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9]", "a bucket's name without gs://"),
        "provisioning": ("on-demand|spot|reserved", "on-demand, spot or reserved"),
        "backend": ("|queued|compute", "queued or compute"),
        "max_wait": (r"|\d+[smhd]", "a time such as 90m or 6h"),
        "vm_image": (
            r"|projects/[^/]+/global/images/(family/)?[^/]+",
            "projects/PROJECT/global/images/family/FAMILY",
        ),
        "image": (r"|[\w.:/@-]+", "a container image, such as HOST/PROJECT/REPOSITORY/t5jax:1"),
    }
    for name, (pattern, expected) in patterns.items():
        if not re.fullmatch(pattern, getattr(s, name)):
            raise ValueError(f"{name} is {getattr(s, name)!r}; expected {expected}")
    _ = s.slice
    try:
        words = s.argv
    except ValueError as error:
        raise ValueError(f"command {s.command!r}: {error}") from None
    if not words:
        raise ValueError('command is empty; expected one, such as "t5jax train t5_c4"')
    run_dir = _run_dir(words)
    if run_dir is not None and not run_dir.startswith("gs://"):
        raise ValueError(
            f"command has --run-dir {run_dir}, which is lost with the machine; leave it out for "
            f"gs://{s.bucket}/runs/{s.name}, or name a folder of a bucket"
        )
    _check_secrets(s)
    for name in s.files:
        path, parts = s.folder / name, Path(name).parts
        if Path(name).is_absolute() or not parts or ".." in parts or not path.exists():
            raise ValueError(f"files has {name!r}; expected what lies in {s.folder.resolve()}")


def _check_secrets(s: Settings) -> None:
    for name in (*s.env, *s.secrets):
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"{name!r} is no name of an environment variable")
    for name, secret in s.secrets.items():
        if SECRET_VALUE.search(secret) or not re.fullmatch(r"[\w-]{1,255}", secret):
            raise ValueError(
                f"secrets.{name} is no name of a secret; keep the value in Secret Manager and "
                f'write its name here: {name} = "my-secret"'
            )
    hidden = [n for n, v in s.env.items() if SECRET_NAME.search(n) or SECRET_VALUE.search(v)]
    if hidden:
        raise ValueError(
            f"env.{hidden[0]} looks like a secret, which belongs into no file and no argument; "
            f"keep it in Secret Manager and name it under [secrets]"
        )
    if SECRET_VALUE.search(s.command):
        raise ValueError(
            "command holds what looks like a secret; keep it in Secret Manager and name it under "
            "[secrets], which makes it an environment variable of the command"
        )
