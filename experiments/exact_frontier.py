"""What wrong labels cost, and what a correction buys, if policies are exact optima.

Claim
    With 40% of the labels flipped at random, DPO with a tuned beta reaches 61% (2,048
    pairs) and 87% (16,384) of the best possible reward at KL 1, and DPO on clean labels
    98% and 100%.  Flips add variance, which costs reward.  They also shrink the scale
    of the margins, but a smaller beta restores it.  With a correction for the known
    rate, the beta for clean labels is right again.  At the same KL, rDPO gains nothing
    over DPO.  The forward correction recovers a third of the lost reward with 16,384
    pairs, and nothing measurable with 2,048.

Commands
    python -m experiments.exact_frontier
    Writes results.json, the figures, and report.html to runs/exact_frontier, or to the
    folder of --out.

Expected
    Draws 0 to 9.  KL and share at beta 1, with standard deviations; reward at KL 1, its
    share, and its difference from DPO with flips, with a 95% interval:

        2,048 pairs    KL, beta 1   share        at KL 1  share  difference
        DPO, no flips  3.27 ± 0.19  0.97 ± 0.04  1.79     0.98   +0.67 (+0.57 to +0.78)
        DPO, 40%       0.01 ± 0.00  0.68 ± 0.05  1.12     0.61
        rDPO, 40%      2.75 ± 0.62  0.49 ± 0.16  1.05     0.57   -0.07 (-0.14 to +0.01)
        forward, 40%   0.40 ± 0.08  0.66 ± 0.06  1.15     0.63   +0.03 (-0.03 to +0.08)

        16,384 pairs
        DPO, no flips  2.83 ± 0.17  1.00 ± 0.00  1.82     1.00   +0.22 (+0.17 to +0.28)
        DPO, 40%       0.02 ± 0.00  0.91 ± 0.02  1.60     0.87
        rDPO, 40%      0.91 ± 0.15  0.87 ± 0.05  1.59     0.87   -0.01 (-0.03 to +0.02)
        forward, 40%   1.12 ± 0.19  0.92 ± 0.05  1.67     0.92   +0.07 (+0.02 to +0.13)

    The KL at beta 1 also depends on the ridge penalty.  DPO with flips has KL 1 at a
    beta of about 0.08 (2,048 pairs) and 0.12 (16,384), and on clean labels at 2 and
    1.8.
    Time: 26 seconds of CPU time (jax 0.10.2, Intel Xeon).

Protocol
    World: reviews and gold reward of `sentiment_world.py`.  Reference: for each of the
    24 prompts, the uniform distribution over 1,024 reviews that its grammar generates.
    So rewards, KLs, and the best possible curve are exact sums, not estimates.
    Policy: log-linear, ref(y|x) exp(theta f(x, y)) / Z(x).  The 76 features f
    are weighted means, over the clauses of a review, of indicators of what a clause
    says ("not very good").  The gold reward is linear in them, so the best possible
    policies are in this class, and only its labels keep a run from reaching them.
    Pairs: two independent samples of the reference, with a Bradley-Terry label, flipped
    with the stated rate; new pairs, labels, and flips for each draw.
    Training: the mean loss with a ridge penalty, minimized by Newton's method in
    float64 from theta = 0.  (Without a penalty, rDPO has no minimum on 2,048 pairs.)
    Beta only scales theta, so the betas of a method trace one curve.
    Tuning, the same for every method: the ridge with the highest reward at KL 1 on
    draws 100 and 101, of 1e-6, 1e-5, ..., 1e-2; reported on other draws.  For DPO with
    flips and 2,048 pairs, that is the largest; 0.1 is worse (1.37 instead of 1.47).
    Differences are paired by draw, with 95% t intervals.
"""

import dataclasses
import functools
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.optimize import brentq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import sentiment_world as world
from experiments.progress import say
from experiments.sentiment_report import add_shares, matched_table
from jaxpref import losses, report
from jaxpref.evaluate.frontier import best_possible, choose_setting
from jaxpref.files import write_json
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.ranges import checked

