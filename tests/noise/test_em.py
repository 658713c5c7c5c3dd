"""EM for label noise, against numpy, scipy, and its mathematical properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import beta

from jaxpref import losses
from jaxpref.noise import em
from tests.noise.simulations import (
    covered,
    em_coverage,
    fit,
    log_likelihood,
    votes,
)

FOUR = (0.95, 0.8, 0.6, 0.3)
LEAVES = ("reliability", "lower", "upper", "posterior", "evidence", "log_likelihood")


def all_finite(found: em.Fit) -> bool:
    return all(np.isfinite(getattr(found, name)).all() for name in LEAVES)


# The E-step and the two forms of the M-step


def test_votes_on_a_pair_share_one_truth():
    """Bayes' rule over both truths; the votes are independent given the truth."""
    rng = np.random.default_rng(0)
    z, eta = rng.normal(0, 3, 50), rng.uniform(0.05, 0.95, (50, 4))
    votes = rng.choice([-1, 0, 1], (50, 4))
    joint = np.stack([expit(z), expit(-z)], 1)
    for truth, sign in enumerate((1, -1)):
        agree = np.where(votes == sign, eta, np.where(votes == -sign, 1 - eta, 1))
        joint[:, truth] *= agree.prod(1)
    first = (joint[:, 0] / joint.sum(1))[:, None]
    expected = np.where(votes == 1, first, np.where(votes == -1, 1 - first, 0.5))
    found = em.votes_posterior(jnp.asarray(z, jnp.float32), eta, votes)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Certain annotators who contradict each other cancel.
    sure = em.votes_posterior(jnp.array([2.0]), 1.0, jnp.array([[1, -1, 0]]))
    np.testing.assert_allclose(sure[0], [expit(2), expit(-2), 0.5], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_posterior_is_bayes_rule(dtype):
    z, eta = np.linspace(-20, 20, 81), np.array([[0.1], [0.5], [0.75], [0.99]])
    p = expit(z)
    expected = p * eta / (p * eta + (1 - p) * (1 - eta))
    with jax.enable_x64(dtype == jnp.float64):
        ours = em.posterior(jnp.asarray(z, dtype), jnp.asarray(eta, dtype))
        assert ours.dtype == dtype
        rtol = 1e-12 if dtype == jnp.float64 else 2e-5
        np.testing.assert_allclose(ours, expected, rtol=rtol)


def test_posterior_at_special_values():
    """P5: z = 0 gives eta, eta = 1/2 gives p, and certainty remains certainty."""
    eta = jnp.array([0.2, 0.5, 0.9])
    np.testing.assert_allclose(em.posterior(jnp.zeros(3), eta), eta, rtol=1e-6)
    z = jnp.linspace(-9, 9, 7)
    np.testing.assert_allclose(em.posterior(z, 0.5), expit(z), rtol=1e-5)
    np.testing.assert_array_equal(em.posterior(z, 1.0), 1.0)
    np.testing.assert_array_equal(em.posterior(z, 0.0), 0.0)
    edge = jnp.array([-jnp.inf, jnp.inf, -1e30, 1e30])
    np.testing.assert_array_equal(em.posterior(edge, 0.9), [0, 1, 0, 1])
    np.testing.assert_array_equal(em.posterior(edge[:2], 1.0), [0.5, 1])


@pytest.mark.parametrize("eta", [0.3, 0.75, 0.99])
def test_both_m_steps_agree_for_dpo(eta):
    """Both have the gradient p - w in the margin, and so has forward_dpo (P4)."""
    with jax.enable_x64(True):
        h, zero = jnp.linspace(-30, 30, 41), jnp.zeros(41)
        w, rate = em.posterior(h, eta), jnp.full(41, 1 - eta)
        dpo = functools.partial(losses.dpo, beta=1.0)
        z = losses.gibbs_logits(dpo)

        def likelihood(h):
            return em.likelihood_loss(z(h, zero, zero, zero), w).sum()

        def weighted(h):
            pair, exchanged = dpo(h, zero, zero, zero), dpo(zero, h, zero, zero)
            return em.weighted_loss(pair, exchanged, w).sum()

        def forward(h):
            return losses.forward_dpo(
                h, zero, zero, zero, beta=1.0, flip_rate=rate
            ).sum()

        np.testing.assert_allclose(likelihood(h), weighted(h), rtol=1e-12)
        for loss in (likelihood, weighted, forward):
            np.testing.assert_allclose(jax.grad(loss)(h), expit(h) - w, atol=1e-13)


def test_m_steps_differ_beyond_dpo():
    """IPO becomes logistic under the likelihood and stays squared if weighted."""
    with jax.enable_x64(True):
        d, zero, w = jnp.array([0.4, -2.0]), jnp.zeros(2), jnp.array([0.9, 0.3])
        ipo = functools.partial(losses.ipo, beta=0.5)
        z = losses.gibbs_logits(ipo)
        derivatives = jax.grad(
            lambda d: em.likelihood_loss(z(d, zero, zero, zero), w).sum()
        )(d)
        np.testing.assert_allclose(derivatives, (expit(4 * d) - w) * 4, rtol=1e-12)
        pair, exchanged = ipo(d, zero, zero, zero), ipo(zero, d, zero, zero)
        expected = w * (d - 1) ** 2 + (1 - w) * (d + 1) ** 2
        ours = em.weighted_loss(pair, exchanged, w)
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_weights_have_no_gradient():
    def total(z):
        w = em.posterior(z, 0.8)
        return em.likelihood_loss(z, w).sum() + em.weighted_loss(z, -z, w).sum()

    z = jnp.array([0.5, -1.0])
    w = em.posterior(z, 0.8)
    np.testing.assert_allclose(
        jax.grad(total)(z), jax.nn.sigmoid(z) - w + 2 * w - 1, rtol=1e-5
    )


def test_losses_at_special_reliabilities():
    """P5: eta 1 is the base loss, eta 1/2 has no gradient, z = 0 is like cdpo."""
    z = jnp.linspace(-40, 40, 9)
    at = lambda eta: lambda z: em.likelihood_loss(z, em.posterior(z, eta))
    np.testing.assert_array_equal(at(1.0)(z), -jax.nn.log_sigmoid(z))
    derivative = lambda eta, z: jax.grad(lambda z: at(eta)(z).sum())(z)
    with jax.enable_x64(True):
        # w and p differ by the rounding of z + 0, whose derivative is at most 1/4.
        rounding = 40 / 4 * np.finfo(np.float64).eps
        z = jnp.linspace(-40, 40, 9)
        np.testing.assert_allclose(derivative(0.5, z), 0, atol=rounding)
    zero = jnp.zeros(1)
    smoothed = jax.grad(
        lambda h: losses.cdpo(h, zero, zero, zero, beta=1.0, flip_rate=0.2).sum()
    )(zero)
    np.testing.assert_allclose(derivative(0.8, zero), smoothed, rtol=1e-6)
    extreme = jnp.array([-1e4, 1e4, -1e30, 1e30])
    for w in (0.0, 0.5, 1.0):
        assert np.isfinite(em.likelihood_loss(extreme, jnp.full(4, w))).all()


# Recovery


@pytest.mark.parametrize(
    "reliability",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in (0.2, 0.4, 0.9)), 0.6, 0.8],
)
@pytest.mark.parametrize("prior", [em.PRIOR, (0.0, 0.0), None])
def test_recovers_one_reliability(reliability, prior):
    """P5: within 0.01 with 200,000 calibrated votes, and a short interval."""
    data = votes(0, reliability=reliability, items=200_000)
    found = em.fit(
        jnp.asarray(data.margins, jnp.float32),
        jnp.full(200_000, -1),
        num_annotators=1,
        prior=prior,
    )
    assert found.converged and found.iterations < 100
    np.testing.assert_allclose(found.reliability, reliability, atol=0.01)
    assert 0.004 < found.upper[0] - found.lower[0] < 0.008
    np.testing.assert_allclose(np.mean(found.posterior), np.mean(data.right), atol=0.01)


