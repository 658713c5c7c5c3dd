"""Noise that is not the same for all pairs: exact policies at matched KL.

Claim
    A loss for unknown noise, or a correction with one flip rate for all labels, is no
    better than DPO with a tuned beta.  Known flip rates help where they differ between
    pairs, most of all if labels are biased.  They can mostly be learned with the
    policy (`--objective instance_noise`), if they may depend on what causes the flips.
    Training on selected pairs (CRM, filtering by an audit) does harm with biased
    labels.

Commands
    python -m experiments.heterogeneous_noise
    python -m experiments.heterogeneous_noise --pairs 2048    (a few minutes)

Expected
    Share of the best possible reward at KL 0.64, which is 1.12; mean over seeds 0 to 4,
    which differ in world, pairs, and labels.  The standard deviations are at most 0.05.
    The columns are the kinds of noise in the order of the protocol.

    2,048 pairs                         symm  hard   two   adv topic   pos class   len
    DPO, clean labels                   0.95  0.95  0.95  0.95  0.95  0.95  0.95  0.95
    DPO                                 0.79  0.91  0.82  0.81  0.86  0.79  0.66  0.50
    ROPO                                0.80  0.90  0.82  0.81  0.86  0.79  0.65  0.49
    Dr. DPO                             0.79  0.91  0.82  0.81  0.86  0.79  0.66  0.50
    Hölder-DPO                          0.79  0.91  0.82  0.81  0.86  0.79  0.66  0.50
    CRM, known mean rate                0.78  0.86  0.82  0.82  0.84  0.78  0.63  0.41
    filtered by an audit                0.78  0.89  0.84  0.90  0.85  0.78  0.64  0.35
    forward, known mean rate            0.80  0.90  0.82  0.81  0.86  0.79  0.65  0.49
    forward, known rate of each pair    0.80  0.93  0.88  0.93  0.94  0.84  0.87  0.90
    learned by annotator                0.78  0.91  0.87  0.93  0.86  0.79  0.66  0.49
    learned by length                   0.79  0.91  0.82  0.81  0.86  0.79  0.86  0.83
    learned by annotator and length     0.79  0.91  0.87  0.93  0.86  0.79  0.86  0.90
    learned by all causes               0.78  0.91  0.87  0.93  0.94  0.85  0.86  0.90

    16,384 pairs                        symm   two   adv topic class   len
    DPO, clean labels                   0.99  0.99  0.99  0.99  0.99  0.99
    DPO                                 0.97  0.97  0.97  0.98  0.70  0.54
    ROPO                                0.97  0.97     -  0.98  0.68  0.50
    Dr. DPO                             0.97  0.97     -  0.98  0.69  0.53
    Hölder-DPO                          0.97  0.97     -  0.98  0.70  0.53
    CRM, known mean rate                0.97  0.97     -  0.98  0.65  0.41
    filtered by an audit                0.97  0.98     -  0.98  0.68  0.35
    forward, known mean rate            0.97  0.97  0.97  0.98  0.68  0.48
    forward, known rate of each pair    0.97  0.98  0.99  0.99  0.98  0.99
    learned by annotator                   -  0.98  0.99  0.98  0.70 -0.02
    learned by length                      -  0.97  0.97  0.98     -  0.98
    learned by annotator and length        -  0.98  0.99  0.98     -  0.99
    learned by all causes                  -     -     -  0.99     -  0.99

    The cells with "-" and the other kinds of noise have not been measured with 16,384
    pairs.  The column "adv" is from an earlier version, with another optimizer of the
    same losses.

    With 2,048 pairs, ROPO, Dr. DPO, Hölder-DPO, and one rate for all labels are within
    0.02 of DPO; with more pairs labeled by length, they are up to 0.06 below it.
    Learned rates are as good as known ones if they can depend on the cause: superfluous
    features cost at most 0.01, and without the right one, nothing is gained.  An audit
    with known annotators reaches most of the gain against an adversary.  CRM and the
    audit drop labels that contradict the others, which are often the right ones if half
    of the labels follow the length.  With rates by annotator alone, an annotator who
    always picks the longer answer looks perfectly consistent, and with 16,384 pairs the
    policy learns little but length.
    Time: 26 minutes for 2,048 pairs, with one thread that had about a tenth of a core
    of an Intel Xeon.  Cells of the table are kept in OUT/cells, so that a run resumes.

Protocol
    2,000 answers, equally likely under the reference, with 80 normal features.  Reward
    and log-length are two orthogonal directions of the features, with standard
    deviations of 1 and 0.5.  Pairs are drawn at random, and labeled by Bradley-Terry of
    the reward.  Then some labels are flipped; all kinds of noise flip 20% to 25%:

    symmetric           a flip rate of 25%
    hard pairs          1 / (1 + exp(|reward difference| / T)), with a mean of 25%
    two annotators      half of the labels each, with flip rates of 5% and 40%
    adversary           30% of the labels with a flip rate of 80%, the others clean
    topic               80% on a known quarter of the pairs, whoever labels them
    half by position    half of the labels name the answer that was shown first
    by class            40% where the shorter answer is better, 5% where the longer is
    half by length      one of two annotators names the longer answer, the other is
                        right

    Two known annotators label the pairs; where nothing else is said, both alike.  The
    noises are those of the `--inject.*` options.

    A policy is exp(theta . features); its margin is z = theta . (difference of the
    features).  theta is a minimum of a loss summed over the labels, with a penalty
    ridge |theta|^2 / 2, found from theta = 0, and is rescaled to KL 0.64 for the
    comparison, so that beta makes no difference.  The penalty plays the role of early
    stopping.  For every method, kind of noise, and number of pairs, the penalty is the
    one of six (1 to 1,000), and the method's own hyperparameter the one of at most
    four, with the highest mean reward on seeds 100 and 101.

    ROPO, Dr. DPO, Hölder-DPO: the losses of `jaxpref.losses`, with alpha 2, 6, 14, or
    30; beta' 0.3, 1, 3, or 10; gamma 0.5, 1, 2, or 4.  All pairs are one batch.
    CRM: two DPO policies start from random halves of the pairs.  Four times, each is
    refitted to the pairs with the largest margins under the other one.  The share that
    is left out rises to the known mean flip rate, or half of it.  Their mean is used.
    "Filtered by an audit": `jaxpref audit`'s own estimate of P(label is right), from
    margins cross-fitted on the same labels and features, with known annotators.  As
    many labels as are expected to be wrong are dropped, the most suspicious first, and
    DPO is fitted to the others.
    "Known mean rate": forward DPO with the mean flip rate.  "Known rate of each pair":
    forward DPO with the probabilities of the descriptions above.
    "Learned": the jointly most likely theta and coefficients of
    `jaxpref.noise.instance`, with the prior `PRIOR` for all kinds of noise.  "By
    annotator" is a rate for each annotator, the optimum that EM on annotators'
    reliabilities (`em`, RE-PO) leads to, up to the prior.  "All causes" are annotator,
    length, position, and topic.
    Everything is in float64.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit

from experiments import heterogeneous_world as worlds
from experiments.heterogeneous_world import NOISES, Pairs
from experiments.progress import say
from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.evaluate.crossfit import cross_fit, scaled
from jaxpref.evaluate.estimate import estimate
from jaxpref.files import write_json
from jaxpref.noise import peer
from jaxpref.report import grouped_bars
from jaxpref.runtime.entry import entry_point

RIDGES = (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Strengths of the penalty |theta|^2 / 2 to choose from."""
TUNED_ON, REPORTED = (100, 101), (0, 1, 2, 3, 4)
"""Seeds that choose penalties and hyperparameters, and seeds of the table."""
PRIOR = {
    "rate": 0.1,
    "spread": 1.0,
    "length": 2.0,
    "position": 2.0,
    "topic": 2.0,
    "annotators": 2.0,
}
"""Prior of the learned flip rates, as the options of `instance_noise`, with largest = 1
throughout; the topic is its predictor."""
FOLDS, ASSUMED_RATE = 5, 0.1
"""Of the audit; the defaults of `jaxpref audit`."""
REVIEWS = 4
"""How often the two models of CRM select each other's pairs."""


