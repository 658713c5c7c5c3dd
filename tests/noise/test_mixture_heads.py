"""MiCRo: mixtures of reward heads, with a router by context."""

import jax
import numpy as np

from jaxpref.noise import mixture_heads

W = np.array([[4.0, 0.0, 1.0], [-4.0, 0.0, 1.0]])


def labels(count, seed):
    """Pairs whose context says, up to 5% of noise, which of two heads is followed."""
    rng = np.random.default_rng(seed)
    contexts = rng.normal(size=(count, 2))
    followed = (contexts[:, 0] > 0) ^ (rng.random(count) < 0.05)
    first, second = rng.normal(size=(2, count, 3))
    margins = np.sum((first - second) * W[followed.astype(int)], axis=1)
    swap = (rng.random(count) > 1 / (1 + np.exp(-margins)))[:, None]
    preferred, other = np.where(swap, second, first), np.where(swap, first, second)
    return preferred, other, contexts, followed


def test_the_mixture_and_its_posteriors():
    rng = np.random.default_rng(0)
    margins = rng.normal(size=(5, 3)) * 3
    priors = rng.dirichlet(np.ones(3), size=5)
    likely = 1 / (1 + np.exp(-margins))
    found = mixture_heads.responsibilities(margins, np.log(priors))
    joint = priors * likely
    np.testing.assert_allclose(found, joint / joint.sum(1, keepdims=True), rtol=1e-5)
    logits = mixture_heads.mixture_logits(margins, np.log(priors))
    total = joint.sum(1)
    np.testing.assert_allclose(logits, np.log(total / (1 - total)), rtol=1e-4)
    # The posterior of one user's head, from five votes.
    posterior = priors[0] * np.prod(likely, axis=0)
    after = np.exp(mixture_heads.adapted(np.log(priors[0]), margins))
    np.testing.assert_allclose(after, posterior / posterior.sum(), rtol=1e-4)
    before = mixture_heads.adapted(np.log(priors[0]), margins, rate=0.0)
    np.testing.assert_allclose(before, np.log(priors[0]), rtol=1e-5)


def test_planted_heads_and_their_contexts_are_found():
    preferred, other, contexts, _ = labels(600, 1)
    one, two = (
        mixture_heads.fit(preferred, other, contexts, jax.random.key(0), num_heads=k)
        for k in (1, 2)
    )
    preferred, other, contexts, followed = labels(2000, 2)
    difference = preferred - other

    def accuracy(fit):
        priors = mixture_heads.log_router(contexts, fit.router, fit.bias)
        logits = mixture_heads.mixture_logits(difference @ fit.heads.T, priors)
        return np.mean(np.asarray(logits) > 0), priors

    alone, _ = accuracy(one)
    mixed, priors = accuracy(two)
    # One reward cannot follow both, whose first features count in opposite ways.
    assert alone < 0.65 and mixed > 0.8
    cosines = np.array(two.heads) @ W.T
    norms = np.linalg.norm(two.heads, axis=1)[:, None] * np.linalg.norm(W, axis=1)
    best = np.argmax(cosines, axis=1)
    assert sorted(best) == [0, 1] and (cosines / norms).max(1).min() > 0.95
    routed = best[np.argmax(priors, axis=1)]
    assert np.mean(routed == followed) > 0.9
