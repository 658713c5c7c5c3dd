"""Two models that choose each other's pairs, in the engine."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.models import RewardModel, build
from jaxpref.models.folder import load_params
from jaxpref.objectives import crm, from_loss
from jaxpref.objectives.co_training import MEMORY, Progress, easiest, remember
from jaxpref.objectives.inputs import Inputs
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring import make_scorer
from jaxpref.scoring.scores import Scored
from jaxpref.train import Decay, OptimizerConfig
from jaxpref.train.gradient import gradient
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step
from tests.compiled import compiled
from tests.test_reward_models import train
from tests.test_training import mesh_of, pairs  # noqa: F401
from tests.tiny import (
    make_model_folder,
    make_pairs_file,
    padded_batches,
    tiny_config,
    tiny_params,
)

BASE = losses.bradley_terry
DPO = functools.partial(losses.dpo, beta=0.5)


def first_batch(pairs, count=8):  # noqa: F811
    batch = next(padded_batches(pairs, batch_size=count))
    return jax.tree.map(jnp.asarray, batch)


def of_weights(params, batch):
    """The scores of two "models", each the rewards of 8 pairs."""
    shaped = lambda x: x.reshape(*batch.pair_index.shape[-2:], 2)
    found = {name: {"rewards": shaped(params[name])} for name in ("one", "two")}
    return Scored(found, {"one": {}, "two": {}})


def after_steps(steps, memory=0):
    """The state after some steps; `memory` margins that are not known yet."""
    return Progress(jnp.int32(steps), jnp.full((2, memory), jnp.nan))


def softplus_derivative(margin):
    return -expit(-margin)


@pytest.mark.parametrize("steps", [0, 3, 4, 50])
def test_each_model_learns_what_the_other_finds_easy(pairs, steps):  # noqa: F811
    batch = first_batch(pairs)
    rng = np.random.default_rng(steps)
    rewards = {name: rng.normal(size=(8, 2)) for name in ("one", "two")}
    objective = crm(losses.bradley_terry, noise_rate=0.4, ramp_steps=5)
    state = after_steps(steps)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rewards)
    find = jax.jit(functools.partial(gradient, objective, of_weights))
    grads, after, metrics = find(params, batch, state)
    keep = round(8 * (1 - 0.4 * min(1, steps / 5)))
    margins = {name: x[:, 0] - x[:, 1] for name, x in rewards.items()}
    loss = 0.0
    for parity, (name, other) in enumerate([("one", "two"), ("two", "one")]):
        chosen = np.zeros(8, bool)
        chosen[np.argsort(-margins[other])[:keep]] = True
        if steps < 5:
            chosen &= (np.arange(8) + steps) % 2 == parity
        each = np.where(chosen, softplus_derivative(margins[name]), 0)
        each = each / chosen.sum()
        expected = np.stack([each, -each], axis=1)
        np.testing.assert_allclose(grads[name], expected, atol=1e-6)
        loss += np.log1p(np.exp(-margins[name]))[chosen].mean()
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert int(after.steps) == steps + 1
    agreement = np.mean((margins["one"] > 0) == (margins["two"] > 0))
    assert float(metrics["crm/agreement"]) == pytest.approx(agreement)


def easiest_sums(sums, latest, share):
    """Which of a batch's sums are among the largest of them and the latest."""
    every = np.concatenate([latest[~np.isnan(latest)], sums])
    count = round(share * len(every))
    return sums >= np.sort(every)[::-1][count - 1]


