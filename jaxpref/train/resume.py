"""Whether a run that is resumed is the one that began, and what it cannot preserve."""

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

import jax

from jaxpref.errors import InputError
from jaxpref.train.task import Task


def environment(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """All that the bits of a step depend on beside the run's config, in words."""
    device = jax.devices()[0]
    kind = f"{device.platform} {device.device_kind}"
    if device.platform == "cpu":
        kind = f"cpu, {os.cpu_count()} cores"
    return {
        "mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "processes": str(jax.process_count()),
        "devices": kind,
        "jax": f"{jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}",
    }


def environment_change_message(
    saved: Mapping[str, str], now: Mapping[str, str], step: int
) -> str | None:
    """One line on what is lost where a checkpoint was saved elsewhere; else None.

    Args:
      saved: `environment` of the checkpoint.
      now: of this run.
      step: that of the checkpoint.
    """
    changed = [
        f"{name} {saved[name]} -> {now[name]}"
        for name in saved.keys() & now.keys()
        if saved[name] != now[name]
    ]
    if not changed:
        return None
    return (
        f"resumed at step {step} in another environment ({'; '.join(sorted(changed))})"
        ": the same pairs in the same batches, but sums are rounded in another order, "
        "so losses and parameters equal those of an uninterrupted run to rounding, not "
        "bit for bit"
    )


def check_resumable(saved: Mapping, task: Task, out: Path) -> None:
    """Compares what lies beside a checkpoint with what is there now.

    Args:
      saved: of the checkpoint, with `splits`, `rows` and `reference`.
      task: of the run.
      out: its folder, for messages.

    Raises:
      InputError: if the pairs, the shape of a packed batch or the reference changed.
    """
    datasets, rows = task.datasets, task.layout.rows
    if saved["splits"] != datasets.splits.digest:
        raise InputError(
            f"{' and '.join(datasets.train_sources)}: its pairs are not those that the "
            f"run in {out} began with; restore the file, or use another --out"
        )
    if saved.get("rows") != rows:
        raise InputError(
            f"the run in {out} has batches of {saved.get('rows')} packed rows, "
            f"on this mesh they would have {rows}; use its mesh, or another --out"
        )
    reference = task.reference
    if reference and reference.digest and saved["reference"] != reference.digest:
        raise InputError(
            f"{reference.name}: its weights are not those that the run in {out} began "
            "with; restore them, or use another --out"
        )
