"""The posterior of Crowd-BT: its density, Newton steps, and Laplace's approximation.

The model and its notation are in `jaxpref.noise.crowd`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jax.scipy.special import gammaln

from jaxpref.sharding import replicated

HALVINGS = 30
"""How often a Newton step that lowers the posterior may be halved."""


@dataclasses.dataclass(frozen=True)
class Votes:
    """The votes, [votes], and the pairs they judge."""

    first: jax.Array
    """The first item of the vote's pair."""
    second: jax.Array
    annotators: jax.Array
    sign: jax.Array
    """1 if the vote prefers the first item, else -1."""
    real: jax.Array
    """1 if the vote counts, 0 if it is masked."""
    judged: jax.Array
    """1 for one real vote of each pair, which represents it in the likelihood."""
    on_pair: Callable[[jax.Array], jax.Array]
    """For each vote, the sum over the votes on the same pair."""


def votes(winners, losers, annotators, pairs, where, dtype) -> Votes:
    """Groups the votes by pair; without pairs, each has its own."""
    winners, losers, annotators, where = map(
        replicated, (winners, losers, annotators, where)
    )
    real = where.astype(dtype)
    if pairs is None:
        one = jnp.ones_like(real)
        return Votes(winners, losers, annotators, one, real, real, lambda x: x)
    size = real.size
    _, ids = jnp.unique(replicated(jnp.asarray(pairs)), return_inverse=True, size=size)
    on_pair = lambda x: jax.ops.segment_sum(x, ids, size)[ids]
    position = jnp.arange(size)
    earliest = jax.ops.segment_min(jnp.where(where, position, size), ids, size)
    judged = real * (earliest[ids] == position)
    sign = jnp.where(winners < losers, 1, -1).astype(dtype)
    return Votes(
        jnp.minimum(winners, losers),
        jnp.maximum(winners, losers),
        annotators,
        sign,
        real,
        judged,
        on_pair,
    )


def balance(votes: Votes, theta: jax.Array) -> jax.Array:
    """Logit that the first item is better, from the votes on the pair alone."""
    return votes.on_pair(votes.real * votes.sign * theta[votes.annotators])


def right(votes: Votes, q: jax.Array, theta: jax.Array) -> jax.Array:
    """P(each vote follows the truth of its pair), the E-step."""
    margin = q[votes.first] - q[votes.second]
    return jax.nn.sigmoid(votes.sign * (margin + balance(votes, theta)))


def log_posterior(votes: Votes, mean, spread, a, b, q, theta) -> jax.Array:
    """The log-density of q and theta, up to a constant, plus the log-likelihood."""
    margin, v = q[votes.first] - q[votes.second], balance(votes, theta)
    truths = jnp.logaddexp(
        jax.nn.log_sigmoid(margin) + v / 2, jax.nn.log_sigmoid(-margin) - v / 2
    )
    own = theta[votes.annotators]
    # log eta = theta / 2 + this, and log (1 - eta) = -theta / 2 + this.
    normalizer = own / 2 - jax.nn.softplus(own)
    prior_q = -jnp.sum(jnp.square((q - mean) / spread)) / 2 - q.size * jnp.log(spread)
    of_right, of_wrong = jax.nn.log_sigmoid(theta), jax.nn.log_sigmoid(-theta)
    proper = (a > 0) & (b > 0)
    # Not jax's betaln, whose error is 6e-7 here, also in float64.
    constant = gammaln(a) + gammaln(b) - gammaln(a + b)
    constant = jnp.where(proper, constant, 0)
    return (
        jnp.sum(votes.judged * truths + votes.real * normalizer)
        + prior_q
        + jnp.sum(a * of_right + b * of_wrong)
        - theta.size * constant
    )


