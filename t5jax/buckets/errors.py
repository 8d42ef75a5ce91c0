"""Errors of the service and its clients, in words that say what to do."""

import contextlib
from collections.abc import Iterator

from t5jax.buckets.urls import SCHEME, split
from t5jax.checks import first_line


@contextlib.contextmanager
def reporting(url: object) -> Iterator[None]:
    """Raises ValueError for an error of the service or its clients, saying what and the remedy."""
    try:
        yield
    except Exception as error:
        if message := describe(error, str(url)):
            raise ValueError(message) from error
        raise


def describe(error: BaseException, url: str = "") -> str:
    """Returns what an error of the service, or of its clients, means; "" for another error."""
    reason = first_line(error)
    code = str(getattr(error, "code", ""))
    forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden: ")
    # The clients' own libraries are those of other stores and the Hub too.
    libraries = ("gcsfs", "google.auth", "google.api_core", "google.cloud")
    libraries += ("aiohttp", "requests") if url else ()
    of_client = type(error).__module__.startswith(libraries)
    if not (of_client or forbidden or (url and isinstance(error, FileNotFoundError))):
        return ""
    where = url or "a bucket"
    bucket = split(url)[0] if url else ""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, FileNotFoundError) or code == "404":
        if ("bucket" in text and "exist" in text) or url == f"{SCHEME}{bucket}":
            return (
                f"there is no bucket {bucket or text}; check the name, or make it: gcloud storage "
                f"buckets create {SCHEME}{bucket or 'BUCKET'}"
            )
        return f"there is no object {where} ({reason})"
    if code == "401" or "Anonymous caller" in text or ".auth" in type(error).__module__:
        return (
            f"{where} cannot be reached, since this machine has no credentials of Google Cloud "
            f"that count ({reason}); run `gcloud auth application-default login`, or set "
            "GOOGLE_APPLICATION_CREDENTIALS to the file of a key"
        )
    if forbidden or code == "403":
        return (
            f"this account has no rights to {where} ({text.removeprefix('Forbidden: ')}); grant it "
            "the roles Storage Object User and Storage Legacy Bucket Reader on the bucket, or log "
            "in as another: gcloud auth application-default login"
        )
    return (
        f"{where}: Google Cloud Storage does not answer as it should ({type(error).__name__}: "
        f"{reason}), after several tries; check the network, and give the same command again"
    )
