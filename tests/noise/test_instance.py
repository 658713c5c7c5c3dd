"""Flip rates that depend on the pair: likelihood, estimate, and identification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit

from jaxpref import losses
from jaxpref.noise import instance, instance_fit, instance_labels
from jaxpref.noise.instance import Coefficients, Features, Prior

PRIOR = Prior(even=(0.7,), odd=(2.0, 1.5), annotators=0.8, rate=0.15, largest=0.6)


def likelihood(z, e, swapped):
    """P(label), from the definition."""
    return (1 - e) * expit(z) + swapped * expit(-z)


@pytest.mark.parametrize("e, swapped", [(0.3, 0.1), (0.0, 0.5), (0.9, 0.4), (0.2, 0.2)])
def test_the_likelihood_and_its_gradient(e, swapped):
    """By finite differences in float64, and finite where float32 is at its limits."""
    z = np.array([-30.0, -3.0, -0.1, 0.0, 0.1, 3.0, 30.0])
    each = lambda z: instance.label_nll(z, e, swapped)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            each(jnp.asarray(z)),
            -np.log(likelihood(z, e, swapped)),
            rtol=1e-12,
            atol=1e-15,  # of the logarithm of a number near 1
        )
        # The two labels of a pair exclude each other.
        other = instance.label_nll(-jnp.asarray(z), swapped, e)
        np.testing.assert_allclose(jnp.exp(-each(jnp.asarray(z))) + jnp.exp(-other), 1)
        slope = jax.vmap(jax.grad(each))(jnp.asarray(z))
    step = 1e-5
    log = lambda z: -np.log(likelihood(z, e, swapped))
    expected = (log(z + step) - log(z - step)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-7, atol=1e-9)
    right = (1 - e) * expit(z) / likelihood(z, e, swapped)
    found = instance.probability_right(jnp.asarray(z, jnp.float32), e, swapped)
    np.testing.assert_allclose(found, right, rtol=2e-6, atol=1e-12)
    extreme = jnp.array([-1e30, 1e30], jnp.float32)
    assert np.isfinite(jax.grad(lambda z: each(z).sum())(extreme)).all()


def test_a_constant_rate_is_forward_dpo():
    z, zero = jnp.linspace(-9, 9, 19), jnp.zeros(19)
    start = instance.initial(Prior(rate=0.2), 0)
    none = Features(jnp.zeros((19, 0)), jnp.zeros((19, 0)))
    rates = instance.flip_rates(start, none, jnp.full(19, -1), prior=Prior(rate=0.2))
    forward = functools.partial(losses.forward_dpo, beta=1.0, flip_rate=0.2)
    theirs = lambda z: forward(z, zero, zero, zero).sum()
    ours = lambda z: instance.label_nll(z, *rates).sum()
    for one, other in zip(jax.value_and_grad(ours)(z), jax.value_and_grad(theirs)(z)):
        np.testing.assert_allclose(one, other, rtol=2e-6)


def random_coefficients(rng, num_annotators, prior):
    of_rate = 1 + len(prior.even) + len(prior.odd)
    own = rng.normal(0, 0.3, (num_annotators + 1, of_rate))
    common = rng.normal(0, 0.3, 1 + len(prior.odd) + of_rate)
    # All pairs are alike if no annotator is known.
    own = own if num_annotators else 0 * own
    return Coefficients(jnp.float32(common), jnp.float32(own))


def numpy_rates(common, own, even, odd, annotators, prior):
    weights = common[-own.shape[1] :] + own[annotators]
    one = np.ones((len(even), 1))
    rate = lambda odd: (
        prior.largest * expit(np.sum(weights * np.hstack([one, even, odd]), 1))
    )
    return rate(odd), rate(-odd)


def numpy_probability(theta, shape, z, even, odd, annotators, prior):
    """P(label) by all coefficients: t, g, w_0 and the d_k one after the other."""
    common, own = theta[: shape[0]], theta[shape[0] :].reshape(shape[1:])
    rates = numpy_rates(common, own, even, odd, annotators, prior)
    margin = np.exp(common[0]) * z + odd @ common[1 : 1 + odd.shape[1]]
    return likelihood(margin, *rates)


def numpy_prior(prior, num_rows):
    """Means and standard deviations of all coefficients."""
    of_rate = 1 + len(prior.even) + len(prior.odd)
    spread = [1.4, *[prior.preference] * len(prior.odd)]
    spread += [prior.spread, *prior.even, *prior.odd]
    mean = np.zeros(len(spread) + num_rows * of_rate)
    mean[1 + len(prior.odd)] = logit(prior.rate / prior.largest)
    return mean, np.array(spread + [prior.annotators] * (num_rows * of_rate))


def simulated(rng, count, num_annotators, prior):
    """Margins, features and annotators, at random; some without an annotator."""
    return (
        rng.normal(0, 2, count),
        rng.normal(size=(count, len(prior.even))),
        np.tanh(rng.normal(size=(count, len(prior.odd)))),
        rng.integers(-1, num_annotators, count),
    )


def as_labels(z, even, odd, annotators, where=None):
    where = np.ones(len(z), bool) if where is None else where
    features = Features(jnp.asarray(even, jnp.float32), jnp.asarray(odd, jnp.float32))
    return instance_labels.flat(
        jnp.asarray(z, jnp.float32), features, jnp.asarray(annotators), where
    )


def test_rates_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    coefficients = random_coefficients(rng, 3, PRIOR)
    _, even, odd, annotators = simulated(rng, 12, 3, PRIOR)
    arrays = np.asarray(coefficients.common), np.asarray(coefficients.own)
    expected = numpy_rates(*arrays, even, odd, annotators, PRIOR)
    shaped = lambda x: jnp.asarray(x.reshape(3, 4, *x.shape[1:]))
    features = Features(shaped(np.float32(even)), shaped(np.float32(odd)))
    of = functools.partial(instance.flip_rates, coefficients, prior=PRIOR)
    found = of(features, shaped(annotators))
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, shaped(theirs), rtol=1e-5)
    swapped = of(features.swapped(), shaped(annotators))
    np.testing.assert_array_equal(swapped, found[::-1])


@pytest.mark.parametrize("num_annotators", [0, 3])
def test_a_step_is_fisher_scoring_in_all_coefficients_at_once(num_annotators):
    """A dense system in float64, with slopes from finite differences."""
    rng = np.random.default_rng(1)
    start = random_coefficients(rng, num_annotators, PRIOR)
    z, even, odd, annotators = simulated(rng, 40, num_annotators, PRIOR)
    (rows, of_rate), size = start.own.shape, len(start.common)
    theta = np.concatenate([start.common, np.ravel(start.own)]).astype(float)
    of = functools.partial(
        numpy_probability,
        shape=(size, rows, of_rate),
        prior=PRIOR,
        **dict(z=z.copy(), even=even, odd=odd, annotators=annotators),
    )
    real, step = np.arange(40) != 7, 1e-6
    slopes = [of(theta + d) - of(theta - d) for d in step * np.eye(len(theta))]
    slopes = np.stack(slopes)[:, real] / (2 * step)
    p = of(theta)[real]
    mean, spread = numpy_prior(PRIOR, rows)
    if num_annotators == 0:
        spread[size:] = 1e-9
    information = (slopes / (p * (1 - p))) @ slopes.T + np.diag(spread**-2.0)
    score = slopes @ (1 / p) - (theta - mean) / spread**2
    moved = np.linalg.solve(information, score)
    free = spread > 1e-6
    moved /= max(1, np.abs(moved / spread)[free].max())
    tried = [theta + size * moved for size in (2.0, 1.0, 0.3, 0.1, 0.02, 0.0)]
    penalty = lambda x: np.sum(((x - mean) / spread) ** 2) / 2
    expected = min(tried, key=lambda x: penalty(x) - np.log(of(x)[real]).sum())
    z[7] = np.nan  # not a label
    labels = as_labels(z, even, odd, annotators, real)
    found = instance_fit.update(start, labels, prior=PRIOR, steps=1)
    assert np.abs(moved).max() > 0.01
    np.testing.assert_allclose(found.common, expected[:size], atol=2e-4)
    np.testing.assert_allclose(np.ravel(found.own), expected[size:], atol=2e-4)


def drawn_from_the_prior(seed, count=500):
    """Labels of two annotators with random rates, scale, and preference."""
    rng = np.random.default_rng(seed)
    z, even, odd, _ = simulated(rng, count, 2, PRIOR)
    who = rng.integers(0, 2, count)
    mean, spread = numpy_prior(PRIOR, 3)
    theta = mean + spread * rng.normal(size=len(mean))
    common, own = theta[:7], theta[7:].reshape(3, 4)
    margin = np.exp(0.5 * common[0]) * z + odd @ common[1:3]
    better = np.where(rng.random(count) < expit(margin), 1, -1)
    e, _ = numpy_rates(common, own, even, odd * better[:, None], who, PRIOR)
    label = np.where(rng.random(count) < e, -better, better)
    return z * label, even, odd * label[:, None], who


@pytest.mark.parametrize(
    "seeds", [range(3), pytest.param(range(3, 20), marks=pytest.mark.slow)]
)
def test_the_fit_is_the_best_of_many_searches(seeds):
    """L-BFGS in float64 from ten random starts finds nothing better.

    The tolerance, 1e-3 nats, is the rounding of coefficients in float32.
    """
    mean, spread = numpy_prior(PRIOR, 3)

    def cost(theta, z, even, odd, who):
        common, own = theta[:7], theta[7:].reshape(3, 4)
        weights = common[3:] + own[who]
        same = weights[:, 0] + weights[:, 1] * even[:, 0]
        other = jnp.sum(weights[:, 2:] * odd, axis=1)
        e, swapped = (
            PRIOR.largest / (1 + jnp.exp(-x)) for x in (same + other, same - other)
        )
        s = 1 / (1 + jnp.exp(-jnp.exp(common[0]) * z - odd @ common[1:3]))
        away = jnp.sum(((theta - mean) / spread) ** 2) / 2
        return away - jnp.log((1 - e) * s + swapped * (1 - s)).sum()

    of = jax.jit(jax.value_and_grad(cost))
    fit = functools.partial(instance_fit.fit, prior=PRIOR, num_annotators=2)
    run = jax.jit(fit)

    def search(theta, *data):
        return tuple(np.asarray(x, float) for x in of(theta, *data))

    for seed in seeds:
        data = drawn_from_the_prior(seed)
        ours = run(as_labels(*data))
        theta = np.concatenate([ours.common, np.ravel(ours.own)]).astype(float)
        rng = np.random.default_rng(1000 + seed)
        with jax.enable_x64(True):
            found = [
                minimize(search, start, data, jac=True, method="L-BFGS-B").fun
                for start in mean + spread * rng.normal(size=(10, len(mean)))
            ]
            assert search(theta, *data)[0] < min(found) + 1e-3


def test_the_newest_labels_are_remembered():
    prior = Prior(even=(1.0,))
    labels, seen = instance_labels.no_labels(prior, 10), []
    rng = np.random.default_rng(0)
    for _ in range(5):
        z, even, odd, annotators = simulated(rng, 4, 2, prior)
        real = rng.random(4) < 0.7
        new = as_labels(z, even, odd, annotators, real)
        labels = instance_labels.remember(labels, new)
        seen = [*zip(z[real], even[real, 0], annotators[real]), *seen][:10]
        kept = np.asarray(labels.where)
        assert kept.tolist() == [True] * len(seen) + [False] * (10 - len(seen))
        columns = labels.margins, labels.features.even[:, 0], labels.annotators
        found = np.stack([np.asarray(column)[kept] for column in columns], 1)
        np.testing.assert_allclose(found, seen, rtol=1e-6)


DIM = 8
LENGTH = Prior(odd=(4.0,), largest=0.5, rate=0.1)


def planted(seed, count, weights, *, length_preference, largest=0.5):
    """A log-linear policy's pairs, whose labels have planted flip rates.

    Returns:
      Differences of policy features and the odd feature, of the labeled order.
    """
    rng = np.random.default_rng(seed)
    difference = rng.normal(size=(count, DIM))
    odd = np.tanh(2 * difference[:, :1])  # the policy can learn the length as well
    truth = np.full(DIM, 0.5)
    truth[0] = length_preference
    better = np.where(rng.random(count) < expit(difference @ truth), 1, -1)
    e = largest * expit(weights[0] + weights[1] * odd[:, 0] * better)
    label = np.where(rng.random(count) < e, -better, better)[:, None]
    return difference * label, odd * label


def joint_optimum(difference, odd, prior):
    """The most likely policy and coefficients together, by BFGS in float64.

    The policy begins at its optimum for a constant rate.
    """
    mean, spread = numpy_prior(prior, 0)
    mean, spread = mean[-2:], spread[-2:]
    none, everyone = np.zeros((len(odd), 0)), np.full(len(odd), -1)

    def nll(policy, weights):
        common = np.concatenate([[0], weights])
        rates = numpy_rates(common, np.zeros((1, 2)), none, odd, everyone, prior)
        p = likelihood(difference @ policy, *rates)
        return -np.log(p).sum() + np.sum(((weights - mean) / spread) ** 2) / 2

    search = functools.partial(minimize, method="BFGS", options={"gtol": 0.5})
    policy = search(lambda x: nll(x, mean), np.zeros(DIM)).x
    both = lambda x: nll(x[:DIM], x[DIM:])
    return search(both, np.concatenate([policy, mean])).x


@functools.partial(jax.jit, static_argnames=("prior", "num_annotators"))
def fitted(labels, prior, num_annotators=0):
    start = instance.initial(prior, num_annotators)
    found = instance_fit.update(start, labels, prior=prior, steps=30)
    return found, instance_fit.describe(found, labels, prior=prior)


def of_length(z, odd, who=None):
    who = np.full(len(z), -1) if who is None else who
    return as_labels(z, np.zeros((len(z), 0)), odd, who)


@pytest.mark.parametrize("length_preference", [0.0, 0.8])
def test_planted_coefficients_are_found(length_preference):
    """Half of the labels name the longer answer, whether it is truly better or not.

    A joint optimum of policy and coefficients in float64 recovers the planted ones:
    over data seeds 0 to 19, its standard deviations are 0.03 (policy), 0.16 (constant)
    and 0.42 (length).  `fit`, given that policy's margins, does as well.
    """
    weights = np.array([0.0, -6.0])
    difference, odd = planted(3, 20_000, weights, length_preference=length_preference)
    optimum = joint_optimum(difference, odd, LENGTH)
    truth = np.array([length_preference, *[0.5] * (DIM - 1), *weights])
    error = np.array([*[0.03] * DIM, 0.16, 0.42])
    np.testing.assert_array_less(np.abs(optimum - truth), 4 * error)
    found, estimate = fitted(of_length(difference @ optimum[:DIM], odd), LENGTH)
    np.testing.assert_array_less(np.abs(found.common[-2:] - weights), 4 * error[-2:])
    e, swapped = numpy_rates(
        np.array([0, *weights]), np.zeros((1, 2)), odd[:, :0], odd, -1, LENGTH
    )
    better = expit(difference @ truth[:DIM])
    flips = better * e + (1 - better) * swapped
    assert estimate.lower < flips.mean() < estimate.upper and bool(estimate.identified)
    assert float(estimate.spread) == pytest.approx(flips.std(), rel=0.1)
    assert (np.asarray(estimate.information) > 0.9).all()


def test_clean_labels_of_those_who_prefer_length_are_no_bias():
    difference, odd = planted(5, 20_000, [-9, 0], length_preference=1.0)
    z = difference @ np.array([1.0, *[0.5] * (DIM - 1)])
    found, estimate = fitted(of_length(z, odd), LENGTH)
    assert float(estimate.upper) < 0.05  # the prior's rate is 0.1
    ends = np.array([[-0.9], [0.9]])
    arrays = np.asarray(found.common), np.zeros((1, 2))
    rates, _ = numpy_rates(*arrays, ends[:, :0], ends, -1, LENGTH)
    assert rates.max() < 0.06


def test_what_the_labels_do_not_tell_stays_at_the_prior():
    """Margins of 0 say nothing of a rate that is the same in both orders."""
    odd = np.where(np.random.default_rng(0).random((20_000, 1)) < 0.5, 1.0, -1.0)
    found, estimate = fitted(of_length(np.zeros(20_000), odd), LENGTH)
    scale, preference, constant, position = np.asarray(found.common)
    assert scale == 0 and abs(preference) < 0.05
    assert abs(constant - logit(0.2)) < 0.01 and abs(position) < 0.3
    assert float(estimate.rate) == pytest.approx(0.1, abs=0.01)
    assert float(estimate.information[0]) < 0.01 and not bool(estimate.identified)


def test_annotators_differ():
    """A careful one, and one who goes by length."""
    prior = Prior(odd=(2.0,), annotators=2.0)
    careful = planted(1, 6000, [-9, 0], length_preference=0.0)
    biased = planted(2, 6000, [0, -9], length_preference=0.0)
    difference, odd = (np.concatenate(x) for x in zip(careful, biased))
    z = difference @ np.array([0.0, *[0.5] * (DIM - 1)])
    found, _ = fitted(of_length(z, odd, np.repeat([0, 1], 6000)), prior, 2)
    ends = np.array([[-0.9], [0.9]])
    arrays = np.asarray(found.common), np.asarray(found.own)
    for who, expected in ((0, [0, 0]), (1, [0.5, 0])):
        rates, _ = numpy_rates(*arrays, ends[:, :0], ends, who, prior)
        np.testing.assert_allclose(rates, expected, atol=0.05)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"largest": 0.0}, "largest in"),
        ({"rate": 0.5}, "rate between 0 and 0.5, got 0.5"),
        ({"spread": 0.0}, "standard deviations > 0"),
        ({"odd": (1.0, -1.0)}, "standard deviations > 0"),
        ({"annotators": -1.0}, "annotators >= 0"),
        ({"preference": -1.0}, "preference >= 0"),
    ],
)
def test_priors_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        instance.check(Prior(**change))
