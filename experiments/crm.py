"""Collaborative reward modeling with and without each of its halves.

Claim
    Peer review (Zhang et al. 2025, CRM, arXiv:2505.10597: two reward models that select
    each other's pairs) makes reward models more accurate, except with few pairs and
    many flips (1,024 and 40%), where it does harm.  The curriculum (from easy to hard)
    adds nothing to it, and alone does harm at 40% flips.

Commands
    python -m experiments.crm             (default)
    python -m experiments.crm --smoke     (sanity check)
    Writes results.json and table.md to runs/crm, with the suffix _smoke, or to the
    folder of --out.  Repeating the command trains only what is missing.

Expected
    Accuracy, mean and standard deviation over five seeds, and the difference from all
    pairs with its 95% interval:

                                    1,024 pairs, 20% flips
        all pairs                   0.829 ± 0.012
        curriculum                  0.784 ± 0.050  -0.045 (-0.116 to +0.026)
        peer review                 0.861 ± 0.013  +0.032 (+0.005 to +0.058)
        peer review and curriculum  0.848 ± 0.026  +0.020 (-0.025 to +0.065)

                                    1,024 pairs, 40% flips
        all pairs                   0.657 ± 0.024
        curriculum                  0.540 ± 0.016  -0.117 (-0.146 to -0.088)
        peer review                 0.582 ± 0.029  -0.075 (-0.110 to -0.040)
        peer review and curriculum  0.575 ± 0.026  -0.082 (-0.111 to -0.053)

                                    4,096 pairs, 20% flips
        all pairs                   0.895 ± 0.012
        curriculum                  0.918 ± 0.008  +0.023 (+0.009 to +0.037)
        peer review                 0.932 ± 0.009  +0.036 (+0.018 to +0.055)
        peer review and curriculum  0.929 ± 0.013  +0.033 (+0.011 to +0.056)

                                    4,096 pairs, 40% flips
        all pairs                   0.717 ± 0.026
        curriculum                  0.590 ± 0.028  -0.126 (-0.153 to -0.099)
        peer review                 0.740 ± 0.041  +0.023 (+0.002 to +0.045)
        peer review and curriculum  0.730 ± 0.045  +0.014 (-0.012 to +0.039)

    Time: 2 minutes of CPU time.

Protocol
    World and models are those of `review_rewards.py`: 24 prompts with 256 reviews each,
    and a reward model with one hidden layer of 64 units.
    Pairs: 1,024 or 4,096 for each seed, with Bradley-Terry labels, P = s(2 (r_a -
    r_b)), of which 20% or 40% are flipped.  The methods know this rate.
    Training: 30 epochs in steps of 64 pairs, with the gradients, AdamW, clipping, and
    cosine schedule of `jaxpref.train`, and a learning rate of 3e-3, which was not
    tuned.  The methods are `crm` with other options, and have the same initial models,
    batches, and labels.  `ramp_steps` is three epochs.
    Measured: the accuracy on 4,096 other pairs of the same reviews, compared with the
    gold reward, mean of both models.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import review_rewards as models
from experiments.leaderboard_world import World, make_world
from experiments.noisy_sentiment import begin
from experiments.progress import say
from jaxpref import losses
from jaxpref.evaluate.frontier import t_interval
from jaxpref.files import write_json, write_whole
from jaxpref.objectives import Objective, crm
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.ranges import checked


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All settings that determine the result; see "Protocol" above."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    flip_rates: tuple[float, ...] = (0.2, 0.4)
    reviews: int = 256
    pairs: tuple[int, ...] = (1024, 4096)
    batch: int = 64
    epochs: int = 30
    learning_rate: float = 3e-3
    tested_pairs: int = 4096


@dataclasses.dataclass(frozen=True)
class Setting:
    """The pairs of some runs."""

    pairs: int
    flip_rate: float

    @property
    def title(self) -> str:
        """For tables and messages."""
        return f"{self.pairs:,} pairs, {self.flip_rate:.0%} flips"


METHODS = {
    "all pairs": {"noise_rate": 0.0},
    "curriculum": {"peer_review": False, "curriculum": True},
    "peer review": {},
    "peer review and curriculum": {"curriculum": True},
}
"""Options of `crm`.  With a noise rate of 0, both models train on all pairs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    out: str | None = None
    """Output folder; repeating the command resumes the run in it.  Default: runs/crm or
    runs/crm_smoke."""
    smoke: bool = False
    """A sanity check of seconds; its numbers mean nothing."""