@pytest.mark.parametrize("peer_review", [True, False])
@pytest.mark.parametrize("steps", [3, 6])
def test_the_curriculum_admits_from_easy_to_hard(pairs, steps, peer_review):  # noqa: F811
    """Four steps are an epoch; the first has no curriculum."""
    batch = first_batch(pairs)
    rng = np.random.default_rng(steps)
    rewards = {name: rng.normal(size=(8, 2)) for name in ("one", "two")}
    latest = rng.normal(size=(2, 20)).astype(np.float32)
    latest[:, :7] = np.nan  # not known yet
    objective = crm(
        losses.bradley_terry,
        noise_rate=0.25,
        ramp_steps=2,
        peer_review=peer_review,
        epoch_steps=4,
    )
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rewards)
    state = Progress(jnp.int32(steps), jnp.asarray(latest))
    find = jax.jit(functools.partial(gradient, objective, of_weights))
    grads, after, metrics = find(params, batch, state)
    margins = {name: x[:, 0] - x[:, 1] for name, x in rewards.items()}
    share = 1.0 if steps < 4 else 0.5 + steps % 4 / 8
    sums = margins["one"] + margins["two"]
    share *= 1.0 if peer_review else 0.75
    admitted = easiest_sums(sums, latest.sum(0), share)
    kept = []
    for name, other in (("one", "two"), ("two", "one")):
        chosen = admitted.copy()
        if peer_review:
            chosen &= np.isin(np.arange(8), np.argsort(-margins[other])[:6])
        each = np.where(chosen, softplus_derivative(margins[name]), 0)
        each = each / chosen.sum()
        expected = np.stack([each, -each], axis=1)
        np.testing.assert_allclose(grads[name], expected, atol=1e-6)
        kept.append(chosen.mean())
    assert float(metrics["crm/kept"]) == pytest.approx(np.mean(kept))
    new = np.stack([margins["one"], margins["two"]])
    np.testing.assert_allclose(after.latest[:, -8:], new, rtol=1e-5)
    np.testing.assert_array_equal(after.latest[:, :-8], latest[:, 8:])


def test_a_run_begins_without_margins(pairs):  # noqa: F811
    options = {"noise_rate": 0.25, "ramp_steps": 2}
    plain = crm(losses.bradley_terry, **options).init(0)
    assert int(plain.steps) == 0 and plain.latest.shape == (2, 0)
    new = crm(losses.bradley_terry, epoch_steps=4, **options).init(0)
    assert new.latest.shape == (2, MEMORY) and np.isnan(new.latest).all()
    # Nothing is known: the batch is ranked alone.
    margins = [jnp.arange(4.0), jnp.arange(4.0)]
    real = jnp.array([True, True, True, False])
    found = easiest(margins, real, new.latest, share=jnp.float32(0.67))
    np.testing.assert_array_equal(found, [False, True, True, False])


def test_with_nothing_to_drop_two_models_train_alone(pairs):  # noqa: F811
    batch = first_batch(pairs)
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=(8, 2)), jnp.float32) for n in "ab"}
    both = {"one": params["a"], "two": params["b"]}
    objective = crm(losses.bradley_terry, noise_rate=0.0, ramp_steps=1)
    found, _, _ = gradient(objective, of_weights, both, batch, after_steps(1))
    shaped = lambda p, micro: p.reshape(*micro.pair_index.shape, 2)
    alone = lambda p, micro: Scored({"rewards": shaped(p, micro)}, {})
    plain = from_loss(losses.bradley_terry)
    for name, mine in (("one", "a"), ("two", "b")):
        expected, _, _ = gradient(plain, alone, params[mine], batch, {})
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_evaluation_is_the_first_models_loss_on_all_pairs(pairs):  # noqa: F811
    batch = first_batch(pairs)
    rewards = np.random.default_rng(0).normal(size=(1, 8, 1, 2)).astype(np.float32)
    scores = {
        "one": {"rewards": jnp.asarray(rewards)},
        "two": {"rewards": jnp.zeros((1, 8, 1, 2))},
    }
    objective = crm(losses.bradley_terry, noise_rate=0.4, ramp_steps=5)
    expected = np.log1p(np.exp(rewards[..., 1] - rewards[..., 0]))
    for steps in (0, 1, 50):
        found, _ = objective.evaluation(Inputs(scores, batch), after_steps(steps))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def steps_of(
    pairs,  # noqa: F811
    *,
    sizes=(1, 1, 1),
    accumulation=1,
    loss="rewards",
    epoch_steps=0,
):
    """Losses of three steps, and the parameters of both models."""
    dpo = loss == "dpo"
    base = DPO if dpo else losses.bradley_terry
    objective = crm(base, noise_rate=0.25, ramp_steps=2, epoch_steps=epoch_steps)
    optimizer = OptimizerConfig(learning_rate=1e-2, decay=Decay.CONSTANT)
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        model = (build if dpo else RewardModel)(tiny_config())
        schedule = make_schedule(optimizer, 100)
        tx = make_optimizer(optimizer, schedule)
        scorer = make_scorer(model, objective.scores, chunk_size=4, num_models=2)
        one = tiny_params(model)
        two = jax.tree.map(jnp.copy, one) if dpo else jax.tree.map(jnp.negative, one)
        new = lambda p: init_state(p, tx, objective, num_annotators=0)
        state = jax.jit(new)({"one": one, "two": two})
        step = make_train_step(scorer, objective, tx, schedule)
        zeros = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
        batches = padded_batches(
            pairs,
            batch_size=8,
            accumulation=accumulation,
            seed=3,
            reference=zeros if dpo else None,
        )
        history = []
        with compiled("train_step") as programs:
            for _ in range(3):
                state, metrics = step(state, {}, to_global(next(batches), mesh))
                history.append([metrics["loss"], metrics["grad_norm"]])
        assert len(programs) == 1
        return np.array(history, float), jax.device_get(state.params)