FLIP_RATE = 0.4
PAIRS, REVIEWS, DRAWS = (2048, 16_384), 1024, 10
TUNING_SEEDS, TUNING_KL = (100, 101), 1.0
RIDGES = 10.0 ** np.arange(-6, -1)
BETAS = 2.0 ** np.arange(-9, 4.01, 0.5)
MATCHED_KLS = (0.5, 1.0, 2.0)
MOST_KL = 4.0
"""Policies with a larger KL are left out."""
DRAWN_KL = 2.5


@dataclasses.dataclass(frozen=True)
class World:
    """A finite reference: features and gold rewards of its reviews."""

    features: np.ndarray
    """[prompts, reviews, features]."""
    rewards: np.ndarray
    """[prompts, reviews]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    out: str = "runs/exact_frontier"
    """Output folder."""


def phrases(prompt: str, review: str) -> list[tuple[str, float]]:
    """What each clause says, and its share of the gold reward's weighted mean."""
    words, wanted = review.split(), prompt.split()[3]
    weights = [
        weight * (2.0 if aspect == wanted else 1.0)
        for aspect, _, weight in world.read_review(words)
    ]
    said = []
    for at in (n for n, word in enumerate(words) if word == "the"):
        end = next(n for n in range(at + 3, len(words)) if words[n] in world.ADJECTIVES)
        phrase = " ".join(words[at + 3 : end + 1])
        # The value of "warm" and "cold" depends on the aspect.
        fixed = world.ADJECTIVES[words[end]] is not None
        said.append(phrase if fixed else f"{words[at + 1] == 'beer'} {phrase}")
    closing = " ".join(words[words.index(".") + 1 :])
    said += [closing] if closing else []
    return list(zip(said, np.array(weights) / sum(weights), strict=True))


def make_world(reviews: int) -> World:
    """Draws the reference's reviews from the grammar."""
    rng, prompts = np.random.default_rng(0), world.all_prompts()
    texts = [[world.write_review(rng, p) for _ in range(reviews)] for p in prompts]
    said = [[phrases(p, text) for text in row] for p, row in zip(prompts, texts)]
    names = sorted({name for row in said for pairs in row for name, _ in pairs})
    column = {name: n for n, name in enumerate(names)}
    features = np.zeros((len(prompts), reviews, len(names)))
    for x, row in enumerate(said):
        for y, pairs in enumerate(row):
            for name, weight in pairs:
                features[x, y, column[name]] += weight
    rewards = [[world.gold_reward(p, t) for t in row] for p, row in zip(prompts, texts)]
    return World(features, np.array(rewards))


def draw_pairs(made: World, count: int, *, seed: int):
    """Feature differences, chosen minus rejected, on clean labels; and the flips."""
    rng = np.random.default_rng(seed)
    prompts, reviews = made.rewards.shape
    x = rng.integers(prompts, size=count)
    a, b = rng.integers(reviews, size=(2, count))
    wins = world.prefer(made.rewards[x, a], made.rewards[x, b], seed=seed)
    difference = made.features[x, a] - made.features[x, b]
    flips = rng.random(count) < FLIP_RATE
    return np.where(wins, 1, -1)[:, None] * difference, np.where(flips, -1, 1)


