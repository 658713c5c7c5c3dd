"""From margins to the flip rate, reliabilities, and posteriors.

A flip rate of 1 - e with margins of the opposite sign explains all labels as well as a
rate of e.  The labels cannot tell these apart, so we assume that they are right more
often than wrong: the flip rate of all labels together is below 1/2.  A single
annotator may be worse.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxpref.noise import calibration, em, rate

ASSUMPTION = "labels are right more often than wrong"
"""What an estimate assumes, for reports."""
VERIFIED = "the verified labels are right, and their pairs are like the others"
"""What it assumes if verified labels have calibrated the margins."""
CERTAIN = 100
"""Pseudo-votes per real vote if the flip rate of all labels is assumed."""
CLEAN = 0.1
"""A flip rate that may be 0 is identified if its interval ends below this."""
ASSUMED = 100
"""Pseudo-votes per annotator if the mean reliability is assumed and most pairs have a
single vote.  With fewer, those with some thirty labels seem to differ by chance, and
the ranking of the labels is worse than by the margins alone (`experiments.audits`,
development seeds)."""
KNOWN = 10
"""The same if most votes share their pair with others, or verified labels determine the
mean reliability: then a few votes say much about an annotator."""


@dataclasses.dataclass(frozen=True)
class Strengths:
    """That strengths of the answers were learned, see `evaluate.recurring`."""

    answers: int
    """Number of different answers."""
    pairs_per_answer: float
    """Mean number of different pairs that an answer stands in."""
    spread: float
    """Standard deviation of the strengths around the judges' scores, nats."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimates from N votes of K annotators and cross-fitted margins."""

    margins: np.ndarray
    """float64 [N]; calibrated, nats, positive where the model agrees with the label."""
    posterior: np.ndarray
    """float64 [N]; probability that the label is right."""
    reliability: np.ndarray
    """float64 [K]."""
    lower: np.ndarray
    """float64 [K]; lower ends of the 95% credible intervals of the reliabilities."""
    upper: np.ndarray
    """float64 [K]; upper ends of these intervals."""
    counts: np.ndarray
    """int64 [K]; votes of each annotator."""
    temperature: float
    """The temperature by which the given margins were divided."""
    flip_rate: float | None
    """Most likely share of wrong labels; None unless `identified`."""
    flip_rate_interval: tuple[float, float]
    """95% interval of the flip rate."""
    identified: bool
    """Whether the votes determine the flip rate."""
    reason: str | None
    """Why the flip rate is not identified; None if it is."""
    assumed_flip_rate: float | None
    """The rate assumed for the posteriors; None if the rate is identified."""
    strengths: Strengths | None = None
    """The strengths of the answers; None if they were not used."""


def estimate(
    margins: Float[np.ndarray, " votes"],
    annotators: Int[np.ndarray, " votes"],
    *,
    items: Int[np.ndarray, " votes"],
    orientation: Int[np.ndarray, " votes"],
    num_annotators: int,
    assumed_flip_rate: float,
) -> Estimate:
    """Estimates the temperature, flip rate, reliabilities, and posteriors.

    Temperature and flip rate come from the marginal likelihood of all votes, in which
    several votes on an item are evidence about each other.  The flip rate is assumed to
    be below 1/2.  If it is not identified, the temperature is the most likely one given
    the assumed rate.

    Args:
      margins: cross-fitted margins of any scale, positive where the model agrees.
      annotators: index of the annotator of each vote.
      items: which votes judge the same pair.
      orientation: +1 or -1, which answer of its item a vote prefers.
      num_annotators: K.
      assumed_flip_rate: used if the votes do not determine the rate.

    Returns:
      `Estimate`.
    """
    z = jnp.asarray(margins, jnp.float32)
    votes: dict[str, Any] = {"items": items, "orientation": orientation}
    if len(np.unique(items)) == len(items):
        votes = {}
    pooled = _pooled(z, votes)
    # An interval from 0 to above CLEAN does not even show whether any label is wrong.
    low, high = pooled.interval
    identified = pooled.identified and (low > 0.005 or high < CLEAN)
    prior, temperature = None, pooled.temperature
    if not identified:
        prior = _prior(assumed_flip_rate, CERTAIN * len(margins))
        temperature = _temperature(z, votes, prior) if margins.any() else 1.0
        if num_annotators > 1:
            _, index, sizes = np.unique(items, return_inverse=True, return_counts=True)
            shared = np.mean(sizes[index] > 1)
            prior = _prior(assumed_flip_rate, KNOWN if shared > 0.5 else ASSUMED)
    elif votes and num_annotators == 1:
        prior = _prior(pooled.rate, CERTAIN * len(margins))
    z = z / temperature
    fit = _reliabilities(z, jnp.asarray(annotators), votes, num_annotators, prior)
    wide = lambda x: np.asarray(x, np.float64)
    lower, upper = wide(fit.lower), wide(fit.upper)
    if num_annotators == 1:  # includes the uncertainty of the temperature
        lower, upper = wide([1 - high]), wide([1 - low])
    return Estimate(
        margins=wide(z),
        posterior=wide(fit.posterior),
        reliability=wide(fit.reliability),
        lower=lower,
        upper=upper,
        counts=np.asarray(fit.counts, np.int64),
        temperature=temperature,
        flip_rate=pooled.rate if identified else None,
        flip_rate_interval=pooled.interval,
        identified=identified,
        reason=(
            None
            if identified
            else _reason(margins, pooled.interval, several=bool(votes))
        ),
        assumed_flip_rate=None if identified else assumed_flip_rate,
    )


