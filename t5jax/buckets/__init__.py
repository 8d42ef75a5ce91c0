"""Objects in buckets of Google Cloud Storage: what `t5jax.storage` needs of them, by gcsfs.

How they differ from files, and what follows:

- An object is written as a whole or not at all, and replaces the one before it at once. So there is
  no writing beside and renaming: an upload is what a rename is on a disk.
- Nothing can be renamed but object by object. A folder that is to be whole or absent is complete
  with one object, which is deleted first and uploaded last (`upload_folder`).
- Nothing can be appended. What grows is uploaded as a part, which the service joins to the object
  (`Upload.sync`), so that a long file is not sent again for each line.
- A folder is what names have in common; it is there as long as an object is in it.
"""

from t5jax.buckets.client import configure, filesystem, path_class
from t5jax.buckets.errors import describe
from t5jax.buckets.folders import delete_folder, download, move_folder, put, upload_folder
from t5jax.buckets.growing import Upload
from t5jax.buckets.object import (
    Object,
    check_bucket,
    create,
    delete,
    objects,
    read,
    write,
    write_over,
)
from t5jax.buckets.urls import SCHEME, split

__all__ = [
    "SCHEME",
    "Object",
    "Upload",
    "check_bucket",
    "configure",
    "create",
    "delete",
    "delete_folder",
    "describe",
    "download",
    "filesystem",
    "move_folder",
    "objects",
    "path_class",
    "put",
    "read",
    "split",
    "upload_folder",
    "write",
    "write_over",
]
