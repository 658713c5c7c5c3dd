"""Estimates of flip rates that depend on the pair (`jaxpref.noise.instance`).

The coefficients are the most likely ones given the margins of labels
(`jaxpref.noise.instance_labels`) and the prior.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.noise.instance import Coefficients, Prior, center, initial, rates_of, row
from jaxpref.noise.instance_labels import Labels
from jaxpref.noise.rate import WIDEST

__all__ = ["Estimate", "describe", "fit", "log_evidence", "starts", "update"]

SCALE_SPREAD = 1.4
"""Prior standard deviation of t, which expects two of three models to be calibrated
within a factor of 4."""
LONGEST_STEP = 1.0
"""The longest step of any coefficient, in prior standard deviations."""
SIZES = (2.0, 1.0, 0.3, 0.1, 0.02, 0.0)
"""Sizes to choose from for a step: a full one may go too far, or not far enough where
the information overestimates the curvature."""
BLOCK = 256
"""Labels that are summed at once: a matrix product per block needs little memory."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Estimate:
    """The flip rates of labels, and how well they are known."""

    rate: Float[Array, ""]
    """The mean probability that a label is wrong, before looking at the label."""
    spread: Float[Array, ""]
    """The standard deviation of that probability over pairs."""
    lower: Float[Array, ""]
    """Lower end of the interval of the mean rate."""
    upper: Float[Array, ""]
    """Upper end of the interval of the mean rate."""
    identified: Bool[Array, ""]
    """Whether the interval is short, and its length is due to the labels and not to the
    prior; if not, report the interval, not `rate`."""
    information: Float[Array, " P"]
    """1 - posterior / prior variance of each coefficient of w_0: 0 if the labels say
    nothing about it, 1 if they determine it.  The variance between annotators is part
    of the posterior, so that it stays below 1 if there are few of them."""


def fit(
    labels: Labels, *, prior: Prior, num_annotators: int, steps: int = 50
) -> Coefficients:
    """The most likely coefficients given the labels and the prior.

    The likelihood may have several maxima.  The result is the best of the points that
    `update` reaches from `starts`.

    Args:
      labels: margins, features and annotators.
      prior: the prior.
      num_annotators: number of known annotators.
      steps: number of steps from each start.
    """

    def climb(start: Coefficients) -> tuple[Coefficients, Array]:
        found = update(start, labels, prior=prior, steps=steps)
        return found, _cost(found, labels, prior, jnp.ones(()))

    found, costs = jax.lax.map(climb, starts(prior, num_annotators))
    return jax.tree.map(lambda x: x[jnp.argmin(costs)], found)


def starts(prior: Prior, num_annotators: int) -> Coefficients:
    """Coefficients to start from: S of them, along a new first axis.

    The first is one constant rate.  The others differ from it by one prior standard
    deviation of one coefficient of w_0, in either direction.
    """
    first = initial(prior, num_annotators)
    of_rate = first.own.shape[1]
    away = jnp.diag(jnp.sqrt(_variances(prior)))[-of_rate:]
    common = first.common + jnp.concatenate([0 * away[:1], away, -away])
    own = jnp.broadcast_to(first.own, (len(common), *first.own.shape))
    return Coefficients(common, own)


