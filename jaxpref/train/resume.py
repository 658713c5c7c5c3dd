"""Whether a run that is resumed is the one that began, and what it cannot preserve."""

from collections.abc import Mapping
from pathlib import Path

from jaxpref.errors import InputError
from jaxpref.train.task import Task


def check_resumable(saved: Mapping, task: Task, out: Path) -> None:
    """Compares what lies beside a checkpoint with what is there now.

    Args:
      saved: of the checkpoint, with `splits` and `reference`.
      task: of the run.
      out: its folder, for messages.

    Raises:
      InputError: if the pairs or the reference changed.
    """
    datasets = task.datasets
    if saved["splits"] != datasets.splits.digest:
        raise InputError(
            f"{' and '.join(datasets.train_sources)}: its pairs are not those that the "
            f"run in {out} began with; restore the file, or use another --out"
        )
    reference = task.reference
    if reference and reference.digest and saved["reference"] != reference.digest:
        raise InputError(
            f"{reference.name}: its weights are not those that the run in {out} began "
            "with; restore them, or use another --out"
        )