@pytest.mark.parametrize("votes_per_item", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_recovers_four_annotators(votes_per_item):
    """Within 0.02 each; intervals contain the truth within 3/2 of their length."""
    items = 200_000 // votes_per_item
    data = votes(1, reliability=FOUR, items=items, votes_per_item=votes_per_item)
    found = fit(data, num_annotators=4)
    np.testing.assert_allclose(found.reliability, FOUR, atol=0.02)
    slack = (found.upper - found.lower) / 4
    assert covered((found.lower - slack, found.upper + slack), np.array(FOUR)) == 1
    np.testing.assert_array_equal(found.counts, np.bincount(data.annotators))


def test_recovers_annotators_from_each_other():
    """Without a model: margins of 0, five votes per item."""
    data = votes(2, reliability=FOUR, items=20_000, votes_per_item=5)
    found = fit(data, num_annotators=4, margins=np.zeros(100_000))
    np.testing.assert_allclose(found.reliability, FOUR, atol=0.02)
    majority = np.sign(np.bincount(data.items, data.orientation))[data.items]
    agrees = majority * data.orientation > 0
    ours = np.asarray(found.posterior) > 0.5
    assert np.mean(ours == data.right) > np.mean(agrees == data.right) + 0.02


@pytest.mark.slow
def test_wrong_scale_of_the_margins_biases():
    """Why calibration is needed: estimates from 1.000 to 0.717."""
    data = votes(3, reliability=0.8, items=200_000)
    for scale, biased in ((0.25, 1.0), (0.5, 0.906), (2, 0.747), (4, 0.717)):
        found = fit(data, num_annotators=1, margins=scale * data.margins)
        np.testing.assert_allclose(found.reliability, biased, atol=0.006)


# The mathematics of EM


def test_fit_maximizes_the_posterior():
    """Against scipy's optimum of a numpy likelihood with a prior."""
    data = votes(4, reliability=FOUR, items=80, votes_per_item=3, spread=1.0)
    a, b = 2.0, 0.5

    def negative(logits):
        eta = expit(logits)
        prior = a * np.log(eta) + b * np.log1p(-eta)
        return -log_likelihood(data, eta) - prior.sum()

    best = minimize(negative, np.full(4, 1.5), method="BFGS", options={"gtol": 1e-7})
    with jax.enable_x64(True):
        found = fit(data, dtype=np.float64, num_annotators=4, prior=(a, b))
        assert found.reliability.dtype == jnp.float64 and found.converged
        np.testing.assert_allclose(found.reliability, expit(best.x), atol=2e-5)
        expected = log_likelihood(data, found.reliability)
        np.testing.assert_allclose(found.log_likelihood, expected, rtol=1e-10)
        of_own = logit(found.posterior) - logit(found.reliability)[data.annotators]
        np.testing.assert_allclose(of_own, found.evidence, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("prior", [(0.0, 0.0), (9.0, 1.0)])
@pytest.mark.parametrize("votes_per_item", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_steps_never_decrease_the_objective(prior, votes_per_item):
    """P5: the log-likelihood plus the log-prior never decreases."""
    data = votes(5, reliability=FOUR, items=300, votes_per_item=votes_per_item)
    a, b = prior
    heights = []
    with jax.enable_x64(True):
        for steps in range(1, 12):
            found = fit(
                data,
                dtype=np.float64,
                num_annotators=4,
                prior=prior,
                max_iterations=steps,
            )
            eta = np.asarray(found.reliability)
            log_prior = a * np.log(eta) + b * np.log1p(-eta)
            heights.append(float(found.log_likelihood + log_prior.sum()))
    assert (np.diff(heights) >= -1e-10).all() and heights[-1] > heights[0] + 0.01


@pytest.mark.parametrize("reliability", [0.3, 0.7, 0.95])
def test_em_is_a_contraction(reliability):
    """P5: l'(eta) = N (T(eta) - eta) / (eta (1 - eta)), and T' in (0, 1) at T's fixed
    point, to which EM converges from both sides."""
    data = votes(6, reliability=reliability, items=5000)
    with jax.enable_x64(True):
        z = jnp.asarray(data.margins)
        mapped = lambda eta: em.posterior(z, eta).mean()
        p = expit(data.margins)
        for eta in (0.2, 0.6, 0.9):
            derivative = np.sum((2 * p - 1) / (p * eta + (1 - p) * (1 - eta)))
            expected = 5000 * (mapped(eta) - eta) / (eta * (1 - eta))
            np.testing.assert_allclose(derivative, expected, rtol=1e-9)
        zeros = jnp.zeros(5000, int)
        ends = [
            em.fit(
                z,
                zeros,
                num_annotators=1,
                prior=(0.0, 0.0),
                start=start,
                tolerance=1e-9,
            )
            for start in (0.02, 0.98)
        ]
        low, high = (end.reliability[0] for end in ends)
        np.testing.assert_allclose(low, high, atol=1e-7)
        assert 0 < jax.grad(mapped)(low) < 1


def test_order_and_names_of_items_do_not_matter():
    data = votes(7, reliability=FOUR, items=200, votes_per_item=3)
    found = fit(data, num_annotators=4)
    order = np.random.default_rng(0).permutation(600)
    shuffled = em.fit(
        jnp.asarray(data.margins[order], jnp.float32),
        jnp.asarray(data.annotators[order]),
        items=jnp.asarray(-7 * data.items[order] + 1000),
        num_annotators=4,
    )
    # Without `orientation`, the signs of the margins are equivalent.
    np.testing.assert_allclose(shuffled.reliability, found.reliability, atol=1e-5)
    np.testing.assert_allclose(shuffled.posterior, found.posterior[order], atol=1e-4)


def test_convergence_waits_for_slow_annotators():
    """One converges at once; the other, with small margins, takes many steps."""
    fast, slow = (votes(15, reliability=0.6, items=n, spread=s) for n, s in SPEEDS)
    margins = jnp.asarray([*fast.margins, *slow.margins], jnp.float32)
    who = jnp.asarray([0] * SPEEDS[0][0] + [1] * SPEEDS[1][0])
    both = em.fit(margins, who, num_annotators=2)
    alone = em.fit(margins[who == 1], jnp.full(SPEEDS[1][0], -1), num_annotators=1)
    exact = em.fit(margins, who, num_annotators=2, tolerance=0.0, max_iterations=5000)
    np.testing.assert_allclose(both.reliability[1], alone.reliability[0], atol=1e-4)
    np.testing.assert_allclose(both.reliability, exact.reliability, atol=1e-4)
    assert both.converged and both.iterations > 50


SPEEDS = (500, 8.0), (4000, 0.4)


# Intervals


@pytest.mark.parametrize("prior", [(0.0, 0.0), (3.0, 1.0)])
def test_interval_is_the_posterior_of_one_annotator(prior):
    """Exact if items have one vote, against quadrature by scipy."""
    data = votes(8, reliability=0.7, items=30)
    a, b = prior
    found = fit(data, num_annotators=1, prior=prior, level=0.9)
    assert 0.5 < found.reliability[0] < 0.9
    p = expit(data.margins)

    def density(eta):
        return np.prod(eta * p + (1 - eta) * (1 - p)) * eta**a * (1 - eta) ** b

    whole = quad(density, 0, 1)[0]
    for end, tail in ((found.lower[0], 0.05), (found.upper[0], 0.95)):
        np.testing.assert_allclose(quad(density, 0, end)[0] / whole, tail, atol=2e-3)


def test_interval_of_annotators_without_votes_is_the_prior():
    for prior, shape in (((0, 0), (1, 1)), ((9.0, 1.0), (10, 2))):
        data = votes(9, reliability=0.8, items=50)
        found = fit(data, num_annotators=2, prior=prior)
        ends = beta.ppf([0.025, 0.975], *shape)
        ours = np.array([found.lower[1], found.upper[1]])
        np.testing.assert_allclose(ours, ends, atol=2e-3)
        np.testing.assert_allclose(found.reliability[1], 0.9, rtol=1e-6)


@pytest.mark.parametrize("votes_per_item", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_intervals_have_the_stated_coverage(votes_per_item):
    """At each reliability of a mixed crowd, under the pooled prior."""
    shares = em_coverage(
        1,
        reliability=(0.6, 0.8, 0.95),
        count=20,
        votes_per_item=votes_per_item,
        annotators=500,
    )
    assert 0.92 <= min(shares) and max(shares) <= 0.98


def test_the_interval_averages_over_the_other_annotators():
    """Exact where items connect annotators in a tree, against a sum over the grid."""
    rng = np.random.default_rng(2)
    a, b = 3.0, 1.0
    # Annotators 0-1-2 share an item each way, and judge 12 others alone.
    who = np.r_[np.repeat([0, 1, 2], 12), 0, 1, 1, 2]
    items = np.r_[np.arange(36), 36, 36, 37, 37]
    margins = np.r_[rng.normal(1, 2, 36), 0.3, 0.3, -0.5, 0.5]
    orientation = np.where(margins < 0, -1, 1)
    found = em.fit(
        jnp.asarray(margins, jnp.float32),
        jnp.asarray(who),
        items=jnp.asarray(items),
        orientation=jnp.asarray(orientation),
        num_annotators=3,
        prior=(a, b),
    )
    grid = (np.arange(200) + 0.5) / 200
    p = expit(margins[:36, None])
    own = [
        np.prod((p * grid + (1 - p) * (1 - grid))[who[:36] == k], axis=0)
        * grid**a
        * (1 - grid) ** b
        for k in range(3)
    ]
    one, two = np.meshgrid(grid, grid, indexing="ij")
    # Item 36: both agree, with margin 0.3.  Item 37: they disagree, -0.5 for the first.
    p, q = expit(0.3), expit(-0.5)
    agree = p * one * two + (1 - p) * (1 - one) * (1 - two)
    disagree = q * one * (1 - two) + (1 - q) * (1 - one) * two
    of_two = disagree @ own[2]
    of_zero = own[0] @ agree
    marginals = (
        own[0] * (agree @ (own[1] * of_two)),
        own[1] * of_zero * of_two,
        own[2] * ((own[1] * of_zero) @ disagree),
    )
    for k, density in enumerate(marginals):
        mass = np.cumsum(density) / density.sum()
        ends = np.interp([0.025, 0.975], mass, grid + 0.5 / 200)
        np.testing.assert_allclose([found.lower[k], found.upper[k]], ends, atol=3e-3)


# Batches


def test_update_is_the_moving_average():
    eta = jnp.array([0.9, 0.8, 0.7, 0.6])
    w = jnp.array([[1.0, 0.5], [0.25, jnp.nan]])
    who = jnp.array([[0, 2], [0, 2]])
    where = jnp.array([[True, True], [True, False]])
    new = em.update(eta, w, who, momentum=0.9, where=where)
    expected = [0.9 * 0.9 + 0.1 * 0.625, 0.8, 0.9 * 0.7 + 0.1 * 0.5, 0.6]
    np.testing.assert_allclose(new, expected, rtol=1e-6)
    np.testing.assert_array_equal(new[jnp.array([1, 3])], eta[jnp.array([1, 3])])
    drawn = em.update(eta, w, who, momentum=0.9, where=where, prior=(3.0, 1.0))
    np.testing.assert_allclose(drawn[0], 0.81 + 0.1 * (3 + 1.25) / 6, rtol=1e-6)
    nobody = em.update(eta, w, who, where=jnp.zeros((2, 2), bool))
    np.testing.assert_array_equal(nobody, eta)
    unknown = em.update(eta, jnp.ones(2), jnp.array([-1, -1]), momentum=0.5)
    np.testing.assert_allclose(unknown, [0.9, 0.8, 0.7, 0.8], rtol=1e-6)


def test_tally_of_all_batches_is_one_m_step():
    """Without decay, soft counts and `estimate` are one M-step of `fit`."""
    data = votes(10, reliability=FOUR, items=4000)
    found = fit(data, num_annotators=5, prior=em.PRIOR)
    right = wrong = jnp.zeros(5)
    for part in np.split(np.arange(4000), 8):
        w, who = found.posterior[part], jnp.asarray(data.annotators[part])
        right, wrong = em.tally(right, wrong, w, who)
    np.testing.assert_allclose(right + wrong, found.counts, rtol=1e-5)
    estimated = em.estimate(right, wrong, prior=em.PRIOR)
    np.testing.assert_allclose(estimated, found.reliability, atol=1e-4)
    assert right[4] == wrong[4] == 0
    # Two votes of annotator 1 decay its counts twice, however they are batched.
    fade = functools.partial(em.tally, memory=4.0)
    one = fade(jnp.ones(2), jnp.ones(2), jnp.ones(2), jnp.array([1, 1]))
    np.testing.assert_allclose(one[0], [1, np.exp(-0.5) + 2], rtol=1e-6)
    np.testing.assert_allclose(one[1], [1, np.exp(-0.5)], rtol=1e-6)


def test_online_em_is_more_stable_than_the_moving_average():
    """Sixteen votes per batch from four annotators: counts are within 0.03."""
    data = votes(11, reliability=FOUR, items=16 * 2000)
    z = jnp.asarray(data.margins, jnp.float32).reshape(2000, 16)
    who = jnp.asarray(data.annotators).reshape(2000, 16)

    def batch(carry, votes):
        moving, right, wrong = carry
        z, who = votes
        moving = em.update(moving, em.posterior(z, moving[who]), who)
        w = em.posterior(z, em.estimate(right, wrong)[who])
        right, wrong = em.tally(right, wrong, w, who, memory=2000.0)
        return (moving, right, wrong), None

    start = jnp.full(4, 0.9), jnp.zeros(4), jnp.zeros(4)
    (moving, right, wrong), _ = jax.lax.scan(batch, start, (z, who))
    np.testing.assert_allclose(em.estimate(right, wrong), FOUR, atol=0.03)
    np.testing.assert_allclose(moving, FOUR, atol=0.2)


def test_sharded_over_eight_devices():
    """Explicit axes, jitted: the sums are those of the global batch."""
    data = votes(12, reliability=FOUR, items=128, votes_per_item=2)
    arrays = {
        "margins": jnp.asarray(data.margins, jnp.float32),
        "annotators": jnp.asarray(data.annotators),
        "items": jnp.asarray(data.items),
        "orientation": jnp.asarray(data.orientation),
        "where": jnp.arange(256) % 7 != 0,
    }

    def everything(margins, annotators, items, orientation, where):
        eta = jnp.linspace(0.5, 0.9, 4)
        w = em.posterior(margins, 0.8)
        found = em.fit(
            margins,
            annotators,
            items=items,
            orientation=orientation,
            where=where,
            num_annotators=4,
        )
        moved = em.update(em.update(eta, w, annotators), w, annotators, where=where)
        tallied = em.tally(eta, eta, w, annotators, where=where)
        return w, em.likelihood_loss(margins, w), moved, tallied, found

    eager = everything(**arrays)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Explicit,) * 2)
    sharding = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        placed = {k: jax.device_put(v, sharding) for k, v in arrays.items()}
        sharded = jax.jit(everything)(**placed)
        assert jax.typeof(sharded[0]).sharding.spec == PartitionSpec(("data", "fsdp"))
        assert jax.typeof(sharded[2]).sharding.spec in (
            PartitionSpec(),
            PartitionSpec(None),
        )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, sharded, eager)


# Invalid input and degenerate data


def test_unknown_annotators_are_the_last_one():
    data = votes(13, reliability=(0.9, 0.6), items=3000)
    who = np.where(data.annotators == 1, -1, 0)
    margins = jnp.asarray(data.margins, jnp.float32)
    mixed = em.fit(margins, jnp.asarray(who), num_annotators=2)
    named = em.fit(margins, jnp.asarray(data.annotators), num_annotators=2)
    jax.tree.map(np.testing.assert_array_equal, mixed, named)
    with pytest.raises(ValueError, match="pass num_annotators=2"):
        em.fit(margins, jnp.asarray(who), num_annotators=1)
    with pytest.raises(ValueError, match="from -1 to 0, got 0 to 1"):
        em.fit(margins, jnp.asarray(data.annotators), num_annotators=1)


def test_padding_is_ignored():
    data = votes(14, reliability=FOUR, items=50, votes_per_item=2)
    found = fit(data, num_annotators=4)
    more = lambda x, filler: jnp.asarray([*x, *[filler] * 10])
    masked = em.fit(
        more(data.margins, np.nan).astype(jnp.float32),
        more(data.annotators, 99),
        items=more(data.items, 3),
        orientation=more(data.orientation, 0),
        where=more(np.ones(100, bool), False),
        num_annotators=4,
    )
    for name in ("reliability", "lower", "upper", "counts", "log_likelihood"):
        ours, expected = getattr(masked, name), getattr(found, name)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
    np.testing.assert_allclose(masked.posterior[:100], found.posterior, rtol=1e-4)


@pytest.mark.parametrize("prior", [em.PRIOR, (0.0, 0.0), None])
@pytest.mark.parametrize(
    "margins",
    [
        [1.0, 2.0, -3.0],
        [0.0, 0.0, 0.0],
        [1e4, 1e4, 1e4],
        [-1e4, -1e4, -1e4],
        [jnp.inf, -jnp.inf, 1e38],
        [jnp.inf] * 6,
        [5.0],
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_few_and_extreme_votes_give_finite_numbers(margins, prior, shared):
    size = len(margins)
    found = em.fit(
        jnp.array(margins),
        jnp.zeros(size, int),
        items=jnp.zeros(size, int) if shared else None,
        num_annotators=1,
        prior=prior,
    )
    assert all_finite(found)
    assert 0 <= found.lower[0] <= found.reliability[0] <= found.upper[0] <= 1
    assert found.upper[0] - found.lower[0] > 0.2
    assert ((found.posterior >= 0) & (found.posterior <= 1)).all()


def test_without_real_votes():
    found = em.fit(
        jnp.ones(4), jnp.zeros(4, int), num_annotators=2, where=jnp.zeros(4, bool)
    )
    assert all_finite(found) and found.converged
    np.testing.assert_array_equal(found.counts, 0)
    np.testing.assert_allclose(found.reliability, 0.9, rtol=1e-6)
    assert found.log_likelihood == 0


def test_perfect_annotators_have_reliability_1():
    """If every vote agrees with a certain model, the likelihood is maximal at 1."""
    found = em.fit(
        jnp.full(1000, 12.0), jnp.zeros(1000, int), num_annotators=1, prior=(0, 0)
    )
    assert found.reliability[0] > 0.999 and found.lower[0] > 0.99
    assert found.upper[0] == found.reliability[0] or found.upper[0] <= 1


def test_invalid_options_are_rejected():
    z, who = jnp.ones(3), jnp.zeros(3, int)
    call = functools.partial(em.fit, z, who, num_annotators=1)
    with pytest.raises(ValueError, match=r"items of shape \(3,\), got \(2,\)"):
        call(items=jnp.zeros(2, int))
    with pytest.raises(ValueError, match="one vote or more"):
        em.fit(jnp.zeros(0), jnp.zeros(0, int), num_annotators=1)
    with pytest.raises(ValueError, match=r"level in \(0, 1\), got 95"):
        call(level=95)
    with pytest.raises(ValueError, match=r"pseudo-counts \(a, b\) >= 0"):
        call(prior=(-1, 2))
    with pytest.raises(ValueError, match="num_annotators and max_iterations >= 1"):
        em.fit(z, who, num_annotators=0)
    with pytest.raises(ValueError, match="prior with a . b > 0"):
        em.estimate(z, z, prior=(0, 0))
    with pytest.raises(TypeError, match="floating-point numbers, got int32"):
        em.posterior(jnp.zeros(3, int), 0.9)