def update(
    coefficients: Coefficients, labels: Labels, *, prior: Prior, steps: int
) -> Coefficients:
    """More likely coefficients, uphill from given ones.

    By Fisher scoring: a step goes in the direction (F + P)^-1 gradient, with the Fisher
    information F and the prior's precision P, which leads uphill.  It is shortened as a
    whole, until no coefficient moves by more than `LONGEST_STEP`, and then to the best
    of `SIZES`.  The annotators' d_k are eliminated one by one, so that the cost grows
    linearly with their number.

    Args:
      coefficients: where to start, from `instance.initial` or an earlier call.
      labels: margins, features and annotators.
      prior: the prior.
      steps: number of steps; one or two are enough after a few new labels.

    Returns:
      The new coefficients, never less likely.
    """

    def step(_, now: Coefficients) -> Coefficients:
        score, information = _score_and_information(now, labels, prior)
        between, variance = _between(now.own, prior), _variances(prior)
        pull = _over(now.common - center(prior), variance)
        own_score = score[:, -now.own.shape[1] :] - _over(now.own, between)
        common, own = _solve(information, jnp.sum(score, 0) - pull, own_score, prior)
        longest = jnp.maximum(
            jnp.max(jnp.abs(_over(common, jnp.sqrt(variance)))),
            jnp.max(jnp.abs(_over(own, jnp.sqrt(between)))),
        )
        sizes = jnp.asarray(SIZES, now.common.dtype)
        sizes *= LONGEST_STEP / jnp.maximum(longest, LONGEST_STEP)
        tried = jax.vmap(
            lambda size: Coefficients(now.common + size * common, now.own + size * own)
        )(sizes)
        base, _, _ = _probability(now, labels, prior)
        costs = jax.vmap(lambda x: _cost(x, labels, prior, base))(tried)
        return jax.tree.map(lambda x: x[jnp.argmin(costs)], tried)

    return jax.lax.fori_loop(0, steps, step, coefficients)


def describe(coefficients: Coefficients, labels: Labels, *, prior: Prior) -> Estimate:
    """The flip rates of the labels, and how well they are known.

    The interval is the mean rate +- 1.96 standard deviations of the posterior of w_0
    and d_k, by the delta method.

    Args:
      coefficients: from `fit` to these labels.
      labels: margins, features and annotators.
      prior: the prior.
    """
    count = jnp.maximum(jnp.sum(labels.where), 1)
    mean = lambda x: jnp.sum(jnp.where(labels.where, x, 0)) / count
    better = jax.nn.sigmoid(_corrected(coefficients.common, labels))

    def rates(coefficients):
        """The probability of a flip, whichever answer is better."""
        one, other = _rates(coefficients, labels, prior)
        return better * one + (1 - better) * other

    each = rates(coefficients)
    rate, gradient = jax.value_and_grad(lambda x: mean(rates(x)))(coefficients)
    _, information = _score_and_information(coefficients, labels, prior)
    common, own = _solve(information, gradient.common, gradient.own, prior)
    variance = jnp.sum(gradient.common * common) + jnp.sum(gradient.own * own)
    deviation = jnp.sqrt(jnp.maximum(variance, 0))
    before = jnp.sum(gradient.common**2 * _variances(prior))
    before += jnp.sum(gradient.own**2 * _between(gradient.own, prior))
    lower = jnp.maximum(rate - 1.96 * deviation, 0)
    upper = jnp.minimum(rate + 1.96 * deviation, prior.largest)
    eye = jnp.eye(len(coefficients.common), dtype=each.dtype)
    none = jnp.zeros((*coefficients.own.shape, len(eye)), each.dtype)
    covariance, _ = _solve(information, eye, none, prior)
    variances = _variances(prior)
    known = _over(variances - jnp.diag(covariance), variances)
    return Estimate(
        rate=rate,
        spread=jnp.sqrt(mean(jnp.square(each - rate))),
        lower=lower,
        upper=upper,
        identified=(upper - lower < WIDEST) & (variance < before / 4),
        information=known[-coefficients.own.shape[1] :],
    )


def log_evidence(
    coefficients: Coefficients, labels: Labels, *, prior: Prior
) -> Float[Array, ""]:
    """The log of P(labels | prior), by Laplace's approximation.

    The curvature is the Fisher information.  Differences of the result between priors
    say which of them the labels support, in nats: a coefficient that explains little
    costs more than it gains.

    Args:
      coefficients: from `fit` to these labels with this prior.
      labels: margins, features and annotators.
      prior: the prior.
    """
    _, information = _score_and_information(coefficients, labels, prior)
    own, curvature = _curvatures(information, coefficients.own, prior)
    volume = jnp.sum(jnp.linalg.slogdet(own)[1]) + jnp.linalg.slogdet(curvature)[1]
    return -_cost(coefficients, labels, prior, jnp.ones(())) - volume / 2


