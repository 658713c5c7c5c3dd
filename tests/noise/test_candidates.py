"""Which description of the noise the labels support: evidence, choice, and safety."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.special import expit, logit, logsumexp
from scipy.stats import norm

from jaxpref.noise import candidates, instance, instance_fit, instance_labels
from jaxpref.noise.instance import Features, Prior

PRIOR = Prior(odd=(2.0,), largest=1.0)
COUNT = 4096


def labels_of(z, odd, annotators):
    where = jnp.ones(len(z), bool)
    even = jnp.zeros((len(z), 0))
    features = Features(even, jnp.asarray(odd, jnp.float32)[:, None])
    who = jnp.asarray(annotators, jnp.int32)
    return instance_labels.flat(jnp.asarray(z, jnp.float32), features, who, where)


@functools.partial(jax.jit, static_argnames="num_annotators")
def log_odds(labels, num_annotators=2):
    start = candidates.initial(PRIOR, num_annotators)
    return candidates.fit(start, labels, prior=PRIOR, steps=20)


@functools.partial(jax.jit, static_argnames=("prior", "num_annotators"))
def fitted(labels, prior, num_annotators):
    """The estimated rate, and the log-evidence."""
    start = instance.initial(prior, num_annotators)
    found = instance_fit.update(start, labels, prior=prior, steps=20)
    rate = instance_fit.describe(found, labels, prior=prior).rate
    return rate, instance_fit.log_evidence(found, labels, prior=prior)


def test_the_evidence_is_the_integral_over_the_prior():
    """By quadrature over t, g and w of one rate, in float64."""
    prior = Prior(odd=(0.0,), annotators=0.0, preference=0.5)
    n, rng = 1000, np.random.default_rng(0)
    odd, m = np.tanh(rng.normal(size=n)), rng.normal(0, 2, n)
    right = np.where(rng.random(n) < expit(m + 0.4 * odd), 1, -1)
    sign = np.where(rng.random(n) < 0.1, -right, right)
    z, odd = sign * m, sign * odd
    labels = labels_of(z, odd, np.full(n, -1))
    _, laplace = fitted(labels, prior, 0)

    t = np.linspace(-1, 1, 21)[:, None, None]
    g = np.linspace(-1, 1.5, 26)[:, None]
    w = np.linspace(-5, 1, 31)
    e = 0.5 * expit(w)
    p = expit(np.exp(t)[..., None] * z + g[..., None] * odd)
    likelihood = np.log((1 - e[:, None]) * p + e[:, None] * (1 - p)).sum(-1)
    prior_density = norm.logpdf(t, 0, 1.4) + norm.logpdf(g, 0, 0.5)
    prior_density = prior_density + norm.logpdf(w, np.log(0.1 / 0.4), 1)
    cell = 2 * np.log(0.1) + np.log(0.2)
    exact = logsumexp(likelihood + prior_density) + cell
    assert float(laplace) == pytest.approx(exact, abs=0.3)


def simulated(noise, *, seed=0, count=COUNT, preference=0.5):
    """Calibrated margins of labels by two annotators."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(size=count)
    odd, m = np.tanh(difference), 3 * rng.normal(size=count) + preference * difference
    who = rng.integers(0, 2, count)
    label = np.where(rng.random(count) < expit(m), 1, -1)
    rate = {"correct": (0, 0), "one_rate": (0.3, 0.3)}.get(noise, (0.02, 0.4))
    if noise in ("features", "both"):
        biased = rng.random(count) < 0.4 if noise == "features" else who == 1
        label = np.where(biased, np.sign(odd), label)
    else:
        label = np.where(rng.random(count) < np.array(rate)[who], -label, label)
    return labels_of(label * m, label * odd, who)


@pytest.mark.parametrize("preference", [0.0, 1.0])
@pytest.mark.parametrize("noise", candidates.NAMES)
def test_each_noise_is_recognized(noise, preference):
    """Also if the true preference depends on the feature."""
    _, found = log_odds(simulated(noise, preference=preference))
    assert candidates.NAMES[int(np.argmax(found))] == noise
    assert found[0] == 0


