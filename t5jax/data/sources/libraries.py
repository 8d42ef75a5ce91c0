"""Sources that use libraries of datasets: TensorFlow Datasets and Hugging Face's `datasets`.

    tfds("glue/sst2", {"train": "train", "test": "validation"}).rename({"text": "sentence"})

No TensorFlow, except for datasets that TFDS has written as TFRecord.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from t5jax.data.sources.files import answer
from t5jax.data.sources.formats import plain
from t5jax.data.sources.source import Row, Source


def tfds(
    name: str,
    splits: Mapping[str, str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Source:
    """Returns a source of a dataset of TensorFlow Datasets.

        tfds("glue/sst2:2.0.0", {"train": "train", "validation": "validation[:500]"})

    Texts are str, arrays are lists, class labels are integers. Datasets prepared as ArrayRecord are
    read without TensorFlow.

    Args:
      name: as for `tfds.builder`: "name", "name/config", "name:version".
      splits: the TFDS split of each split, or a slice of one.
      data_dir: the folder or bucket of prepared datasets; by default that of TFDS.
      download: download and prepare a dataset that is missing, instead of raising an error.
    Raises:
      ValueError: when rows are read, if a dataset or split is unknown, or not prepared.
    """
    data_dir = None if data_dir is None else os.fspath(data_dir)
    read = functools.partial(_tfds_rows, name, data_dir, download)
    return Source({ours: functools.partial(read, split) for ours, split in splits.items()})


def _tfds_rows(name: str, data_dir: str | None, download: bool, split: str) -> Iterator[Row]:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
        if download:
            builder.download_and_prepare()
        elif not builder.is_prepared():
            raise ValueError(
                f"it is not prepared in {builder.data_path}; prepare it with `tfds build {name}`, "
                "or set download=True, or name its folder (data_dir)"
            )
        try:
            rows = iter(builder.as_data_source(split=split))
        except NotImplementedError:  # TFRecord.
            from t5jax.data.bridge import tf  # noqa: F401  TensorFlow, quietly.

            rows = iter(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))
    except Exception as error:
        # After the first line, TFDS lists all known datasets.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot read the TFDS data set {name!r}, split {split!r}: {reason}"
        ) from error
    yield from map(plain, rows)


def hf_dataset(
    path: str | os.PathLike[str],
    splits: Mapping[str, str],
    name: str | None = None,
    **options: Any,
) -> Source:
    """Returns a source of a Hugging Face dataset, from the Hub or a local folder.

        hf_dataset("cais/mmlu", {"train": "auxiliary_train", "validation": "dev"}, "all")

    Class labels are integers. Private datasets need `hf auth login` or HF_TOKEN.

    Args:
      path: as for `datasets.load_dataset`: a name on the Hub, a folder of data files, or a format
        with data_files=; or a folder written by `save_to_disk`.
      splits: the dataset's split for each split, or a slice of one ("train[:10%]").
      name: the configuration, if the dataset has several.
      **options: other arguments of `datasets.load_dataset`, such as revision, or streaming=True
        for datasets that are too large to download.
    Raises:
      ValueError: if a token is given; when rows are read, if a dataset, configuration or split does
        not exist, or the Hub does not respond.
    """
    if "token" in options:
        raise ValueError(
            "hf_dataset takes no token, which would be written wherever the task is; "
            "log in with `hf auth login`, or set HF_TOKEN"
        )
    read = functools.partial(_hf_rows, os.fspath(path), name, options)
    return Source({ours: functools.partial(read, split) for ours, split in splits.items()})


def _hf_rows(path: str, name: str | None, options: Mapping[str, Any], split: str) -> Iterator[Row]:
    import datasets

    if _is_on_hub(path, options):  # Or nowhere.
        answer(functools.partial(_ask_hub, path, options), f"the Hugging Face data set {path!r}")
    try:
        if os.path.isfile(os.path.join(path, "state.json")):  # One split, of no name.
            rows = iter(datasets.load_from_disk(path))
        else:
            rows = iter(datasets.load_dataset(path, name, split=split, **options))
    except Exception as error:
        raise ValueError(
            f"cannot read the Hugging Face data set {path!r}, split {split!r}: {error}"
        ) from error
    yield from map(plain, rows)


def _is_on_hub(path: str, options: Mapping[str, Any]) -> bool:
    local = os.path.exists(path) or "data_files" in options or "data_dir" in options
    return not local and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) is not None


def _ask_hub(path: str, options: Mapping[str, Any]) -> None:
    """Raises if the Hub does not have a dataset; `load_dataset` would retry for half a minute."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        info = huggingface_hub.HfApi().dataset_info
        info(path, revision=options.get("revision"), timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        raise  # It says what: missing, private, gated.
    except Exception as error:
        raise ValueError(
            f"there is no such folder, and the hub does not answer ({error}); for what is "
            "downloaded, set HF_HUB_OFFLINE=1"
        ) from error
