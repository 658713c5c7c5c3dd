"""Plans: what is read of compiled programs, counted by hand, and told to the user."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxpref import cli, losses
from jaxpref.errors import InputError
from jaxpref.models import ModelConfig, build
from jaxpref.plan import PlanConfig, advice, child, command, hlo, program, roofline
from jaxpref.plan.chips import CHIPS, GIB, Chip, parse_topology
from jaxpref.plan.presets import PRESETS
from jaxpref.plan.sweep import candidates
from jaxpref.train import MeshConfig, from_loss
from tests.tiny import make_model_folder, tiny_config

ROOT = Path(__file__).resolve().parents[1]


# ---- collectives, of texts as compilers write them -----------------------------------

GATHERS = """
HloModule jit_step

%body (param: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %param = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%param), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%param), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %all-gather.1 = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, WHOLE
  ROOT %tuple = (s32[], f32[8,16]{1,0}) tuple(%next, %x)
}

%condition (param.1: (s32[], f32[8,16])) -> pred[] {
  %param.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%param.1), index=0
  %bound = s32[]{:T(128)} constant(5)
  ROOT %test = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (arg: f32[8,16]) -> f32[8,16] {
  %arg = f32[8,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,16]{1,0}) tuple(%zero, %arg)
  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body NOTED
  %sum = f32[8,16]{1,0} all-reduce(%arg), channel_id=2, WHOLE, to_apply=%add
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    "noted, times",
    [("", 5), (', backend_config={"known_trip_count":{"n":"7"}}', 7)],
    ids=["counted", "noted"],
)
@pytest.mark.parametrize(
    "whole",
    [
        "replica_groups={{0,1,2,3,4,5,6,7}}",
        "replica_groups=[1,8]<=[8]",
        "replica_groups=mesh['a'=8,'b'=2] {'a'}",
    ],
)
def test_a_collective_counts_as_often_as_its_loop_turns(noted, times, whole):
    text = GATHERS.replace("NOTED", noted).replace("WHOLE", whole)
    found = hlo.collectives(text, devices=8)
    gathered, summed = 64 * 16 * 2, 8 * 16 * 4
    assert found == {
        "all-gather": {
            "count": times,
            "bytes": times * gathered,
            "wire_bytes": times * gathered * 7 / 8,
        },
        "all-reduce": {"count": 1, "bytes": summed, "wire_bytes": summed * 2 * 7 / 8},
    }
    assert hlo.wire_bytes(found) == times * gathered * 7 / 8 + summed * 7 / 4


def test_a_counter_may_take_larger_steps_that_come_from_outside():
    text = GATHERS.replace("WHOLE", "replica_groups=[1,8]<=[8]").replace("NOTED", "")
    text = text.replace("(s32[], f32[8,16]{1,0})", "(s32[], f32[8,16]{1,0}, s32[])")
    text = text.replace(
        "%one = s32[] constant(1)", "%one = s32[] get-tuple-element(%param), index=2"
    )
    text = text.replace("tuple(%next, %x)", "tuple(%next, %x, %one)")
    text = text.replace(
        "tuple(%zero, %arg)", "tuple(%zero, %arg, %two)\n  %two = s32[] constant(2)"
    )
    assert hlo.collectives(text, devices=8)["all-gather"]["count"] == 3  # 0, 2, 4


def test_an_all_reduce_of_which_a_part_is_kept_is_a_reduce_scatter():
    text = """
%all-reduce-scatter.3 (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %all-reduce.9 = f32[64]{0} all-reduce(%p), channel_id=3, replica_groups=[1,8]<=[8]
  ROOT %slice = f32[8]{0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={8}
}

ENTRY %main (arg: f32[64]) -> f32[8] {
  %arg = f32[64]{0} parameter(0)
  %rs = f32[8]{0} reduce-scatter(%arg), channel_id=4, replica_groups=[1,8]<=[8]
  ROOT %f = f32[8]{0} fusion(%arg), kind=kCustom, calls=%all-reduce-scatter.3
}
"""
    found = hlo.collectives(text, devices=8)
    assert found == {
        "reduce-scatter": {"count": 2, "bytes": 2 * 256, "wire_bytes": 2 * 224}
    }


