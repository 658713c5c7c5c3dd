"""Flip rates of annotators, pooled toward a common rate: counts, rates, intervals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from scipy.special import expit, logsumexp
from scipy.stats import beta, norm

from jaxpref.noise import annotator_rates, em, running

BATCH, LABELS, ANNOTATORS = 64, 8192, 128
"""Fewer annotators leave the other rows empty, so that everything compiles once."""


def crowd(seed, rates, *, spread=2.5):
    """Margins of a model whose scale drifts, and whose label each is, shuffled."""
    random = np.random.default_rng(seed)
    who = random.permutation(np.arange(LABELS) % len(rates))
    m = random.normal(0, spread, len(who))
    wrong = (random.random(len(who)) > expit(m)) ^ (
        random.random(len(who)) < np.asarray(rates)[who]
    )
    true = np.where(wrong, -m, m).astype(np.float32)
    return true, (true * np.linspace(0.1, 1, len(who))).astype(np.float32), who


@jax.jit
def one_pass(margins, who):
    def add(carry, batch):
        counts, table = carry
        where = jnp.ones(BATCH, bool)
        counts = running.count(counts, batch[0], where=where)
        table = annotator_rates.count(table, counts, *batch, where=where)
        return (counts, table), None

    start = running.no_counts(), annotator_rates.no_counts(ANNOTATORS)
    batches = margins.reshape(-1, BATCH), who.reshape(-1, BATCH)
    return jax.lax.scan(add, start, batches)[0]


def fit(margins, who):
    """The pooled rate, and the rates of the annotators that have labels."""
    counts, table = one_pass(jnp.asarray(margins), jnp.asarray(who))
    pooled = running.posterior(counts)
    return pooled, annotator_rates.posterior(table, pooled)


def first(found, number):
    """Rates, and lower and upper ends, of the first annotators."""
    return (np.asarray(x)[:number] for x in (found.rate, found.lower, found.upper))


def test_counts_by_annotator_size_and_agreement():
    z = jnp.array([0.5, -0.5, 1.0, 2.0, jnp.nan, 1.0])  # the mean size is 1
    who, where = jnp.array([0, 0, 1, -1, 0, 1]), ~jnp.isnan(z)
    counts = running.count(running.no_counts(), z, where=where)
    table = annotator_rates.no_counts(2)
    for times in (1, 2):
        table = annotator_rates.count(table, counts, z, who, where=where)
        assert table.shape == (2, 18, 2) and table.sum() == 4 * times
        np.testing.assert_array_equal(table[0, 10], [times, times])
        np.testing.assert_array_equal(table[1, 12], [2 * times, 0])


def test_counts_are_those_of_all_labels():
    _, z, who = crowd(0, [0.1, 0.3])
    counts, table = one_pass(jnp.asarray(z), jnp.asarray(who))
    of_all = counts.table.sum(0).reshape(18, 4, 2).sum(1)
    np.testing.assert_array_equal(table.sum(0), of_all)
    assert table.sum((1, 2)).tolist() == [4096, 4096] + [0] * 126


def test_posterior_against_integrals():
    """In float64, given one pooled rate, by SciPy's densities."""
    pooled_rate = 0.2
    _, z, who = crowd(1, np.random.default_rng(0).beta(2, 8, ANNOTATORS))
    counts, table = one_pass(jnp.asarray(z), jnp.asarray(who))
    certain = jnp.where(jnp.arange(101) == 40, 0.0, -1e4)
    pooled = dataclasses.replace(
        running.posterior(counts),
        rate=jnp.float32(pooled_rate),
        log_likelihood=certain,
    )
    found = annotator_rates.posterior(table, pooled)

    agree, disagree = np.moveaxis(np.asarray(table, np.float64), 2, 0)
    middle = (np.arange(18) + 0.5) / 2 - 6
    logs_t = np.linspace(-3, 7, 81)
    of_t = norm.pdf(logs_t, 0, 2)
    of_t = of_t / of_t.sum() / 2 + (logs_t > 3.99) / (2 * 25)
    links, scores = [], []
    for power in (-0.5, -0.25, 0, 0.25, 0.5):
        for log_t, p in zip(logs_t, of_t):
            g = np.minimum(np.tanh(2 ** (middle * 2**power) / 2**log_t / 2), 1 - 1e-6)
            lean = (1 - 2 * pooled_rate) * g
            score = (agree @ np.log1p(lean) + disagree @ np.log1p(-lean)).sum()
            scores.append(score + np.log(p) + norm.logpdf(power, 0, 0.25))
            links.append(g)
    link = np.exp(scores - logsumexp(scores)) @ links
    e = (np.arange(1000) + 0.5) / 1000
    lean = (1 - 2 * e[:, None]) * link
    logs = agree @ np.log1p(lean).T + disagree @ np.log1p(-lean).T
    likelihood = np.exp(logs - logs.max(1, keepdims=True))
    total, scores, spreads = [], [], []
    for m in np.linspace(0.01, 0.69, 24):
        for s in 2.0 ** np.arange(1, 11):
            mass = np.diff(beta.cdf(np.linspace(0, 1, 1001), m * s, (1 - m) * s))
            evidence = likelihood @ mass
            scores.append(np.log(evidence).sum() + np.log(s) - 2.5 * np.log(s + 2))
            total.append(likelihood[:4] * mass / evidence[:4, None])
            spreads.append(beta.std(m * s, (1 - m) * s))
    weights = np.exp(scores - logsumexp(scores))
    of_rates = np.einsum("p,pke->ke", weights, total)
    rate, lower, upper = first(found, 4)
    np.testing.assert_allclose(rate, of_rates @ e, atol=0.003)
    below = np.cumsum(of_rates, 1)
    for end, p in ((lower, 0.025), (upper, 0.975)):
        expected = [np.interp(p, row, e) for row in below]
        np.testing.assert_allclose(end, expected, atol=0.006)
    np.testing.assert_allclose(found.spread, weights @ spreads, rtol=0.03)


