"""Runs that train adapters or a part of the model: steps, resume, folders."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpref import data, losses
from jaxpref.cli import evaluate as evaluate_command
from jaxpref.cli import sample as sample_command
from jaxpref.errors import InputError
from jaxpref.models import RewardModel, build
from jaxpref.models.adapter_files import load_adapter
from jaxpref.models.folder import load_params
from jaxpref.models.lora import LoraOptions
from jaxpref.models.low_rank import Dropout
from jaxpref.models.weights import Weights, load_weights
from jaxpref.objectives import (
    beta_dpo,
    bvpo,
    crm,
    em,
    from_loss,
    learned_rate,
    sft,
)
from jaxpref.plan.roofline import Load, forward_flops, ideal_wire_bytes, step_flops
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring import make_scorer
from jaxpref.scoring.partition import Trained, in_training
from jaxpref.scoring.scores import stored_scores
from jaxpref.train import MeshConfig, TrainConfig, prepare, read_metrics, run
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step
from tests.test_bvpo_training import pairs as pairs  # some with an empty trace
from tests.test_training import OPTIMIZER, mesh_of
from tests.tiny import MULTIPLES, tiny_config

LORA = LoraOptions(rank=2, alpha=4.0)
DPO = from_loss(losses.dpo, beta=0.5)


def config_for(inputs: Path, out: Path, **changes) -> TrainConfig:
    """Two steps of 16 pairs on eight devices."""
    defaults = dict(
        model=str(inputs / "model"),
        data=str(inputs / "pairs.jsonl"),
        out=str(out),
        objective=DPO,
        lora=LORA,
        optimizer=OPTIMIZER,
        options=data.DataOptions(max_length=64, heldout_fraction=0.0),
        mesh=MeshConfig(data=8),
        max_steps=2,
        batch_size=16,
        row_length="none",
        save_every=9,  # the last step is always saved
        log_every=1,
    )
    return TrainConfig(**(defaults | changes))


def losses_of(out: Path) -> list[float]:
    return [
        record["loss"]
        for record in read_metrics(out / "metrics.jsonl")
        if "loss" in record
    ]


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory) -> Path:
    """A finished run of two steps."""
    out = tmp_path_factory.mktemp("made") / "run"
    run(config_for(inputs, out))
    return out


@pytest.mark.slow
def test_a_run_starts_at_log_2_and_writes_both_folders(inputs, made):
    assert losses_of(made)[0] == pytest.approx(math.log(2), abs=1e-6)
    model = build(tiny_config())
    lora, _ = load_adapter(made / "adapter", model)
    assert (lora.rank, lora.scale) == (2, 2.0)
    adapted = load_weights(Weights(inputs / "model", made / "adapter"), model)
    exported = load_params(made / "export", model)
    tokens = np.arange(24).reshape(2, 12)
    one, other = (jax.jit(model.logits)(p, tokens) for p in (adapted, exported))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    base = load_params(inputs / "model", model)
    assert float(jnp.abs(one - model.logits(base, tokens)).max()) > 1e-3
    # The embedding is copied bit for bit.
    np.testing.assert_array_equal(exported["embed"], base["embed"])


def test_the_state_holds_adapters_alone(inputs, tmp_path):
    task = prepare(config_for(inputs, tmp_path))
    with jax.set_mesh(task.mesh):
        state = task.abstract_state()
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    layers, shapes = 2, [(16, 16), (16, 8), (16, 8), (16, 16), *[(16, 32)] * 3]
    assert size(state.params) == layers * sum(2 * (i + o) for i, o in shapes)
    assert size(state.opt_state) == pytest.approx(2 * size(state.params), abs=8)
    assert size(state) == size((state.params, state.opt_state)) + 2


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(inputs, tmp_path):
    for name, steps in {"whole": [4], "parts": [2, 4]}.items():
        for until in steps:
            run(config_for(inputs, tmp_path / name, max_steps=until, seed=3))
    one, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "parts")
    )
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"row_length": 64},
        {"accumulation": 2},
        {"mesh": MeshConfig(data=2, fsdp=2, tensor=2)},
    ],
    ids=["packed", "accumulated", "sharded"],
)
def test_layouts_do_not_change_the_numbers(inputs, made, tmp_path, changes):
    run(config_for(inputs, tmp_path / "other", **changes))
    # Sums in another order; Adam's first step is sign-like and amplifies them.
    np.testing.assert_allclose(
        losses_of(tmp_path / "other"), losses_of(made), rtol=2e-4
    )


@pytest.mark.slow
def test_a_run_continues_from_an_adapter(inputs, made, tmp_path):
    """Its reference is the start, or the base if that is asked for."""
    start = dict(adapter=str(made / "adapter"), lora=LoraOptions(), max_steps=1)
    run(config_for(inputs, tmp_path / "more", **start))
    assert losses_of(tmp_path / "more")[0] == pytest.approx(math.log(2), abs=1e-6)
    run(config_for(inputs, tmp_path / "base", **start, reference="base"))
    assert abs(losses_of(tmp_path / "base")[0] - math.log(2)) > 1e-3
    with pytest.raises(InputError, match="--lora.rank 2: the adapter in"):
        prepare(config_for(inputs, tmp_path / "x", **start | {"lora": LORA}))


@pytest.mark.slow
def test_evaluation_and_samples_are_those_of_the_merged_model(inputs, made, tmp_path):
    model, adapter = f"--model {inputs}/model", f"--adapter {made}/adapter"
    common = f"--data {inputs}/pairs.jsonl --mesh.data 8 --mesh.fsdp 1"
    for name, flags in {
        "adapter": f"{model} {adapter} --reference base",
        "merged": f"--model {made}/export --reference {inputs}/model",
    }.items():
        evaluate_command.command(f"{flags} {common} --out {tmp_path / name}".split())
        common_sample = f"--data {inputs}/pairs.jsonl --limit 8 --temperature 0"
        out = f"--max-new-tokens 8 --out {tmp_path / name}.json"
        flags = flags.split(" --reference")[0]
        sample_command.command(f"{flags} {common_sample} {out}".split())
    one, other = (
        json.loads((tmp_path / name / "metrics.json").read_text())
        for name in ("adapter", "merged")
    )
    assert one.keys() == other.keys() and one["rewards/margins"] != 0
    for name, value in one.items():
        assert value == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    one, other = (
        [row["output"] for row in json.loads((tmp_path / f"{name}.json").read_text())]
        for name in ("adapter", "merged")
    )
    assert one == other


@pytest.mark.slow
def test_adapters_of_a_quantized_base(inputs, tmp_path):
    """The reference is quantized, too; a resumed run has the same bits."""
    lora = LoraOptions(rank=2, alpha=4.0, base="nf4")
    base = dict(lora=lora, row_length="auto", mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    for name, steps in {"whole": [4], "parts": [2, 4]}.items():
        for until in steps:
            run(config_for(inputs, tmp_path / name, max_steps=until, **base))
    found = losses_of(tmp_path / "whole")
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found == losses_of(tmp_path / "parts")
    files = [
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "parts")
    ]
    jax.tree.map(np.testing.assert_array_equal, *files)
    run(config_for(inputs, tmp_path / "plain", max_steps=4, lora=LORA))
    plain = losses_of(tmp_path / "plain")
    assert np.abs(np.subtract(found, plain))[1:].max() > 1e-4
    # The export is the folder's own weights and the change.
    model = build(tiny_config())
    exported = load_params(tmp_path / "whole" / "export", model)
    merged = load_weights(Weights(inputs / "model", tmp_path / "whole/adapter"), model)
    tokens = np.arange(24).reshape(2, 12)
    one, other = (jax.jit(model.logits)(p, tokens) for p in (merged, exported))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_adapter_is_continued_on_a_quantized_base(inputs, made, tmp_path):
    """Its reference is the start; the base is quantized as well if it is that."""
    start = dict(adapter=str(made / "adapter"), lora=LoraOptions(base="int8"))
    for reference, first in {"start": True, "base": False}.items():
        out = tmp_path / reference
        for until in (1, 2):  # the second time, all weights are read again
            config = config_for(inputs, out, **start, reference=reference)
            run(dataclasses.replace(config, max_steps=until))
        is_log_2 = losses_of(out)[0] == pytest.approx(math.log(2), abs=1e-6)
        assert is_log_2 == first


def test_dropout_drops_a_share_of_the_inputs():
    """Alike in every layout and for every key of its own, and off without one."""
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 2))
    drop = Dropout(keys[0], 0.25)
    x = jnp.ones((8, 64, 32))
    found = np.asarray(drop(x))
    assert set(np.unique(found)) == {0.0, np.float32(1 / 0.75)}
    # 16,384 draws: six standard deviations.
    assert (found == 0).mean() == pytest.approx(
        0.25, abs=6 * (0.25 * 0.75 / 2**14) ** 0.5
    )
    jitted = jax.jit(lambda x: drop(x))
    np.testing.assert_array_equal(found, jitted(x))
    assert (found != np.asarray(Dropout(keys[1], 0.25)(x))).any()
    with jax.set_mesh(mesh_of(2, 2, 2)):
        spread = jax.device_put(x, jax.P(("data", "fsdp"), None, "tensor"))
        np.testing.assert_array_equal(found, jitted(spread))


def test_dropout_depends_on_step_and_micro_batch_alone(pairs):  # noqa: F811
    model = build(tiny_config())
    start = Weights(Path())
    options = LoraOptions(rank=2, dropout=0.5)
    one = lambda **changes: make_scorer(
        model,
        frozenset({"policy_logps"}),
        trained=Trained(lora=options, start=start, **changes),
    )
    scorer = one()
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(
        lambda x: x + draw(0, 0.3, x.shape).astype(np.float32),
        scorer.init(jax.random.key(0)),
    )
    frozen = scorer.init_frozen(jax.random.key(0))
    layout = data.padded_layout(pairs, batch_size=4, accumulation=2, **MULTIPLES)
    batch = next(layout.batches(pairs, data.uniform(pairs, 0), threads=0))
    micro = lambda n: jax.tree.map(lambda x: jnp.asarray(x[n]), batch)
    first, second = micro(0), micro(1)
    score = jax.jit(
        lambda scorer, micro, **more: scorer(params, frozen | more, micro).scores[
            "policy_logps"
        ],
        static_argnums=0,
    )
    at = lambda micro, step, scorer=scorer: np.asarray(score(scorer, micro, step=step))
    np.testing.assert_array_equal(at(first, 3), at(first, 3))
    others = at(first, 4), at(first, 3, one(seed=1)), np.asarray(score(scorer, first))
    for other in others:
        assert np.abs(at(first, 3) - other).max() > 1e-3
    renamed = dataclasses.replace(first, pair_index=second.pair_index)
    assert np.abs(at(first, 3) - at(renamed, 3)).max() > 1e-3
    assert in_training(frozen, jnp.int32(3)).keys() == {"base", "step"}


@pytest.mark.slow
def test_dropout_survives_an_interruption(inputs, tmp_path):
    lora = dataclasses.replace(LORA, dropout=0.3)
    for name, steps in {"whole": [4], "parts": [2, 4]}.items():
        for until in steps:
            run(config_for(inputs, tmp_path / name, max_steps=until, lora=lora))
    found = losses_of(tmp_path / "whole")
    assert found == losses_of(tmp_path / "parts")
    # New adapters are 0, whatever they read.
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    run(config_for(inputs, tmp_path / "plain", max_steps=4))
    assert np.abs(np.subtract(found, losses_of(tmp_path / "plain")))[1:].max() > 1e-4


BT = from_loss(losses.bradley_terry)
OBJECTIVES = {
    "loss of one pair": (from_loss(losses.rdpo, flip_rate=0.2), 1),
    "coupled pairs": (from_loss(losses.dr_dpo), 2),
    "live reference": (from_loss(losses.tdpo1), 1),
    "without a reference": (from_loss(losses.simpo), 1),
    "completions": (sft(), 1),
    "learned noise": (em(losses.dpo), 1),
    "learned rate": (learned_rate(losses.dpo), 1),
    "learned beta": (beta_dpo(), 1),
    "mixed gradients": (bvpo(DPO), 1),
    "mixed, with probes": (bvpo(em(losses.dpo)), 2),
    "reward model": (BT, 1),
    "two reward models": (crm(losses.bradley_terry, noise_rate=0.2), 1),
    "two policies": (crm(losses.dpo, noise_rate=0.2), 1),
}


def one_step(pairs, objective, accumulation=1, **trained):  # noqa: F811
    """The parameters before and after a step on eight devices, and its metrics."""
    mesh = mesh_of(4, 1, 2)
    with jax.set_mesh(mesh):
        rewards = "rewards" in objective.scores
        model = (RewardModel if rewards else build)(tiny_config())
        start = Weights(Path())
        scorer = make_scorer(
            model,
            objective.scores,
            num_models=objective.num_models,
            trained=Trained(start=start, reference=start, **trained),
        )
        schedule = make_schedule(OPTIMIZER, 10)
        tx = make_optimizer(OPTIMIZER, schedule)
        params = jax.jit(scorer.init)(jax.random.key(0))
        frozen = jax.jit(scorer.init_frozen)(jax.random.key(0))
        before = jax.device_get(params)
        state = jax.jit(lambda p: init_state(p, tx, objective))(params)
        layout = data.padded_layout(
            pairs,
            batch_size=8,
            accumulation=accumulation,
            **MULTIPLES,
        )
        order = data.uniform(pairs, 0)
        if objective.mixes_empty_traces:
            order = data.mixture(pairs, 3, 0.5)
        zeros = np.zeros((len(pairs), 2), np.float32)
        stored = {name: zeros for name in stored_scores(objective.scores)}
        batch = next(layout.batches(pairs, order, reference=stored, threads=0))
        step = make_train_step(scorer, objective, tx, schedule)
        state, metrics = step(state, frozen, to_global(batch, mesh))
        return before, jax.device_get(state), metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_kind_of_objective_trains_adapters(name, pairs):  # noqa: F811
    objective, accumulation = OBJECTIVES[name]
    if objective.num_completions == 1:
        builder = data.DatasetBuilder(1)
        for n, record in enumerate(pairs.ids):
            builder.add(pairs.prompt(n), [pairs.completion(n, 0)], id=record)
        pairs = builder.build()
    before, state, metrics = one_step(pairs, objective, accumulation, lora=LORA)
    assert bool(metrics["finite"])
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="."): values
        for path, values in jax.tree_util.tree_leaves_with_path(state.params)
    }
    assert all(path.endswith((".a", ".b", "score")) for path in paths)
    # b moves at once, a only with the second step: b was zero.
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, state.params)
    assert all(
        values == (not path.endswith(".a"))
        for path, values in zip(paths, jax.tree.leaves(moved))
    )


@pytest.mark.slow
@pytest.mark.parametrize("train", ["last:1", "no-embeddings", "head"])
def test_parts_are_trained_on_eight_devices(train, pairs):  # noqa: F811
    before, state, metrics = one_step(pairs, DPO, train=train)
    assert bool(metrics["finite"])
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, state.params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_a_part_is_trained_from_the_folder_and_exported(inputs, tmp_path):
    part = dict(lora=LoraOptions(), train="last:1", compute_dtype="bfloat16")
    run(config_for(inputs, tmp_path / "run", **part))
    base, found = (
        load_file(folder / "model.safetensors")
        for folder in (inputs / "model", tmp_path / "run" / "export")
    )
    for name, values in base.items():
        trained = "layers.1" in name or name in ("lm_head.weight", "model.norm.weight")
        assert (values != found[name]).any() == trained, name
    assert not (tmp_path / "run" / "adapter").exists()


def test_flops_of_a_step_with_adapters():
    """Frozen weights need two products in place of three, adapters three."""
    load = Load(
        model=build(tiny_config()),
        mesh={"data": 1, "fsdp": 2, "tensor": 1},
        sequences=2,
        length=8,
        predictions=4,
        seen=72,
        adapter_weights=100,
    )
    flops = forward_flops(load)
    frozen = flops["layers"] + flops["head"]
    assert flops["adapters"] == 2 * 100 * 2 * 8
    expected = 2 * frozen + 3 * (flops["attention"] + flops["adapters"])
    assert step_flops(load)[0] == expected
    # The weights are gathered twice in float32; the adapters' gradients are summed.
    c = tiny_config()
    weights = flops["layers"] / (2 * 2 * 8) + 2 * c.vocab_size * c.hidden_size
    assert ideal_wire_bytes(load) == (2 * 4 * weights + 4 * 100) / 2
    # In nf4, 64 weights of a layer's matrix take 32 bytes and a scale.
    tables = 2 * c.vocab_size * c.hidden_size
    held = (weights - tables) * 36 / 64 + 4 * tables
    load = dataclasses.replace(load, quantization="nf4")
    assert ideal_wire_bytes(load) == (2 * held + 4 * 100) / 2
