"""`jaxpref plan`: FLOPs, times, topologies, and advice, checked against hand counts."""

import dataclasses
import math
from pathlib import Path

import jax
import pytest

from jaxpref import losses, objectives
from jaxpref.errors import InputError
from jaxpref.models import Numerics, build
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.objectives import from_loss, lipo_lambda
from jaxpref.plan import PlanConfig, advice, child, command, program, roofline
from jaxpref.plan.chips import GIB, Chip, parse_topology
from jaxpref.plan.presets import PRESETS
from jaxpref.plan.sweep import candidates
from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[1]


# ---- sizes and times -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters",
    [
        # From the model cards and safetensors indices.
        ("llama-3-1b", 1_235_814_400),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("llama-3-405b", 405_853_388_800),
        ("mistral-7b", 7_248_023_552),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("gemma-3-1b", 999_885_952),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        # Qwen3-0.6B without its query and key norms.
        ("llama-0.6b-152k", 596_049_920 - 28 * 2 * 128),
    ],
)
def test_presets_have_the_models_parameter_counts(name, parameters):
    model = build(PRESETS[name])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == parameters


def small_load(**changes) -> roofline.Load:
    architecture = LlamaArchitecture(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=20,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
    )
    model = build(architecture, Numerics(remat=changes.pop("remat", "none")))
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
    assert roofline.layer_weights(small_load().model.architecture) == weights
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


def test_the_slowest_of_four_bounds_the_step():
    load, held = small_load(slices=3), {"parameters": 1000, "optimizer": 2000}
    flops, _ = roofline.step_flops(load)
    ideal = roofline.ideal_wire_bytes(load)
    # Gathered twice and scattered once in float32; a tied head is the embedding.
    layers = roofline.layer_weights(load.model.architecture)
    assert ideal == 12 * (layers + 2 * 8 * 100) * 3 / 4
    architecture = load.model.architecture
    model = build(dataclasses.replace(architecture, tie_word_embeddings=True))
    tied = dataclasses.replace(load, model=model, models=2)
    assert roofline.ideal_wire_bytes(tied) == 2 * 12 * (layers + 8 * 100) * 3 / 4
    assert roofline.step_flops(tied)[0] == 2 * flops
    # A chip holds a quarter of the gradients; a ring of three passes 2/3 of it twice.
    between = roofline.ideal_dcn_bytes(load)
    assert between == pytest.approx(4 / 3 * 4 * (layers + 2 * 8 * 100) / 4)
    assert roofline.ideal_dcn_bytes(small_load()) == 0
    traffic = roofline.memory_traffic(load, held)
    fields = "flops", "hbm_bandwidth", "ici_bandwidth", "dcn_bandwidth"
    slow = dict.fromkeys(fields, 1e30)
    for field, bound, seconds in (
        ("flops", "compute", flops / 4),
        ("hbm_bandwidth", "memory", traffic),
        ("ici_bandwidth", "ici", ideal),
        ("dcn_bandwidth", "dcn", between),
    ):
        chip = Chip("chip", hbm_bytes=1, axes=2, **(slow | {field: 1.0}))
        found = roofline.estimate(load, chip, held, None, None)
        assert found["bound"] == bound
        assert found["roofline_seconds"] == pytest.approx(seconds)
        peak = 4 * chip.flops * seconds
        assert found["mfu_estimate"] == pytest.approx(flops / peak)


def test_the_time_per_token_is_bounded_by_weights_and_cache():
    load = small_load(sequences=8, length=10)
    layers, head = roofline.layer_weights(load.model.architecture), 8 * 100
    # Two prompts per device; keys and values of one head of 4 features in 3 layers.
    cache = 2 * 3 * 1 * 4 * 2 * 10
    # The gathered layers are written and read, and so are the float32 logits.
    read = 4 * (2 * layers + head + cache) + 8 * 2 * 100
    flops = 2 * (layers + head) * 8 + 4 * 3 * (2 * 4) * 8 * 10
    fields = "flops", "hbm_bandwidth", "ici_bandwidth", "dcn_bandwidth"
    slow = dict.fromkeys(fields, 1e30)
    for field, bound, seconds in (
        ("flops", "compute", flops / 4),
        ("hbm_bandwidth", "memory", read),
        ("ici_bandwidth", "ici", 4 * layers * 3 / 4),
    ):
        chip = Chip("chip", hbm_bytes=1, axes=2, **(slow | {field: 1.0}))
        found = roofline.token_estimate(load, chip, None)
        assert found["bound"] == bound
        assert found["seconds_per_token"] == pytest.approx(seconds)
        assert found["tokens_per_second"] == pytest.approx(8 / seconds)
    assert roofline.token_estimate(load, chip, 7.0)["ici_seconds"] == 7.0