def test_one_that_runs_on_through_fusions_and_a_loop_is_one():
    text = GATHERS.replace("WHOLE", "replica_groups=[1,8]<=[8]").replace("NOTED", "")
    begun = "  %begun = bf16[64,16]{1,0} fusion(%arg), calls=%async_collective_fusion\n"
    text = text.replace("  %sum =", begun + "  %sum =")
    text += """
%async_collective_fusion (q: f32[8,16]) -> bf16[64,16] {
  %q = f32[8,16]{1,0} parameter(0)
  ROOT %g = bf16[64,16]{1,0} all-gather(%q), channel_id=1, replica_groups=[1,8]<=[8]
}
"""
    assert hlo.collectives(text, devices=8)["all-gather"]["count"] == 1


def test_those_that_are_begun_count_their_results_and_branches_once():
    text = """
%yes (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %r = f32[4]{0} all-reduce(%a), channel_id=5, replica_groups=[4,2]<=[8]
}

%no (b: f32[4]) -> f32[4] {
  ROOT %b = f32[4]{0} parameter(0)
}

ENTRY %main (arg: f32[4]) -> f32[4] {
  %arg = f32[4]{0} parameter(0)
  %go = pred[] constant(true)
  %g = (f32[4]{0}, f32[8]{0}) all-gather-start(%arg), channel_id=1, REPLICAS
  %gd = f32[8]{0} all-gather-done(%g)
  %p = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%arg)
  %pd = f32[4]{0} collective-permute-done(%p)
  %self = f32[4]{0} all-reduce(%arg), channel_id=9, replica_groups=[8,1]<=[8]
  ROOT %c = f32[4]{0} conditional(%go, %arg, %arg), branch_computations={%yes, %no}
}
""".replace("REPLICAS", "replica_groups=[4,2]<=[8]")
    assert hlo.collectives(text, devices=8) == {
        "all-gather": {"count": 1, "bytes": 32, "wire_bytes": 16},
        "collective-permute": {"count": 1, "bytes": 16, "wire_bytes": 16},
        "all-reduce": {"count": 1, "bytes": 16, "wire_bytes": 16},
    }


# ---- sizes and times -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters",
    [
        # As the models' cards and safetensors indices have them.
        ("llama-3-1b", 1_235_814_400),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        # 596,049,920 of Qwen3-0.6B, less the norms of its queries and keys.
        ("llama-0.6b-152k", 596_049_920 - 28 * 2 * 128),
    ],
)
def test_presets_have_as_many_parameters_as_the_models(name, parameters):
    model = build(PRESETS[name])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == parameters


def small_load(**changes) -> roofline.Load:
    model = ModelConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=20,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        remat=changes.pop("remat", "none"),
    )
    sizes = dict(
        model=model,
        mesh={"data": 1, "fsdp": 4, "tensor": 1},
        sequences=8,
        length=10,
        predictions=5,
        seen=8 * 55,
    )
    return roofline.Load(**(sizes | changes))


def test_flops_by_hand():
    # Queries 8 x 8, keys and values 8 x 4 each, output 8 x 8; gate, up and down 8 x 20.
    weights = 3 * (64 + 32 + 32 + 64 + 3 * 160)
    assert roofline.layer_weights(small_load().model) == weights
    forward = {
        "layers": 2 * weights * 8 * 10,
        "attention": 3 * 2 * 440 * 2 * (2 * 4),  # scores and mixes
        "head": 2 * 8 * 100 * 8 * 5,
    }
    assert roofline.forward_flops(small_load()) == forward
    once = sum(forward.values())
    assert roofline.step_flops(small_load()) == (3 * once, 3 * once)
    again = forward["layers"] + forward["attention"]
    full = small_load(remat="full")
    assert roofline.step_flops(full) == (3 * once, 3 * once + again)
    dots = small_load(remat="dots")
    assert roofline.step_flops(dots) == (3 * once, 3 * once + forward["attention"])
    parts = small_load(logit_chunk=2)
    assert roofline.chunks(parts) == 3
    assert roofline.step_flops(parts) == (3 * once, 3 * once + forward["head"])