def fit(derivatives: Callable, differences: np.ndarray, ridge: float) -> np.ndarray:
    """Minimizes mean loss(differences theta) + ridge |theta|^2 / 2, from theta = 0.

    Newton's method with backtracking.  A negative curvature of the loss in a margin
    counts as 0, so every step descends.  `derivatives` gives the losses of an array of
    margins and their first and second derivatives.
    """
    count, size = differences.shape
    theta, margins = np.zeros(size), np.zeros(count)
    values, gradients, curvatures = map(np.asarray, derivatives(margins))
    value = values.mean()
    for _ in range(200):
        gradient = differences.T @ gradients / count + ridge * theta
        weighted = np.maximum(curvatures, 0)[:, None] * differences
        hessian = differences.T @ weighted / count + ridge * np.eye(size)
        step = np.linalg.solve(hessian, -gradient)
        decrease, length = float(-gradient @ step), 1.0
        if decrease < 1e-9:
            return theta
        while True:
            new = theta + length * step
            margins = differences @ new
            values, gradients, curvatures = map(np.asarray, derivatives(margins))
            new_value = values.mean() + ridge * (new @ new) / 2
            if new_value <= value - 1e-4 * length * decrease or length < 1e-6:
                break
            length /= 2
        theta, value = new, new_value
    return theta


def measure(made: World, theta: np.ndarray) -> dict:
    """Exact reward and KL to the reference of a log-linear policy."""
    logits = made.features @ theta
    logits -= logits.max(axis=1, keepdims=True)
    weights = np.exp(logits)
    normalizer = np.mean(weights, axis=1, keepdims=True)
    policy = weights / normalizer / weights.shape[1]
    kl = np.mean(np.sum(policy * (logits - np.log(normalizer)), axis=1))
    reward = np.mean(np.sum(policy * made.rewards, axis=1))
    return {"reward": float(reward), "kl": max(float(kl), 0.0)}


