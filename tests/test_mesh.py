"""The mesh: of one slice and of several, and which rows of a batch are whose."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from jaxpref.errors import InputError
from jaxpref.runtime.mesh import AXES, MeshConfig, check_rows, make_mesh, share_of_rows
from tests.tiny import make_model_folder
from tests.virtual import xla_flags

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Device:
    """What jax tells of a device."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def slices_of_v5e(count: int) -> list[Device]:
    """4x4 chips each, of which a host has a square of 2x2, listed host by host."""
    found = []
    for index in range(count):
        for host in range(4):
            for chip in range(4):
                x, y = 2 * (host % 2) + chip % 2, 2 * (host // 2) + chip // 2
                id = len(found)
                found.append(Device(id, 4 * index + host, index, (x, y, 0)))
    return found


def boxes_of_gpus(count: int) -> list[Device]:
    return [
        Device(n, n // 8, n // 8, platform="gpu", device_kind="H200")
        for n in range(8 * count)
    ]


@pytest.mark.parametrize("slices", [2, 3])
@pytest.mark.parametrize("asked", [{}, {"tensor": 4}, {"fsdp": 2, "data": -1}])
def test_each_slice_holds_whole_copies(slices, asked):
    devices = slices_of_v5e(slices)
    # The slices need not be listed one after the other.
    devices = devices[::2] + devices[1::2]
    mesh = make_mesh(MeshConfig(**asked), devices)
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Explicit}
    copies = mesh.shape["data"]
    assert copies == slices * (8 if "data" in asked else 1)
    of = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    # Slices change along `data` only, and there in blocks, in their own order.
    expected = np.repeat(np.arange(slices), copies // slices)
    np.testing.assert_array_equal(
        of, np.broadcast_to(expected[:, None, None], of.shape)
    )
    assert len(set(mesh.devices.ravel())) == len(devices)


def test_the_order_within_a_slice_is_that_of_a_slice_alone():
    one = make_mesh(MeshConfig(tensor=4), slices_of_v5e(1))
    two = make_mesh(MeshConfig(tensor=4), slices_of_v5e(2))
    places = np.vectorize(lambda device: device.coords, otypes=[object])
    for part in two.devices:
        assert (places(part) == places(one.devices[0])).all()


@pytest.mark.parametrize("data", [1, 3])
def test_a_copy_over_several_slices_is_refused(data):
    devices = slices_of_v5e(2) if data == 1 else slices_of_v5e(2)[:30]
    with pytest.raises(InputError) as error:
        make_mesh(MeshConfig(data=data), devices)
    assert f"mesh data={data}: a replica of the parameters would" in str(error.value)
    assert "use a multiple of 2, or omit --mesh.data" in str(error.value)


def test_sizes_that_do_not_multiply_are_refused_of_slices_too():
    with pytest.raises(InputError, match="data=2 x fsdp=3 x tensor=1 does not match"):
        make_mesh(MeshConfig(fsdp=3), slices_of_v5e(2))


def test_boxes_of_gpus_hold_a_copy_each_but_may_share_one():
    devices = boxes_of_gpus(3)
    assert dict(make_mesh(MeshConfig(), devices).shape)["data"] == 3
    mesh = make_mesh(MeshConfig(data=1, tensor=2), devices[::-1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 12, "tensor": 2}
    assert [device.id for device in mesh.devices.ravel()] == list(range(24))


def test_one_slice_has_one_copy():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


PROCESS = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from jaxpref.runtime.mesh import initialize_distributed
initialize_distributed()
import jax, numpy as np
from jax.sharding import AxisType
from jaxpref.models import build, tensor_files
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.runtime.mesh import AXES, check_rows, share_of_rows, to_global

folder = sys.argv[2]
me = jax.process_index()

def mesh_of(order, *sizes):
    devices = np.array(sorted(jax.devices(), key=lambda d: d.id))[order]
    types = (AxisType.Explicit,) * 3
    return jax.sharding.Mesh(devices.reshape(sizes), AXES, axis_types=types)

# Hosts hold every second shard, as a square of chips does of a ring.
mesh = mesh_of([0, 4, 1, 5, 2, 6, 3, 7], 2, 4, 1)
assert share_of_rows(mesh) == (me, 2)
mine = np.arange(8).reshape(2, 4) + 100 * me
with jax.set_mesh(mesh):
    rows = to_global({"x": mine}, mesh)["x"]
    whole = jax.jit(lambda x: jax.reshard(x, jax.P()))(rows)
placed = np.array(whole.addressable_data(0)).tolist()

# A product over both processes: they fill the same rows, alike.
mesh = mesh_of([0, 4, 1, 5, 2, 6, 3, 7], 1, 4, 2)
assert share_of_rows(mesh) == (0, 1)
with jax.set_mesh(mesh):
    rows = to_global({"x": np.arange(16).reshape(2, 8)}, mesh)["x"]
    whole = jax.jit(lambda x: jax.reshard(x, jax.P()))(rows)
shared = np.array(whole.addressable_data(0)).tolist()

# What is read of a model's folder, and by how much at a time.
read, opened = [], tensor_files.open_file

class Counted:
    def __init__(self, tensor):
        self.get_shape, self.get_dtype = tensor.get_shape, tensor.get_dtype
        self.tensor = tensor

    def __getitem__(self, index):
        found = self.tensor[index]
        if len(self.get_shape()) == 2:
            read.append((found.nbytes, 4 * int(np.prod(self.get_shape()))))
        return found

tensor_files.open_file = lambda path: {n: Counted(t) for n, t in opened(path).items()}
with jax.set_mesh(mesh_of(list(range(8)), 1, 8, 1)):
    load_params(folder, build(read_architecture(folder)))
print(json.dumps({"placed": placed, "shared": shared, "read": read}))
"""


def test_two_processes_fill_their_rows_and_read_their_half_of_the_weights(tmp_path):
    folder = make_model_folder(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for index in range(2):
        environ = os.environ | {
            "XLA_FLAGS": xla_flags(4),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-c", PROCESS, str(ROOT), str(folder)]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, env=environ, stdout=pipe, stderr=pipe, text=True)
        )
    try:
        told = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], [err for _, err in told]
    found = [json.loads(out.splitlines()[-1]) for out, _ in told]
    for one in found:
        # The rows of the processes take turns, each one's in their order.
        assert one["placed"] == [
            [0, 100, 1, 101, 2, 102, 3, 103],
            [4, 104, 5, 105, 6, 106, 7, 107],
        ]
        assert one["shared"] == np.arange(16).reshape(2, 8).tolist()
    # No matrix is read whole by anyone, and by both together once.
    parts = [part for one in found for part, _ in one["read"]]
    largest = max(part / whole for one in found for part, whole in one["read"])
    stored = sum(whole for one in found for _, whole in one["read"]) / len(parts)
    assert largest == 1 / 8
    assert sum(parts) == len(parts) * stored / 8
    halves = [sum(part for part, _ in one["read"]) for one in found]
    assert halves[0] == halves[1] == sum(parts) / 2


@pytest.mark.parametrize("tensor, shares", [(1, 4), (2, 4), (4, 2), (8, 2), (16, 1)])
def test_processes_fill_the_rows_of_their_chips(monkeypatch, tensor, shares):
    mesh = make_mesh(MeshConfig(tensor=tensor), slices_of_v5e(1))
    processes = [device.process_index for device in mesh.devices.ravel()]
    if tensor == 1:
        assert processes != sorted(processes)  # along the torus
    found = {}
    for index in range(4):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found[index] = share_of_rows(mesh)
    assert {count for _, count in found.values()} == {shares}
    assert {index for index, _ in found.values()} == set(range(shares))
    # Who has the first row has the first share.
    assert found[processes[0]][0] == 0
    for row, (one, *others) in enumerate(mesh.devices[0]):
        holders = {found[device.process_index] for device in (one, *others)}
        assert len(holders) == 1, row


def test_rows_that_processes_share_in_part_are_refused():
    devices = [dataclasses.replace(d, platform="gpu") for d in slices_of_v5e(1)[:12]]
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=6), devices)
    with pytest.raises(
        InputError, match="tensor=6: the rows of some processes would partly"
    ):
        check_rows(32, 2, mesh)


@pytest.mark.parametrize("count, tensor", [(1, 1), (1, 2), (3, 2), (2, 8)])
def test_the_order_is_that_of_jax(count, tensor):
    """Where jax knows one: for slices its own function for them is the oracle."""
    devices = slices_of_v5e(count)
    mesh = make_mesh(MeshConfig(tensor=tensor), devices)
    expected = mesh_utils.create_hybrid_device_mesh(
        (1, 16 // tensor, tensor),
        (count, 1, 1),
        devices,
        allow_split_physical_axes=True,
    )
    assert (mesh.devices == expected).all()


def test_an_axis_of_the_torus_may_be_divided():
    """jax.make_mesh refuses, of other chips than v5e."""
    devices = [
        dataclasses.replace(d, device_kind="TPU v6 lite") for d in slices_of_v5e(2)
    ]
    mesh = make_mesh(MeshConfig(tensor=2), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8, "tensor": 2}
    for one, other in mesh.devices.reshape(-1, 2):
        # Neighbours, which the tensor axis needs most.
        assert sum(abs(a - b) for a, b in zip(one.coords, other.coords)) == 1
