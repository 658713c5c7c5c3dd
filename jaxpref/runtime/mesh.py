"""The device mesh, starting a multi-process run, and placing batches on devices."""

import collections
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpref.errors import InputError
from jaxpref.sharding import row_axes

# jax gives no stub of it.
Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]
AXES = ("data", "fsdp", "tensor")
"""The axes of every mesh."""
EXPERT_AXES = ("data", "fsdp", "expert", "tensor")
"""The axes of a mesh for mixtures of experts."""
DEAD_AFTER = 60
"""Seconds without a heartbeat after which JAX considers a process dead and ends the
others; JAX's own default is 100."""


Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices on each mesh axis; one axis may be -1 (all that remain)."""

    data: int | None = None
    """Replicas of the parameters; rows are split over them.  Default: one per slice of
    a multislice run or per GPU host, because the network between slices or hosts is
    slower than the one within."""
    fsdp: int = -1
    """Devices over which each replica of the parameters is sharded; they also split the
    rows.  -1: all remaining devices."""
    expert: int = 1
    """For mixtures of experts: devices over which the experts are split.  They also
    split the rows, and the other parameters are sharded over them."""
    tensor: int = 1
    """Devices that share each matrix product (heads, feed-forward, vocabulary)."""


def make_mesh(
    config: MeshConfig, devices: Sequence[Device] | None = None
) -> jax.sharding.Mesh:
    """Creates a mesh of all devices with Explicit axes.

    With Explicit axes, a mistake in the layout fails at tracing.  The mesh has an axis
    `expert` only if its size is not 1.  Each of several slices holds whole replicas of
    the parameters: `data` spans the slices, while the other axes stay within one.  jax
    treats GPU hosts as slices too.  There `data` may be any number, because one host
    may be too small for a replica.

    Args:
      config: sizes of the axes.
      devices: the devices to use in place of this run's, e.g. described topologies.

    Raises:
      InputError: if the product of the sizes is not the number of devices, or a replica
        of the parameters would span several TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = collections.defaultdict(list)
    for device in devices:
        slices[_slice(device)].append(device)
    axes = AXES if config.expert == 1 else EXPERT_AXES
    data, *within = sizes = _sizes(config, axes, len(devices), len(slices))
    each, rest = divmod(data, len(slices))
    if not rest:
        arranged = [
            _arranged((each, *within), axes, slices[key]) for key in sorted(slices)
        ]
        ordered = np.concatenate(arranged)
    elif devices[0].platform == "tpu":
        raise InputError(
            f"mesh data={data}: a replica of the parameters would span several of the "
            f"{len(slices)} slices, across their slow network; use a multiple of "
            f"{len(slices)}, or omit --mesh.data (if memory is short: larger slices, "
            "or --optimizer adafactor)"
        )
    else:
        ordered = sorted(devices, key=lambda device: (_slice(device), device.id))
    types = (AxisType.Explicit,) * len(axes)
    return jax.sharding.Mesh(np.reshape(ordered, sizes), axes, axis_types=types)


def _arranged(
    sizes: tuple[int, ...], axes: tuple[str, ...], devices: Sequence[Device]
) -> np.ndarray:
    """The devices of one slice, with mesh neighbors close together on the torus."""
    try:
        return jax.make_mesh(sizes, axes, devices=devices).devices
    except NotImplementedError:  # one axis of the torus has to serve two mesh axes
        return mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )


def _slice(device: Device) -> int:
    return getattr(device, "slice_index", None) or 0


def _sizes(
    config: MeshConfig, axes: tuple[str, ...], count: int, slices: int
) -> tuple[int, ...]:
    """The number of devices on each axis, with defaults and -1 filled in."""
    requested = {axis: getattr(config, axis) for axis in axes}
    if requested["data"] is None:
        requested["data"] = slices
    sizes = list(requested.values())
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        if known > 0:
            sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) != count:
        product = " x ".join(f"{axis}={size}" for axis, size in requested.items())
        raise InputError(
            f"mesh {product} does not match the {count} device(s) of this run; "
            "the product of the axes must be that number (one axis may be -1)"
        )
    return tuple(sizes)


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of parts the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in row_axes(mesh))