def choose(options: Options) -> tuple[Protocol, Path]:
    """The protocol and the output folder."""
    if not options.smoke:
        return Protocol(), Path(options.out or "runs/crm")
    protocol = Protocol(
        seeds=(0, 1), flip_rates=(0.4,), reviews=8, pairs=(64,), batch=16, epochs=2,
        tested_pairs=64,
    )  # fmt: skip
    return protocol, Path(options.out or "runs/crm_smoke")


def make_objective(method: str, setting: Setting, protocol: Protocol) -> Objective:
    """CRM, or a part of it."""
    options = {"noise_rate": setting.flip_rate} | METHODS[method]
    epoch_steps = setting.pairs // protocol.batch
    if not options.pop("curriculum", False):
        return crm(losses.bradley_terry, ramp_steps=3 * epoch_steps, **options)
    return crm(
        losses.bradley_terry,
        ramp_steps=3 * epoch_steps,
        epoch_steps=epoch_steps,
        **options,
    )


def run_method(
    method: str, setting: Setting, world: World, protocol: Protocol
) -> dict[str, list[float]]:
    """The accuracy of each seed, mean of both models."""
    objective = make_objective(method, setting, protocol)
    draw = functools.partial(models.draw_pairs, world)
    seeds = protocol.seeds
    records = [
        models.shuffled(
            draw(setting.flip_rate, setting.pairs, seed=seed),
            epochs=protocol.epochs,
            batch=protocol.batch,
            seed=seed,
        )
        for seed in seeds
    ]
    tested = [draw(0.0, protocol.tested_pairs, seed=1000 + s).answers for s in seeds]

    @jax.jit
    @jax.vmap
    def accuracies(records, tested, seed):
        found = models.train(
            objective,
            world.features,
            records,
            jax.random.key(seed),
            learning_rate=protocol.learning_rate,
        )
        return [models.accuracy(world, found[m], tested) for m in ("one", "two")]

    records = jax.tree.map(lambda *x: np.stack(x), *records)
    one, two = accuracies(records, np.stack(tested), np.array(seeds))
    return {"accuracy": ((one + two) / 2).tolist()}


def main(options: Options) -> None:
    """Runs what is missing, and writes the table."""
    protocol, out = choose(options)
    begin(protocol, out)
    (out / "parts").mkdir(exist_ok=True)
    clock = functools.partial(say, time.perf_counter())
    world = make_world(protocol.reviews)
    settings = [
        Setting(pairs, rate) for pairs in protocol.pairs for rate in protocol.flip_rates
    ]
    results = []
    for setting in settings:
        for method in METHODS:
            percent = round(100 * setting.flip_rate)
            name = f"{method.replace(' ', '_')}-{setting.pairs}-{percent}.json"
            path = out / "parts" / name
            if not path.exists():
                found = run_method(method, setting, world, protocol)
                part = {"method": method, **dataclasses.asdict(setting), **found}
                write_json(path, part)
            results.append(json.loads(path.read_text()))
            mean = np.mean(results[-1]["accuracy"])
            clock(f"{method}, {setting.title}: accuracy {mean:.3f}")
    write_json(out / "results.json", results)
    write_whole(str(out / "table.md"), table(results, settings))


def table(results: list[dict], settings: list[Setting]) -> str:
    """Mean and standard deviation over seeds, by method and setting.

    And the difference from all pairs, with its 95% t interval over seeds.
    """
    lines = [
        "| trained on | " + " | ".join(x.title for x in settings) + " |",
        "|---" * (1 + len(settings)) + "|",
    ]
    of = lambda name: [np.array(r["accuracy"]) for r in results if r["method"] == name]
    for method in METHODS:
        cells = []
        for own, every in zip(of(method), of("all pairs"), strict=True):
            cells.append(f"{own.mean():.3f} ± {own.std(ddof=1):.3f}")
            if method != "all pairs":
                mean, low, high = t_interval(own - every)
                cells[-1] += f", {mean:+.3f} ({low:+.3f} to {high:+.3f})"
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with entry_point():
        main(checked(tyro.cli(Options, description=__doc__)))
