"""Crowd-BT against scipy, brute force in numpy, and its limits."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.optimize import minimize
from scipy.special import betaln, expit, log_expit, logit, ndtr
from scipy.stats import norm

from jaxpref.noise import crowd

ITEMS, ANNOTATORS, VOTES = 8, 5, 120
ETA = np.array([0.95, 0.9, 0.8, 0.7, 0.3])
SPREAD = 1.5
MEAN = np.linspace(-1, 1, ITEMS)


def draw(seed=0):
    """(winners, losers, annotators), and the pair of each vote: 40 pairs, 3 votes."""
    rng = np.random.default_rng(seed)
    q = MEAN + rng.normal(0, SPREAD, ITEMS)
    i = rng.integers(0, ITEMS, VOTES // 3)
    j = (i + rng.integers(1, ITEMS, VOTES // 3)) % ITEMS
    pairs = np.repeat(np.arange(VOTES // 3), 3)
    who = rng.integers(0, ANNOTATORS, VOTES)
    truth = (rng.random(VOTES // 3) < expit(q[i] - q[j]))[pairs]
    first = truth == (rng.random(VOTES) < ETA[who])
    i, j = i[pairs], j[pairs]
    return (np.where(first, i, j), np.where(first, j, i), who), pairs


VOTED, PAIRS = draw()


def fit(voted=VOTED, *, dtype=jnp.float64, mean=MEAN, **options):
    options = {"spread": SPREAD, "tolerance": 1e-10} | options
    return crowd.fit(
        *(jnp.asarray(x) for x in voted),
        num_items=ITEMS,
        num_annotators=ANNOTATORS,
        prior_mean=jnp.asarray(mean, dtype),
        **options,
    )


@pytest.fixture(scope="module")
def found():
    """The fits without and with shared truths, in float64, as numpy arrays."""
    with jax.enable_x64(True):
        fits = {pairs is not None: fit(pairs=pairs) for pairs in (None, PAIRS)}
        return {shared: jax.tree.map(np.asarray, x) for shared, x in fits.items()}


def log_posterior(x, shared: bool, voted=VOTED) -> float:
    """In numpy, pair by pair, summed over both truths, with a normalized prior."""
    winners, losers, who = voted
    q, theta = x[:ITEMS], x[ITEMS:]
    names = PAIRS if shared else np.arange(VOTES)
    total = -np.sum((q - MEAN) ** 2) / (2 * SPREAD**2) - ITEMS * np.log(SPREAD)
    total += np.sum(9 * log_expit(theta) + log_expit(-theta))
    total -= ANNOTATORS * betaln(9, 1)
    for name in np.unique(names):
        on = np.flatnonzero(names == name)
        first = winners[on[0]]
        m = q[first] - q[losers[on[0]]]
        sign = np.where(winners[on] == first, 1, -1)
        if_first = np.prod(expit(sign * theta[who[on]]))
        if_second = np.prod(expit(-sign * theta[who[on]]))
        total += np.log(expit(m) * if_first + expit(-m) * if_second)
    return total


@pytest.mark.parametrize("shared", [False, True])
def test_fit_maximizes_the_posterior(found, shared):
    best = minimize(
        lambda x: -log_posterior(x, shared),
        np.r_[MEAN, np.full(ANNOTATORS, 2.0)],
        method="BFGS",
        options={"gtol": 1e-6},
    )
    ours = found[shared]
    assert ours.converged
    np.testing.assert_allclose(ours.strength, best.x[:ITEMS], atol=1e-5)
    np.testing.assert_allclose(ours.reliability, expit(best.x[ITEMS:]), atol=1e-5)
    np.testing.assert_allclose(ours.log_posterior, -best.fun, rtol=1e-9)
    np.testing.assert_array_equal(ours.counts, np.bincount(VOTED[2]))


def test_intervals_and_evidence_are_those_of_laplace(found):
    """The Hessian by differences of the numpy posterior."""
    ours = found[False]
    x = np.r_[ours.strength, logit(ours.reliability)]
    steps = 1e-3 * np.eye(x.size)
    value = lambda x: log_posterior(x, False)
    mixed = lambda a, b: (
        value(x + a + b) - value(x + a - b) - value(x - a + b) + value(x - a - b)
    )
    hessian = np.array([[-mixed(a, b) / 4e-6 for b in steps] for a in steps])
    covariance = np.linalg.inv(hessian)
    reach = norm.ppf(0.975) * np.sqrt(np.diag(covariance))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
    close(ours.strength_lower, x[:ITEMS] - reach[:ITEMS])
    close(ours.strength_upper, x[:ITEMS] + reach[:ITEMS])
    close(ours.lower, expit(x[ITEMS:] - reach[ITEMS:]))
    close(ours.upper, expit(x[ITEMS:] + reach[ITEMS:]))
    close(ours.log_evidence, value(x) - np.linalg.slogdet(hessian)[1] / 2)
    i, j, _ = VOTED
    variance = covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]
    close(ours.stronger, ndtr((x[i] - x[j]) / np.sqrt(variance)))


def test_margins_leave_out_the_votes_on_the_pair(found):
    """Close to refits without the pair, and far from the margins with it."""
    i, j, _ = VOTED
    ours = found[True]
    inside = ours.strength[i] - ours.strength[j]
    first = np.unique(PAIRS, return_index=True)[1]
    with jax.enable_x64(True):
        fits = [fit(pairs=PAIRS, where=PAIRS != PAIRS[n]) for n in first]
        # What `margins` says of votes that are not real needs no correction.
        shrunk = np.array([f.margins[n] for n, f in zip(first, fits)])
    # An approximation: a refit also changes the reliabilities.
    assert np.corrcoef(ours.margins[first], shrunk)[0, 1] > 0.995
    errors = [np.abs(x[first] - shrunk).mean() for x in (ours.margins, inside)]
    assert errors[0] < min(0.05, errors[1] / 4)
    own = logit(ours.reliability)[VOTED[2]]
    # Bayes' rule: the margin, and all votes on the pair relative to this one.
    sign = np.where(i < j, 1, -1)
    balance = np.bincount(PAIRS, sign * own)[PAIRS]
    expected = expit(ours.margins + sign * balance)
    np.testing.assert_allclose(ours.posterior, expected, rtol=1e-9)


def test_perfect_annotators_give_bradley_terry():
    winners, losers, _ = VOTED
    with jax.enable_x64(True):
        ours = fit(prior=(1e12, 1.0))

    def negative(q):
        fits = np.sum(log_expit(q[winners] - q[losers]))
        return np.sum((q - MEAN) ** 2) / (2 * SPREAD**2) - fits

    best = minimize(negative, MEAN, method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(ours.strength, best.x, atol=1e-6)


def test_one_pair_of_items():
    """80 of 120 perfect votes for item 0: m = log 2, with variance 1 / (n p q)."""
    zero = np.r_[np.zeros(80, int), np.ones(40, int)]
    with jax.enable_x64(True):
        ours = fit(
            (zero, 1 - zero, VOTED[2]), prior=(1e12, 1.0), mean=0 * MEAN, spread=1e3
        )
    np.testing.assert_allclose(
        ours.strength[0] - ours.strength[1], np.log(2), rtol=1e-5
    )
    deviation = np.sqrt(9 / 2 / VOTES)
    expected = ndtr(np.log(2) / deviation)
    np.testing.assert_allclose(ours.stronger[:80], expected, rtol=1e-5)
    # The other items have no votes, and keep their prior.
    np.testing.assert_allclose(
        ours.strength_upper[2:], norm.ppf(0.975) * 1e3, rtol=1e-6
    )


def test_without_strengths_it_is_dawid_and_skene():
    """All items equal: one rate per annotator, two labels, EM in numpy."""
    winners, losers, who = VOTED
    sign = np.where(winners < losers, 1, -1)
    eta = np.full(ANNOTATORS, 0.9)
    for _ in range(2000):
        own = np.log(eta / (1 - eta))[who]
        right = expit(sign * np.bincount(PAIRS, sign * own)[PAIRS])
        eta = (9 + np.bincount(who, right)) / (10 + np.bincount(who))
    with jax.enable_x64(True):
        ours = fit(pairs=PAIRS, mean=0 * MEAN, spread=1e-6)
    np.testing.assert_allclose(ours.reliability, eta, atol=1e-7)
    np.testing.assert_allclose(ours.posterior, right, atol=1e-6)


def test_certain_scores_count_right_and_wrong():
    """If the prior mean decides every pair, a reliability is a share of votes."""
    winners, losers, who = VOTED
    mean = 1000.0 * np.arange(ITEMS)
    with jax.enable_x64(True):
        ours = fit(mean=mean, spread=1e-3)
    right = np.bincount(who, winners > losers)
    np.testing.assert_allclose(ours.reliability, (9 + right) / (10 + np.bincount(who)))


def test_padding_order_and_unknown_annotators():
    voted, pairs = VOTED, PAIRS
    with jax.enable_x64(True):
        usual = fit(pairs=pairs)
        order = np.random.default_rng(1).permutation(VOTES)
        mixed = fit([x[order] for x in voted], pairs=-7 * pairs[order])
        where = np.arange(VOTES) < 117
        less = fit([np.where(where, x, 0) for x in voted], pairs=pairs, where=where)
        gone = fit([np.where(where, x, 1) for x in voted], pairs=pairs, where=where)
        unknown = np.where(voted[2] == 4, -1, voted[2])
        last = fit([*voted[:2], unknown], pairs=pairs)
    close = functools.partial(np.testing.assert_allclose, atol=1e-8)
    close(mixed.strength, usual.strength)
    close(mixed.margins, usual.margins[order])
    close(last.reliability, usual.reliability)
    close(less.strength, gone.strength)
    assert (
        int(less.counts.sum()) == 117
        and np.abs(less.strength - usual.strength).max() > 0.01
    )


def test_sharded_over_eight_devices():
    arrays = (*(jnp.asarray(x) for x in VOTED), jnp.asarray(PAIRS))

    def ours(winners, losers, annotators, pairs):
        return fit(
            (winners, losers, annotators),
            pairs=pairs,
            dtype=jnp.float32,
            tolerance=1e-5,
        )

    eager = ours(*arrays)
    assert eager.strength.dtype == jnp.float32 and eager.converged
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Explicit,) * 2)
    sharding = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        sharded = jax.jit(ours)(*(jax.device_put(x, sharding) for x in arrays))
    for name in ("strength", "reliability", "margins", "posterior", "lower"):
        np.testing.assert_allclose(
            getattr(sharded, name), getattr(eager, name), atol=2e-3
        )


def test_invalid_input_is_rejected():
    winners, losers, who = VOTED
    call = functools.partial(fit, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"items from 0 to 7, got -1 to 7"):
        call((np.where(winners == 3, -1, winners), losers, who))
    with pytest.raises(ValueError, match="compares item 2 with itself"):
        call((np.where(losers == 2, 2, winners), losers, who))
    with pytest.raises(ValueError, match="votes on one pair to compare the same two"):
        call(pairs=PAIRS // 2)
    with pytest.raises(ValueError, match="finite spread > 0, got 0"):
        call(spread=0)
    with pytest.raises(ValueError, match=r"prior_mean of shape \(8,\), got \(3,\)"):
        call(mean=np.zeros(3))
    with pytest.raises(ValueError, match=r"losers of shape \(120,\), got \(3,\)"):
        call((winners, losers[:3], who))
    with pytest.raises(ValueError, match="annotators from -1 to 4, got 0 to 5"):
        call((winners, losers, who + (who == 4)))


def test_the_example_runs():
    result = doctest.testmod(crowd)
    assert result.attempted and not result.failed
