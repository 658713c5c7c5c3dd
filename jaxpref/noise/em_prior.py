"""The prior of reliabilities, estimated from all annotators together."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.noise import _common
from jaxpref.sharding import replicated

START = 0.9
"""RE-PO's initial reliability."""


def pooled_prior(
    evidence: Float[Array, " votes"],
    annotators: Int[Array, " votes"],
    *,
    num_annotators: int,
    where: Bool[Array, " votes"] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The prior of a reliability, estimated from all annotators (empirical Bayes).

        (a, b) = argmax  sum over k of log int Beta(eta; a + 1, b + 1) L_k(eta) d eta
                         - 5/2 log(a + b + 2) + one vote at reliability 0.9

    L_k is the likelihood of the votes of k.  The second term is the usual vague prior
    on the size of a Beta, and the third decides where the votes say nothing.  A single
    annotator, or a few with few votes, say little about how annotators differ.  They
    get a prior of very few votes rather than one that repeats their own.  As the
    `prior` of `em.fit` or `em.estimate`, it shrinks annotators with few votes toward
    the mean and hardly affects the others.

    Args:
      evidence: logit that each vote is right, ignoring its annotator: margins, or
        the evidence of margins and other votes if items have several; [votes].
      annotators: int index of the annotator; -1 if unknown, the last; [votes].
      num_annotators: K.
      where: which votes are real; None if all are.

    Returns:
      a and b, right and wrong votes; a + b at most 1000.

    References:
      Gelman et al., "Bayesian Data Analysis", 2013, 5.3, for the term in a + b.
    """
    evidence = _common.floating(evidence)
    where = jnp.ones(evidence.shape, bool) if where is None else where
    return _pooled_prior(evidence, annotators, where, num_annotators)


@functools.partial(jax.jit, static_argnames="num_annotators")
def _pooled_prior(evidence, annotators, where, num_annotators):
    evidence, annotators, where = map(
        replicated, (evidence, jnp.asarray(annotators), jnp.asarray(where))
    )
    dtype = evidence.dtype
    annotators = jnp.where(annotators < 0, num_annotators - 1, annotators)
    contrast = jnp.tanh(jnp.where(where, evidence, 0) / 2)
    points = 199
    grid = (jnp.arange(points, dtype=dtype) + 0.5) / points
    log_likelihoods = jax.lax.map(
        lambda eta: jax.ops.segment_sum(
            jnp.log1p((2 * eta - 1) * contrast), annotators, num_annotators
        ),
        grid,
    )
    likelihoods = jnp.exp(log_likelihoods - jnp.max(log_likelihoods, axis=0))

    def best(means, sizes):
        """The best combination of a mean a / (a + b) and a size log(a + b)."""
        mean, size = (x.reshape(-1, 1) for x in jnp.meshgrid(means, sizes))
        shape = jnp.exp(size) * (mean * jnp.log(grid) + (1 - mean) * jnp.log1p(-grid))
        density = jax.nn.softmax(shape, axis=-1)
        score = jnp.sum(jnp.log(density @ likelihoods), axis=-1)
        score = score - 2.5 * jnp.log(jnp.exp(size[:, 0]) + 2)
        share = mean[:, 0]
        score = score + START * jnp.log(share) + (1 - START) * jnp.log1p(-share)
        chosen = jnp.argmax(score)
        return mean[chosen, 0], size[chosen, 0]

    low, high = jnp.log(jnp.asarray(0.1, dtype)), jnp.log(jnp.asarray(1000.0, dtype))
    mean, size = best(jnp.linspace(0.02, 0.98, 49), jnp.linspace(low, high, 25))
    for cell in (1.0, 1 / 8):
        near = jnp.linspace(-cell, cell, 17, dtype=dtype)
        mean, size = best(
            jnp.clip(mean + 0.02 * near, 0.005, 0.995),
            jnp.clip(size + (high - low) / 24 * near, low, high),
        )
    total = jnp.exp(size)
    return mean * total, (1 - mean) * total