# ---- exact policies ----------------------------------------------------------------

OfMargins = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""The sum of a loss over pairs, and its derivative in each pair's margin."""


def fit(features: np.ndarray, loss: OfMargins, *, ridge: float) -> np.ndarray:
    """The minimum of loss(features theta) + ridge |theta|^2 / 2 that 0 leads to."""

    def cost(theta):
        value, by_margin = loss(features @ theta)
        return (
            value + ridge * theta @ theta / 2,
            features.T @ by_margin + ridge * theta,
        )

    return descend(cost, np.zeros(features.shape[1]))


def descend(cost, start: np.ndarray) -> np.ndarray:
    """The minimum near `start`, by L-BFGS; `cost` gives the value and its gradient."""
    options = {"maxiter": 1000, "ftol": 1e-13, "gtol": 1e-2}
    return minimize(cost, start, jac=True, method="L-BFGS-B", options=options).x


def dpo(margins: np.ndarray) -> tuple[float, np.ndarray]:
    """-log s(z)."""
    return -log_expit(margins).sum(), -expit(-margins)


def forward(e, other) -> OfMargins:
    """-log((1 - e) s(z) + e' s(-z)) for flip rates (e, e')."""

    def of_margins(z):
        right, wrong = expit(z), expit(-z)
        p = np.maximum((1 - e) * right + other * wrong, 1e-12)
        return -np.log(p).sum(), -(1 - e - other) * right * wrong / p

    return of_margins


