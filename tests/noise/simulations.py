"""Votes drawn from the model of `jaxpref.noise`: calibrated margins, known truth.

    python -m tests.noise.simulations

prints how often the intervals of `em`, `rate` and `calibration` cover the truth, and
how many labels temperature and flip rate take.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from scipy.special import expit
from scipy.stats import beta, norm

from jaxpref.noise import calibration, em, rate


@dataclasses.dataclass(frozen=True)
class Votes:
    """numpy arrays with one entry per vote."""

    margins: np.ndarray
    annotators: np.ndarray
    items: np.ndarray
    orientation: np.ndarray
    right: np.ndarray


def votes(
    seed, *, reliability, votes_per_item=1, items=1000, spread=2.5, annotators=None
) -> Votes:
    """Calibrated margins N(0, spread^2), and annotators with given reliabilities.

    Which annotator votes is given for every vote or drawn uniformly.
    """
    random = np.random.default_rng(seed)
    reliability = np.atleast_1d(reliability)
    margin = random.normal(0, spread, items)
    first_better = random.random(items) < expit(margin)
    item = np.repeat(np.arange(items), votes_per_item)
    if annotators is None:
        annotators = random.integers(0, len(reliability), len(item))
    right = random.random(len(item)) < reliability[annotators]
    orientation = np.where(first_better[item] == right, 1, -1)
    return Votes(orientation * margin[item], annotators, item, orientation, right)


def fit(data: Votes, *, dtype=np.float32, margins=None, **options) -> em.Fit:
    """`em.fit` of the votes, with shared items."""
    margins = data.margins if margins is None else margins
    return em.fit(
        jnp.asarray(margins, dtype),
        jnp.asarray(data.annotators),
        items=jnp.asarray(data.items),
        orientation=jnp.asarray(data.orientation),
        **options,
    )


def log_likelihood(data: Votes, reliability, margins=None) -> float:
    """The marginal log-likelihood in numpy, item by item, summed over both truths."""
    margins = data.margins if margins is None else margins
    reliability = np.asarray(reliability, np.float64)
    total = 0.0
    for item in np.unique(data.items):
        on = data.items == item
        eta, d = reliability[data.annotators[on]], data.orientation[on]
        first = expit((d * margins[on]).mean())
        if_first = np.prod(np.where(d > 0, eta, 1 - eta))
        if_second = np.prod(np.where(d > 0, 1 - eta, eta))
        total += np.log(first * if_first + (1 - first) * if_second)
    return total


def counted_interval(found: em.Fit, data: Votes, level=0.95):
    """An alternative: Beta(1 + sum w, 1 + sum (1 - w)), posteriors as counts."""
    k = found.reliability.size
    right = np.bincount(data.annotators, np.asarray(found.posterior), k)
    wrong = np.bincount(data.annotators, minlength=k) - right
    tail = (1 - level) / 2
    return tuple(beta.ppf(q, 1 + right, 1 + wrong) for q in (tail, 1 - tail))


def laplace_interval(found: em.Fit, data: Votes, level=0.95):
    """Another alternative: a normal approximation from the curvature."""
    eta = np.asarray(found.reliability, np.float64)
    at, c = eta[data.annotators], np.tanh(np.asarray(found.evidence, np.float64) / 2)
    gradients = 2 * c / (1 + (2 * at - 1) * c)
    curvature = np.bincount(data.annotators, gradients**2, eta.size)
    half = norm.ppf((1 + level) / 2) / np.sqrt(np.maximum(curvature, 1e-12))
    return eta - half, eta + half


def covered(interval, truth) -> float:
    """Share of intervals that contain the truth."""
    lower, upper = (np.asarray(end) for end in interval)
    return float(np.mean((lower <= truth) & (truth <= upper)))


def em_coverage(seed, *, reliability, count, votes_per_item=1, annotators=1000):
    """Coverage of 95% intervals for equal `annotators`: grid, counts, and Laplace."""
    who = np.tile(np.arange(annotators), count)
    if votes_per_item > 1:
        # An annotator votes once per item, together with varying others.
        random = np.random.default_rng(seed + 1)
        who = np.concatenate([random.permutation(annotators) for _ in range(count)])
    data = votes(
        seed,
        reliability=np.full(annotators, reliability),
        votes_per_item=votes_per_item,
        items=len(who) // votes_per_item,
        annotators=who,
        spread=2.0,
    )
    found = fit(data, num_annotators=annotators, prior=None)
    intervals = (
        (found.lower, found.upper),
        counted_interval(found, data),
        laplace_interval(found, data),
    )
    return tuple(covered(interval, reliability) for interval in intervals)


def rate_runs(seeds, *, flip_rate, labels, scale=1.0, spread=2.5):
    """`fit_rate` at the true scale, then temperature and rate together; each seed."""
    runs = []
    for seed in seeds:
        data = votes(seed, reliability=1 - flip_rate, items=labels, spread=spread)
        margins = jnp.asarray(data.margins, np.float32)
        alone = rate.fit_rate(margins)
        runs.append((alone, *calibration.fit_temperature_and_rate(scale * margins)))
    return runs


def rate_row(seeds, *, flip_rate, labels, spread) -> str:
    """Prints a line of the second table."""
    runs = rate_runs(seeds, flip_rate=flip_rate, labels=labels, spread=spread)
    alone, temperatures, jointly = zip(*runs)
    ends = lambda fits: [np.array([getattr(f, end) for f in fits]) for end in ENDS]
    width = lambda fits: np.median(np.subtract(*ends(fits)[::-1]))
    known = lambda fits: np.mean([f.identified for f in fits])
    error = np.median([abs(f.rate - flip_rate) for f in jointly])
    factor = np.exp(np.median([abs(np.log(f.temperature)) for f in temperatures]))
    return (
        f"{covered(ends(alone), flip_rate):.3f} {covered(ends(jointly), flip_rate):.3f}"
        f" {covered(ends(temperatures), 1.0):.3f}; {width(alone):.3f}"
        f" {width(jointly):.3f}; {known(alone):.2f} {known(jointly):.2f};"
        f" {error:.3f} x{factor:.2f}"
    )


ENDS = ("lower", "upper")


def main() -> None:
    """Prints the tables, in about seven minutes on two busy cores."""
    print("coverage of 95% intervals, 1000 annotators each: grid, counts, Laplace")
    for per_item, eta, count in itertools.product(
        (1, 5), (0.6, 0.8, 0.95), (10, 100, 1000)
    ):
        shares = em_coverage(0, reliability=eta, count=count, votes_per_item=per_item)
        row = " ".join(f"{share:.3f}" for share in shares)
        print(f"{per_item} an item, eta {eta}, {count} votes: {row}", flush=True)
    print("200 data sets: coverage of the rate alone, of rate and T fitted jointly;")
    print("median widths of the rate's intervals; identified; median error of rate, T")
    for spread, labels, e in itertools.product(
        (1.0, 2.5), (300, 1000, 3000, 10000), (0.2, 0.4)
    ):
        row = rate_row(range(200), flip_rate=e, labels=labels, spread=spread)
        print(f"{labels} labels, spread {spread}, rate {e}: {row}", flush=True)


if __name__ == "__main__":
    main()
