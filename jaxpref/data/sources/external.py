"""Datasets of other packages: Hugging Face `datasets` and prepared TFDS datasets.

Both packages are optional and imported only when needed.  No code of a dataset is run:
`datasets` from version 4 reads data files only, and TFDS datasets must have been
prepared as ArrayRecord files (`prepared`), which are read without TensorFlow.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data.sources.divisible import Divisible
from jaxpref.data.sources.optional import import_optional
from jaxpref.data.sources.prepared import check_features, prepared_folder
from jaxpref.errors import InputError, first_line


class Rows(Divisible):
    """Random access to an external table, with values converted to plain Python."""

    def __init__(self, table: Sequence[Any], name: str):
        self._table, self._name = table, name

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Any:
        return plain(self._table[index], self.location(index))

    def location(self, index: int) -> str:
        """Rows count from 1."""
        return f"{self._name} row {index + 1}"


def open_saved(folder: Path, *, split: str | None) -> Rows:
    """A folder written by `datasets.save_to_disk`, with or without splits."""
    datasets = _import_datasets(str(folder))
    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged folder makes the package raise
        raise InputError(f"{folder}: cannot be loaded ({first_line(error)})") from None
    if isinstance(table, datasets.DatasetDict):
        split = split or "train"
        if split not in table:
            raise InputError(f"{folder}: no split {split!r}; it has {', '.join(table)}")
        table = table[split]
    elif split is not None:
        raise InputError(f"{folder}: it has no splits; leave out split {split!r}")
    return Rows(table, f"{folder}")


def open_hub(
    name: str, *, split: str, data_dir: str | None, revision: str | None = None
) -> Rows:
    """OWNER/NAME or OWNER/NAME:CONFIG on the Hugging Face hub, or in its cache."""
    datasets = _import_datasets(name)
    name, _, config = name.partition(":")
    try:
        table = datasets.load_dataset(
            name,
            config or None,
            split=split,
            data_dir=data_dir,
            revision=revision,
        )
    except Exception as error:  # network, missing set, split or config, damaged cache
        raise InputError(
            f"hf:{name}: cannot be loaded ({first_line(error)}); check name, split"
            f" {split!r} and network"
        ) from None
    return Rows(table, f"hf:{name} {split}")


def open_tfds(name: str, *, split: str, data_dir: str | None) -> Rows:
    """A prepared TFDS dataset by name, in `data_dir` (default: that of TFDS)."""
    _import_tfds(name)
    folder = prepared_folder(name, data_dir)
    return Rows(_open_prepared(folder, split), f"tfds:{name} {split}")


def open_tfds_folder(folder: Path, *, split: str) -> Rows:
    """The folder of a prepared TFDS dataset, such as DATA_DIR/NAME/VERSION."""
    return Rows(_open_prepared(folder, split), f"{folder} {split}")


def _open_prepared(folder: Any, split: str) -> Any:
    tfds = _import_tfds(str(folder))
    check_features(folder)
    try:
        builder = tfds.builder_from_directory(str(folder))
        return builder.as_data_source(split=split)
    except Exception as error:  # damaged, not ArrayRecord, no such split
        raise InputError(
            f"{folder}: cannot be opened as a TFDS dataset ({_tfds_reason(error)});"
            f" check the split {split!r} and that its file format is array_record"
        ) from None


def _tfds_reason(error: Exception) -> str:
    if isinstance(error, AttributeError) and "FieldDescriptor" in str(error):
        # Seen with tensorflow-datasets 4.9.9 and protobuf 7.
        return 'this tensorflow-datasets needs `pip install "protobuf<7"`'
    return first_line(error)


def _import_datasets(name: str) -> Any:
    return import_optional("datasets", name, extra="hub")


def _import_tfds(name: str) -> Any:
    try:
        import array_record  # noqa: F401  (TFDS names it only in a late, long error)
        import tensorflow_datasets
    except ImportError:
        raise InputError(
            f"{name}: reading it needs the packages `tensorflow-datasets` and"
            ' `array-record`; pip install "jaxpref[tfds]"'
        ) from None
    return tensorflow_datasets


def plain(value: Any, where: str) -> Any:
    """A value with bytes as text and NumPy values as Python's."""
    if isinstance(value, dict):
        return {key: plain(item, where) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item, where) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: byte {value[error.start]:#04x} at {error.start + 1} is not"
                " UTF-8 text"
            ) from None
    return value