def _variances(prior: Prior) -> Float[Array, " M"]:
    """The prior variances of (t, g, w_0)."""
    of_margin = (SCALE_SPREAD, *[prior.preference] * len(prior.odd))
    spreads = (*of_margin, prior.spread, *prior.even, *prior.odd)
    return jnp.square(jnp.stack([jnp.asarray(x, jnp.float32) for x in spreads]))


def _between(own: Array, prior: Prior) -> Float[Array, " P"]:
    """The prior variances of d_k; 0 if there is only one group of pairs.

    A coefficient that is left out of w_0 is left out of d_k too.
    """
    spread = prior.annotators if len(own) > 1 else 0.0
    there = _variances(prior)[-own.shape[1] :] > 0
    return jnp.square(jnp.asarray(spread, jnp.float32)) * there.at[0].set(True)


def _over(values: Array, variance: Array) -> Array:
    """Values divided by their prior variance; 0 for a coefficient that is left out."""
    there = variance > 0
    return jnp.where(there, values, 0) / jnp.where(there, variance, 1)


def _corrected(common: Float[Array, " M"], labels: Labels) -> Float[Array, " N"]:
    """The margin of the estimate: exp(t) z + g . x_o."""
    odd = labels.features.odd
    preference = _dot(odd, common[1 : 1 + odd.shape[1]])
    return jnp.exp(common[0]) * labels.margins + preference


def _index(labels: Labels, num_rows: int) -> Int[Array, " N"]:
    """The row of each label's annotator; the last one if it is unknown."""
    return jnp.where(labels.annotators < 0, num_rows - 1, labels.annotators)