def test_different_rates_are_recovered():
    """The last annotator is wrong more often than right."""
    rates = np.array([0.05, 0.2, 0.4, 0.7])
    _, z, who = crowd(2, rates)
    pooled, found = fit(z, who)
    np.testing.assert_allclose(pooled.rate, rates.mean(), atol=0.05)
    rate, lower, upper = first(found, 4)
    np.testing.assert_allclose(rate, rates, atol=0.05)
    assert np.all((lower <= rates) & (rates <= upper))
    assert 0.1 < found.spread < 0.4


def test_pooling_beats_separate_fits():
    """Even fits that are given the true scale of the margins."""
    for seed in range(2):
        truth = np.random.default_rng(seed).beta(8, 32, ANNOTATORS)
        true, z, who = crowd(seed, truth)
        _, found = fit(z, who)
        alone = em.fit(
            jnp.asarray(true), jnp.asarray(who), num_annotators=128, prior=(0, 0)
        )
        error = lambda rate, truth=truth: np.sqrt(np.mean((rate - truth) ** 2))
        assert error(found.rate) < 0.8 * error(1 - alone.reliability)
        inside = (found.lower <= truth) & (truth <= found.upper)
        assert inside.mean() > 0.9


def test_equal_annotators_get_the_common_rate():
    _, z, who = crowd(3, np.full(ANNOTATORS, 0.2))
    pooled, found = fit(z, who)
    assert np.std(found.rate) < 0.03 and found.spread < 0.06
    np.testing.assert_allclose(np.mean(found.rate), pooled.rate, atol=0.02)


def test_a_single_annotator_has_the_pooled_rate():
    """The 127 without a label have a wide interval."""
    _, z, who = crowd(4, [0.2])
    pooled, found = fit(z, who)
    rate, lower, upper = first(found, 2)
    np.testing.assert_allclose(rate[0], pooled.rate, atol=0.01)
    ends = [pooled.lower, pooled.upper]
    np.testing.assert_allclose([lower[0], upper[0]], ends, atol=0.03)
    assert upper[1] - lower[1] > 0.5


def test_without_annotators():
    nobody = annotator_rates.posterior(
        annotator_rates.no_counts(0), running.posterior(running.no_counts())
    )
    assert nobody.rate.shape == (0,)


def test_sharded_over_eight_devices():
    _, z, who = (x[:64] for x in crowd(6, [0.1, 0.4]))

    def everything(z, who):
        where = jnp.ones(z.shape, bool)
        counts = running.count(running.no_counts(), z, where=where)
        table = annotator_rates.no_counts(2)
        table = annotator_rates.count(table, counts, z, who, where=where)
        return annotator_rates.posterior(table, running.posterior(counts))

    arrays = [jnp.asarray(x).reshape(2, 32) for x in (z, who)]
    eager = everything(*arrays)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    sharding = jax.NamedSharding(mesh, PartitionSpec(None, "data"))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding) for x in arrays]
        sharded = jax.jit(everything)(*placed)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, sharded, eager)