def newton_step(votes: Votes, mean, spread, posterior, q, theta) -> jax.Array:
    """A Newton step in q for the expected truths, halved if it lowers the posterior."""
    margin = q[votes.first] - q[votes.second]
    p = jax.nn.sigmoid(margin)
    pull = votes.judged * (jax.nn.sigmoid(margin + balance(votes, theta)) - p)
    gradient = (
        jax.ops.segment_sum(pull, votes.first, q.size)
        - jax.ops.segment_sum(pull, votes.second, q.size)
        - (q - mean) / spread**2
    )
    hessian = _of_differences(votes, votes.judged * p * (1 - p), q.size)
    hessian = hessian + jnp.eye(q.size, dtype=q.dtype) / spread**2
    step = cho_solve(cho_factor(hessian), gradient)
    height = posterior(q)

    def lower(carry):
        size, turns = carry
        return (posterior(q + size * step) < height) & (turns < HALVINGS)

    size, turns = jax.lax.while_loop(
        lower, lambda carry: (carry[0] / 2, carry[1] + 1), (jnp.ones_like(height), 0)
    )
    return jnp.where(turns < HALVINGS, q + size * step, q)


def laplace(votes: Votes, spread, a, b, q, theta):
    """Laplace's approximation of the posterior around its mode.

    Minus the Hessian is [[A, B], [B', D]] in (q, theta).  D is diagonal with one vote
    per pair; with several, the terms between their annotators are left out.

    Returns:
      The covariance of q [N, N], the variances of theta [K], and the log-determinant of
      minus the Hessian.  They are NaN if (q, theta) is not a maximum.
    """
    margin, v = q[votes.first] - q[votes.second], balance(votes, theta)
    prior_curve, curve = (_curve(z) for z in (margin, margin + v))
    qq = _of_differences(votes, votes.judged * (prior_curve - curve), q.size)
    qq = qq + jnp.eye(q.size, dtype=q.dtype) / spread**2
    mixed = -votes.real * votes.sign * curve
    qt = jnp.zeros((q.size, theta.size), q.dtype)
    qt = qt.at[votes.first, votes.annotators].add(mixed)
    qt = qt.at[votes.second, votes.annotators].add(-mixed)
    per_annotator = lambda x: jax.ops.segment_sum(x, votes.annotators, theta.size)
    tt = (a + b + per_annotator(votes.real)) * _curve(theta)
    # At the end of a reliability's range, the curvature is 0; keeps its inverse finite.
    tt = jnp.maximum(tt - per_annotator(votes.real * curve), jnp.finfo(q.dtype).eps)
    factor = cho_factor(qq - (qt / tt) @ qt.T)
    covariance = cho_solve(factor, jnp.eye(q.size, dtype=q.dtype))
    reduced = qt / tt
    variances = 1 / tt + jnp.sum(reduced * (covariance @ reduced), axis=0)
    log_determinant = 2 * jnp.sum(jnp.log(jnp.diag(factor[0]))) + jnp.sum(jnp.log(tt))
    return covariance, variances, log_determinant


def _curve(logit: jax.Array) -> jax.Array:
    """s'(z)."""
    return jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit)


def _of_differences(votes: Votes, weights, size: int) -> jax.Array:
    """Sum of weight (e_first - e_second)(e_first - e_second)'; [items, items]."""
    off = jnp.zeros((size, size), weights.dtype)
    off = off.at[votes.first, votes.second].add(weights)
    off = off + off.T
    return jnp.diag(jnp.sum(off, axis=1)) - off


def margins(votes: Votes, covariance, q) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the margin of each vote's pair, first minus second."""
    i, j = votes.first, votes.second
    variance = covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]
    return q[i] - q[j], variance


def outside(votes: Votes, margin, variance, theta) -> jax.Array:
    """Logit that the first item is better, without the votes on the pair.

    The pair's factor is divided out of Laplace's approximation.  With v the logit of
    its votes and V the variance of m, its log-likelihood has the gradient
    g = s(m + v) - s(m) and the curvature -h = s'(m + v) - s'(m), so that

        V' = V / (1 - h V),   m' = m - V' g,   out = m' / sqrt(1 + pi V' / 8)

    whose s is about the mean of s(N(m', V')).
    """
    v = balance(votes, theta)
    pull = jax.nn.sigmoid(margin + v) - jax.nn.sigmoid(margin)
    precision = _curve(margin) - _curve(margin + v)
    without = variance / jnp.maximum(1 - precision * variance, 0.1)
    return (margin - without * pull) / jnp.sqrt(1 + jnp.pi * without / 8)