@pytest.mark.parametrize(
    ("log_odds", "found", "with_shared"),
    [
        ([0, -1, -3, -15, -17], "correct", "correct"),
        ([0, 5, 30, -3, 12], "annotators", "annotators"),
        # All annotators follow the feature.
        ([0, 5, 30, 60, 58], "one_rate", "features"),
        ([0, -2, 30, 60, 58], "correct", "features"),
        # Whether they differ is unclear, and then clear.
        ([0, 5, 30, 60, 65], "one_rate", "both"),
        ([0, 5, 30, 60, 75], "both", "both"),
    ],
)
def test_what_all_annotators_share_may_be_a_preference(log_odds, found, with_shared):
    for correct_shared, name in ((False, found), (True, with_shared)):
        odds = jnp.array(log_odds, jnp.float32)
        which = candidates.select(odds, correct_shared=correct_shared)
        assert candidates.NAMES[int(which)] == name


def test_a_preference_that_the_margins_lack_is_not_a_bias():
    """Labels that are all correct depend on the feature, and the margins do not yet."""
    rng = np.random.default_rng(1)
    difference, rest = rng.normal(size=(2, COUNT))
    odd, m = np.tanh(difference), 1.5 * rest
    label = np.where(rng.random(COUNT) < expit(m + 0.8 * difference), 1, -1)
    who = rng.integers(0, 2, COUNT)
    _, found = log_odds(labels_of(label * m, label * odd, who))
    assert int(np.argmax(found)) == 0


def test_without_annotators_and_labels_nothing_is_corrected():
    labels = simulated("one_rate")
    unknown = dataclasses.replace(labels, annotators=jnp.full(COUNT, -1))
    _, found = log_odds(unknown)
    assert int(np.argmax(found)) == 1
    nothing = dataclasses.replace(labels, where=jnp.zeros(COUNT, bool))
    coefficients, found = log_odds(nothing)
    np.testing.assert_allclose(found, candidates.LOG_PRIOR, atol=1e-5)
    now, prior = candidates.chosen(coefficients, jnp.argmax(found), prior=PRIOR)
    rates = instance.flip_rates(now, labels.features, labels.annotators, prior=prior)
    assert max(float(jnp.max(rate)) for rate in rates) < 1e-8


@pytest.mark.parametrize("rate, spread", [(0.1, 2.0), (0.3, 6.0)])
def test_shrinkage_is_the_ratio_of_the_scales_of_both_fits(rate, spread):
    """Against scipy in float64, and against the root of its defining equation.

    The labels are as many as their probability says, so that only the prior lies
    between the two: it takes the rate for smaller.
    """
    points = norm.ppf((np.arange(64) + 0.5) / 64)
    m = np.repeat(spread * points, COUNT // 64)
    share = (np.arange(COUNT) % (COUNT // 64) + 0.5) / (COUNT // 64)
    p = rate + (1 - 2 * rate) * expit(m)
    z = np.where(share < p, 1, -1) * m
    coefficients, _ = log_odds(labels_of(z, np.zeros(COUNT), np.full(COUNT, -1)))
    found = float(candidates.shrinkage(coefficients))

    def cost(t, e):
        right = expit(np.exp(t) * z)
        return -np.log((1 - e) * right + e * (1 - right)).sum() + (t / 1.4) ** 2 / 2

    correct = minimize(lambda v: cost(v[0], 0.0), [0.0]).x[0]
    of_rate = lambda v: cost(v[0], expit(v[1])) + (v[1] - logit(0.1)) ** 2 / 2
    assert found == pytest.approx(
        np.exp(correct - minimize(of_rate, [0.0, -1.0]).x[0]), rel=1e-3
    )
    root = brentq(lambda c: np.mean(m * (p - expit(c * m))), 0, 1)
    assert root < 1 - 2 * rate
    assert found == pytest.approx(root, rel=0.1)


def test_a_coefficient_with_a_prior_of_zero_is_left_out():
    """The same rate as if the feature did not exist, and the same evidence."""
    labels = simulated("one_rate", preference=0.0)
    none = Features(labels.features.even, labels.features.odd[:, :0])
    results = []
    for x, odd in ((labels.features, (0.0,)), (none, ())):
        prior = Prior(odd=odd, annotators=0.0, preference=0.0, largest=1.0)
        seen = dataclasses.replace(labels, features=x)
        results.append(fitted(seen, prior, 2))
    (one, more), (other, less) = results
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    assert float(one) == pytest.approx(0.3, abs=0.05)
    assert float(more) == pytest.approx(float(less), abs=2e-3)