def test_the_slowest_of_three_bounds_the_step():
    load, held = small_load(), {"parameters": 1000, "optimizer": 2000}
    flops, _ = roofline.step_flops(load)
    ideal = roofline.ideal_wire_bytes(load)
    # Gathered twice and scattered once in float32; the tied or untied head twice.
    weights = roofline.layer_weights(load.model) + 2 * 8 * 100
    assert ideal == 12 * weights * 3 / 4
    traffic = roofline.memory_traffic(load, held)
    slow = dict.fromkeys(("flops", "hbm_bandwidth", "ici_bandwidth"), 1e30)
    for field, bound, seconds in (
        ("flops", "compute", flops / 4),
        ("hbm_bandwidth", "memory", traffic),
        ("ici_bandwidth", "ici", ideal),
    ):
        chip = Chip("chip", hbm_bytes=1, axes=2, **(slow | {field: 1.0}))
        found = roofline.estimate(load, chip, held, None)
        assert found["bound"] == bound
        assert found["roofline_seconds"] == pytest.approx(seconds)
        peak = 4 * chip.flops * seconds
        assert found["mfu_estimate"] == pytest.approx(flops / peak)


def test_packed_rows_attend_within_their_pair():
    config = dict(model="m", topology="cpu:8", batch=4, seq=6, answer_length=2)
    objective = from_loss(losses.dpo)
    padded = command._seen(PlanConfig(**config), objective, sequences=8)
    assert padded == 8 * 21
    packed = command._seen(PlanConfig(**config, row_length=32), objective, 2)
    seen = 0  # by drawing the triangle of prompt, chosen and rejected
    parts = [0] * 4 + [1] * 2 + [2] * 2
    for i, query in enumerate(parts):
        seen += sum(key in (0, query) for key in parts[: i + 1])
    assert packed == 4 * seen


# ---- what is asked, and what cannot be -----------------------------------------------


@pytest.mark.parametrize(
    "name, devices",
    [("v5p:4x4x8", 128), ("v5e:16x16", 256), ("tpu7x:2x2x1", 8), ("cpu:8", 8)],
)
def test_topologies(name, devices):
    assert parse_topology(name).devices == devices


@pytest.mark.parametrize("name", ["v9:2x2", "v5p:4x4", "v5e:4x4x4", "cpu:0", "v5e", ""])
def test_an_unknown_topology_lists_those_that_are_known(name):
    with pytest.raises(
        InputError, match=r"--topology .* like v4:4x4x4, v5e:4x4, .*cpu"
    ):
        parse_topology(name)


def test_an_unknown_model_lists_the_presets():
    config = PlanConfig(model="./none", topology="cpu:8", batch=8, seq=8)
    with pytest.raises(InputError, match=r"\./none: .*llama-3-8b, llama-3-70b"):
        command.run(config, from_loss(losses.dpo), [])


def test_libtpu_is_asked_for_where_it_is_missing(monkeypatch):
    def missing(package):
        raise program.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(program.importlib.metadata, "version", missing)
    with pytest.raises(InputError, match=r'pip install "jaxpref\[plan\]"'):
        program.devices_of(parse_topology("v5e:4x4"))


@pytest.mark.parametrize(
    "message, needs, limit",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
            "the total memory required for HLO temporaries (20.00G) exceeds available "
            "HBM (15.75G). HLO module: jit_step.",
            20 * GIB,
            15.75 * GIB,
        ),
        ("Used 512.5M of 0.25G hbm. Exceeded", 512.5 * 2**20, 0.25 * GIB),
    ],
)
def test_how_much_is_too_much_is_read_of_the_compilers_message(message, needs, limit):
    assert program.too_large(message) == {"needs": needs, "limit": limit}
    assert program.too_large("INTERNAL: no") is None