def check_rows(batch_size: int, accumulation: int, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError unless a micro-batch can be split over the mesh."""
    if batch_size < 1 or batch_size % (accumulation * row_shards(mesh)):
        raise InputError(
            f"batch_size {batch_size} is not a multiple of accumulation {accumulation} "
            f"x {row_shards(mesh)} devices ({' x '.join(row_axes(mesh))})"
        )
    share_of_rows(mesh)


def rows_for(count: int, batch_size: int, mesh: jax.sharding.Mesh) -> int:
    """Rows of a batch that holds up to `batch_size` of `count` items.

    No more than needed, so that a huge batch size does not allocate a huge batch; a
    multiple of the parts that the rows are split into.
    """
    parts = row_shards(mesh)
    return min(batch_size, max(-(-count // parts), 1) * parts)


def share_of_rows(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Which share of a batch's rows this process loads, and the number of shares.

    The rows of a share need not be contiguous: the mesh follows the torus, where the
    chips of a host may form a square.  If `tensor` spans several processes, all of
    these load the same share.

    Raises:
      InputError: if the rows of two processes overlap only in part.
    """
    shards = row_shards(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(row_axes(mesh)))
    held = collections.defaultdict(set)
    for device, (part,) in sharding.devices_indices_map((shards,)).items():
        held[device.process_index].add(part.indices(shards)[0])
    shares = sorted({tuple(sorted(parts)) for parts in held.values()})
    if any(len(parts) * len(shares) != shards for parts in shares):
        raise InputError(
            f"mesh tensor={mesh.shape['tensor']}: the rows of some processes would "
            "partly overlap; choose a tensor size that divides the number of devices "
            "per process or is a multiple of it"
        )
    mine = tuple(sorted(held[jax.process_index()]))
    return shares.index(mine), len(shares)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of every array `[A, R, ...]` of a batch."""
    return NamedSharding(mesh, PartitionSpec(None, row_axes(mesh)))


def to_global(batch: Tree, mesh: jax.sharding.Mesh) -> Tree:
    """Combines each process's rows of an `[A, R, ...]` batch into one global batch.

    A process's rows keep their order and fill the positions held by its devices, so
    every mesh sees the same pairs in the same micro-batches.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def from_whole(batch: Tree, mesh: jax.sharding.Mesh) -> Tree:
    """Puts an `[A, R, ...]` batch that every process has whole on the devices."""
    sharding = batch_sharding(mesh)

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda own: x[own])

    return jax.tree.map(lambda x: place(np.asarray(x)), batch)


def initialize_distributed() -> None:
    """Joins the other processes of this run, if the environment indicates any.

    These environments do: a Cloud TPU VM, a GKE pod with TPUs, Slurm or Open MPI with
    more than one task, and an indexed job of Kubernetes.  JAX then detects the other
    processes.  `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, and `JAX_PROCESS_ID`
    take precedence; the command line sets them by `PROCESS_OPTIONS`.
    `JAX_NUM_PROCESSES=1` alone forces a single-process run.

    Must run before any device is used; a second call does nothing.

    Raises:
      InputError: if the environment indicates several processes but does not identify
        them.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        _prevent_deadlock_of_virtual_devices()
    if jax.distributed.is_initialized():
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, index = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    reason = "JAX_COORDINATOR_ADDRESS is set" if address else _cluster_hint()
    if reason is None or (count == 1 and not address):
        return
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            address, count, index, heartbeat_timeout_seconds=DEAD_AFTER
        )
    except ValueError as error:
        raise InputError(
            f"{reason}, but the processes of the run are not known ({error}); pass "
            "--coordinator HOST:PORT --processes N --process-id I, or set "
            "JAX_NUM_PROCESSES=1 for a single-process run"
        ) from error


PROCESS_OPTIONS = {
    "--coordinator": "JAX_COORDINATOR_ADDRESS",
    "--processes": "JAX_NUM_PROCESSES",
    "--process-id": "JAX_PROCESS_ID",
}
"""Command-line options that identify the processes of a run."""


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    try:
        return None if text is None else int(text)
    except ValueError as error:
        raise InputError(f"{name} {text!r}: must be a whole number") from error


def _cluster_hint() -> str | None:
    """What in the environment indicates several processes, or None."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if (_number(name) or 1) > 1:
            return f"{name} is {os.environ[name]}"
    # JAX itself sets this if it finds chips and libtpu.
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if "tpu" in (platforms or ""):
        return "this machine has TPUs"
    if "JOB_COMPLETION_INDEX" in os.environ:
        return "this pod belongs to an indexed job (JOB_COMPLETION_INDEX)"
    return None


def _prevent_deadlock_of_virtual_devices() -> None:
    """Keeps XLA's CPU collectives from deadlocking.

    A collective blocks a thread of XLA's pool until all devices arrive, and one device
    may block several threads.  By default there are only as many threads as devices, so
    none may remain for the device that the others wait for.
    """
    os.environ.setdefault("NPROC", "64")  # threads of XLA's pools
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def on_devices(abstract: Tree, mesh: jax.sharding.Mesh) -> Tree:
    """Binds the shardings of shapes from `jax.eval_shape` to the mesh's devices."""

    def bind(x):
        spec = x.sharding.spec if x.sharding is not None else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(bind, abstract)
