"""URLs of buckets and objects."""

SCHEME = "gs://"


def split(url: str) -> tuple[str, str]:
    """Returns the bucket and the name of an object."""
    bucket, _, name = url.removeprefix(SCHEME).partition("/")
    return bucket, name.strip("/")
