"""Which description of the labels' noise the labels support.

The candidates are priors of `jaxpref.noise.instance`, from correct labels to flip rates
that depend on annotator and features.  All explain the same labels with the same
margins, and all may correct the margin's scale and its preference for a feature.  The
one with the highest posterior probability is chosen: its log-evidence
(`instance_fit.log_evidence`) plus its log-prior.

The prior is strongly against rates that depend on features.  A policy in training has
not learned the exact shape of the preference for a feature, and a bias explains what
remains.  This gains a few nats, and up to ten for many labels.  If labels are biased,
the evidence for it grows by one nat for every few labels.

A dependence on a feature that all annotators share may be a bias or a preference, and
even strong evidence for a bias may be wrong: with 8,192 labels, half of them by length,
the best explanation was a bias for shorter answers, by over 30 nats.  So `select` can
require that annotators differ.  The comparison is our own.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.noise import instance, instance_fit
from jaxpref.noise.instance import Coefficients, Prior
from jaxpref.noise.instance_labels import Labels

NAMES = ("correct", "one_rate", "annotators", "features", "both")
"""The candidates: labels that are all correct; one flip rate; one for each annotator;
rates that depend on the features; and both."""
LOG_PRIOR = (0.0, 0.0, -2.0, -15.0, -15.0)
"""Of each candidate, in nats."""
DIFFER = 10.0
"""By how much, in nats, "both" must be more probable than "features" to show that
annotators differ in how their labels depend on the features."""
NONE = 1e-9
"""The largest flip rate if all labels are correct: small enough to have no effect."""


def priors(prior: Prior) -> Prior:
    """The candidates within a prior, along a new first axis."""
    alike = dataclasses.replace(
        prior,
        even=(0.0,) * len(prior.even),
        odd=(0.0,) * len(prior.odd),
        annotators=0.0,
    )
    correct = dataclasses.replace(
        alike, largest=NONE, rate=NONE * prior.rate / prior.largest, spread=0.0
    )
    each = (
        correct,
        alike,
        dataclasses.replace(alike, annotators=prior.annotators),
        dataclasses.replace(prior, annotators=0.0),
        prior,
    )
    return jax.tree.map(lambda *values: jnp.asarray(values, jnp.float32), *each)


def initial(prior: Prior, num_annotators: int) -> Coefficients:
    """The coefficients of each candidate before the first label."""
    start = lambda prior: instance.initial(prior, num_annotators)
    return jax.vmap(start)(priors(prior))


def fit(
    coefficients: Coefficients, labels: Labels, *, prior: Prior, steps: int
) -> tuple[Coefficients, Float[Array, " candidates"]]:
    """The coefficients of each candidate after `steps` steps, and its log-posterior.

    The log-posterior is the log of P(candidate, labels), and 0 for correct labels.
    """

    def one(now: Coefficients, prior: Prior):
        moved = instance_fit.update(now, labels, prior=prior, steps=steps)
        return moved, instance_fit.log_evidence(moved, labels, prior=prior)

    moved, evidence = jax.vmap(one)(coefficients, priors(prior))
    posterior = evidence + jnp.asarray(LOG_PRIOR)
    return moved, posterior - posterior[0]


def select(
    log_odds: Float[Array, " candidates"], *, correct_shared: bool
) -> Int[Array, ""]:
    """The candidate to use: the most probable one that can be trusted.

    Args:
      log_odds: from `fit`.
      correct_shared: whether to correct a dependence on features that all annotators
        share.  If not, "features" is never used, and "both" only if annotators differ
        by at least `DIFFER`.  If one of them is nevertheless the most probable, the
        labels count as correct or have one flip rate; a rate for each annotator would
        trust those most who follow the features.
    """
    if correct_shared:
        return jnp.argmax(log_odds)
    features, both = NAMES.index("features"), NAMES.index("both")
    differ = log_odds[both] - log_odds[features] >= DIFFER
    most = jnp.argmax(log_odds)
    usable = (most < features) | ((most == both) & differ)
    simple = jnp.argmax(log_odds[: NAMES.index("annotators")])
    return jnp.where(usable, most, simple)


def chosen(
    coefficients: Coefficients, which: Int[Array, ""], *, prior: Prior
) -> tuple[Coefficients, Prior]:
    """The coefficients and the prior of one candidate."""
    return jax.tree.map(lambda x: x[which], (coefficients, priors(prior)))


def shrinkage(coefficients: Coefficients) -> Float[Array, ""]:
    """The factor by which one flip rate shrinks the margins of a policy.

    Labels with a flip rate e and true margins m are approximated best, in the mean of
    their log-likelihood, by correct labels with margins c m, where

        E[m (e + (1 - 2e) s(m))] = E[m s(c m)],    0 < c < 1 - 2e for 0 < e < 1/2

    (c is about 1 - 2e if margins are small, and less if they are large).  If m is
    linear in features with an elliptical distribution, no other direction fits better
    (Li and Duan, "Regression analysis under link violation", 1989).  The estimate of c
    is the ratio of the scales exp(t) with which both candidates fit the same margins.

    Args:
      coefficients: of all candidates, from `fit`.
    """
    log_scale = coefficients.common[:, 0]
    correct, one_rate = NAMES.index("correct"), NAMES.index("one_rate")
    return jnp.exp(log_scale[correct] - log_scale[one_rate])
