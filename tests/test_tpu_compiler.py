"""The packed train step, compiled by the TPU compiler on a machine without a TPU."""

import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.random_steps import make_step, packed_batch, random_pairs
from jaxpref.models import ModelConfig, build
from jaxpref.models.config import ROWS
from jaxpref.train.mesh import AXES, on_devices

pytest.importorskip("libtpu", reason="the TPU compiler (pip install libtpu) is absent")
pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    compute_dtype="bfloat16",
    remat="full",
)
T = 2048


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch):
    """Unless told, the compiler asks the network what TPUs this machine has."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # beside another process that compiles
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x1"])
def test_the_packed_step_runs_splash_attention(topology):
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = jax.make_mesh(
        (1, len(devices), 1),
        AXES,
        axis_types=(AxisType.Explicit,) * 3,
        devices=devices,
    )
    sizes = np.tile([[127, 255, 127]], (len(devices) * 4, 1))
    pairs = random_pairs(sizes, vocab_size=MODEL.vocab_size)
    model = build(MODEL)

    def shaped(x):
        shape = (1, len(devices), *x.shape[2:])
        sharding = NamedSharding(mesh, P(None, ROWS))
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        step = make_step(model)
        begin = lambda: step.new_state(model.init(jax.random.key(0)))
        state = on_devices(jax.eval_shape(begin), mesh)
        batch = jax.tree.map(shaped, packed_batch(pairs, row_length=T))
        text = step.step.lower(state, batch).compile().as_text()
    calls = re.findall(
        r"%splash_mha_(\w+?)_segmented\w*[.\d]* = .*tpu_custom_call", text
    )
    # Forward a second time, as nothing of a layer is kept for the backward pass.
    assert sorted(calls) == ["dkv", "dq", "fwd", "fwd"]
    loops = re.findall(r' while\(.*op_name="([^"]*)"', text)
    assert loops and not [name for name in loops if "shard_map" in name]
