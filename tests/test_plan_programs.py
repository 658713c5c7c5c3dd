"""Plans end to end: the compiled programs, the cache, and the printed plan."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxpref import losses
from jaxpref.cli import plan as plan_command
from jaxpref.models import Numerics, build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.objectives import from_loss
from jaxpref.plan import PlanConfig, child, command, hlo, program, roofline
from jaxpref.plan.chips import CHIPS, parse_topology
from jaxpref.plan.layout import uniform_layout
from jaxpref.runtime.mesh import on_devices
from jaxpref.scoring import make_scorer
from jaxpref.train import MeshConfig, make_mesh
from tests.tiny import make_model_folder, tiny_config

ROOT = Path(__file__).resolve().parents[1]


def test_a_plan_for_eight_virtual_devices(tmp_path, capsys, monkeypatch):
    folder = make_model_folder(tmp_path / "model")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path / "cache"))
    argv = f"--model {folder} --topology cpu:8 --batch 16 --seq 24 --mesh.tensor 2"
    argv = f"{argv} --json {tmp_path}/plan.json --loss rdpo --loss.flip-rate 0.1"
    plan_command.command(argv.split())
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] is None and plan["roofline_seconds"] is None
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert plan["tokens_shape"] == [1, 16, 2, 24] and plan["loss"] == "rdpo"
    # A device holds an eighth of every matrix and all norm scales.  The moments are
    # twice that plus two four-byte counters.
    c = tiny_config()
    D, K, L = c.hidden_size, c.head_dim, c.num_layers
    layer = D * K * 2 * (c.num_heads + c.num_kv_heads) + 3 * D * c.intermediate_size
    matrices = 2 * c.vocab_size * D + L * layer
    held = 4 * (matrices // 8 + D * (2 * L + 1))
    assert plan["held_bytes"]["parameters"] == held
    assert plan["held_bytes"]["optimizer"] == 2 * held + 8
    # The state, and the part of the batch that the step reads.
    state = 3 * held + 8 + 8
    assert state < plan["argument_bytes"] <= state + plan["held_bytes"]["batch"]
    assert plan["temp_bytes"] > 0 and plan["hbm_bytes"] > plan["temp_bytes"]
    tokens = 16 * 2 * 24
    forward = (
        2 * tokens * L * layer + 2 * 16 * 2 * 16 * D * c.vocab_size
    )  # 12 by eights
    forward += 4 * L * D * 16 * 2 * (24 * 25 // 2)
    assert plan["flops_per_step"] == 3 * forward
    # The weights of the layers are gathered over fsdp in both passes.
    assert plan["collectives"]["all-gather"]["count"] > 2 * 7 * L
    assert plan["wire_bytes"] > plan["ideal_wire_bytes"] > 0  # tensor has its own
    assert 0 < plan["activation_bytes"] < plan["temp_bytes"]
    decode = plan["decode"]
    assert decode["prompts"] == 16 and decode["slots"] == 24
    # Weights, prompts and lengths on every device, a key, and sampling options.
    prompts = 4 * 16 * (12 + 1)
    assert 0 <= decode["argument_bytes"] - held - prompts < 64
    # The loop gathers the weights of the layers once per token.
    assert 0 < decode["wire_bytes"] < plan["wire_bytes"]
    assert plan["score"]["hbm_bytes"] < plan["hbm_bytes"]
    printed = capsys.readouterr().out
    assert re.search(r"cpu:8: 8 devices, data=1 x fsdp=4 x tensor=2", printed)
    assert "collectives of a step" in printed and "fits" not in printed
    # The result is cached, for this process too.
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: 1 / 0)
    config = PlanConfig(
        model=str(folder),
        topology="cpu:8",
        batch=16,
        seq=24,
        mesh=MeshConfig(tensor=2),
    )
    objective = from_loss(losses.rdpo, flip_rate=0.1)
    work = command.work_of(config, command.model_of(config), objective)
    again = program.measure(work, parse_topology("cpu:8"))
    assert again["step"]["temp"] == plan["temp_bytes"]
    # The step alone: the same figures, and the other programs do not show up.
    config = dataclasses.replace(config, step_only=True)
    work = command.work_of(config, command.model_of(config), objective)
    alone = program.measure(work, parse_topology("cpu:8"))
    monkeypatch.setattr(child, "compile_in_child", lambda *_: alone)
    found = command.run(config, objective, ())
    assert found["hbm_bytes"] == plan["hbm_bytes"]
    assert found["fits"] is found["score"] is found["decode"] is None
    printed = capsys.readouterr().out
    assert "reference pass" not in printed and "sampler" not in printed


@pytest.mark.parametrize(
    "options",
    [
        "--objective em --objective.prior-right 4",
        "--objective crm --objective.noise-rate 0.2",
        "--objective bvpo --objective.alpha auto --objective.noise em",
        "--loss bradley_terry --head.kind mlp",
        "--soft-prompt.length 4",
        pytest.param("--objective ppo_clip --answers 3", marks=pytest.mark.slow),
    ],
)
def test_plans_of_losses_and_objectives(options, tmp_path, monkeypatch):
    folder = make_model_folder(tmp_path / "model")
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(child.TARGET, str(tmp_path / "found.json"))
    plan_command.command(
        [
            "--model",
            str(folder),
            *f"--topology cpu:8 --batch 8 --seq 16 {options}".split(),
        ]
    )
    found = json.loads((tmp_path / "found.json").read_text())
    held = found["bytes"]
    assert held["optimizer"] == 2 * held["parameters"] + 8
    assert found["step"]["temp"] > 0 and found["score"]["temp"] > 0
    if "soft" in options:
        assert found["adapter_weights"] == 4 * tiny_config().hidden_size
        assert found["shape"]["prompts"][1] == 4 + 8
        assert held["parameters"] == 4 * 4 * tiny_config().hidden_size < held["frozen"]
    if "ppo" in options:
        assert found["shape"]["tokens"] == [1, 8, 3, 16]
        assert found["shape"]["prompts"] == [24, 8, 8]
        c = tiny_config()
        slots = 2 * c.num_layers * c.num_kv_heads * c.head_dim * 24 // 8 * 16
        # Keys and values in bfloat16 or wider, and lengths.
        assert found["cache"] in (2 * slots + 12, 4 * slots + 12)
    if "bradley" in options:
        assert found["decode"] is None  # a reward model generates nothing
        c = tiny_config()
        D, K, L = c.hidden_size, c.head_dim, c.num_layers
        layer = D * K * 2 * (c.num_heads + c.num_kv_heads)
        layer += 3 * D * c.intermediate_size
        head = D * D + D  # on every device, like the norms
        shared = (c.vocab_size * D + L * layer) // 8
        assert held["parameters"] == 4 * (shared + D * (2 * L + 1) + head)
    else:
        # The sampler has one model; the step of a co-trained pair has two.
        share = found["decode"]["argument"] / held["parameters"]
        assert (share < 0.6) == ("crm" in options)


def test_activations_are_the_residuals_of_the_backward_pass():
    """At least the layers' inputs, and more if less is recomputed."""
    sizes = dict(model="m", topology="cpu:8", batch=8, seq=16)
    found = {}
    for remat in ("full", "dots", "none"):
        work = command.work_of(
            PlanConfig(**sizes),
            build(tiny_config(), Numerics(remat=remat)),
            from_loss(losses.dpo),
        )
        mesh = make_mesh(work.mesh)
        with jax.set_mesh(mesh):
            model = work.model
            params = on_devices(jax.eval_shape(model.init, jax.random.key(0)), mesh)
            lengths = dict(prompt_length=8, answer_length=8)
            layout = uniform_layout(2, mesh, batch_size=8, **lengths)
            batch = layout.abstract_batch()
            scorer = make_scorer(model, work.objective.scores)
            found[remat] = program._activations(scorer, params, None, batch)
    inputs = tiny_config().num_layers * 2 * 16 * tiny_config().hidden_size * 4
    assert inputs <= found["full"] < found["dots"] < found["none"]