def test_packed_rows_attend_within_their_pair():
    config = dict(model="m", topology="cpu:8", batch=4, seq=6, answer_length=2)
    objective = from_loss(losses.dpo)
    padded = command._attended_pairs(PlanConfig(**config), objective, sequences=8)
    assert padded == 8 * 21
    packed = command._attended_pairs(PlanConfig(**config, row_length=32), objective, 2)
    seen = 0  # counted in the attention mask of prompt, chosen, and rejected
    parts = [0] * 4 + [1] * 2 + [2] * 2
    for i, query in enumerate(parts):
        seen += sum(key in (0, query) for key in parts[: i + 1])
    assert packed == 4 * seen


# ---- options and errors --------------------------------------------------------------


@pytest.mark.parametrize(
    "name, devices",
    [
        ("v5p:4x4x8", 128),
        ("v5e:16x16", 256),
        ("tpu7x:2x2x1", 8),
        ("cpu:8", 8),
        ("v5litepod-16", 16),
        ("v5p-128", 64),
        ("2xv6e-256", 512),
        ("v4-8", 4),
    ],
)
def test_topologies(name, devices):
    assert parse_topology(name).devices == devices


def test_a_token_is_multiplied_with_its_own_experts():
    """Mixtral's card: 12.9 billion active parameters, with embedding and head."""
    model = PRESETS["mixtral-8x7b"]
    active = roofline.active_weights(model) + 2 * 32000 * 4096
    assert active == pytest.approx(12.88e9, rel=1e-3)
    assert roofline.active_weights(PRESETS["llama-3-8b"]) == roofline.layer_weights(
        PRESETS["llama-3-8b"]
    )


def test_accelerator_types_are_the_slices_that_gcloud_makes():
    """From Cloud TPU's pages of v5e and v5p."""
    assert parse_topology("v5litepod-32").name == "v5e:4x8"
    assert parse_topology("v5p-1024").slice == "v5p:8x8x8"
    assert parse_topology("2xv5p-64").slice == "v5p:2x4x4"


@pytest.mark.parametrize(
    "name",
    ["v9:2x2", "v5p:4x4", "v5e:4x4x4", "cpu:0", "v5e", "", "v5p-7", "v5litepod-"],
)
def test_an_unknown_topology_lists_the_known_ones(name):
    with pytest.raises(
        InputError, match=r"--topology .* like v4:4x4x4, v5e:4x4, .*cpu"
    ):
        parse_topology(name)


def test_the_length_of_lists_must_be_given():
    config = PlanConfig(model="m", topology="cpu:8", batch=4, seq=6)
    lists = dataclasses.replace(config, answers=3)
    assert config.completions_of(from_loss(losses.dpo)) == 2
    assert lists.completions_of(lipo_lambda()) == 3
    with pytest.raises(InputError, match="lipo_lambda: .*--answers"):
        config.completions_of(lipo_lambda())
    with pytest.raises(InputError, match="--answers 3: dpo does not read lists"):
        lists.completions_of(from_loss(losses.dpo))


def test_the_answers_that_are_sampled_must_be_given():
    """To prompts alone, or after the two answers of a pair."""
    config = PlanConfig(model="m", topology="cpu:8", batch=4, seq=6)
    eight = dataclasses.replace(config, answers=8)
    assert eight.completions_of(objectives.grpo()) == 8
    assert eight.completions_of(objectives.hypo()) == 2 + 8
    with pytest.raises(InputError, match="grpo: give --answers, .*--group-size"):
        config.completions_of(objectives.grpo())


