"""Everything besides the config that affects a run's bits: software, devices, mesh."""

import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import jax


def versions() -> dict[str, str]:
    """Versions of the software that, besides options and data, affect the results."""
    code = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        code.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    found = {"jaxpref's code": code.hexdigest(), "Python": f"{sys.version_info[:2]}"}
    for name in ("jax", "jaxlib", "numpy", "grain"):
        found[name] = importlib.metadata.version(name)
    return found


def environment(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """Describes everything that affects the bits of a step, except the config."""
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
    """A line about the changes since a checkpoint was saved, or None if there are none.

    Args:
      saved: the `environment` of the checkpoint.
      now: that of this run.
      step: the step of the checkpoint.
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
