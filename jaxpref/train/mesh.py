"""Devices: the one mesh, the start of a multi-process run, and batches placed on it."""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpref.errors import InputError, first_line
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
      InputError: if the sizes do not multiply to the number of devices, or cannot be
        laid out on their torus.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    count = jax.device_count() if devices is None else len(devices)
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        if known > 0:
            sizes[sizes.index(-1)] = count // known
    asked = " x ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise InputError(
            f"mesh {asked} does not cover the {count} device(s) of this run; "
            "set the axes so that their product is that number (one may be -1)"
        )
    types = (AxisType.Explicit,) * 3
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    except NotImplementedError as error:
        raise InputError(
            f"mesh {asked}: each axis must take whole axes of the chips' torus; choose "
            f"other sizes ({first_line(error)})"
        ) from error


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

    The environment says so by `JAX_COORDINATOR_ADDRESS` (with `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`), by Slurm or Open MPI with more than one task, or by being a Cloud
    TPU machine.  Must run before anything touches a device; a second call does nothing.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        _make_room_for_virtual_devices()
    if jax.distributed.is_initialized():
        return
    environ = os.environ
    if "cpu" in environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if address := environ.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count = int(environ["JAX_NUM_PROCESSES"])
            index = int(environ["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise InputError(
                "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and "
                f"JAX_PROCESS_ID must be set to whole numbers too ({error})"
            ) from error
        jax.distributed.initialize(address, count, index)
    elif _tasks() > 1 or _on_cloud_tpu():
        jax.distributed.initialize()


def _make_room_for_virtual_devices() -> None:
    """Keeps XLA's CPU collectives from waiting for each other for ever.

    A collective blocks a thread of XLA's pool until all devices have come, and a device
    may block several at once.  With as many threads as devices, which is the default,
    none may be left for the device that the others wait for.
    """
    os.environ.setdefault("NPROC", "64")  # threads of XLA's pools
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _tasks() -> int:
    names = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    return max(int(os.environ.get(name, "1")) for name in names)


def _on_cloud_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return (
        ("tpu" in platforms or not platforms)
        and importlib.util.find_spec("libtpu") is not None
        and (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists())
    )


def on_devices(abstract, mesh: jax.sharding.Mesh):
    """Shapes from `jax.eval_shape`, their shardings bound to the mesh's devices."""

    def bind(x):
        spec = x.sharding.spec if x.sharding is not None else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(bind, abstract)
