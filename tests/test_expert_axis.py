"""The mesh axis of experts: what is read, refused, planned, and trained."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.models import build, tensor_files
from jaxpref.models.families.mixtral import EXPERTS_IN
from jaxpref.models.folder import load_params, save
from jaxpref.models.lora import LoraOptions
from jaxpref.models.paths import by_path
from jaxpref.objectives import from_loss
from jaxpref.plan.presets import PRESETS
from jaxpref.plan.roofline import Load, active_weights, ideal_wire_bytes
from jaxpref.runtime.mesh import MeshConfig, check_rows, make_mesh, row_shards
from jaxpref.train import Decay, OptimizerConfig, TrainConfig, read_metrics, run
from tests.family_cases import architecture_of, random_params
from tests.test_family_training import make_folder
from tests.test_models import mesh
from tests.tiny import make_pairs_file


def test_a_mesh_has_the_axis_if_its_size_is_given():
    made = make_mesh(MeshConfig(expert=4, tensor=2))
    assert dict(made.shape) == {"data": 1, "fsdp": 1, "expert": 4, "tensor": 2}
    assert row_shards(made) == 4
    with pytest.raises(InputError, match="4 devices .data x fsdp x expert"):
        check_rows(6, 1, made)
    with pytest.raises(InputError, match="data=1 x fsdp=-1 x expert=3 x tensor=1"):
        make_mesh(MeshConfig(expert=3))


@pytest.mark.parametrize(
    "case, sizes, words",
    [
        ("llama", (1, 2, 2, 1), "expert=2, but a llama model has no experts; use fsdp"),
        ("mixtral tied", (1, 1, 2, 1), "expert=2 does not divide .* num_experts=5"),
        ("mixtral", (1, 3, 2, 1), "fsdp=3 x expert=2 does not divide .* vocab_size=64"),
    ],
)
def test_models_that_do_not_fit_the_axis_are_refused(case, sizes, words):
    model = build(architecture_of(case))
    with mesh(*sizes), pytest.raises(InputError, match=words):
        jax.eval_shape(model.init, jax.random.key(0))


def test_folders_are_read_by_part_and_written_as_they_were(tmp_path, monkeypatch):
    model = build(architecture_of("mixtral"))
    params = random_params(model)
    save(tmp_path / "model", model, params)
    read = []

    class Counted:
        def __init__(self, name, tensor):
            self.get_shape, self.get_dtype = tensor.get_shape, tensor.get_dtype
            self.name, self.tensor = name, tensor

        def __getitem__(self, index):
            found = self.tensor[index]
            if ".experts." in self.name:
                read.append(found.size)
            return found

    opened = tensor_files.open_file
    monkeypatch.setattr(
        tensor_files,
        "open_file",
        lambda path: {name: Counted(name, t) for name, t in opened(path).items()},
    )
    with mesh(1, 2, 2, 2):
        found = load_params(tmp_path / "model", model)
        gate = found["layers"]["gate"]
        assert jax.typeof(gate).sharding.spec == EXPERTS_IN
        # A device has half the experts, half the inputs, and half the outputs.
        assert gate.addressable_data(0).size == gate.size // 8
        save(tmp_path / "again", model, found)
    experts = sum(found["layers"][name].size for name in ("gate", "up", "down"))
    assert sum(read) == experts  # nothing is read twice
    jax.tree.map(np.testing.assert_array_equal, found, params)
    jax.tree.map(
        np.testing.assert_array_equal, load_params(tmp_path / "again", model), params
    )


def test_the_ideal_communication_of_a_plan():
    """Of Qwen3-30B-A3B, with its numbers written out."""
    load = Load(
        model=build(PRESETS["qwen3-30b-a3b"]),
        mesh={"data": 2, "fsdp": 4, "expert": 8, "tensor": 1},
        sequences=128,
        length=4096,
        predictions=2048,
        seen=0.0,
    )
    hidden, layers = 2048, 48
    experts = layers * 128 * 3 * hidden * 768
    attention = layers * 2 * hidden * (32 + 4) * 128
    others = attention + layers * hidden * 128 + 2 * 151936 * hidden
    # Float32: two gathers and one reduce-scatter, of 4 bytes a weight each.
    weights = 12 * (others * 31 / 32 + experts / 8 * 3 / 4)
    # Three gathers and two reduce-scatters of the other devices' tokens.
    tokens = 128 * 4096 // 64
    moved = 7 * layers * tokens * hidden * 5 * 4
    assert math.isclose(ideal_wire_bytes(load), weights + moved)
    share = others - 2 * 151936 * hidden + experts * 8 // 128
    assert active_weights(load.model.architecture) == share


def losses_of(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    return {x["step"]: x["loss"] for x in lines if "loss" in x}


ATTENTION = LoraOptions(rank=2, targets="attention")
LORA = {
    "full": LoraOptions(),
    "lora": ATTENTION,
    "dora": dataclasses.replace(ATTENTION, dora=True, base="nf4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("lora", LORA.values(), ids=LORA)
def test_training_and_resuming_on_another_mesh(lora, tmp_path):
    """Full training and adapters of attention, in packed rows.

    As for other meshes, losses agree within a relative 2e-4 (tests/test_processes.py).
    """
    folder = make_folder("qwen3_moe", tmp_path / "model")
    config = TrainConfig(
        model=str(folder),
        data=str(make_pairs_file(tmp_path / "pairs.jsonl", 80)),
        out=str(tmp_path / "plain"),
        objective=from_loss(losses.dpo),
        max_steps=6,
        batch_size=16,
        accumulation=2,
        row_length=64,
        log_every=1,
        save_every=3,
        options=DataOptions(max_length=32),
        lora=lora,
        optimizer=OptimizerConfig(learning_rate=1e-3, decay=Decay.CONSTANT),
        mesh=MeshConfig(data=8, fsdp=1),
    )
    run(config)
    out = tmp_path / "sharded"
    meshes = MeshConfig(fsdp=2, expert=2, tensor=2), MeshConfig(fsdp=2, expert=4)
    for made, steps in zip(meshes, (3, 6), strict=True):
        run(dataclasses.replace(config, out=str(out), mesh=made, max_steps=steps))
    expected = losses_of(tmp_path / "plain")
    found = losses_of(out)
    assert found.keys() == expected.keys() == set(range(1, 7))
    for step, loss in expected.items():
        assert math.isclose(found[step], loss, rel_tol=2e-4), step
    model = build(architecture_of("qwen3_moe"))
    one = by_path(load_params(tmp_path / "plain" / "export", model))
    two = by_path(load_params(out / "export", model))
    before = by_path(load_params(folder, model))
    for path, x in one.items():
        moved = np.abs(x - before[path]).max()
        # Adam divides by the size of the gradients, which also scales up rounding.
        np.testing.assert_allclose(two[path], x, rtol=0, atol=0.05 * moved + 1e-7)
