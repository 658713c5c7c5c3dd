"""Losses of ranked and graded lists."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from jaxpref import losses
from tests.losses.meshes import sharded
from tests.losses.row import EXTREMES

LISTS, ITEMS = 16, 5


def drawn(seed=0):
    """Scores that float32 holds exactly, grades with ties, places; some items padding.

    The first lists begin with an extreme score; the last two have one item and none.
    """
    rng = np.random.default_rng(seed)
    scores = np.round(rng.uniform(-4, 4, (LISTS, ITEMS)) * 2**10) / 2**10
    scores[: len(EXTREMES), 0] = EXTREMES
    scores[6, 1:4] = scores[6, 0]
    grades = rng.integers(0, 3, (LISTS, ITEMS)) / 2
    places = np.argsort(rng.random((LISTS, ITEMS)), axis=-1) + 1.0
    real = rng.random((LISTS, ITEMS)) < 0.8
    real[:8] |= np.arange(ITEMS) < 2
    real[-2], real[-1] = np.arange(ITEMS) == 2, False
    return scores, grades, places, real


# Oracles of one list without padding, by loops over its items.


def plackett_luce(s):
    """Pick the best by softmax, then the best of the rest."""
    return -sum((log_softmax(s[i:])[0] for i in range(len(s))), np.longdouble(0))


def lipo_lambda(s, psi, ranked=None):
    """Lambda weights of the ranks that a stable sort finds."""
    ranked = s if ranked is None else ranked
    rank = np.empty(len(s))
    rank[np.argsort(-ranked, kind="stable")] = np.arange(1, len(s) + 1)
    total = np.longdouble(0)
    for i, j in itertools.permutations(range(len(s)), 2):
        if psi[i] > psi[j]:
            gain = abs((2 ** psi[i] - 1) - (2 ** psi[j] - 1))
            discount = abs(1 / np.log(1 + rank[i]) - 1 / np.log(1 + rank[j]))
            total += gain * discount * np.logaddexp(0, -(s[i] - s[j]))
    return total


def irpo(s, relevance, place):
    total = np.longdouble(0)
    for i in range(len(s)):
        others = [s[j] - s[i] for j in range(len(s)) if j != i]
        if others:
            weight = (2 ** relevance[i] - 1) / np.log2(1 + place[i])
            total += weight * np.logaddexp(0, logsumexp(others) - np.log(len(others)))
    return total / max(len(s), 1)


CASES = [
    pytest.param(losses.plackett_luce, plackett_luce, 0, id="plackett_luce"),
    pytest.param(losses.lipo_lambda, lipo_lambda, 1, id="lipo_lambda"),
    pytest.param(losses.irpo, irpo, 2, id="irpo"),
]
every_case = pytest.mark.parametrize(("loss", "oracle", "extra"), CASES)


def oracle_of_lists(oracle, scores, extra, real, **fixed):
    rows = []
    for i in range(LISTS):
        keep = real[i]
        wide = np.asarray(scores[i][keep], np.longdouble)
        more = {name: array[i][keep] for name, array in fixed.items()}
        rows.append(oracle(wide, *(e[i][keep] for e in extra), **more))
    return np.array(rows)


def oracle_derivatives(oracle, scores, extra, real):
    """Central differences, an item at a time; ranks stay as they are."""
    fixed = {"ranked": scores} if oracle is lipo_lambda else {}
    step = 2.0**-17
    derivatives = np.zeros((LISTS, ITEMS))
    for item in range(ITEMS):
        sides = []
        for sign in (1, -1):
            moved = np.asarray(scores, np.longdouble)
            moved[:, item] += sign * step
            sides.append(oracle_of_lists(oracle, moved, extra, real, **fixed))
        derivatives[:, item] = (sides[0] - sides[1]) / (2 * step)
    return derivatives * real


def both(loss):
    def function(scores, real, *extra):
        run = lambda s: loss(s, *extra, where=real)
        return run(scores), jax.grad(lambda s: jnp.sum(run(s)))(scores)

    return function


@every_case
def test_values_and_gradients(loss, oracle, extra):
    scores, *others, real = drawn()
    extra = others[:extra]
    expected = oracle_of_lists(oracle, scores, extra, real).astype(float)
    derivatives = oracle_derivatives(oracle, scores, extra, real)
    poison = lambda x: np.where(real, x, np.nan)
    run = both(loss)
    with jax.enable_x64(True):
        wide = [jnp.asarray(poison(x)) for x in (scores, *extra)]
        value, gradient = jax.jit(run)(wide[0], jnp.asarray(real), *wide[1:])
        assert value.dtype == jnp.float64 and value.shape == (LISTS,)
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(gradient, derivatives, rtol=1e-7, atol=1e-9)
    single = [jnp.asarray(poison(x), jnp.float32) for x in (scores, *extra)]
    arrays = single[0], jnp.asarray(real), *single[1:]
    cube = lambda x: x.reshape(2, 8, ITEMS)
    results = [
        run(*arrays),
        jax.jit(run)(*arrays),
        sharded(run, *arrays),
        jax.jit(jax.vmap(run))(*arrays),
        jax.tree.map(
            lambda x: x.reshape(LISTS, *x.shape[2:]), jax.jit(run)(*map(cube, arrays))
        ),
        jax.tree.map(
            lambda x: x.reshape(LISTS, *x.shape[2:]),
            sharded(run, *map(cube, arrays), axis=1),
        ),
    ]
    for value, gradient in results:
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, derivatives, rtol=1e-5, atol=1e-6)
        assert not np.asarray(gradient)[~real].any()
    half = [x.astype(jnp.bfloat16) for x in single]
    value, gradient = jax.jit(run)(half[0], arrays[1], *half[1:])
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert np.isfinite(value).all() and np.isfinite(gradient).all()


@every_case
def test_without_where_all_items_are_real(loss, oracle, extra):
    scores, *others, _ = (jnp.asarray(x, jnp.float32) for x in drawn())
    extra = others[:extra]
    where = jnp.ones((LISTS, ITEMS), bool)
    np.testing.assert_array_equal(
        loss(scores, *extra), loss(scores, *extra, where=where)
    )
    alone = loss(scores[7], *(e[7] for e in extra))
    assert alone.shape == ()
    np.testing.assert_allclose(alone, loss(scores, *extra)[7], rtol=1e-6)


@every_case
def test_a_constant_in_all_scores_changes_nothing(loss, oracle, extra):
    scores, *others, real = drawn()
    extra = [jnp.asarray(e, jnp.float32) for e in others[:extra]]
    run = functools.partial(loss, where=jnp.asarray(real))
    here, there = (
        run(jnp.asarray(scores + c, jnp.float32), *extra) for c in (0, 2.0**10)
    )
    np.testing.assert_allclose(here, there, rtol=1e-6)


@every_case
def test_invalid_arguments(loss, oracle, extra):
    bare = inspect.unwrap(loss)
    scores = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"one shape, got .*where \(3,\)"):
        bare(scores, *[scores] * extra, where=jnp.ones(3, bool))
    with pytest.raises(TypeError, match="scores to be floating"):
        bare(scores.astype(int), *[scores] * extra)
    with pytest.raises(ValueError, match="got a scalar"):
        bare(jnp.float32(1), *[jnp.float32(1)] * extra)
    names = list(inspect.signature(loss).parameters)[1 : 1 + extra]
    for i, name in enumerate(names):
        wrong = [scores] * extra
        wrong[i] = scores[:, :2]
        with pytest.raises(ValueError, match=rf"one shape, got .*{name} \(2, 2\)"):
            bare(scores, *wrong)


# Two items are a pair.


@pytest.fixture
def pairs():
    rng = np.random.default_rng(3)
    logps = [jnp.asarray(a, jnp.float32) for a in rng.uniform(-60, 0, (4, LISTS))]
    reward = functools.partial(losses.implicit_rewards, beta=0.3)
    scores = jnp.stack(
        [reward(logps[0], logps[2]), reward(logps[1], logps[3])], axis=-1
    )
    return scores, losses.dpo(*logps, beta=0.3)


def test_two_items_are_dpo(pairs):
    scores, dpo = pairs
    grades = jnp.broadcast_to(jnp.asarray([1.0, 0.0]), scores.shape)
    places = jnp.broadcast_to(jnp.asarray([1, 2]), scores.shape)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7)
    close(losses.plackett_luce(scores), dpo)
    close(losses.irpo(scores, grades, places), dpo / 2)
    constant = 1 / np.log(2) - 1 / np.log(3)
    close(losses.lipo_lambda(scores, grades), constant * dpo)
    close(losses.lipo_lambda(scores[:, ::-1], grades[:, ::-1]), constant * dpo)


@every_case
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0,)])
def test_nothing_to_rank(loss, oracle, extra, shape):
    empty = jnp.zeros(shape)
    value = loss(empty, *[empty] * extra)
    assert value.shape == shape[:-1] and not value.any()
    derivative = jax.grad(lambda s: loss(s, *[empty] * extra).sum())(empty)
    assert derivative.shape == shape


# What they promise.


def test_plackett_luce_is_a_distribution_over_orders():
    scores = jnp.asarray([0.3, -2.0, 1.5, 0.0])
    orders = jnp.asarray(list(itertools.permutations(range(4))))
    np.testing.assert_allclose(
        jnp.exp(-losses.plackett_luce(scores[orders])).sum(), 1, rtol=1e-6
    )


def test_lipo_lambda_moves_an_untrained_policy():
    """With equal scores, ranks must differ; otherwise all gradients are 0."""
    labels = jnp.asarray([0.0, 0.5, 1.0])
    derivative = jax.grad(losses.lipo_lambda)(jnp.zeros(3), labels)
    assert derivative[0] > 0 > derivative[2]


def test_lipo_lambda_ignores_the_order_of_the_list():
    scores, labels = (
        jnp.asarray([2.0, -1.0, 0.5, 3.0]),
        jnp.asarray([0.0, 1, 0.25, 0.5]),
    )
    here = losses.lipo_lambda(scores, labels)
    for order in itertools.permutations(range(4)):
        order = jnp.asarray(order)
        np.testing.assert_allclose(
            losses.lipo_lambda(scores[order], labels[order]), here, rtol=1e-6
        )
    same = jnp.ones(4)
    assert losses.lipo_lambda(scores, same) == 0


def test_irpo_weighs_the_top_most():
    """The same slip costs more at a place further up; what is irrelevant costs none."""
    scores = jnp.asarray([0.0, 1.0, 0.0])
    places = jnp.asarray([1, 2, 3])
    one = lambda i: losses.irpo(scores[jnp.asarray(i)], jnp.eye(3)[0], places)
    first = losses.irpo(scores, jnp.asarray([1.0, 0, 0]), places)
    last = losses.irpo(scores, jnp.asarray([0, 0, 1.0]), places)
    np.testing.assert_allclose(first / last, 2.0, rtol=1e-6)  # log2(4) / log2(2)
    assert losses.irpo(scores, jnp.zeros(3), places) == 0
    assert one([1, 0, 2]) < first
