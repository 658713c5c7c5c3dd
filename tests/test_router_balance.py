"""The routers' load-balancing loss: value, gradient, and where it is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.models import Numerics, RewardModel, build
from jaxpref.objectives import crm, from_loss
from jaxpref.objectives.penalties import router_balance, with_router_balance
from jaxpref.plan.command import run as plan
from jaxpref.plan.config import PlanConfig
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring import make_scorer
from jaxpref.train.gradient import gradient
from tests.family_cases import architecture_of, random_params
from tests.test_models import mesh
from tests.test_packing import make_pairs, packed, padded

CASES = "mixtral", "qwen3_moe", "olmoe"
NAMES = "loss", "router_balance"


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(24)


def oracle(model, params, sequences):
    """The loss in NumPy, from what each router was given for whole sequences.

    f_e and P_e are means over the tokens of all sequences and layers.
    """
    a, seen = model.architecture, []
    block = a.family.transformer.block
    original = block.probabilities
    lengths = np.array([*map(len, sequences)])
    real = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(real.shape, np.int32)
    tokens[real] = np.concatenate(sequences)

    def recorded(self, h):
        p = original(self, h)
        jax.debug.callback(lambda p: seen.append(np.asarray(p, np.float64)), p)
        return p

    block.probabilities = recorded
    try:
        jax.block_until_ready(jax.jit(model.hidden)(params, tokens))
        jax.effects_barrier()
    finally:
        block.probabilities = original
    p = np.concatenate([x[real] for x in seen])
    assert len(p) == a.num_layers * lengths.sum()
    chosen = np.argsort(-p, axis=1)[:, : a.experts_per_token]
    counts = np.bincount(chosen.ravel(), minlength=a.num_experts)
    return a.num_experts * np.sum(counts / len(p) * p.mean(0))


def sequences_of(pairs, held):
    return [
        np.concatenate([pairs.prompt(n), pairs.completion(n, side)])
        for n in held
        for side in range(2)
    ]


def step(objective, model, params, batch):
    scorer = make_scorer(model, objective.scores, num_models=objective.num_models)
    score = lambda p, micro: scorer(p, {}, micro, totals=objective.totals)
    find = jax.jit(lambda p, b: gradient(objective, score, p, b, objective.init(0)))
    grads, _, metrics = find(params, batch)
    return grads, metrics


def close(found, expected, atol=1e-5):
    """To rounding in float32, relative to the largest number of each array."""
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        largest = max(float(np.abs(theirs).max()), 1e-3)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol * largest)


def test_the_loss_is_that_of_all_sequences_in_every_layout(pairs):
    """Packed rows hold a prompt once; it counts once for each of its answers."""
    model = build(architecture_of("mixtral"))
    params = random_params(model)
    table = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    objective = with_router_balance(from_loss(losses.dpo), 0.5)
    batch, held = packed(pairs, reference=table, accumulation=2)
    expected = oracle(model, params, sequences_of(pairs, held))
    grads, metrics = step(objective, model, params, batch)
    np.testing.assert_allclose(metrics["router_balance"], expected, rtol=1e-5)
    whole, again = step(objective, model, params, padded(pairs, held, table))
    close([again[name] for name in NAMES], [metrics[name] for name in NAMES])
    close(whole, grads)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_added_to_the_loss(pairs, case):
    model = build(architecture_of(case))
    params = random_params(model)
    table = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    batch, held = packed(pairs, reference=table)
    objective = with_router_balance(from_loss(losses.dpo), 0.5)
    grads, metrics = step(objective, model, params, batch)
    plain, without = step(from_loss(losses.dpo), model, params, batch)
    assert "router_balance" not in without
    expected = oracle(model, params, sequences_of(pairs, held))
    np.testing.assert_allclose(metrics["router_balance"], expected, rtol=1e-5)
    loss = without["loss"] + 0.5 * expected
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    moved = grads["layers"]["router"] - plain["layers"]["router"]
    assert np.abs(moved).max() > 1e-4
    halves, _ = packed(pairs, reference=table, accumulation=2)
    found, again = step(objective, model, params, halves)
    close([again[name] for name in NAMES], [metrics[name] for name in NAMES])
    close(found, grads)


def test_the_gradient_is_that_of_the_loss():
    """With the choices held fixed, by differences in float64."""
    rng = np.random.default_rng(0)
    choices, p = rng.random((2, 4))
    with jax.enable_x64(True):
        derivative = jax.grad(router_balance, 1)(*map(jnp.asarray, (choices, p, 7.0)))
    np.testing.assert_allclose(derivative, 4 * choices / 49, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 2, 2, 2)])
@pytest.mark.parametrize("case", CASES)
def test_on_every_mesh(pairs, case, sizes):
    table = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    objective = with_router_balance(from_loss(losses.dpo), 0.5)
    model = build(architecture_of(case), Numerics(remat="full"))
    batch, held = packed(pairs, rows=8, accumulation=2, reference=table)
    expected = step(objective, model, random_params(model), batch)
    with mesh(*sizes):
        placed = to_global(jax.device_get(batch), jax.sharding.get_mesh())
        found = step(objective, model, random_params(model), placed)
    close([found[1][n] for n in NAMES], [expected[1][n] for n in NAMES])
    close(jax.device_get(found[0]), expected[0], atol=1e-4)


@pytest.mark.slow
def test_reward_models_and_twins(pairs):
    model = RewardModel(architecture_of("mixtral"))
    params = random_params(model)
    batch, held = packed(pairs)
    backbone = {name: x for name, x in params.items() if name != "score"}
    expected = oracle(model.backbone, backbone, sequences_of(pairs, held))
    plain = with_router_balance(from_loss(losses.bradley_terry), 0.5)
    _, metrics = step(plain, model, params, batch)
    np.testing.assert_allclose(metrics["router_balance"], expected, rtol=1e-5)
    twins = with_router_balance(crm(losses.bradley_terry, noise_rate=0.1), 0.5)
    _, metrics = step(twins, model, {"one": params, "two": params}, batch)
    np.testing.assert_allclose(metrics["router_balance"], 2 * expected, rtol=1e-5)


def test_models_without_experts_are_refused():
    config = PlanConfig(
        model="smollm2-135m", topology="cpu:1", batch=8, seq=64, router_balance=0.1
    )
    with pytest.raises(InputError, match="--router-balance: a llama model has no exp"):
        plan(config, from_loss(losses.dpo), [])
    with pytest.raises(InputError, match="router_balance -1"):
        PlanConfig(
            model="smollm2-135m", topology="cpu:1", batch=8, seq=64, router_balance=-1.0
        )
