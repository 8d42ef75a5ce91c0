"""gcsfs, and the paths of etils that use it."""

import functools
import importlib.util
import logging
import os
from typing import Any

from t5jax.buckets.urls import SCHEME


@functools.cache
def configure() -> None:
    """Makes every library that opens gs:// use gcsfs, as this module does.

    Raises:
      ValueError: if it is not installed.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError("gs:// needs gcsfs, which is not installed; pip install 't5jax[gcs]'")
    # etils.epath, and so Orbax and jax: otherwise by TensorFlow, which takes seconds to import.
    os.environ.setdefault("EPATH_USE_TF", "false")
    from etils.epath import gpath

    if decided := getattr(gpath, "_is_tf_installed", None):
        decided.cache_clear()  # Whoever has used a path in a bucket before has decided for all.
    # Zonal buckets, of which each one is asked about by gRPC before it is used.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec

    # Another process may write: what was listed is not kept.
    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    # They log every request that fails, and all of the traceback, before it is tried again.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def filesystem() -> Any:
    """Returns gcsfs's file system, which tries again up to six times on errors of the service."""
    configure()
    import fsspec

    return fsspec.filesystem("gcs")


@functools.cache
def path_class() -> Any:
    """Returns the class of paths in buckets, which have the methods of `pathlib.Path`."""
    configure()
    from etils import epath

    class BucketPath(type(epath.Path(f"{SCHEME}bucket"))):  # type: ignore[misc]
        """A path that Orbax takes too."""

        def absolute(self) -> Any:
            return self

        def expanduser(self) -> Any:
            return self

        def resolve(self, strict: bool = False) -> Any:
            return self

    return BucketPath
