"""Answers that recur in several pairs: the labels on one pair inform the others.

If the same answer is compared with several others, as in a tournament, the labels on
its other pairs are evidence about this one, even with a single label per pair.
Crowd-BT (`jaxpref.noise.crowd`) learns the strengths of the answers together with the
annotators' reliabilities.  The judges' scores are the prior means of the strengths.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxpref.evaluate.estimate import Estimate, Strengths, estimate
from jaxpref.evaluate.votes import Votes
from jaxpref.noise import crowd

ENOUGH = 3.0
"""Answers recur if they stand in at least this many different pairs on average."""
MOST = 1500
"""Largest number of answers: Crowd-BT takes time for its third power."""
SPREADS = (0.5, 1.0, 2.0, 4.0)
"""Candidate standard deviations of the strengths around their prior means, nats."""


def with_strengths(
    found: Estimate, votes: Votes, *, assumed_flip_rate: float
) -> Estimate:
    """The estimate that also uses the labels on an answer's other pairs.

    Crowd-BT gives each label the log-odds that it is right without the labels on its
    own pair.  With these as margins, flip rate, reliabilities and posteriors are
    estimated again; `margins` and `temperature` stay those of the judges.  The labels
    must be independent given the strengths: pairs that were made from one ranking are
    consistent with each other, right or wrong.

    Args:
      found: the estimate from the judges' margins.
      votes: the labels.
      assumed_flip_rate: used if the labels do not determine the rate.

    Returns:
      `found` itself if answers recur too little, or are too many.
    """
    answers = _compared(votes)
    if answers.pairs_each < ENOUGH or answers.count > MOST:
        return found
    spread, margins = _margins(found, votes, answers)
    again = estimate(
        margins,
        votes.annotators,
        items=votes.items,
        orientation=votes.orientation,
        num_annotators=len(votes.names),
        assumed_flip_rate=assumed_flip_rate,
    )
    return dataclasses.replace(
        again,
        margins=found.margins,
        temperature=found.temperature,
        strengths=Strengths(answers.count, answers.pairs_each, spread),
    )


class _Compared(NamedTuple):
    """The answers of N labels, numbered from 0."""

    sides: Int[np.ndarray, "votes 2"]
    """The answer that a label prefers, and the other one."""
    count: int
    pairs_each: float
    """Mean number of different pairs of an answer."""


def _compared(votes: Votes) -> _Compared:
    _, sides = np.unique(votes.answers, return_inverse=True)
    sides = sides.reshape(votes.answers.shape)
    _, first = np.unique(votes.texts, return_index=True)
    count = int(sides.max()) + 1
    return _Compared(sides, count, 2 * len(first) / count)


def _margins(
    found: Estimate, votes: Votes, answers: _Compared
) -> tuple[float, np.ndarray]:
    """The spread with the largest evidence, and the margins of Crowd-BT with it."""
    differ = answers.sides[:, 0] != answers.sides[:, 1]
    # Copies of a record without an annotator are not further votes.
    _, first = np.unique(votes.texts, return_index=True)
    named = np.array([name is not None for name in votes.names])[votes.annotators]
    real = differ & (named | np.isin(np.arange(len(differ)), first))
    # A vote on two equal answers is not one, but its indices must be valid.
    winners, losers = np.where(differ, answers.sides.T, [[0], [1]])
    mean = scores(answers.sides, found.margins, count=answers.count)
    fits = {
        spread: crowd.fit(
            jnp.asarray(winners),
            jnp.asarray(losers),
            jnp.asarray(votes.annotators),
            num_items=answers.count,
            num_annotators=len(votes.names),
            prior_mean=jnp.asarray(mean, jnp.float32),
            spread=jnp.asarray(spread, jnp.float32),
            pairs=jnp.asarray(votes.texts),
            where=jnp.asarray(real),
            tolerance=1e-3,
        )
        for spread in SPREADS
    }
    evidence = [np.nan_to_num(fit.log_evidence, nan=-np.inf) for fit in fits.values()]
    best = SPREADS[int(np.argmax(evidence))]
    return best, np.where(differ, np.asarray(fits[best].margins, np.float64), 0.0)


def scores(
    sides: Int[np.ndarray, "votes 2"],
    margins: Float[np.ndarray, " votes"],
    *,
    count: int,
) -> Float[np.ndarray, " answers"]:
    """Scores of the answers whose differences are the margins, by least squares.

    The judges are linear and judge all pairs of a prompt with one fit, so their margins
    are differences of scores.  The mean score of connected answers is 0.

    Args:
      sides: the answer that a label prefers, and the other one.
      margins: score of the first minus that of the second.
      count: number of answers.
    """
    chosen, rejected = sides.T
    joined = np.zeros((count, count))
    np.add.at(joined, (chosen, rejected), 1.0)
    joined += joined.T
    laplacian = np.diag(joined.sum(axis=1)) - joined
    pull = np.bincount(chosen, margins, count) - np.bincount(rejected, margins, count)
    # The Laplacian is singular, because only differences matter.
    return np.linalg.solve(laplacian + 1e-9 * np.eye(count), pull)