def reward_at(made: World, theta: np.ndarray, kl: float) -> float:
    """Reward of the policy c theta whose scale c gives this KL."""
    scale = brentq(
        lambda log: measure(made, np.exp(log) * theta)["kl"] - kl, -15, 15, xtol=1e-3
    )
    return measure(made, np.exp(scale) * theta)["reward"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A loss at beta 1, and whether it sees flipped labels."""

    name: str
    loss: Callable
    flipped: bool


def make_methods() -> list[Method]:
    """DPO on clean labels, and all losses on flipped ones."""
    at, known = f", {100 * FLIP_RATE:.0f}% flips", {"flip_rate": FLIP_RATE}
    one = functools.partial
    return [
        Method("DPO, no flips", one(losses.dpo, beta=1.0), False),
        Method(f"DPO{at}", one(losses.dpo, beta=1.0), True),
        Method(f"rDPO{at}", one(losses.rdpo, beta=1.0, **known), True),
        Method(f"forward DPO{at}", one(losses.forward_dpo, beta=1.0, **known), True),
    ]


def make_derivatives(loss: Callable) -> Callable:
    """The compiled losses of an array of margins, and their two derivatives."""

    def of_margins(margins):
        zero = jnp.zeros_like(margins)
        return loss(margins, zero, zero, zero)

    @jax.jit
    def derivatives(margins):
        gradient = jax.grad(lambda margins: jnp.sum(of_margins(margins)))
        # Pairs are independent, so this is the diagonal of the Hessian.
        gradients, curvatures = jax.jvp(gradient, (margins,), (jnp.ones_like(margins),))
        return of_margins(margins), gradients, curvatures

    return derivatives


def make_records(made: World, method: Method, count: int, seeds) -> list[dict]:
    """The method's sweeps over beta, with the ridge tuned on `TUNING_SEEDS`."""
    derivatives = make_derivatives(method.loss)

    def fitted(seed: int, ridge: float) -> np.ndarray:
        clean, signs = draw_pairs(made, count, seed=seed)
        observed = clean * signs[:, None] if method.flipped else clean
        return fit(derivatives, observed, ridge)

    tuning = np.array(
        [[reward_at(made, fitted(seed, ridge), TUNING_KL) for ridge in RIDGES]
         for seed in TUNING_SEEDS]
    )  # fmt: skip
    same = np.full_like(tuning, TUNING_KL)
    ridge = float(RIDGES[choose_setting(same, tuning, most_kl=TUNING_KL)])
    named = {"arm": method.name, "pairs": count, "ridge": ridge}
    records = []
    for seed in seeds:
        theta = fitted(seed, ridge)
        points = ({"beta": float(b)} | measure(made, theta / b) for b in BETAS)
        records += [named | {"seed": seed} | p for p in points if p["kl"] <= MOST_KL]
    return records


def table_at_beta_one(records: list[dict], title: str) -> report.Table:
    """Reward, KL, and share of the best possible of each method at beta 1."""
    rows = []
    for name in dict.fromkeys(r["arm"] for r in records):
        runs = [r for r in records if r["arm"] == name and r["beta"] == 1]
        cells = (
            report.mean_spread([run[key] for run in runs if run[key] is not None])
            for key in ("reward", "kl", "share_of_best_possible")
        )
        rows.append([name, f"{runs[0]['ridge']:g}", *cells])
    return report.Table(
        [title, "ridge", "reward at beta 1", "KL", "share of best possible"],
        rows,
        caption=f"mean ± standard deviation over {len(runs)} draws; share: gain over "
        "the reference, divided by the largest possible gain at the same KL",
    )


def drawn(records: list[dict], *, draws: int) -> list[dict]:
    """The settings up to a mean KL of `DRAWN_KL`, if measured on every draw.

    A mean over only the draws that are within reach would be misleading.
    """
    settings: dict[tuple, list[dict]] = {}
    for record in records:
        settings.setdefault((record["arm"], record["beta"]), []).append(record)
    return [
        run
        for runs in settings.values()
        if len(runs) == draws and np.mean([run["kl"] for run in runs]) <= DRAWN_KL
        for run in runs
    ]


def main(options: Options) -> None:
    """Runs the experiment and writes the report."""
    jax.config.update("jax_enable_x64", True)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    clock = functools.partial(say, time.perf_counter())
    made = make_world(REVIEWS)
    # The reviews are the whole reference, not samples of it, so results are exact even
    # if few of them have weight.  `best_possible` would reject these: hence the copies.
    tilts = np.concatenate([[0.0], 4 * 2.0 ** np.arange(-8, 0.01, 0.125)])
    kls, rewards = best_possible(np.tile(made.rewards, 30), tilts)
    curve = [{"kl": float(k), "reward": float(r)} for k, r in zip(kls, rewards)]
    records, tables = [], []
    baseline = make_methods()[1].name
    for count in PAIRS:
        found = [
            record
            for method in make_methods()
            for record in make_records(made, method, count, range(DRAWS))
        ]
        clock(f"{count:,} pairs: done")
        add_shares(found, curve)
        title = f"{count:,} pairs"
        tables += [
            table_at_beta_one(found, title),
            matched_table(found, curve, baseline=baseline, at=MATCHED_KLS, title=title),
        ]
        records += found
    write_json(
        out / "results.json",
        {
            "flip_rate": FLIP_RATE,
            "best_possible": curve,
            "runs": records,
        },
    )
    figures = {count: out / f"reward_kl_{count}.png" for count in PAIRS}
    for count, path in figures.items():
        found = [r for r in records if r["pairs"] == count]
        report.frontiers(
            path,
            drawn(found, draws=DRAWS),
            best=curve,
            title=f"Exactly optimized policies, {count:,} pairs",
        )
    page = [
        report.Section("Result", [*(report.Figure(f) for f in figures.values())]),
        report.Section("Tables", tables),
        report.Section("What was done", ["From the experiment's file:\n\n"
        + textwrap.indent(__doc__, "    ")]),
    ]  # fmt: skip
    report.write_html(
        out / "report.html",
        "What wrong labels cost, and what a correction buys",
        page,
        summary="Log-linear policies whose losses are minimized exactly.",
    )
    for table in tables:
        for row in [table.columns, *table.rows]:
            print("  ".join(f"{cell:<24}" for cell in row).rstrip())
        print()
    print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    with entry_point():
        main(checked(tyro.cli(Options, description=__doc__)))
