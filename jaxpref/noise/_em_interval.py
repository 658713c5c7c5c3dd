"""Posteriors of reliabilities on a grid, their intervals, and the evidence of others.

With c = tanh(evidence / 2), a vote has likelihood proportional to 1 + (2 eta - 1) c,
linear in the reliability eta of its annotator.  An annotator's posterior is the product
over its votes, given the evidence of everything but the annotator.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from jaxpref.noise import _common

POINTS = 129
"""Grid points of a posterior."""
ROUNDS = 4
"""How often annotators exchange their leave-one-out means."""


@dataclasses.dataclass(frozen=True)
class Posterior:
    """The posteriors of all reliabilities, each on its own grid."""

    grid: jax.Array
    """Values of eta, [points, annotators]."""
    density: jax.Array
    """Proportional to the probability density; [points, annotators]."""


def posterior(evidence, eta, annotators, real, a, b) -> Posterior:
    """The posterior of each reliability around the estimate `eta`.

    Relative to the estimate, a vote has likelihood 1 + (at - eta) u.
    """
    u = _per_unit(evidence, eta[annotators])
    per_annotator = lambda x: jax.ops.segment_sum(real * x, annotators, eta.size)
    curvature = per_annotator(u**2) + a / eta**2 + b / (1 - eta) ** 2
    reach = 10 * jax.lax.rsqrt(curvature)
    low, high = jnp.clip(eta - reach, 0, 1), jnp.clip(eta + reach, 0, 1)
    share = jnp.linspace(0, 1, POINTS, dtype=eta.dtype)[:, None]
    grid = low + share * (high - low)

    def log_posterior(at):
        gains = jnp.log(jnp.maximum(1 + (at - eta)[annotators] * u, 0))
        return (
            per_annotator(gains) + xlogy(a, at / eta) + xlogy(b, (1 - at) / (1 - eta))
        )

    logs = jax.lax.map(log_posterior, grid)
    return Posterior(grid, jnp.exp(logs - jnp.max(logs, axis=0)))


def interval(found: Posterior, mode, level) -> tuple[jax.Array, jax.Array]:
    """Equal-tailed interval of each posterior, extended to contain the estimate."""
    density = found.density
    mass = jnp.cumsum((density[1:] + density[:-1]) / 2, axis=0)
    mass = jnp.concatenate([jnp.zeros_like(mass[:1]), mass]) / mass[-1]
    quantile = jax.vmap(jnp.interp, in_axes=(None, 1, 1))
    tail = (1 - jnp.asarray(level, density.dtype)) / 2
    # The mode lies in a tail if it is 0 or 1.
    return (
        jnp.minimum(quantile(tail, mass, found.grid), mode),
        jnp.maximum(quantile(1 - tail, mass, found.grid), mode),
    )


def marginal_evidence(
    evidence_from: Callable[[jax.Array], jax.Array], eta, annotators, real, a, b
) -> jax.Array:
    """The logit that each vote is right, averaged over the others' reliabilities.

    The likelihood of an item's votes is linear in the reliability of every voter.  So
    to average over one that is independent of the item, it suffices to use its mean
    given its votes on all other items.  The mode over all items, which EM finds, would
    use the item's votes twice, and treat the reliability as certain.  Each mean depends
    on the evidence of the others, hence the rounds (belief propagation).

    `evidence_from` maps each vote's assumed logit of being right to the evidence.

    References:
      Liu, Peng, and Ihler, "Variational Inference for Crowdsourcing", NeurIPS 2012,
      3.1, whose messages these are with an informative model of the items.
    """
    own = _common.logit(eta, eta.dtype)[annotators]

    def exchange(_, evidence):
        at = eta[annotators]
        found = posterior(evidence, eta, annotators, real, a, b)
        u = _per_unit(evidence, at)

        def add(sums, point):
            grid, density = point
            # Divides the vote's own likelihood out of the posterior.
            weight = density[annotators] / jnp.maximum(
                1 + (grid[annotators] - at) * u, jnp.finfo(eta.dtype).tiny
            )
            return (sums[0] + weight, sums[1] + weight * grid[annotators]), None

        zero = jnp.zeros_like(evidence)
        (total, first), _ = jax.lax.scan(add, (zero, zero), (found.grid, found.density))
        means = first / jnp.maximum(total, jnp.finfo(eta.dtype).tiny)
        return evidence_from(_common.logit(means, eta.dtype))

    return jax.lax.fori_loop(0, ROUNDS, exchange, evidence_from(own))


def _per_unit(evidence: jax.Array, eta: jax.Array) -> jax.Array:
    """The derivative of the log-likelihood of a vote in eta."""
    contrast = jnp.tanh(evidence / 2)
    return 2 * contrast / (1 + (2 * eta - 1) * contrast)
