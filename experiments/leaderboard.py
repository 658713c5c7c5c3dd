"""Every loss and objective at matched KL, over five kinds of label noise.

Claim
    At the same KL, no loss beats DPO with a tuned beta if labels are flipped at random
    with one rate.  If half of the labels follow the length of the answers, DPO loses a
    third of the reward, losses that distrust contradicted pairs lose more than half of
    it, and knowing which labels they are restores it.

Commands
    python -m experiments.leaderboard --smoke
    python -m experiments.leaderboard --full
    python -m experiments.leaderboard --full --methods rdpo,ropo --noises none
    Writes leaderboard.json (a list of runs), table.json, table.md, and report.html to
    runs/leaderboard, or to the folder of --out.  Repeating the command trains only what
    is missing.

Expected
    The tables of docs/leaderboard.md.

Protocol
    World: prompts and gold reward of `sentiment_world.py`.  For each of the 24 prompts,
    the reference is uniform over 256 different reviews that the grammar generates.  A
    policy is log-linear, ref(y|x) exp(theta f(x, y)) / Z(x), so its reward and its KL
    to the reference are exact sums.  The features f are those of `exact_frontier.py`,
    in which the gold reward is linear, and the number of words, which is almost
    uncorrelated with it.  Log-probabilities of tokens are exact too: the next-token
    distributions are those of the tree of all prefixes of a prompt's reviews.
    Pairs: two different samples of the reference, with a Bradley-Terry label; then
    the noise.  "symmetric": flips with this probability.  "two pools": ten known
    annotators, five with a flip rate of 5% and five with 40%.  "half by length": half
    of the labels, at random, prefer the longer review whatever its quality, and it is
    not known which.
    Methods: all that the library can train on these pairs, from its own lists.
    Objectives wrap DPO.  Options have the library's defaults, except for those that
    have none (`SETTINGS` of `leaderboard_methods.py`), and ramp_steps of crm.  Some
    methods know more than the others: the mean flip rate (1/4 if half of the labels
    are by length), the flip rate of each pair (1/2 for a label by length), or the gold
    rewards of the answers.  Losses of reward models train a reward r(x, y), linear in
    the same features, and the policy is the optimum for it, ref(y|x) exp(r(x, y) /
    beta) / Z(x).
    Training: one pass over 8,192 pairs, 128 steps of 64, with the gradients, AdamW,
    clipping, and cosine schedule of `jaxpref.train`, float32.
    Sweep: 12 betas from 2^-6 to 2^5 times the learning rates 0.1, 0.2, and 0.4, the
    same for all losses.  sft has no beta and is swept over 12 learning rates.  Methods
    whose steps take many times as long (`COSTLY`) have every second beta and the middle
    learning rate.  The learning rates were 0.1, 0.3, and 1 at first, and were changed
    for all methods after a look at results that included reported seeds.
    Tuning, the same for every method and kind of noise, on seeds 100 and 101: for each
    of the matched KLs, the learning rate whose betas have the highest mean reward at
    this KL.  The beta of the tables is the one with the highest mean reward at a mean
    KL of at most 1, at the learning rate for KL 1.
    Reported on seeds 0 to 4 for twelve methods, 0 and 1 for the others; a seed
    determines pairs, labels, and noise.
    Reward at matched KL: along the betas at the tuned learning rate, piecewise linear
    in the root of the KL, for each seed.  Between betas, this is up to 0.02 too low
    (checked for IPO).  Differences from DPO, tuned in the same way, are paired by seed,
    with 95% t intervals.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import leaderboard_methods as methods
from experiments.leaderboard_report import read_part, write_results
from experiments.leaderboard_world import NOISES, Noise, World, draw_pairs, make_world
from experiments.noisy_sentiment import begin
from experiments.progress import say
from jaxpref.errors import InputError
from jaxpref.evaluate.frontier import best_possible
from jaxpref.files import write_json
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.ranges import checked


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All settings that determine the result; see "Protocol" above."""

    reviews: int = 256
    pairs: int = 8192
    batch: int = 64
    betas: tuple[float, ...] = tuple(2.0 ** np.arange(-6, 6))
    learning_rates: tuple[float, ...] = (0.1, 0.2, 0.4)
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Reported seeds of the methods in `FULL`; the others have the first two."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    out: str | None = None
    """Output folder; repeating the command resumes the run in it.  Default:
    runs/leaderboard_smoke or runs/leaderboard."""
    smoke: bool = False
    """A sanity check of a few minutes; its numbers mean nothing."""
    full: bool = False
    """The whole table."""
    methods: str = ""
    """Names of methods, separated by commas; all by default.  DPO is always run."""
    noises: str = ""
    """Names of kinds of noise, separated by commas; all by default."""