@pytest.mark.slow
def test_a_plan_for_a_tpu(tmp_path):
    pytest.importorskip("libtpu")
    folder = make_model_folder(tmp_path / "model")
    command_line = [sys.executable, "-m", "jaxpref", "plan", "--model", str(folder)]
    command_line += "--topology v5e:2x2 --batch 8 --seq 256 --row-length 512".split()
    done = subprocess.run(
        [*command_line, "--json", str(tmp_path / "plan.json")],
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JAXPREF_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["hbm_limit_bytes"] == CHIPS["v5e"].hbm_bytes
    assert 0 < plan["mfu_estimate"] < 1 and plan["roofline_seconds"] > 0
    assert "fits" in done.stdout
    assert plan["decode"]["fits"] and plan["decode"]["seconds_per_token"] > 0
    assert "per token of each of 8 prompts" in done.stdout


SIZES = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
)
NUMERICS = Numerics(compute_dtype="bfloat16", remat="full")


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:4x4x4", "2xv5e:2x2"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_communication_on_tpu_is_close_to_ideal_fsdp(
    monkeypatch, tmp_path, topology, tied
):
    """Read from programs compiled for whole slices with two and three torus axes."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path))
    topology = parse_topology(topology)
    for name, value in child.environment(topology, tmp_path / "x").items():
        if name.startswith(("TPU_", "ALLOW_")):
            monkeypatch.setenv(name, value)
    model = build(LlamaArchitecture(tie_word_embeddings=tied, **SIZES), NUMERICS)
    batch, seq = topology.devices, 512
    config = PlanConfig(model="m", topology=topology.name, batch=batch, seq=seq)
    work = command.work_of(config, model, from_loss(losses.dpo))
    found = program.measure(work, topology)["step"]["collectives"]
    load = roofline.Load(
        model=model,
        mesh={
            "data": topology.slices,
            "fsdp": topology.devices // topology.slices,
            "tensor": 1,
        },
        slices=topology.slices,
        sequences=2 * batch,
        length=seq,
        predictions=seq // 2,
        seen=0,
    )
    share = hlo.wire_bytes(found) / roofline.ideal_wire_bytes(load)
    # An embedding is gathered only once, and it dominates these small models.
    assert 0.6 <= share <= 1.1
    between = hlo.wire_bytes(found, between_slices=True)
    ideal = roofline.ideal_dcn_bytes(load)
    assert ideal <= between <= 1.1 * ideal