def of_library(loss, name: str) -> Callable[[Pairs, float, float], np.ndarray]:
    """The policy of a loss of `jaxpref.losses`, with a hyperparameter, at beta 1.

    All pairs are one batch, and the ridge stands for beta: with margins beta z, the
    optimum is the same as with a ridge divided by beta^2, apart from its scale.
    """

    def total(margins, value):
        zero = jnp.zeros_like(margins)
        return jnp.sum(loss(margins, zero, zero, zero, beta=1.0, **{name: value}))

    compiled = jax.jit(jax.value_and_grad(total))

    def policy(pairs: Pairs, ridge: float, value: float) -> np.ndarray:
        def of_margins(z):
            with jax.enable_x64(True):
                cost, by_margin = compiled(jnp.asarray(z), jnp.asarray(value))
                return float(cost), np.asarray(by_margin)

        return fit(pairs.features, of_margins, ridge=ridge)

    return policy


def mean_rate(pairs: Pairs) -> float:
    """The mean flip rate."""
    return float(np.mean(pairs.rate + pairs.other_rate) / 2)


def fit_by_peers(pairs: Pairs, ridge: float, dropped: float) -> np.ndarray:
    """CRM: two policies, each refitted to the pairs that the other one finds easy.

    Each starts with a random half of the pairs.  The share that is left out rises over
    three rounds to `dropped` times the known mean flip rate.  Returns their mean.
    """
    lot = np.random.default_rng(0).random(len(pairs.length)) < 0.5
    one = functools.partial(_of_subset, pairs, ridge)
    both = one(lot), one(~lot)
    for turn in range(REVIEWS):
        keep = peer.kept_share(turn + 1, noise_rate=dropped * mean_rate(pairs))
        margins = [(pairs.features @ theta).astype(np.float32) for theta in both]
        easy = peer.peer_selection(*map(jnp.asarray, margins), keep=keep)
        both = tuple(one(np.asarray(subset)) for subset in easy)
    return np.mean(both, axis=0)


def _of_subset(pairs: Pairs, ridge: float, subset: np.ndarray) -> np.ndarray:
    return fit(pairs.features[subset], dpo, ridge=ridge)


@functools.lru_cache(maxsize=len(TUNED_ON + REPORTED))
def kept_by_audit(pairs: Pairs) -> np.ndarray:
    """Which labels an audit of the same labels keeps; bool [N].

    Cross-fitted margins, then `jaxpref audit`'s estimate of P(label is right) with the
    known annotators.  The most suspicious labels are dropped, as many as are expected
    to be wrong.
    """
    count = len(pairs.length)
    rng = np.random.default_rng(0)
    folds, inner = (rng.permutation(count) % FOLDS for _ in range(2))
    found = estimate(
        cross_fit(scaled(pairs.features), folds, inner).margins,
        pairs.annotator,
        items=np.arange(count),
        orientation=np.ones(count, int),
        num_annotators=2,
        assumed_flip_rate=ASSUMED_RATE,
    )
    keep = np.ones(count, bool)
    dropped = round(float(np.sum(1 - found.posterior)))
    keep[np.argsort(found.posterior)[:dropped]] = False
    return keep


