"""Devices: the one mesh, the start of a multi-process run, and batches placed on it."""

import dataclasses
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpref.errors import InputError
from jaxpref.models.config import ROWS

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis has; one axis may be -1, "all that are left"."""

    data: int = 1
    """Copies of the parameters; rows are split over them."""
    fsdp: int = -1
    """Devices that share one copy of the parameters; rows are split over them too."""
    tensor: int = 1
    """Devices that share each matrix product (heads, feed-forward, vocabulary)."""


def make_mesh(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """The mesh over all devices; by Explicit axes a layout mistake fails when traced.

    Args:
      config: sizes of its axes.
      devices: others than those of this run, e.g. some that are only described.

    Raises:
      InputError: if the sizes do not multiply to the number of devices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    count = jax.device_count() if devices is None else len(devices)
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        if known > 0:
            sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) != count:
        asked = " x ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        raise InputError(
            f"mesh {asked} does not cover the {count} device(s) of this run; "
            "set the axes so that their product is that number (one may be -1)"
        )
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices
    )


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of parts the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_rows(batch_size: int, accumulation: int, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError unless a micro-batch can be split over the mesh."""
    if batch_size < 1 or batch_size % (accumulation * row_shards(mesh)):
        raise InputError(
            f"batch_size {batch_size} is not a multiple of accumulation {accumulation} "
            f"x {row_shards(mesh)} devices (data x fsdp)"
        )
    # Each process fills one block of the rows, so the mesh must give it just that.
    rows = batch_size // accumulation
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    mine = sharding.addressable_devices_indices_map((rows,)).values()
    held = {i for (part,) in mine for i in range(*part.indices(rows))}
    size = rows // jax.process_count()
    first = jax.process_index() * size
    if held != set(range(first, first + size)):
        raise InputError(
            "the mesh gives several processes the same rows: keep tensor within one "
            "process, so that data x fsdp is a multiple of the processes"
        )


def to_global(batch, mesh: jax.sharding.Mesh):
    """Places each process's rows of an `[A, R, ...]` batch as one global batch."""
    sharding = NamedSharding(mesh, PartitionSpec(None, ROWS))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def initialize_distributed() -> None:
    """Joins the other processes of this run, where the environment says there are any.

    It says so by being a Cloud TPU machine or a GKE pod with TPUs, by Slurm or Open MPI
    with more than one task, or by Kubernetes with an indexed job; JAX then finds out
    who the others are.  `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` say it themselves and come first (`PROCESS_OPTIONS` of a command
    line sets them); `JAX_NUM_PROCESSES=1` alone says that there are none.

    Must run before anything touches a device; a second call does nothing.

    Raises:
      InputError: if the environment speaks of other processes and does not say which.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        _make_room_for_virtual_devices()
    if jax.distributed.is_initialized():
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, index = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    reason = "JAX_COORDINATOR_ADDRESS is set" if address else _speaks_of_others()
    if reason is None or (count == 1 and not address):
        return
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(address, count, index)
    except ValueError as error:
        raise InputError(
            f"{reason}, but not which processes belong to the run ({error}); give "
            "--coordinator HOST:PORT --processes N --process-id I, or "
            "JAX_NUM_PROCESSES=1 for a run of its own"
        ) from error


PROCESS_OPTIONS = {
    "--coordinator": "JAX_COORDINATOR_ADDRESS",
    "--processes": "JAX_NUM_PROCESSES",
    "--process-id": "JAX_PROCESS_ID",
}
"""Options of a command line that say which processes belong to a run."""


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    try:
        return None if text is None else int(text)
    except ValueError as error:
        raise InputError(f"{name} {text!r}: must be a whole number") from error


def _speaks_of_others() -> str | None:
    """What of the environment does, or None."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if (_number(name) or 1) > 1:
            return f"{name} is {os.environ[name]}"
    # JAX itself writes it there where it finds chips and libtpu.
    if "tpu" in (jax.config.jax_platforms or ""):
        return "this machine has TPUs"
    if "JOB_COMPLETION_INDEX" in os.environ:
        return "this pod belongs to an indexed job (JOB_COMPLETION_INDEX)"
    return None


def _make_room_for_virtual_devices() -> None:
    """Keeps XLA's CPU collectives from waiting for each other for ever.

    A collective blocks a thread of XLA's pool until all devices have come, and a device
    may block several at once.  With as many threads as devices, which is the default,
    none may be left for the device that the others wait for.
    """
    os.environ.setdefault("NPROC", "64")  # threads of XLA's pools
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def on_devices(abstract, mesh: jax.sharding.Mesh):
    """Shapes from `jax.eval_shape`, their shardings bound to the mesh's devices."""

    def bind(x):
        spec = x.sharding.spec if x.sharding is not None else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(bind, abstract)