def choose(options: Options) -> tuple[Protocol, Path]:
    """The protocol and the output folder."""
    if options.smoke == options.full:
        raise InputError("give either --smoke or --full")
    if options.full:
        return Protocol(), Path(options.out or "runs/leaderboard")
    protocol = Protocol(
        reviews=32, pairs=256, betas=(0.1, 1.0), learning_rates=(0.1,),
        tuning_seeds=(100,), seeds=(0, 1),
    )  # fmt: skip
    return protocol, Path(options.out or "runs/leaderboard_smoke")


def named(option: str, names: str, known) -> list[str]:
    """The names in a comma-separated list, in the order of `known`."""
    given = [name.strip() for name in names.split(",") if name.strip()]
    for name in given:
        if name not in known:
            raise InputError(f"--{option} {name}: expected some of {', '.join(known)}")
    return [name for name in known if name in given or not given]


def run_method(
    world: World, method: methods.Method, noise: Noise, protocol: Protocol, train
) -> dict:
    """All runs of one method with one kind of noise: the contents of its file."""
    started = time.perf_counter()
    count = len(protocol.seeds) if method.name in methods.FULL else 2
    seeds = [*protocol.tuning_seeds, *protocol.seeds[:count]]
    sizes = methods.Sizes(protocol.pairs, protocol.batch)
    draws = [draw_pairs(world, noise, protocol.pairs, seed=seed) for seed in seeds]
    grid = methods.make_grid(method, protocol.betas, protocol.learning_rates)
    pairs = methods.stacked(draws, sizes)
    found = train(pairs, jnp.array(grid.betas), jnp.array(grid.learning_rates))
    number = lambda x: float(x) if np.isfinite(x) else None
    return {
        "method": method.name,
        "noise": noise.name,
        "knows": method.knows,
        "seeds": seeds,
        "betas": [number(x) for x in grid.betas],
        "learning_rates": grid.learning_rates.tolist(),
        **{
            name: [[number(x) for x in row] for row in np.asarray(values, np.float64)]
            for name, values in found.items()
        },
        "seconds": time.perf_counter() - started,
    }


def best_curve(world: World) -> list[dict]:
    """The exact best possible curve.

    The reviews are the whole reference, not samples of it, so the curve is exact even
    if few of them have weight.  `best_possible` would reject these: hence the copies.
    """
    tilts = np.concatenate([[0.0], 4 * 2.0 ** np.arange(-8, 0.01, 0.125)])
    found = zip(*best_possible(np.tile(world.rewards, 60), tilts))
    return [{"kl": float(kl), "reward": float(reward)} for kl, reward in found]


def main(options: Options) -> None:
    """Runs what is missing, and writes the report."""
    protocol, out = choose(options)
    table = methods.all_methods()
    order = [*methods.FULL, *(name for name in table if name not in methods.FULL)]
    order.sort(key=lambda name: name in methods.COSTLY)
    chosen = named("methods", options.methods and options.methods + ",dpo", order)
    noises = [NOISES[name] for name in named("noises", options.noises, NOISES)]
    begin(protocol, out)
    (out / "parts").mkdir(exist_ok=True)
    clock = functools.partial(say, time.perf_counter())
    world = make_world(protocol.reviews)
    clock(f"{len(chosen)} methods, {len(noises)} kinds of noise")
    parts = []
    for name in chosen:
        trainers = {}
        for noise in noises:
            path = out / "parts" / f"{name}-{noise.name.replace(' ', '-')}.json"
            if not path.exists():
                # Noises that differ only in their labels share a program.
                method = table[name]
                key = Noise(
                    "",
                    noise.flip_rate if method.needs_rate else 0.0,
                    noise.annotators if method.learns else 0,
                )
                if key not in trainers:
                    trainers[key] = methods.trainer(world, method, key)
                part = run_method(world, method, noise, protocol, trainers[key])
                write_json(path, part)
                clock(f"{name}, {noise.name}: {part['seconds']:.0f} s")
            parts.append(read_part(path))
    write_results(
        out,
        parts,
        best_curve(world),
        tuning_seeds=protocol.tuning_seeds,
        about=__doc__ or "",
    )
    clock(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    with entry_point():
        main(checked(tyro.cli(Options, description=__doc__)))