def test_advice_names_the_knobs():
    config = PlanConfig(model="m", topology="v5e:4x4", batch=64, seq=8, remat="dots")
    plan = {
        "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
        "held_bytes": {"parameters": 100, "optimizer": 200},
        "tokens_shape": [1, 64, 2, 8],
        "hbm_limit_bytes": 1000,
    }
    found = advice.advice(config, plan)
    assert found[0] == "--remat full" and found[1].startswith("--accumulation 2 ")
    found = advice.advice(config, plan | {"hbm_limit_bytes": 350})
    assert "take more chips" in found[0]


def test_a_sweep_takes_the_meshes_that_divide_the_model():
    config = PlanConfig(model="m", topology="cpu:16", batch=32, seq=8)
    model = tiny_config(vocab_size=48)  # hidden 16, 4 heads, 2 for keys
    tried = {
        (c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
        for c in candidates(config, model, parse_topology("cpu:16"))
    }
    assert tried == {(1, 16, 1), (1, 8, 2)}


def test_the_compilers_environment_is_its_own(monkeypatch):
    flag = "--xla_force_host_platform_device_count"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_other=1 {flag}=3")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "elsewhere:1")
    cpu = child.environment(parse_topology("cpu:8"), Path("x"))
    assert cpu["XLA_FLAGS"] == f"--xla_other=1 {flag}=8"
    assert "JAX_COORDINATOR_ADDRESS" not in cpu and cpu["JAX_PLATFORMS"] == "cpu"
    tpu = child.environment(parse_topology("v5e:4x4"), Path("x"))
    assert tpu["XLA_FLAGS"] == "--xla_other=1"


# ---- from end to end -----------------------------------------------------------------


def test_a_plan_for_eight_virtual_devices(tmp_path, capsys, monkeypatch):
    folder = make_model_folder(tmp_path / "model")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path / "cache"))
    argv = f"--model {folder} --topology cpu:8 --batch 16 --seq 24 --mesh.tensor 2"
    argv = f"{argv} --json {tmp_path}/plan.json --loss rdpo --loss.flip-rate 0.1"
    cli.plan(argv.split())
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] is None and plan["roofline_seconds"] is None
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert plan["tokens_shape"] == [1, 16, 2, 24] and plan["loss"] == "rdpo"
    # A device holds an eighth of every matrix, and all of the norms' gains; the moments
    # twice that and two counters of four bytes.
    c = tiny_config()
    D, K, L = c.hidden_size, c.head_dim, c.num_layers
    layer = D * K * 2 * (c.num_heads + c.num_kv_heads) + 3 * D * c.intermediate_size
    matrices = 2 * c.vocab_size * D + L * layer
    held = 4 * (matrices // 8 + D * (2 * L + 1))
    assert plan["held_bytes"]["parameters"] == held
    assert plan["held_bytes"]["optimizer"] == 2 * held + 8
    # The state and what the step reads of the batch.
    state = 3 * held + 8 + 8
    assert state < plan["argument_bytes"] <= state + plan["held_bytes"]["batch"]
    assert plan["temp_bytes"] > 0 and plan["hbm_bytes"] > plan["temp_bytes"]
    tokens = 16 * 2 * 24
    forward = (
        2 * tokens * L * layer + 2 * 16 * 2 * 16 * D * c.vocab_size
    )  # 12 by eights
    forward += 4 * L * D * 16 * 2 * (24 * 25 // 2)
    assert plan["flops_per_step"] == 3 * forward
    # Weights of the layers are gathered over fsdp in both passes.
    assert plan["collectives"]["all-gather"]["count"] > 2 * 7 * L
    assert plan["score"]["hbm_bytes"] < plan["hbm_bytes"]
    told = capsys.readouterr().out
    assert re.search(r"cpu:8: 8 devices, data=1 x fsdp=4 x tensor=2", told)
    assert "collectives of a step" in told and "fits" not in told
    # Compiled once: another process finds it, as this one.
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
