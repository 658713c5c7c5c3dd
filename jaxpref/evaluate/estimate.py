"""From margins to the flip rate, reliabilities, and posteriors."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxpref.noise import calibration, em, rate

CERTAIN = 100
"""Pseudo-votes per real vote if the flip rate of all labels is assumed."""
CLEAN = 0.1
"""A flip rate that may be 0 is identified if its interval ends below this."""
FEW = 10
"""Pseudo-votes per annotator if the mean reliability is assumed."""


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

    If each item has one vote, temperature and flip rate come from the marginal
    likelihood of all votes.  If some items have several, they come from EM, in which
    the votes on an item are evidence about each other.  If the rate is not identified,
    the temperature is the most likely one given the assumed rate.

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
    votes: dict[str, Any] = {"items": items, "orientation": orientation}
    z = jnp.asarray(margins, jnp.float32)
    everyone = jnp.zeros(len(margins), jnp.int32)
    if len(np.unique(items)) == len(items):
        votes = {}
        scale, pooled = calibration.fit_temperature_and_rate(z)
        flip_rate = float(pooled.rate)
        interval = float(pooled.lower), float(pooled.upper)
        identified = bool(pooled.identified)
    else:
        scale, one = calibration.fit_temperature_and_reliability(
            z, everyone, num_annotators=1, prior=None, **votes
        )
        flip_rate = 1 - float(one.reliability[0])
        interval = 1 - float(one.upper[0]), 1 - float(one.lower[0])
        identified = interval[1] - interval[0] < rate.WIDEST and interval[1] < 0.5
    # An interval from 0 to above CLEAN does not even show whether any label is wrong.
    identified = identified and (interval[0] > 0.005 or interval[1] < CLEAN)
    temperature = float(scale.temperature)
    if not identified:
        right = CERTAIN * len(margins) * (1 - assumed_flip_rate)
        wrong = CERTAIN * len(margins) * assumed_flip_rate
        scale, _ = calibration.fit_temperature_and_reliability(
            z, everyone, num_annotators=1, prior=(right, wrong), **votes
        )
        temperature = float(scale.temperature) if margins.any() else 1.0
    z = z / temperature
    voters = jnp.asarray(annotators)
    several: dict[str, Any] = {"num_annotators": num_annotators, **votes}
    if identified and num_annotators > 1:
        fit, _ = rate.fit_rates(z, voters, **several)
    elif identified:
        fit = em.fit(z, voters, **several)
    elif num_annotators > 1:
        prior = (FEW * (1 - assumed_flip_rate), FEW * assumed_flip_rate)
        fit = em.fit(z, voters, prior=prior, **several)
    else:
        fit = em.fit(z, voters, prior=(right, wrong), **several)
    wide = lambda x: np.asarray(x, np.float64)
    lower, upper = wide(fit.lower), wide(fit.upper)
    if num_annotators == 1:  # includes the uncertainty of the temperature
        lower, upper = wide([1 - interval[1]]), wide([1 - interval[0]])
    return Estimate(
        margins=wide(z),
        posterior=wide(fit.posterior),
        reliability=wide(fit.reliability),
        lower=lower,
        upper=upper,
        counts=np.asarray(fit.counts, np.int64),
        temperature=temperature,
        flip_rate=flip_rate if identified else None,
        flip_rate_interval=interval,
        identified=identified,
        reason=None if identified else _reason(margins, interval),
        assumed_flip_rate=None if identified else assumed_flip_rate,
    )


def _reason(margins: np.ndarray, interval: tuple[float, float]) -> str:
    if not margins.any():
        return (
            "every margin is 0: there are too few prompts for cross-fitting, or the "
            "answers do not differ in any feature"
        )
    return (
        f"{len(margins)} labels are compatible with any flip rate from "
        f"{interval[0]:.2f} to {interval[1]:.2f}: a weak model and wrong labels look "
        "alike; more pairs, a better model, or several votes per pair would help"
    )