@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [
        pytest.param((1, 1, 1), 4, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), 1, marks=pytest.mark.slow),
        ((4, 1, 2), 2),
    ],
)
def test_layout_does_not_change_what_is_chosen(pairs, sizes, accumulation):  # noqa: F811
    whole, _ = steps_of(pairs)
    split, _ = steps_of(pairs, sizes=sizes, accumulation=accumulation)
    np.testing.assert_allclose(split, whole, rtol=1e-4)


@pytest.mark.slow
def test_layout_does_not_change_the_curriculum(pairs):  # noqa: F811
    whole, _ = steps_of(pairs, epoch_steps=2)
    split, _ = steps_of(pairs, epoch_steps=2, sizes=(4, 1, 2), accumulation=2)
    np.testing.assert_allclose(split, whole, rtol=1e-4)


@pytest.mark.parametrize("epoch_steps", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_equal_policies_part(pairs, epoch_steps):  # noqa: F811
    _, params = steps_of(pairs, loss="dpo", epoch_steps=epoch_steps)
    gaps = jax.tree.map(lambda a, b: abs(a - b).max(), params["one"], params["two"])
    assert min(jax.tree.leaves(gaps)) > 1e-4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"noise_rate": 1.0}, "noise_rate 1.0"),
        ({"noise_rate": -0.1}, "noise_rate -0.1"),
        ({"noise_rate": 0.2, "ramp_steps": 0.0}, "ramp_steps 0.0"),
        ({"noise_rate": 0.2, "ramp_steps": math.inf}, "ramp_steps inf"),
        ({"noise_rate": 0.2, "epoch_steps": -1}, "epoch_steps -1"),
        ({"noise_rate": 0.2, "peer_review": False}, "peer_review false: give epoch"),
        ({"noise_rate": 0.2, "loss": functools.partial(BASE, gamma=1.0)}, "gamma"),
    ],
)
def test_wrong_options_are_named(wrong, message):
    with pytest.raises(InputError, match=message):
        crm(**{"loss": BASE} | wrong)


def test_a_loss_of_whole_batches_is_refused():
    with pytest.raises(InputError, match="dr_dpo"):
        crm(losses.dr_dpo, noise_rate=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["bradley_terry", "dpo"])
def test_a_run_exports_both_models(tmp_path, loss):
    source = make_model_folder(tmp_path / "source")
    pairs_file = make_pairs_file(tmp_path / "pairs.jsonl")
    flags = ["--objective", "crm", "--objective.noise-rate", "0.25"]
    export = train(source, pairs_file, tmp_path / "run", *flags, loss=loss)
    model = (build if loss == "dpo" else RewardModel)(tiny_config())
    one, two = (
        load_params(tmp_path / "run" / name, model) for name in ("export", "export_two")
    )
    assert export == tmp_path / "run" / "export"
    gaps = jax.tree.map(lambda a, b: float(abs(a - b).max()), one, two)
    assert min(jax.tree.leaves(gaps)) > 0


def test_slots_without_a_pair_push_no_pair_out():
    latest = jnp.array([[jnp.nan, jnp.nan, 1.0, 2.0]] * 2)
    real = jnp.array([True, False, False, False])
    margins = jnp.array([3.0, 9.0, 9.0, 9.0]), jnp.array([4.0, 9.0, 9.0, 9.0])
    found = remember(margins, real, latest)
    np.testing.assert_array_equal(found[0], [jnp.nan, 1, 2, 3])
    np.testing.assert_array_equal(found[1], [jnp.nan, 1, 2, 4])