def _rates(
    coefficients: Coefficients, labels: Labels, prior: Prior
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    own = coefficients.own[_index(labels, len(coefficients.own))]
    weights = own + coefficients.shared
    return rates_of(weights, labels.features, prior=prior)


def _probability(
    coefficients: Coefficients, labels: Labels, prior: Prior
) -> tuple[Array, tuple[Array, Array], tuple[Array, Array]]:
    """P(label), (e, e'), and the probabilities (s(m), s(-m)) of both answers."""
    margin = _corrected(coefficients.common, labels)
    rate, swapped = _rates(coefficients, labels, prior)
    better, worse = jax.nn.sigmoid(margin), jax.nn.sigmoid(-margin)
    probability = (1 - rate) * better + swapped * worse
    # Keeps the information finite where the label is certain.
    probability = jnp.clip(probability, 1e-6, 1 - 1e-6)
    return probability, (rate, swapped), (better, worse)


def _cost(
    coefficients: Coefficients, labels: Labels, prior: Prior, base: Array
) -> Float[Array, ""]:
    """What `fit` minimizes: -log P(labels) / base - log prior, nats; base [N]."""
    probability, _, _ = _probability(coefficients, labels, prior)
    away = jnp.square(coefficients.common - center(prior))
    away = jnp.sum(_over(away, _variances(prior)))
    own = jnp.square(coefficients.own)
    own = jnp.sum(_over(own, _between(coefficients.own, prior)))
    gains = jnp.where(labels.where, jnp.log(probability / base), 0)
    nll = -_dot(jnp.ones_like(gains), gains)
    return nll + (away + own) / 2


def _score_and_information(
    coefficients: Coefficients, labels: Labels, prior: Prior
) -> tuple[Float[Array, "annotators M"], Float[Array, "annotators M M"]]:
    """Score and Fisher information about (t, g, w), of each annotator's labels."""
    features = labels.features
    probability, (rate, swapped), (better, worse) = _probability(
        coefficients, labels, prior
    )
    by_margin = (1 - rate - swapped) * better * worse
    by_rate = lambda rate, x: (rate * (1 - rate / prior.largest))[:, None] * row(x)
    by_weights = worse[:, None] * by_rate(swapped, features.swapped())
    by_weights -= better[:, None] * by_rate(rate, features)
    by_scale = jnp.exp(coefficients.common[0]) * labels.margins
    by_preference = by_margin[:, None] * features.odd
    by_scale = (by_margin * by_scale)[:, None]
    derivatives = jnp.concatenate([by_scale, by_preference, by_weights], axis=1)
    real, num_rows = labels.where.astype(derivatives.dtype), len(coefficients.own)
    total = lambda x: _sums(x, _index(labels, num_rows), num_rows)
    weight = real / (probability * (1 - probability))
    products = derivatives[:, :, None] * derivatives[:, None, :]
    score = total((real / probability)[:, None] * derivatives)
    return score, total(weight[:, None, None] * products)


def _dot(a: Array, b: Array) -> Array:
    """A matrix product.  XLA on CPU (jax 0.10 to 0.12) miscomputes the fused sums."""
    return jnp.matmul(a, b, precision="highest")


def _sums(values: Array, index: Int[Array, " N"], num_rows: int) -> Array:
    """The sum of the values [N, ...] of each annotator, [annotators, ...]."""
    missing = -len(index) % BLOCK
    pad = lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    block = lambda x: jnp.reshape(x, (-1, BLOCK, *x.shape[1:]))

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        values, index = part
        own = (index == jnp.arange(num_rows)[:, None]).astype(values.dtype)
        return total + _dot(own, values), None

    flat = values.reshape(len(index), -1)
    zeros = jnp.zeros((num_rows, flat.shape[1]), values.dtype)
    total, _ = jax.lax.scan(add, zeros, (block(pad(flat)), block(pad(index))))
    return total.reshape(num_rows, *values.shape[1:])


def _curvatures(
    information: Array, own: Array, prior: Prior
) -> tuple[Float[Array, "annotators P P"], Float[Array, "M M"]]:
    """I + S F S for each d_k, and for (t, g, w_0) after the d_k are eliminated.

    S holds the prior's standard deviations, F the information.  So the product of the
    determinants is that of all coefficients, and a standard deviation of 0 is no
    special case.  The information about d_k and about w_0 is the same.
    """
    cross, size = information[:, -own.shape[1] :], own.shape[1]
    between = jnp.sqrt(_between(own, prior))
    inside = between[:, None] * cross[:, :, -size:] * between
    of_own = jnp.eye(size, dtype=own.dtype) + inside
    inverse = between[:, None] * jnp.linalg.inv(of_own) * between
    reduced = _einsum("kpm,kpq,kqn->mn", cross, inverse, cross)
    spread = jnp.sqrt(_variances(prior))
    scaled = spread[:, None] * (jnp.sum(information, 0) - reduced) * spread
    return of_own, jnp.eye(len(scaled), dtype=scaled.dtype) + scaled


def _solve(
    information: Array, common: Array, own: Array, prior: Prior
) -> tuple[Array, Array]:
    """(F + prior precision)^-1 times a vector, in parts for (t, g, w_0) and for d_k."""
    size, spread = own.shape[1], jnp.sqrt(_variances(prior))
    of_own, curvature = _curvatures(information, own, prior)
    between = jnp.sqrt(_between(own, prior))
    inverse = between[:, None] * jnp.linalg.inv(of_own) * between
    cross = information[:, -size:]
    towards = _einsum("kpq,kq...->kp...", inverse, own)
    common = common - _einsum("kpm,kp...->m...", cross, towards)
    scale = lambda x: x * spread.reshape(-1, *[1] * (x.ndim - 1))
    common = scale(jnp.linalg.solve(curvature, scale(common)))
    return common, towards - _einsum("kpq,kqm,m...->kp...", inverse, cross, common)


_einsum = functools.partial(jnp.einsum, precision="highest")
