"""Sources that use libraries of datasets: TensorFlow Datasets and Hugging Face's `datasets`.

    tfds("glue/sst2", {"train": "train", "test": "validation"}).rename({"text": "sentence"})

No TensorFlow, except for datasets that TFDS has written as TFRecord.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from t5jax.data.sources.files import answer, find_files
from t5jax.data.sources.formats import plain
from t5jax.data.sources.offsets import Unreachable
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
    rows = {ours: _TfdsRows(name, data_dir, download, split) for ours, split in splits.items()}
    return Source(rows)


@dataclasses.dataclass(frozen=True)
class _TfdsRows:
    """The rows of a split of a dataset of TensorFlow Datasets."""

    path: str
    data_dir: str | None
    download: bool
    split: str
    library: ClassVar[str] = "TFDS"

    def __call__(self) -> Iterator[Row]:
        yield from map(plain, iter(self._rows()))

    def reachable(self) -> "_PlainRows":
        return _PlainRows(self._rows())

    def _rows(self) -> Any:
        name, split = self.path, self.split
        try:
            builder = self._builder()
            if self.download:
                builder.download_and_prepare()
            elif not builder.is_prepared():
                raise ValueError(
                    f"it is not prepared in {builder.data_path}; prepare it with `tfds build "
                    f"{name}`, or set download=True, or name its folder (data_dir)"
                )
            try:
                return builder.as_data_source(split=split)
            except NotImplementedError:  # TFRecord.
                import tensorflow_datasets as tfds

                from t5jax.data.bridge import tf  # noqa: F401  TensorFlow, quietly.

                return tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))
        except Exception as error:
            # After the first line, TFDS lists all known datasets.
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"cannot read the TFDS data set {name!r}, split {split!r}: {reason}"
            ) from error

    def paths(self) -> list[str]:
        """Returns the files of the prepared dataset on this machine."""
        try:
            folder = os.fspath(self._builder().data_path)
        except Exception as error:
            raise ValueError(f"cannot find the TFDS data set {self.path!r}: {error}") from error
        return find_files([os.path.join(folder, "*")]) if os.path.isdir(folder) else []

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder(self.path, data_dir=self.data_dir, try_gcs=False)


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
    path = os.fspath(path)
    return Source({ours: _HubRows(path, name, split, options) for ours, split in splits.items()})


@dataclasses.dataclass(frozen=True)
class _HubRows:
    """The rows of a split of a Hugging Face dataset."""

    path: str
    name: str | None
    split: str
    options: Mapping[str, Any]
    library: ClassVar[str] = "Hugging Face"

    @property
    def is_endless(self) -> bool:
        return bool(self.options.get("streaming"))

    def __call__(self) -> Iterator[Row]:
        yield from map(plain, iter(self._rows()))

    def reachable(self) -> "_PlainRows":
        return _PlainRows(self._rows())

    def _rows(self) -> Any:
        import datasets

        path, split = self.path, self.split
        if _is_on_hub(path, self.options):  # Or nowhere.
            ask = functools.partial(_ask_hub, path, self.options)
            answer(ask, f"the Hugging Face data set {path!r}")
        try:
            if _is_saved(path):
                return self._from_disk()
            return datasets.load_dataset(path, self.name, split=split, **self.options)
        except Exception as error:
            raise ValueError(
                f"cannot read the Hugging Face data set {path!r}, split {split!r}: {error}"
            ) from error

    def _from_disk(self) -> Any:
        """Returns the rows of a folder written by `save_to_disk`."""
        import datasets

        if self.name is not None or self.options:
            given = [*(["name"] if self.name is not None else []), *self.options]
            raise ValueError(
                f"save_to_disk wrote this folder, to which {', '.join(given)} cannot apply; leave "
                "that out"
            )
        saved = datasets.load_from_disk(self.path)
        if isinstance(saved, datasets.Dataset):
            saved = {str(saved.split or "train"): saved}  # As load_dataset calls a single split.
        sizes = {name: len(rows) for name, rows in saved.items()}
        wanted = datasets.ReadInstruction.from_spec(self.split)
        try:
            parts = wanted.to_absolute(sizes)
        except ValueError:
            raise ValueError(
                f"there is no such split; the folder has {', '.join(sizes)}, and slices of "
                f'{"it" if len(sizes) == 1 else "them"}, such as "{next(iter(sizes))}[:90%]"'
            ) from None
        chosen = [saved[part.splitname].select(range(part.from_, part.to)) for part in parts]
        return datasets.concatenate_datasets(chosen)

    def paths(self) -> list[str]:
        """Returns the files on this machine; a cache uses them to detect that they have changed."""
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as formats

        folder = self.path if os.path.isdir(self.path) else ""
        if not folder and self.path not in formats:
            return []  # On the Hub.
        folder = os.path.join(folder, self.options.get("data_dir") or "")
        given = self.options.get("data_files") or ([os.path.join("**", "*")] if folder else [])
        given = given.values() if isinstance(given, Mapping) else [given]
        patterns = (x if isinstance(x, (list, tuple)) else [x] for x in given)
        paths = [os.fspath(pattern) for part in patterns for pattern in part]
        return find_files([p if "://" in p else os.path.join(folder, p) for p in paths])


class _PlainRows:
    """The rows of a library's data set that has random access, as plain Python."""

    def __init__(self, rows: Any):
        if not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
            raise Unreachable("their library reads them in order")
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return plain(self._rows[number])


def _is_saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote a folder, of one split or several."""
    files = ("state.json", "dataset_dict.json")
    return any(os.path.isfile(os.path.join(folder, file)) for file in files)


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