def test_the_state_stays_in_memory_while_answers_are_sampled():
    """The optimizer's, and of adapters their own and the frozen weights."""
    held = {"parameters": 5, "optimizer": 10, "batch": 99, "frozen": 40}
    plan = {"hbm_bytes": 100, "hbm_limit_bytes": 152, "fits": True}
    full = {"bytes": held | {"frozen": 0}, "adapter_weights": None}
    adapted = {"bytes": held, "adapter_weights": 7}
    found = command._with_resident(plan, full)
    assert found == {"hbm_bytes": 110, "fits": True}
    found = command._with_resident(plan, adapted)
    assert found == {"hbm_bytes": 155, "fits": False}


def test_an_unknown_model_lists_the_presets():
    config = PlanConfig(model="./none", topology="cpu:8", batch=8, seq=8)
    with pytest.raises(InputError, match=r"\./none: .*llama-3-8b, llama-3-70b"):
        command.run(config, from_loss(losses.dpo), [])


def test_the_message_if_libtpu_is_missing(monkeypatch):
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
def test_the_compilers_out_of_memory_message_is_parsed(message, needs, limit):
    assert program.too_large(message) == {"needs": needs, "limit": limit}
    assert program.too_large("INTERNAL: no") is None


def test_advice_suggests_options():
    sizes = dict(model="llama-3-8b", batch=64, seq=8)
    config = PlanConfig(topology="v5e:4x4", remat="dots", **sizes)
    plan = {
        "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
        "held_bytes": {"parameters": 100, "optimizer": 200},
        "tokens_shape": [1, 64, 2, 8],
        "hbm_limit_bytes": 1000,
    }
    found = advice.advice(config, plan)
    assert found[0] == "--remat full" and found[1].startswith("--accumulation 2 ")
    found = advice.advice(config, plan | {"hbm_limit_bytes": 350})
    assert "more chips" in found[0]
    assert found[1] == "--optimizer adafactor, or --adam-mu-dtype bfloat16"
    # Rows are split evenly; fsdp stays within a slice and divides the vocabulary.
    config = PlanConfig(topology="v5e:4x4", **sizes)
    found = advice.advice(config, plan | {"tokens_shape": [1, 48, 2, 8]})
    assert found[0].startswith("--accumulation 3 ")
    plan |= {"tokens_shape": [1, 32, 2, 8], "hbm_limit_bytes": 1000}
    config = PlanConfig(topology="2xv5e:4x4", **sizes)
    sliced = {"mesh": {"data": 2, "fsdp": 16, "tensor": 1}}
    assert not any("fsdp" in line for line in advice.advice(config, plan | sliced))
    sliced = {"mesh": {"data": 4, "fsdp": 8, "tensor": 1}}
    assert "--mesh.fsdp 16" in advice.advice(config, plan | sliced)
    config = PlanConfig(topology="v5p:8x8x8", **sizes)
    whole = {"mesh": {"data": 2, "fsdp": 256, "tensor": 1}}  # 128,256 = 256 x 501
    assert not any("fsdp" in line for line in advice.advice(config, plan | whole))


def test_a_sweep_uses_the_meshes_that_divide_the_model():
    config = PlanConfig(model="m", topology="cpu:16", batch=32, seq=8)
    model = tiny_config(vocab_size=48)  # hidden 16, 4 heads, 2 for keys
    tried = {
        (c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
        for c in candidates(config, model, parse_topology("cpu:16"))
    }
    assert tried == {(1, 16, 1), (1, 8, 2)}


def test_the_environment_of_the_child_process(monkeypatch):
    flag = "--xla_force_host_platform_device_count"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_other=1 {flag}=3")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "elsewhere:1")
    cpu = child.environment(parse_topology("cpu:8"), Path("x"))
    assert cpu["XLA_FLAGS"] == f"--xla_other=1 {flag}=8"
    assert "JAX_COORDINATOR_ADDRESS" not in cpu and cpu["JAX_PLATFORMS"] == "cpu"
    tpu = child.environment(parse_topology("v5e:4x4"), Path("x"))
    assert tpu["XLA_FLAGS"] == "--xla_other=1"
