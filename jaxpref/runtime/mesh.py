"""Devices: the one mesh, the start of a multi-process run, and batches placed on it."""

import collections
import dataclasses
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpref.errors import InputError
from jaxpref.sharding import ROWS

AXES = ("data", "fsdp", "tensor")
DEAD_AFTER = 60
"""Seconds without a heartbeat after which JAX takes a process for dead and ends the
others; its own default is 100."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis has; one axis may be -1, "all that are left"."""

    data: int | None = None
    """Copies of the parameters; rows are split over them.  Where not given, one for
    each slice of a multislice run or box of GPUs, between which the network is slower
    than within."""
    fsdp: int = -1
    """Devices that share one copy of the parameters; rows are split over them too."""
    tensor: int = 1
    """Devices that share each matrix product (heads, feed-forward, vocabulary)."""


def make_mesh(
    config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """The mesh over all devices; by Explicit axes a layout mistake fails when traced.

    Of several slices each holds whole copies of the parameters: `data` is spread over
    the slices first, and `fsdp` and `tensor` stay within one.  Boxes of GPUs are slices
    to jax too; there `data` may be any number, since a box may be too small for a copy.

    Args:
      config: sizes of its axes.
      devices: others than those of this run, e.g. some that are only described.

    Raises:
      InputError: if the sizes do not multiply to the number of devices, or a copy of
        the parameters would lie on several slices of TPUs.
    """
    devices = jax.devices() if devices is None else devices
    slices = collections.defaultdict(list)
    for device in devices:
        slices[_slice(device)].append(device)
    data, *within = sizes = _sizes(config, len(devices), len(slices))
    each, rest = divmod(data, len(slices))
    if not rest:
        arranged = [_arranged((each, *within), slices[key]) for key in sorted(slices)]
        ordered = np.concatenate(arranged)
    elif devices[0].platform == "tpu":
        raise InputError(
            f"mesh data={data}: a copy of the parameters would lie on several of the "
            f"{len(slices)} slices, which a slow network joins; give a multiple of "
            f"{len(slices)}, or leave --mesh.data out (to make it fit: larger slices, "
            "or --optimizer adafactor)"
        )
    else:
        ordered = sorted(devices, key=lambda device: (_slice(device), device.id))
    types = (AxisType.Explicit,) * len(AXES)
    return jax.sharding.Mesh(np.reshape(ordered, sizes), AXES, axis_types=types)


def _arranged(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of one slice, neighbours in the mesh near each other on the torus."""
    try:
        return jax.make_mesh(sizes, AXES, devices=devices).devices
    except NotImplementedError:  # an axis of the torus is divided between two of ours
        return mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0


def _sizes(config: MeshConfig, count: int, slices: int) -> tuple[int, ...]:
    """Devices on each axis, all of them known."""
    asked = {axis: getattr(config, axis) for axis in AXES}
    if asked["data"] is None:
        asked["data"] = slices
    sizes = list(asked.values())
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        if known > 0:
            sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) != count:
        told = " x ".join(f"{axis}={size}" for axis, size in asked.items())
        raise InputError(
            f"mesh {told} does not cover the {count} device(s) of this run; "
            "set the axes so that their product is that number (one may be -1)"
        )
    return tuple(sizes)


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
    share_of_rows(mesh)


def share_of_rows(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Which share of a batch's rows this process fills, and how many shares there are.

    The rows of a share need not lie side by side: a mesh follows the torus, of which a
    host's chips may be a square.  Where `tensor` reaches over several processes, all of
    them fill the same share, alike.

    Raises:
      InputError: if the rows of two processes overlap in part.
    """
    shards = row_shards(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    held = collections.defaultdict(set)
    for device, (part,) in sharding.devices_indices_map((shards,)).items():
        held[device.process_index].add(part.indices(shards)[0])
    shares = sorted({tuple(sorted(parts)) for parts in held.values()})
    if any(len(parts) * len(shares) != shards for parts in shares):
        raise InputError(
            f"mesh tensor={mesh.shape['tensor']}: some processes would hold a part of "
            "each other's rows; choose a tensor that divides the devices of a process, "
            "or is a multiple of them"
        )
    mine = tuple(sorted(held[jax.process_index()]))
    return shares.index(mine), len(shares)


def to_global(batch, mesh: jax.sharding.Mesh):
    """Places each process's rows of an `[A, R, ...]` batch as one global batch.

    A process's rows stay in their order, in those places of the batch that its devices
    hold; so any mesh sees the same pairs in the same micro-batches.
    """
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
        jax.distributed.initialize(
            address, count, index, heartbeat_timeout_seconds=DEAD_AFTER
        )
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
