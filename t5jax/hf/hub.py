"""Finds a model: a local folder, or a name on the Hugging Face Hub."""

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from t5jax import storage


def resolve(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Returns the local folder for a path or a name on the Hugging Face Hub.

    An existing folder takes precedence; one in a bucket is copied to this machine. Otherwise the
    model is downloaded, or found in the Hub's cache if the Hub cannot be reached: configs,
    tokenizer, and one copy of the weights (safetensors if possible).

    Args:
      name_or_path: the path or the name.
      revision: a branch, a tag or a commit on the Hub. None: the newest.
    Raises:
      ValueError: if there is neither, or the Hub cannot be reached and its cache has no copy.
    """
    path = storage.path(name_or_path, "the model")
    if storage.is_remote(path):
        path = storage.local(path, _needed, "model")
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; expected the folder that it lies in, or a hub name")
    name = str(name_or_path)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(
            f"there is no folder {name}; give one that exists, or a hub name such as "
            "google/flan-t5-small"
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    # huggingface_hub has changed its HTTP library, and so its errors, twice: any error means that
    # the Hub did not respond.
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10)
        files = _needed(entry.rfilename for entry in info.siblings)
        # By branch, not by info.sha, so that it is found in the cache by name afterwards.
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=files, etag_timeout=10
            )
        )
    except RevisionNotFoundError:
        raise ValueError(f"{name} on the hub has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name} is neither a folder here nor a model on the hub that you may read; check the "
            "spelling, or log in with `hf auth login` if it is private or gated"
        ) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        # Only config.json is certain to be in a cached copy.
        cached = huggingface_hub.snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=["config.json"]
        )
    except Exception:
        raise ValueError(
            f"{name} is no folder here, the hub cannot be reached ({reason}), and its cache has no "
            "copy; check the network, or download the model elsewhere and give its folder"
        ) from None
    warnings.warn(
        f"the hub cannot be reached ({reason}); {name} is taken from its cache, {cached}",
        stacklevel=3,
    )
    return Path(cached)


def _needed(files: Iterable[str]) -> list[str]:
    """Returns which of a model's files to download: no subfolders, no second copy of the
    weights."""
    files = [f for f in files if "/" not in f]
    small = [f for f in files if f.endswith((".json", ".model", ".txt", ".jinja"))]
    for pattern in (
        r"model(-\d+-of-\d+)?\.safetensors",
        r"pytorch_model(-\d+-of-\d+)?\.bin",
        r"adapter_model\.safetensors",
        r"adapter_model\.bin",
    ):
        weights = [f for f in files if re.fullmatch(pattern, f)]
        if weights:
            return small + weights
    return small
