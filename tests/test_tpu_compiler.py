"""Train steps, compiled by the TPU compiler on a machine without a TPU."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from benchmarks.random_steps import make_step, packed_batch, random_pairs
from jaxpref import losses
from jaxpref.models import Numerics, build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.objectives import from_loss
from jaxpref.plan.chips import parse_topology
from jaxpref.plan.layout import uniform_layout
from jaxpref.plan.program import devices_of
from jaxpref.runtime.mesh import AXES, batch_sharding, on_devices
from jaxpref.scoring import make_scorer
from jaxpref.train import MeshConfig, OptimizerConfig, make_mesh
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.task import Programs
from tests.virtual import xla_flags_of_tpus

pytest.importorskip("libtpu", reason="the TPU compiler (pip install libtpu) is absent")
pytestmark = pytest.mark.slow

ARCHITECTURE = LlamaArchitecture(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
)
NUMERICS = Numerics(compute_dtype="bfloat16", remat="full")
T = 2048


@pytest.fixture(autouse=True)
def no_metadata_server(monkeypatch):
    """Without these variables, the compiler queries the network for TPUs."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may be compiling
        "XLA_FLAGS": xla_flags_of_tpus(),
    }.items():
        monkeypatch.setenv(name, value)


WINDOWS = dataclasses.replace(
    ARCHITECTURE,
    sliding_window=700,
    sliding_layers=(True, False),
    attention_soft_cap=50.0,
)


@pytest.mark.parametrize(
    "topology, architecture",
    [("v5e:4x4", ARCHITECTURE), ("v5p:2x2x1", ARCHITECTURE), ("v5e:4x4", WINDOWS)],
    ids=["v5e", "v5p", "windows"],
)
def test_the_packed_step_runs_splash_attention(topology, architecture):
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = jax.make_mesh(
        (1, len(devices), 1),
        AXES,
        axis_types=(AxisType.Explicit,) * 3,
        devices=devices,
    )
    sizes = np.tile([[127, 255, 127]], (len(devices) * 4, 1))
    pairs = random_pairs(sizes, vocab_size=architecture.vocab_size)
    model = build(architecture, NUMERICS)

    def shaped(x):
        shape = (1, len(devices), *x.shape[2:])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=batch_sharding(mesh))

    with jax.set_mesh(mesh):
        step = make_step(model)
        begin = lambda: step.new_state(model.init(jax.random.key(0)))
        state = on_devices(jax.eval_shape(begin), mesh)
        batch = jax.tree.map(shaped, packed_batch(pairs, row_length=T))
        text = step.step.lower(state, {}, batch).compile().as_text()
    calls = re.findall(
        r"%splash_mha_(\w+?)_segmented\w*[.\d]* = .*tpu_custom_call", text
    )
    # Two forward calls, because the backward pass recomputes the layers; twice if
    # layers with a window have another kernel.
    kernels = 1 if architecture.sliding_layers is None else 2
    assert sorted(calls) == sorted(["dkv", "dq", "fwd", "fwd"] * kernels)
    loops = re.findall(r' while\(.*op_name="([^"]*)"', text)
    assert loops and not [name for name in loops if "shard_map" in name]


def test_only_gradients_cross_between_slices():
    """Each chip sends its own part of the gradients and scalar sums, but no weights."""
    model = build(ARCHITECTURE, NUMERICS)
    objective, config = from_loss(losses.cpo), OptimizerConfig()
    schedule = make_schedule(config, 100)
    mesh = make_mesh(MeshConfig(), devices_of(parse_topology("2xv5e:4x4")))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 16, "tensor": 1}
    with jax.set_mesh(mesh):
        task = Programs(
            scorer=make_scorer(model, objective.scores),
            objective=objective,
            optimizer=make_optimizer(config, schedule),
            schedule=schedule,
            mesh=mesh,
            layout=uniform_layout(
                2, mesh, prompt_length=128, answer_length=128, batch_size=32
            ),
        )
        params, state = task.abstract_params(), task.abstract_state()
        batch = task.abstract_batch()
        text = task.train_step.lower(state, {}, batch).compile().as_text()

    # Within a slice: groups of its 16 chips.
    groups = re.findall(r"replica_groups=\{(\{[\d,{}]*\})\}", text)
    assert groups
    for group in re.findall(r"\{([\d,]+)\}", " ".join(groups)):
        assert len({int(chip) // 16 for chip in group.split(",")}) == 1
    # Between slices: the transfers handed to the runtime of the network.
    sent = re.findall(
        r"= \((\w+)\[([\d,]*)\].* send\(.*TRANSFER".replace(
            "TRANSFER", r"_xla_megascale_transfer_type=\"(\w+)\""
        ),
        text,
    )
    assert {kind for *_, kind in sent} == {"ALL_REDUCE"}
    assert len(sent) == len(re.findall(r" send\(", text))
    sizes = [math.prod(map(int, shape.split(","))) for _, shape, _ in sent]
    layer = lambda x: (
        math.prod(x.sharding.shard_shape(x.shape)) // ARCHITECTURE.num_layers
    )
    parts = [layer(x) for x in jax.tree.leaves(params["layers"]) if x.ndim > 2]
    parts += [2 * layer(params["embed"]), 2 * layer(params["head"])]
    # The compiler may combine the transfers of a layer.  Each chip's part of every
    # matrix is among them, but no whole matrix.
    assert sum(parts) <= sum(sizes) and max(sizes) <= sum(parts)
    assert sum(parts) < math.prod(params["layers"]["gate"].shape[1:])
