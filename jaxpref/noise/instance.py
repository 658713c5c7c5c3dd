"""Flip rates that depend on the pair, learned from the margins of a model in training.

A pair has features of two kinds.  Even ones (x_e) stay the same if the answers change
places, such as how hard the pair is.  Odd ones (x_o) change their sign, such as the
difference of the answers' lengths.  If the labeled answer is truly the better one, the
label is wrong with probability e; if the other one is, with probability e':

    e   = c s(w . [1, x_e,  x_o])        c the largest flip rate, 1/2 by default
    e'  = c s(w . [1, x_e, -x_o])        w = w_0 + d_k for annotator k

    P(label) = (1 - e) s(z) + e' s(-z)   z the model's margin, nats

The probabilities of the two possible labels sum to 1.  With even features alone,
e = e', and this is the likelihood of `jaxpref.noise.rate` and of FA-DPO.  Labelers who
prefer, for example, the longer answer need an odd feature: they are wrong only where
the shorter one is better.

**Identifiability.**  The labels may depend on an odd feature because of biased labelers
or because of the true preference.  The two differ in shape only: a bias bounds the
probability of a label away from 1, a preference does not.  So w must be learned from
the margins of a model that has been trained with a constant rate first, and has learned
the preference as well as the bias.  For an untrained model, every dependence on the
feature looks like a bias.  The estimate uses exp(t) z + g . x_o in place of z: the
scale of the margins of a model in training is not that of the labels, and the model may
have learned too little or too much of a preference for a feature.  g has a narrow
prior: if it were free, labelers who follow a feature would look consistent, and all
others noisy.  The prior on w is centered on one constant rate.  Where the labels cannot
tell, w stays there, and `instance_fit.Estimate` says so.

Source: the flip rate as a logistic function of features, and the likelihood with
e = e', are FA-DPO's, Xu et al., 2025, arXiv:2512.00709.  Odd features, the
scale, the preference, the annotators and the estimate are ours.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.losses._common import Number, PerPair
from jaxpref.noise import _common

__all__ = [
    "Coefficients",
    "Features",
    "Prior",
    "check",
    "flip_rates",
    "initial",
    "label_nll",
    "probability_right",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
    """What the flip rate of a pair depends on."""

    even: Float[Array, "*batch E"]
    """Unchanged if the answers change places."""
    odd: Float[Array, "*batch O"]
    """Change their sign if the answers change places."""

    def swapped(self) -> "Features":
        """The features of the pairs with chosen and rejected exchanged."""
        return Features(self.even, -self.odd)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prior:
    """What is assumed before any label: independent normal coefficients.

    A standard deviation of 0 leaves a coefficient out.  The numbers may be arrays, for
    several priors at once under `jax.vmap`.
    """

    even: tuple[float, ...] = ()
    """Standard deviation of the coefficient of each even feature."""
    odd: tuple[float, ...] = ()
    """Standard deviation of the coefficient of each odd feature."""
    rate: float = 0.1
    """The flip rate at coefficients of zero, between 0 and `largest`."""
    spread: float = 1.0
    """Standard deviation of the logit of rate / largest."""
    annotators: float = 1.0
    """Standard deviation of each coefficient between annotators, >= 0; 0 if all are
    alike."""
    largest: float = 0.5
    """c, the largest possible flip rate, in (0, 1].  Above 1/2, an annotator may be an
    adversary."""
    preference: float = 0.5
    """Standard deviation of g, the correction of the margin by odd features, >= 0."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coefficients:
    """How the flip rate depends on the features: P = 1 + E + O numbers w."""

    common: Float[Array, " M"]
    """(t, g, w_0), M = 1 + O + P: the log-scale of the margin, the correction of the
    margin by the odd features, and the mean w."""
    own: Float[Array, "annotators P"]
    """d_k = w - w_0 of each annotator; the last row is for pairs without one."""

    @property
    def shared(self) -> Float[Array, " P"]:
        """w_0, the mean w of the annotators."""
        return self.common[-self.own.shape[-1] :]


def check(prior: Prior) -> None:
    """Checks the numbers of a prior.

    Raises:
      ValueError: if one is out of range.
    """
    if not 0 < prior.largest <= 1:
        raise ValueError(f"Expected largest in (0, 1], got {prior.largest}.")
    if not 0 < prior.rate < prior.largest:
        raise ValueError(
            f"Expected rate between 0 and {prior.largest}, got {prior.rate}."
        )
    if not all(x > 0 for x in (prior.spread, *prior.even, *prior.odd)):
        raise ValueError(f"Expected standard deviations > 0, got {prior}.")
    for name in ("annotators", "preference"):
        if not getattr(prior, name) >= 0:
            raise ValueError(f"Expected {name} >= 0, got {getattr(prior, name)}.")