def fit_learned(
    pairs: Pairs, ridge: float, *causes: str, annotators: bool
) -> np.ndarray:
    """Policy and flip rates, jointly most likely: `--objective instance_noise`.

    Unlike the objective, it does not estimate a scale of the margins, because this is
    an optimum and not a training run.  It starts from the policy for a constant rate.
    """
    count = len(pairs.length)
    columns = {"rate": np.ones(count)}
    columns |= {cause: getattr(pairs, cause) for cause in causes}
    odd = np.array([name in ("length", "position") for name in columns])
    labeled = np.stack(list(columns.values()), axis=1)
    other = np.where(odd, -labeled, labeled)
    spread = [PRIOR["spread"], *(PRIOR[cause] for cause in causes)]
    mean = np.zeros(len(spread))
    mean[0] = logit(PRIOR["rate"])
    if annotators:
        own = [pairs.annotator[:, None] == k for k in range(2)]
        labeled, other = (
            np.hstack([x, *(x * k for k in own)]) for x in (labeled, other)
        )
        spread = spread + [PRIOR["annotators"]] * (2 * len(spread))
        mean = np.concatenate([mean, 0 * mean, 0 * mean])
    x, size = pairs.features, pairs.features.shape[1]
    # In units of about a standard error.
    unit = np.concatenate([np.full(size, np.sqrt(2 / count)), np.ones(len(mean))])

    def cost(both):
        theta, w = np.split(both * unit, [size])
        e, swapped = expit(labeled @ w), expit(other @ w)
        z = x @ theta
        right, wrong = expit(z), expit(-z)
        p = np.maximum((1 - e) * right + swapped * wrong, 1e-12)
        away = (w - mean) / spread
        value = -np.log(p).sum() + ridge * theta @ theta / 2 + away @ away / 2
        by_theta = x.T @ (-(1 - e - swapped) * right * wrong / p) + ridge * theta
        by_w = labeled.T @ (right * e * (1 - e) / p) + away / spread
        by_w -= other.T @ (wrong * swapped * (1 - swapped) / p)
        return value, np.concatenate([by_theta, by_w]) * unit

    start = fit(x, forward(PRIOR["rate"], PRIOR["rate"]), ridge=ridge)
    return (descend(cost, np.concatenate([start, mean]) / unit) * unit)[:size]


# ---- methods and cells -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to learn a policy from labels that may be wrong."""

    name: str
    policy: Callable[[Pairs, float, float], np.ndarray]
    """`(pairs, ridge, hyperparameter) -> theta`."""
    settings: tuple[float, ...] = (0.0,)
    """Values of the hyperparameter to choose from."""


CLEAN = Method(
    "DPO, clean labels", lambda p, ridge, _: fit(p.features, dpo, ridge=ridge)
)
METHODS = (
    Method("DPO", CLEAN.policy),
    Method("ROPO", of_library(losses.ropo, "alpha"), (2.0, 6.0, 14.0, 30.0)),
    Method("Dr. DPO", of_library(losses.dr_dpo, "beta_prime"), (0.3, 1.0, 3.0, 10.0)),
    Method("Hölder-DPO", of_library(losses.holder_dpo, "gamma"), (0.5, 1.0, 2.0, 4.0)),
    Method("CRM, known mean rate", fit_by_peers, (0.5, 1.0)),
    Method(
        "filtered by an audit",
        lambda p, ridge, _: _of_subset(p, ridge, kept_by_audit(p)),
    ),
    Method(
        "forward, known mean rate",
        lambda p, ridge, _: fit(p.features, forward(*[mean_rate(p)] * 2), ridge=ridge),
    ),
    Method(
        "forward, known rate of each pair",
        lambda p, ridge, _: fit(p.features, forward(p.rate, p.other_rate), ridge=ridge),
    ),
    Method(
        "learned by annotator",
        lambda p, ridge, _: fit_learned(p, ridge, annotators=True),
    ),
    Method(
        "learned by length",
        lambda p, ridge, _: fit_learned(p, ridge, "length", annotators=False),
    ),
    Method(
        "learned by annotator and length",
        lambda p, ridge, _: fit_learned(p, ridge, "length", annotators=True),
    ),
    Method(
        "learned by all causes",
        lambda p, ridge, _: fit_learned(
            p, ridge, "length", "position", "topic", annotators=True
        ),
    ),
)


@functools.lru_cache(maxsize=len(TUNED_ON + REPORTED))
def make_world(seed: int) -> worlds.World:
    """The world of a seed."""
    return worlds.make_world(seed)


@functools.lru_cache(maxsize=len(TUNED_ON + REPORTED))
def draw(noise: str, count: int, seed: int) -> Pairs:
    """The labeled pairs of a seed."""
    kind = NOISES.get(noise, worlds.no_noise)
    return worlds.draw_pairs(make_world(seed), count, kind, seed)


def reward_of(
    method: Method, noise: str, count: int, ridge: float, setting: float, seed: int
) -> float:
    """The reward of one fit at the KL of the comparison."""
    world = make_world(seed)
    theta = method.policy(draw(noise, count, seed), ridge, setting)
    return worlds.at_matched_kl(world.features @ theta, world.reward)


