"""UPO and ensembles, against definitions in numpy, and weighted sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import entropy

from jaxpref.noise import uncertainty
from tests.losses.meshes import sharded

PASSES = expit(np.random.default_rng(0).normal(0.5, 2.0, (10, 16)))


def bald_of(p):
    """H(mean p) - mean H(p), by scipy, over the first axis."""
    both = np.stack([p, 1 - p])
    return entropy(both.mean(1)) - entropy(both).mean(0)


def test_the_definitions():
    with jax.enable_x64(True):
        passes = jnp.asarray(PASSES)
        np.testing.assert_allclose(uncertainty.bald(passes), bald_of(PASSES))
        means = uncertainty.mean_probability(passes)
        np.testing.assert_allclose(means, PASSES.mean(0))
        assert uncertainty.bald(passes).dtype == jnp.float64
    scores = np.random.default_rng(1).normal(size=(5, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(
        uncertainty.disagreement(scores), scores.var(0), rtol=1e-5
    )


def test_bald_at_its_extremes():
    certain = jnp.array([[0.0, 1.0, 0.0, 0.3], [0.0, 1.0, 1.0, 0.3]], jnp.bfloat16)
    found = uncertainty.bald(certain)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [0, 0, np.log(2), 0], atol=1e-7)
    alike = jnp.broadcast_to(jnp.linspace(0, 1, 1001), (7, 1001))
    assert (uncertainty.bald(alike) >= 0).all()
    np.testing.assert_array_equal(uncertainty.disagreement(alike[:1]), 0)


@pytest.mark.parametrize("function", ["bald", "disagreement", "mean_probability"])
def test_no_passes_are_rejected(function):
    function = getattr(uncertainty, function)
    with pytest.raises(ValueError, match=r"T >= 1, got \(0, 3\)"):
        function(jnp.zeros((0, 3)))
    with pytest.raises(TypeError, match="floating point"):
        function(jnp.zeros((2, 3), int))


@pytest.mark.parametrize(
    ("agree", "share", "drawn"),
    [(10, 0.7, 7), (10, 0.5, 5), (7, 0.5, 3), (20, 0.35, 7), (9, 1, 9), (9, 0, 0)],
)
def test_a_share_of_the_agreeing_pairs_is_drawn(agree, share, drawn):
    """floor(share n) for any weights; no contradicted pair and no padding."""
    means = np.r_[np.linspace(0.5, 1, agree), np.linspace(0, 0.49, 6), [np.nan] * 3]
    weights = np.r_[np.geomspace(1e-30, 1e30, agree), np.ones(6), [np.nan] * 3]
    real = np.arange(len(means)) < agree + 6
    for seed in range(5):
        found = uncertainty.drop_and_sample(
            jnp.asarray(means, jnp.float32),
            jnp.asarray(weights, jnp.float32),
            jax.random.key(seed),
            share=share,
            where=jnp.asarray(real),
        )
        assert found.dtype == bool and found.sum() == drawn
        assert not found[agree:].any()


def shares(weights, **options):
    """How often each pair is drawn in 20000 draws."""
    means = jnp.ones(len(weights))
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = lambda key: uncertainty.drop_and_sample(
        means, jnp.asarray(weights), key, **options
    )
    return jax.vmap(draw)(keys).mean(0)


def test_draws_follow_the_weights():
    weights = np.array([1.0, 2.0, 5.0])
    # Four standard errors of a share: 4 sqrt(0.25 / 20000) = 0.014.
    for scale in (1.0, 1e-20):
        first = shares(weights * scale, share=0.34)
        np.testing.assert_allclose(first, weights / 8, atol=0.015)
    # Without replacement: i first, or second after j.
    p = weights / 8
    either = p + [
        sum(p[j] * p[i] / (1 - p[j]) for j in {0, 1, 2} - {i}) for i in range(3)
    ]
    np.testing.assert_allclose(shares(weights, share=0.67), either, atol=0.015)


def test_weights_of_0_come_last_and_all_0_are_uniform():
    np.testing.assert_array_equal(shares([0.0, 1.0, 1e-3], share=0.67), [0, 1, 1])
    np.testing.assert_allclose(shares([0.0] * 4, share=0.5), 0.5, atol=0.015)


def test_easy_and_hard_pairs():
    """UPO's two weights prefer agreeing and disagreeing passes."""
    passes = jnp.array([[0.9] * 8 + [0.99] * 8, [0.9] * 8 + [0.1] * 8])
    means, divided = uncertainty.mean_probability(passes), uncertainty.bald(passes)
    hard = uncertainty.drop_and_sample(means, divided, jax.random.key(0), share=0.5)
    assert hard[8:].all()  # the others have weight 0
    keys = jax.random.split(jax.random.key(0), 500)
    easy = jax.vmap(
        lambda key: uncertainty.drop_and_sample(means, 1 - divided, key, share=0.5)
    )(keys).mean(0)
    assert easy[:8].min() > easy[8:].max()


def test_sharding_does_not_matter():
    passes, real = PASSES.astype(np.float32), np.arange(16) < 13

    def everything(passes, real):
        means, divided = uncertainty.mean_probability(passes), uncertainty.bald(passes)
        drawn = uncertainty.drop_and_sample(
            means, divided, jax.random.key(3), where=real
        )
        return means, divided, uncertainty.disagreement(passes), drawn

    alone = everything(jnp.asarray(passes), jnp.asarray(real))
    split = sharded(lambda p, r: everything(p.T, r), passes.T.copy(), real)
    for ours, theirs in zip(split, alone):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_share_out_of_range_is_rejected():
    ones = jnp.ones(3)
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 1.5"):
        uncertainty.drop_and_sample(ones, ones, jax.random.key(0), share=1.5)
    with pytest.raises(ValueError, match="one shape"):
        uncertainty.drop_and_sample(ones, jnp.ones(2), jax.random.key(0))
