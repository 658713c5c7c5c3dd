"""`--objective ppo_clip`: its loss, its gradient, and its value head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import objectives
from jaxpref.errors import InputError
from jaxpref.models import Numerics, build
from jaxpref.objectives.ppo import SAMPLER_VALUES, VALUES
from jaxpref.objectives.sampled import POLICY, REFERENCE, SAMPLER
from jaxpref.scoring.scores import Scored
from jaxpref.scoring.twin import make_scorer
from jaxpref.train.gradient import gradient
from tests.sampled import padded_answers
from tests.test_packing import make_pairs, packed, padded
from tests.tiny import tiny_config, tiny_params

SHAPE = PROMPTS, GROUP, TOKENS = 2, 3, 5


def drawn(seed=0):
    """Arrays [B, K, T] by name, the mask of the tokens, and rewards [B, K]."""
    rng = np.random.default_rng(seed)
    logps = rng.uniform(-3, -0.2, SHAPE)
    near = lambda: logps + rng.uniform(-0.5, 0.5, SHAPE)
    arrays = {POLICY: logps, SAMPLER: near(), REFERENCE: near()}
    arrays[SAMPLER_VALUES] = rng.normal(size=SHAPE)
    arrays[VALUES] = arrays[SAMPLER_VALUES] + rng.uniform(-0.5, 0.5, SHAPE)
    mask = np.arange(TOKENS) < rng.integers(1, TOKENS + 1, SHAPE[:2])[..., None]
    rewards = rng.normal(size=SHAPE[:2])
    rewards[1, 2] = np.nan  # an answer without a reward
    return arrays, mask, rewards


def ours(objective, arrays, mask, rewards, *, parts=1):
    """Loss, gradients in the trained arrays by name, and metrics.

    The prompts are split over so many micro-batches.
    """
    read = {name: arrays[name] for name in sorted(objective.token_numbers)}
    trained = {POLICY, VALUES} & set(objective.reads)
    with jax.enable_x64(True):
        split = lambda x: jnp.asarray(x).reshape(parts, PROMPTS // parts, *x.shape[2:])
        batch = jax.tree.map(split, padded_answers(mask, read, rewards))
        params = {n: jnp.asarray(np.where(mask, arrays[n], 0)) for n in trained}
        own = lambda x, micro: x[micro.pair_index[:, 0]]
        score = lambda params, micro: Scored(
            {name: own(x, micro) for name, x in params.items()}, {}
        )
        grads, _, metrics = gradient(objective, score, params, batch, objective.init(0))
        return jax.tree.map(np.asarray, (metrics["loss"], grads, metrics))


OPTIONS = {"clip_low": 0.2, "clip_high": 0.3, "beta": 0.1, "gae_lambda": 0.8}
OPTIONS |= {"gamma": 0.9, "value_coefficient": 0.7, "clip_value": 0.25}


def by_loops(arrays, mask, rewards, whiten):
    """The loss of PPO with `OPTIONS`, from its equations; and the returns."""
    advantages, returns = {}, {}
    decay = OPTIONS["gamma"] * OPTIONS["gae_lambda"]
    for b, k in np.ndindex(PROMPTS, GROUP):
        if np.isnan(rewards[b, k]):
            continue
        of = {name: x[b, k] for name, x in arrays.items()}
        last, advantage, following = mask[b, k].sum() - 1, 0.0, 0.0
        for t in range(last, -1, -1):
            reward = -OPTIONS["beta"] * (of[SAMPLER][t] - of[REFERENCE][t])
            reward += rewards[b, k] if t == last else 0
            old = of[SAMPLER_VALUES][t]
            advantage *= decay
            advantage += reward + OPTIONS["gamma"] * following - old
            following = old
            advantages[b, k, t], returns[b, k, t] = advantage, advantage + old
    shift, scale, total = 0.0, 1.0, 0.0
    if whiten:
        known = np.array([*advantages.values()])
        shift, scale = known.mean(), known.std()
    for place, target in returns.items():
        of = {name: x[place] for name, x in arrays.items()}
        ratio, old = np.exp(of[POLICY] - of[SAMPLER]), of[SAMPLER_VALUES]
        advantage = (advantages[place] - shift) / scale
        total -= min(ratio * advantage, np.clip(ratio, 0.8, 1.3) * advantage)
        near = np.clip(of[VALUES], old - 0.25, old + 0.25)
        total += 0.7 * 0.5 * max((of[VALUES] - target) ** 2, (near - target) ** 2)
    return total / mask.sum(), returns


@pytest.mark.parametrize("whiten", [False, True])
def test_loss_and_gradient_are_those_of_the_equations(whiten):
    """The gradient by central differences; in two micro-batches as in one."""
    arrays, mask, rewards = drawn()
    objective = objectives.ppo_clip(**OPTIONS, whiten_advantages=whiten)
    loss, grads, metrics = ours(objective, arrays, mask, rewards)
    expected, returns = by_loops(arrays, mask, rewards, whiten)
    in_two = ours(objective, arrays, mask, rewards, parts=2)
    for one, other in zip(jax.tree.leaves(in_two[:2]), jax.tree.leaves((loss, grads))):
        np.testing.assert_allclose(one, other, rtol=1e-9)
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    for name in (POLICY, VALUES):
        for place in zip(*np.nonzero(mask)):
            step = np.zeros(SHAPE)
            step[place] = 1e-6
            ends = [
                by_loops(changed, mask, rewards, whiten)[0]
                for s in (1, -1)
                for changed in [arrays | {name: arrays[name] + s * step}]
            ]
            quotient = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(grads[name][place], quotient, atol=1e-8)
    targets = np.array(list(returns.values()))
    old = np.array([arrays[SAMPLER_VALUES][place] for place in returns])
    explained = 1 - np.var(targets - old) / np.var(targets)
    np.testing.assert_allclose(metrics["values/explained"], explained, rtol=1e-6)
    np.testing.assert_allclose(metrics["values/mean"], old.mean(), rtol=1e-6)


def test_equal_returns_have_no_variance_to_explain():
    """Returns that are equal up to rounding, whatever the values are."""
    arrays, mask, _ = drawn()
    ppo = objectives.ppo_clip(beta=0.0, gae_lambda=1.0)
    metrics = ours(ppo, arrays, mask, np.full(SHAPE[:2], 0.1))[2]
    assert np.isnan(metrics["values/explained"])


def test_without_values_it_is_reinforce():
    """With lambda = gamma = 1 and values of 0, on policy, up to the denominator."""
    arrays, mask, rewards = drawn(1)
    arrays |= {SAMPLER: arrays[POLICY], VALUES: np.zeros(SHAPE)}
    arrays |= {SAMPLER_VALUES: np.zeros(SHAPE)}
    options = {"value_coefficient": 0.0, "whiten_advantages": False}
    ppo = objectives.ppo_clip(beta=0.0, gae_lambda=1.0, **options)
    found = ours(ppo, arrays, mask, rewards)[1][POLICY]
    expected = ours(objectives.reinforce(beta=0.0), arrays, mask, rewards)[1][POLICY]
    np.testing.assert_allclose(
        found * mask.sum(), expected * PROMPTS * GROUP, rtol=1e-9
    )


def values_of(model, params):
    """A function that gives the values of a batch, compiled once."""
    objective = objectives.ppo_clip()
    scorer = make_scorer(model, objective.scores, heads=objective.heads, chunk_size=4)
    first = lambda batch: jax.tree.map(lambda x: x[0], batch)
    found = jax.jit(lambda batch: scorer(params, {}, first(batch)).scores[VALUES])
    return lambda batch: np.asarray(found(batch))


@pytest.mark.parametrize(
    "layout", ["packed", pytest.param("padded", marks=pytest.mark.slow)]
)
def test_a_value_is_that_of_the_tokens_before(layout):
    """Also if the token itself, and all later ones of its answer, change."""
    rng = np.random.default_rng(0)
    pairs = make_pairs(8)
    with jax.enable_x64(True):
        model = build(tiny_config(), Numerics("float64", "float64"))
        policy = jax.tree.map(lambda x: x.astype(jnp.float64), tiny_params(model))
        head = {"weight": jnp.asarray(rng.normal(size=16)), "bias": jnp.asarray(0.3)}
        params = {"policy": policy, "heads": head}
        batch, held = packed(pairs)
        if layout == "padded":
            batch = padded(pairs, held)
        values_in = values_of(model, params)
        values = values_in(batch)
        # The third token of each answer, and what follows it, becomes another one.
        own, tokens = np.asarray(batch.completions), np.asarray(batch.tokens).copy()
        index = np.zeros_like(own)
        for *row, p in np.argwhere(own >= 0):
            same = own[(*row, slice(None, p))] == own[(*row, p)]
            index[(*row, p)] = same.sum()
        after = np.asarray(batch.predictors)
        for *row, p in np.argwhere((own >= 0) & (index > 2)):
            tokens[(*row, after[(*row, p)])] = 3
        changed = dataclasses.replace(batch, tokens=jnp.asarray(tokens))
        other = values_in(changed)
        places = np.argwhere(own[0] >= 0)
        before, ends = np.zeros((len(places), 20), np.int32), []
        for n, (r, q, p) in enumerate(places):
            slot, side = divmod(int(own[0, r, q, p]), 2)
            pair = int(batch.pair_index[0, r, slot])
            prompt, answer = pairs.prompt(pair), pairs.completion(pair, side)
            text = [*prompt, *answer[: index[0, r, q, p]]]
            before[n, : len(text)] = text
            ends.append(len(text) - 1)
        states = jax.jit(model.hidden)(policy, jnp.asarray(before))
        last = np.asarray(states)[np.arange(len(places)), ends]
    at = tuple(places.T)
    expected = last @ np.asarray(head["weight"]) + 0.3
    np.testing.assert_allclose(values[at], expected, rtol=1e-8)
    same = np.isclose(values[at], other[at], rtol=1e-12)
    np.testing.assert_array_equal(same, index[0][at] <= 2)
    assert 20 < same.sum() < len(same) - 5


def test_options_out_of_range_are_refused():
    for name, value in (
        ("gae_lambda", 1.5),
        ("gamma", -0.1),
        ("value_coefficient", float("inf")),
        ("clip_value", 0.0),
        ("clip_low", 2.0),
    ):
        with pytest.raises(InputError, match=f"ppo_clip: {name} {value}"):
            objectives.ppo_clip(**{name: value})
