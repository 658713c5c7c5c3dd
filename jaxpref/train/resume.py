"""Checks that a resumed run uses the same data and the same reference."""

from collections.abc import Mapping
from pathlib import Path

from jaxpref.errors import InputError
from jaxpref.train.task import Task


def check_resumable(saved: Mapping, task: Task, out: Path) -> None:
    """Compares the metadata of a checkpoint with the task.

    Args:
      saved: the checkpoint's metadata, with `splits` and `reference`.
      task: the task of the run.
      out: the run's folder, for messages.

    Raises:
      InputError: if the pairs or the reference have changed.
    """
    datasets = task.datasets
    if saved["splits"] != datasets.splits.digest:
        raise InputError(
            f"{' and '.join(datasets.train_sources)}: the pairs have changed since the "
            f"run in {out} began; restore the file, or use another --out"
        )
    reference = task.reference
    if reference and reference.digest and saved["reference"] != reference.digest:
        raise InputError(
            f"{reference.name}: the weights have changed since the run in {out} began; "
            "restore them, or use another --out"
        )