def cell(method: Method, noise: str, count: int) -> list[dict]:
    """One record per reported seed, with the settings that the other seeds choose."""
    grid = [(ridge, setting) for ridge in RIDGES for setting in method.settings]
    reward = functools.partial(reward_of, method, noise, count)
    tuned = lambda both: np.mean([reward(*both, seed) for seed in TUNED_ON])
    ridge, setting = max(grid, key=tuned)
    named = {"method": method.name, "noise": noise, "pairs": count, "kl": worlds.KL}
    named |= {"ridge": ridge, "setting": setting}
    records = []
    for seed in REPORTED:
        found, reward_of_best = reward(ridge, setting, seed), make_world(seed).reward
        best = worlds.at_matched_kl(reward_of_best, reward_of_best)
        share = {"reward": found, "share_of_best_possible": found / best}
        records.append(named | {"seed": seed} | share)
    return records


def stored(folder: Path, method: Method, noise: str, count: int) -> list[dict]:
    """The records of a cell, from `folder` if it has them with the same protocol."""
    slug = "-".join(f"{count} {noise} {method.name}".lower().replace(",", "").split())
    path, protocol = folder / f"{slug}.json", json.loads(json.dumps(_protocol(method)))
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        if found["protocol"] == protocol:
            return found["records"]
    records = cell(method, noise, count)
    write_json(path, {"protocol": protocol, "records": records})
    return records


def _protocol(method: Method) -> dict:
    """What determines a cell, apart from the code."""
    return {
        "world": [worlds.ANSWERS, worlds.FEATURES, worlds.KL],
        "ridges": RIDGES,
        "settings": method.settings,
        "seeds": [TUNED_ON, REPORTED],
        "prior": PRIOR,
        "audit": [FOLDS, ASSUMED_RATE],
        "reviews": REVIEWS,
    }


# ---- the experiment ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the experiment."""

    out: str = "runs/heterogeneous_noise"
    """Output folder.  Cells of the table that are already in it are not computed again;
    use another folder after changes to the code."""
    pairs: tuple[int, ...] = (2048, 16_384)
    """Numbers of pairs."""
    noises: tuple[str, ...] = tuple(NOISES)
    """Kinds of noise."""


def main(options: Options) -> None:
    """Fits everything, prints the tables, and writes results.json and the figures."""
    clock, out = functools.partial(say, time.perf_counter()), Path(options.out)
    if unknown := set(options.noises) - NOISES.keys():
        raise InputError(
            f"--noises {unknown.pop()}: must be one of {', '.join(NOISES)}"
        )
    (out / "cells").mkdir(parents=True, exist_ok=True)
    records = []
    for count in options.pairs:
        clean = stored(out / "cells", CLEAN, "no noise", count)
        for noise in options.noises:
            records += [record | {"noise": noise} for record in clean]
            for method in METHODS:
                found = stored(out / "cells", method, noise, count)
                records += found
                rewards = [record["reward"] for record in found]
                shares = [record["share_of_best_possible"] for record in found]
                clock(
                    f"{count:6} pairs, {noise:16} {method.name:32} reward "
                    f"{np.mean(rewards):.3f} ± {np.std(rewards, ddof=1):.3f} share "
                    f"{np.mean(shares):.3f} ridge {found[0]['ridge']:g} setting "
                    f"{found[0]['setting']:g}"
                )
    write_json(out / "results.json", json.loads(json.dumps(records)))
    for count in options.pairs:
        found = [record for record in records if record["pairs"] == count]
        print(table(found, options.noises, count))
        shown = [r for r in found if r["noise"] in DRAWN[0] and r["method"] in DRAWN[1]]
        if not shown:
            continue
        grouped_bars(
            out / f"shares-{count}.png",
            shown,
            value="share_of_best_possible",
            group="noise",
            arm="method",
            y_label="share of the best possible reward",
            title=f"Exact policies at the same KL, {count:,} pairs",
        )


DRAWN = (
    ("two annotators", "adversary", "by class", "half by length"),
    (
        "DPO, clean labels",
        "DPO",
        "ROPO",
        "filtered by an audit",
        "forward, known mean rate",
        "forward, known rate of each pair",
        "learned by annotator",
        "learned by annotator and length",
    ),
)
"""Noises and methods of the figures."""


def table(records: list[dict], noises: tuple[str, ...], count: int) -> str:
    """Mean share of the best possible reward and its standard deviation."""
    lines = [f"{count:,} pairs".ljust(34) + "".join(f"{n:>18}" for n in noises)]
    for method in (CLEAN, *METHODS):
        cells = []
        for noise in noises:
            shares = [
                record["share_of_best_possible"]
                for record in records
                if (record["method"], record["noise"]) == (method.name, noise)
            ]
            cells.append(f"{np.mean(shares):.2f} ± {np.std(shares, ddof=1):.2f}")
        lines.append(method.name.ljust(34) + "".join(f"{x:>18}" for x in cells))
    return "\n".join(["", *lines])


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
