"""What a run that goes on elsewhere keeps, and what it cannot."""

import importlib.metadata
import os
from collections.abc import Mapping

import jax


def surroundings(mesh: jax.sharding.Mesh) -> dict[str, str]:
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


def told_of_change(
    saved: Mapping[str, str], now: Mapping[str, str], step: int
) -> str | None:
    """One line on what is lost where a checkpoint was saved elsewhere; else None.

    Args:
      saved: `surroundings` of the checkpoint.
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
        f"resumed at step {step} elsewhere ({'; '.join(sorted(changed))}): the same "
        "pairs in the same batches, but sums are rounded in another order, so losses "
        "and parameters are those of an undisturbed run to rounding, not bit for bit"
    )
