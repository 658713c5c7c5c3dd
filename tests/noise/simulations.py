"""Votes drawn from the model of `jaxpref.noise`: calibrated margins, known truth.

    python -m tests.noise.simulations

prints how often the intervals of `em`, `rate` and `calibration` cover the truth, and
how many labels temperature and flip rate take.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from jaxpref.noise import calibration, crowd, em, rate


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


def covered(interval, truth) -> float:
    """Share of intervals that contain the truth."""
    lower, upper = (np.asarray(end) for end in interval)
    return float(np.mean((lower <= truth) & (truth <= upper)))


def em_coverage(
    seed, *, reliability, count, votes_per_item=1, annotators=1000, spread=2.0
) -> list[float]:
    """Coverage of the 95% intervals of `em.fit` at each of the given reliabilities.

    `annotators` of each reliability cast `count` votes.  Those on an item are by
    different annotators, in varying company.  A `spread` of 0 leaves out the model.
    """
    truth = np.repeat(np.atleast_1d(reliability), annotators)
    random = np.random.default_rng(seed + 1)
    who = np.concatenate([random.permutation(truth.size) for _ in range(count)])
    data = votes(
        seed,
        reliability=truth,
        votes_per_item=votes_per_item,
        items=len(who) // votes_per_item,
        annotators=who,
        spread=spread,
    )
    found = fit(data, num_annotators=truth.size)
    inside = (found.lower <= truth) & (truth <= found.upper)
    return np.mean(np.reshape(inside, (-1, annotators)), axis=1).tolist()


def crowd_coverage(seed, *, sets=400, items=8, annotators=5, count=120) -> tuple:
    """Coverage of the 95% intervals of `crowd.fit`, for parameters from its prior.

    Returns the coverage of strengths and of reliabilities, and the largest difference
    between P(the winner is the stronger item) and how often it is, over ten bins.
    """
    random = np.random.default_rng(seed)
    strength = random.normal(0, 1.5, (sets, items))
    reliability = random.beta(10, 2, (sets, annotators))
    one = random.integers(0, items, count)
    two = (one + random.integers(1, items, count)) % items
    who = random.integers(0, annotators, count)
    difference = strength[:, one] - strength[:, two]
    follows = random.random((sets, count)) < reliability[:, who]
    first = (random.random((sets, count)) < expit(difference)) == follows
    fit_one = lambda winners, losers: crowd.fit(
        winners,
        losers,
        jnp.asarray(who),
        num_items=items,
        num_annotators=annotators,
        spread=1.5,
    )
    found = jax.jit(jax.vmap(fit_one))(
        np.where(first, one, two), np.where(first, two, one)
    )
    stated, right = np.asarray(found.stronger), first == (difference > 0)
    bins = np.minimum((10 * stated).astype(int), 9)
    gaps = [abs(np.mean((stated - right)[bins == n])) for n in range(10)]
    return (
        covered((found.strength_lower, found.strength_upper), strength),
        covered((found.lower, found.upper), reliability),
        max(gaps),
    )


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


ETAS = (0.6, 0.8, 0.95)
EM_CELLS = (
    (2.0, 1, 20),
    (2.0, 1, 100),
    (2.0, 5, 20),
    (2.0, 5, 100),
    (0.0, 5, 20),
)
"""Spread of the margins, votes per item, and votes per annotator."""


def main() -> None:
    """Prints the tables, in about ten minutes on two cores."""
    print(
        "coverage of 95% intervals at reliability 0.6, 0.8, and 0.95, 2,000 annotators"
    )
    print("each: of three crowds that are all alike, and of a mixed one")
    for spread, per_item, count in EM_CELLS:
        cover = functools.partial(
            em_coverage,
            0,
            count=count,
            votes_per_item=per_item,
            spread=spread,
            annotators=2000,
        )
        alike = [cover(reliability=eta)[0] for eta in ETAS]
        row = " ".join(f"{share:.3f}" for share in (*alike, *cover(reliability=ETAS)))
        model = "a model" if spread else "no model"
        print(f"{model}, {per_item} an item, {count} votes: {row}", flush=True)
    print("200 data sets: coverage of the rate alone, of rate and T fitted jointly;")
    print("median widths of the rate's intervals; identified; median error of rate, T")
    for spread, labels, e in itertools.product(
        (1.0, 2.5), (300, 1000, 3000, 10000), (0.2, 0.4)
    ):
        row = rate_row(range(200), flip_rate=e, labels=labels, spread=spread)
        print(f"{labels} labels, spread {spread}, rate {e}: {row}", flush=True)


if __name__ == "__main__":
    main()