def estimate_calibrated(
    margins: Float[np.ndarray, " votes"],
    annotators: Int[np.ndarray, " votes"],
    *,
    items: Int[np.ndarray, " votes"],
    orientation: Int[np.ndarray, " votes"],
    num_annotators: int,
    assumed_flip_rate: float,
) -> Estimate:
    """As `estimate`, for margins that verified labels have calibrated.

    The temperature is 1, and which sign of a margin is right is known.  So the flip
    rate may also be above 1/2.
    """
    z = jnp.asarray(margins, jnp.float32)
    votes: dict[str, Any] = {"items": items, "orientation": orientation}
    everyone = em.fit(z, jnp.zeros(z.shape, jnp.int32), num_annotators=1, **votes)
    low, high = 1 - float(everyone.upper[0]), 1 - float(everyone.lower[0])
    identified = bool(margins.any()) and high - low < rate.WIDEST
    at = 1 - float(everyone.reliability[0]) if identified else assumed_flip_rate
    prior = _prior(at, CERTAIN * len(margins) if num_annotators == 1 else KNOWN)
    fit = em.fit(
        z, jnp.asarray(annotators), num_annotators=num_annotators, prior=prior, **votes
    )
    wide = lambda x: np.asarray(x, np.float64)
    one = num_annotators == 1
    return Estimate(
        margins=wide(z),
        posterior=wide(fit.posterior),
        reliability=wide([1 - at]) if one else wide(fit.reliability),
        lower=wide([1 - high]) if one else wide(fit.lower),
        upper=wide([1 - low]) if one else wide(fit.upper),
        counts=np.asarray(fit.counts, np.int64),
        temperature=1.0,
        flip_rate=at if identified else None,
        flip_rate_interval=(low, high),
        identified=identified,
        reason=None if identified else _reason(margins, (low, high), several=False),
        assumed_flip_rate=None if identified else assumed_flip_rate,
    )


class _Pooled(NamedTuple):
    """The temperature and the flip rate of all labels together."""

    temperature: float
    rate: float
    interval: tuple[float, float]
    """95% interval of the rate."""
    identified: bool
    """Whether the interval is short enough, and excludes labels by chance."""


def _pooled(z: jax.Array, votes: dict[str, Any]) -> _Pooled:
    """The most likely temperature and flip rate if all labels have the same rate."""
    scale, found = calibration.fit_temperature_and_rate(z, **votes)
    return _Pooled(
        temperature=float(scale.temperature),
        rate=float(found.rate),
        interval=(float(found.lower), float(found.upper)),
        identified=bool(found.identified) and float(found.upper) < 0.5,
    )


def _temperature(z: jax.Array, votes: dict[str, Any], prior: em.Prior) -> float:
    """The most likely temperature if the prior determines the flip rate."""
    scale, _ = _as_one_annotator(z, votes, prior=prior)
    return float(scale.temperature)


def _as_one_annotator(
    z: jax.Array, votes: dict[str, Any], *, prior: em.Prior | None
) -> tuple[calibration.TemperatureFit, em.Fit]:
    """Temperature and reliability as if one annotator had cast all votes."""
    everyone = jnp.zeros(z.shape, jnp.int32)
    return calibration.fit_temperature_and_reliability(
        z, everyone, num_annotators=1, prior=prior, **votes
    )


def _prior(flip_rate: float, votes: int) -> em.Prior:
    """Right and wrong pseudo-votes, that many together, with this share of flips."""
    return votes * (1 - flip_rate), votes * flip_rate


def _reliabilities(
    z: jax.Array,
    annotators: jax.Array,
    votes: dict[str, Any],
    num_annotators: int,
    prior: em.Prior | None,
) -> em.Fit:
    """Reliabilities and posteriors; without a prior, several annotators are pooled."""
    fit = functools.partial(
        em.fit, z, annotators, num_annotators=num_annotators, **votes
    )
    if prior is not None:
        return fit(prior=prior)
    if num_annotators == 1:
        return fit(prior=em.PRIOR)
    return fit()


def _reason(
    margins: np.ndarray, interval: tuple[float, float], *, several: bool
) -> str:
    if not margins.any() and not several:
        return (
            "every margin is 0: there are too few prompts for cross-fitting, or the "
            "answers do not differ in any feature"
        )
    return (
        f"{len(margins)} labels are compatible with any flip rate from "
        f"{interval[0]:.2f} to {interval[1]:.2f}: "
        + (
            "there are too few pairs with several votes; more would help"
            if several
            else "a weak model and wrong labels look alike; more pairs, a better model,"
            " or several votes per pair would help"
        )
    )