def initial(prior: Prior, num_annotators: int) -> Coefficients:
    """The coefficients before the first label: one constant rate.

    Args:
      prior: the prior.
      num_annotators: number of known annotators.
    """
    of_rate = 1 + len(prior.even) + len(prior.odd)
    own = jnp.zeros((num_annotators + 1, of_rate), jnp.float32)
    return Coefficients(center(prior), own)


def flip_rates(
    coefficients: Coefficients,
    features: Features,
    annotators: Int[Array, "*batch"],
    *,
    prior: Prior,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """(e, e') of each pair: its flip rates if the labeled or other answer is better.

    Args:
      coefficients: from `initial` or `instance_fit.fit`.
      features: of the pairs as labeled.
      annotators: index of the annotator of each pair; -1 if unknown.
      prior: the prior of the coefficients.

    Returns:
      Two arrays [*batch], in (0, c).
    """
    weights = _of_annotators(coefficients.own, annotators)
    weights = weights + coefficients.shared
    return rates_of(weights, features, prior=prior)


def rates_of(
    weights: Float[Array, "*batch P"], features: Features, *, prior: Prior
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """(e, e') of each pair, from the w of its annotator."""
    total = lambda weights, x: jnp.sum(weights * x, axis=-1)
    end = 1 + len(prior.even)
    same = weights[..., 0] + total(weights[..., 1:end], features.even)
    other = total(weights[..., end:], features.odd)
    rate = lambda x: prior.largest * jax.nn.sigmoid(x)
    return rate(same + other), rate(same - other)


def label_nll(margin_logits: PerPair, rate: Number, swapped_rate: Number) -> PerPair:
    """Negative log-likelihood of a label whose flip rate depends on the better answer.

        nll = -log((1 - e) s(z) + e' s(-z))

    With e = e', it is `rate.marginal_nll`, which is `forward_dpo` as a function of the
    margin.  Labels that the model strongly contradicts have little effect.

    Args:
      margin_logits: z, nats; [*batch].
      rate: e in [0, 1], the flip rate if the labeled answer is better; broadcasts.
      swapped_rate: e' in [0, 1], the flip rate if the other answer is better.

    Returns:
      One number per label, at least float32, >= 0; [*batch].

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise import instance
      >>> longer = instance.label_nll(jnp.array([0.0, -40.0]), 0.0, 0.5)
      >>> print(jnp.exp(-longer))  # half of the labels name the longer answer anyway
      [0.75 0.5 ]

    References:
      The likelihood of class-conditional noise, Natarajan et al., "Learning with Noisy
      Labels", 2013; with e = e', FA-DPO, 2025, arXiv:2512.00709.
    """
    z = _common.floating(margin_logits)
    rate, swapped = (jnp.asarray(x, z.dtype) for x in (rate, swapped_rate))
    # In log space nothing underflows; a rate of 0 gives -inf, which drops out.
    right = jnp.log1p(-rate) + jax.nn.log_sigmoid(z)
    wrong = jnp.log(swapped) + jax.nn.log_sigmoid(-z)
    return -jnp.logaddexp(right, wrong)


def probability_right(
    margin_logits: PerPair, rate: Number, swapped_rate: Number
) -> PerPair:
    """The probability that a label is right, given the model and the label.

        w = (1 - e) s(z) / ((1 - e) s(z) + e' s(-z))

    Args:
      margin_logits: z, nats; [*batch].
      rate: e in [0, 1], the flip rate if the labeled answer is better; broadcasts.
      swapped_rate: e' in [0, 1], the flip rate if the other answer is better.

    Returns:
      Probabilities, at least float32; [*batch].
    """
    z = _common.floating(margin_logits)
    rate, swapped = (jnp.asarray(x, z.dtype) for x in (rate, swapped_rate))
    odds = jnp.log1p(-rate) - jnp.log(swapped)
    return jax.nn.sigmoid(_common.finite(z) + _common.finite(odds))


def center(prior: Prior) -> Float[Array, " M"]:
    """The prior mean of (t, g, w_0)."""
    share = jnp.asarray(prior.rate / prior.largest, jnp.float32)
    rest = jnp.zeros(len(prior.even) + len(prior.odd), jnp.float32)
    constant = _common.logit(share, jnp.float32)
    margin = jnp.zeros(1 + len(prior.odd), jnp.float32)
    return jnp.concatenate([margin, constant[None], rest])


def row(features: Features) -> Float[Array, "*batch P"]:
    """[1, x_e, x_o]."""
    ones = jnp.ones((*features.odd.shape[:-1], 1), features.odd.dtype)
    return jnp.concatenate([ones, features.even, features.odd], axis=-1)


def _of_annotators(values: Float[Array, "annotators P"], annotators) -> Array:
    """The row of each pair's annotator; the last one if it is unknown (-1)."""
    index = jnp.where(annotators < 0, len(values) - 1, annotators)
    # Uses a comparison, so that pairs may be sharded in any way.
    own = index[..., None, None] == jnp.arange(len(values))[:, None]
    return jnp.sum(jnp.where(own, values, 0), axis=-2)
