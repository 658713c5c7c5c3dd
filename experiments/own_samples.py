"""What training on one's own answers gains over a fixed set of pairs.

Question
    Do rounds of sampling, scoring by a reward model, pairing, and training reach more
    gold reward at the same KL than DPO on a fixed set of pairs: with the labels that
    the reward model has learned from, or with as many answers of the reference, ranked
    by the same reward model?  The recipes are those of `jaxpref rounds`: iterated DPO
    (with a reward model, as in Orca-Math, arXiv:2402.14830), online DPO (2402.04792),
    SPA (2406.04412), UPO (2409.11212), temporal self-rewarding (2508.06026), and delta
    learning (2507.06187).

Commands
    python -m experiments.own_samples             (three recipes, two seeds)
    python -m experiments.own_samples --why       (one change at a time, two seeds)
    python -m experiments.own_samples --smoke     (sanity check)
    python -m experiments.own_samples --full      (all recipes, five seeds)
    Repeating a command resumes its run in OUT: runs/own_samples (also with --why),
    runs/own_samples_smoke, runs/own_samples_full, or the folder of --out.

Expected
    Gold reward at a KL to the reference, mean and standard deviation of two seeds.  The
    reference has -0.04; the best possible is 1.25, 1.79, and 2.54.

                                            KL 0.5        KL 1          KL 2
        offline DPO, the labels          0.66 +- 0.02   –
        offline DPO, the reward model    0.61 +- 0.02   0.89 +- 0.03   –
        iterated DPO                     0.60 +- 0.05   0.87 +- 0.07   1.19 +- 0.04
        upo                              0.54 +- 0.03   0.81 +- 0.07   1.19 +- 0.10
        spa, all labels                  0.59 +- 0.03   0.86 +- 0.09   1.21 +- 0.21
        spa, 3.3% of the labels          0.23 +- 0.04   0.33 +- 0.06   0.44 +- 0.18

    –: not both seeds got as far.
    Samples of its own give a policy no advantage here over DPO on the labels that the
    reward model was trained on, nor over pairs of the reference's answers.  At a KL of
    0.5, DPO on the labels is ahead of the other methods that have all of them, by 0.05
    (the reward model; 95% interval 0.01 to 0.10), 0.06 (iterated DPO; -0.17 to 0.29),
    0.07 (SPA; 0.03 to 0.11), and 0.12 (UPO; 0.06 to 0.18).  SPA does not make up for
    labels: with 3.3% of them, 30% flipped, it reaches a third of the reward at the same
    KL.  The policies differ more in how far they have moved: at the end, the mean KL is
    0.9 and 1.9 for the two offline methods, 2.9 for iterated DPO and UPO, and above 5
    for SPA.

    --why, in the same units; the first line is the baseline:

        iterated DPO                     0.60 +- 0.05   0.87 +- 0.07   1.19 +- 0.04
        data: answers of the reference   0.61 +- 0.02   0.89 +- 0.03   –
        no rejected answers              0.56 +- 0.05   0.81 +- 0.08   –
        neither                          0.57 +- 0.01   –              –
        algorithm: RLOO                  0.58 +- 0.02   0.85 +- 0.02   –
        reward: 1/8 of the labels        0.07 +- 0.13   0.18 +- 0.17   –
        reward: labels without flips     0.71 +- 0.02   1.05 +- 0.01   1.48 +- 0.02
        half of the prompts              0.58 +- 0.08   0.83 +- 0.09   –

    The reward model makes the largest differences.  Without flips in its labels, the
    gain at a KL of 2 is 0.29, but with two seeds, its 95% interval is -0.27 to 0.85.
    Of the others, only the cost of leaving out the rejected answers at a KL of 0.5,
    0.04, has an interval that excludes 0 (0.03 to 0.05), one of about 20, with two
    seeds: it may be chance.  That the reward matters most
    agrees with Ivison et al. 2024, arXiv:2406.09279.  Tajwar et al. 2024,
    arXiv:2404.14367, find that on-policy samples and a negative gradient help; here
    they move the policy further in as many steps, but to little more reward at the same
    KL: without rejected answers, training on answers of the reference ends at a KL of
    0.7, and iterated DPO at 2.9.
    Time: 12 minutes of CPU time, and 9 more for --why; two seeds run at once.  The
    default took 11.3 minutes on two cores of an Intel Xeon beside other work.

Protocol
    World: `sentiment_world.py`, a grammar of reviews with an exact gold reward, and its
    reference, a Llama model with 0.23 M parameters (`noisy_sentiment.py`).
    Labels: for each seed, 8,192 pairs of samples of the reference with Bradley-Terry
    labels of the gold reward, of which 30% are flipped.  A reward model is trained on
    them in one pass (`--loss bradley_terry`); nothing else sees the gold reward.
    Rounds: 64 answers to each of the 24 prompts, of which the 16 best are paired with
    the 16 worst by the reward model (SPA: by log-ratios), and 12 steps of 32 pairs.
    SPA begins with three epochs on 3.3% of the labels, 270 pairs, or with 85 steps of
    all of them; delta learning takes its rejected answers from a reference that was
    trained for a tenth of the steps.
    Offline: DPO on the labeled pairs, 255 steps, evaluated after each third; or on
    pairs of one sample of answers of the reference, as many as all rounds have,
    evaluated after as many steps as each round: checkpoints of one run with a constant
    learning rate.  The second is iterated DPO with a single round.
    --why: from iterated DPO, one thing is changed.  "No rejected answers" trains on the
    chosen ones by maximum likelihood.  RLOO samples about as many answers in all (4,320
    of 4,608), without a KL penalty.  A reward model of 1/8 of the labels is trained for
    1/8 of the steps.
    Half of the prompts are given twice as many answers; evaluated on all.
    Optimizer: momentum with steps of constant length (see `noisy_sentiment.py`).
    Measured on 1,920 samples of each policy: gold reward, and KL to the reference.
    Reward at matched KL: along the rounds of a recipe, piecewise linear in the root of
    the KL, for each seed.  All betas are 0.1.
    Learning rate and number of labels were chosen on a seed that is not reported: with
    2,048 labels, the reward model's errors misled every method that followed it.
"""

import concurrent.futures
import dataclasses
import functools
import json
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import noisy_sentiment as sentiment
from experiments import sentiment_world as world
from experiments.own_samples_methods import (
    Protocol,
    arms,
    inputs,
    train_weak,
    variations,
)
from experiments.progress import say
from jaxpref import report
from jaxpref.errors import InputError, show
from jaxpref.evaluate.frontier import reward_at_kl, t_interval
from jaxpref.files import write_json
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.ranges import checked
from jaxpref.train import MeshConfig, make_mesh

ABOUT = "From the experiment's file:\n\n" + textwrap.indent(__doc__ or "", "    ")
KLS = (0.5, 1.0, 2.0)
"""At which rewards are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    out: str | None = None
    """Output folder; repeating the command resumes the run in it.  Default:
    runs/own_samples, with the suffix _smoke or _full."""
    smoke: bool = False
    """A sanity check; its numbers mean nothing."""
    full: bool = False
    """All recipes and five seeds."""
    why: bool = False
    """Data, algorithm, reward and prompts, varied one at a time."""


def choose(options: Options) -> tuple[Protocol, Path]:
    """The protocol and the output folder."""
    if options.smoke and options.full:
        raise InputError("--smoke and --full cannot be combined")
    protocol, out = Protocol(), "runs/own_samples"
    if options.full:
        recipes = ("iterated_dpo", "online_dpo", "upo", "spa", "temporal", "delta")
        protocol, out = Protocol(seeds=(0, 1, 2, 3, 4), recipes=recipes), f"{out}_full"
    if options.smoke:
        protocol = Protocol(
            seeds=(0,), recipes=("iterated_dpo",), rounds=2, labels=128, answers=8,
            per_prompt=2, steps=3, batch=16, sft_reviews=2000, sft_steps=40,
            sft_batch=64, evaluated_samples=240, reference_samples=2400,
        )  # fmt: skip
        out = f"{out}_smoke"
    return protocol, Path(options.out or out)


def main(options: Options) -> None:
    """Runs all recipes and writes the report."""
    protocol, out = choose(options)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "protocol.json"
    asked = json.loads(json.dumps(dataclasses.asdict(protocol)))
    if path.exists() and json.loads(path.read_text()) != asked:
        raise InputError(f"{out}: has another protocol; use another --out")
    write_json(path, asked)
    clock = functools.partial(say, time.perf_counter())
    mesh = make_mesh(MeshConfig())
    reference = sentiment.train_reference(protocol, out)
    rewards = sentiment.reference_rewards(protocol, reference, out, mesh=mesh)
    start = {"kl": 0.0, "reward": float(np.mean(rewards))}
    if "delta" in protocol.recipes:
        train_weak(protocol, out)
    methods = variations if options.why else arms

    def of_seed(seed: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        with jax.set_mesh(mesh):
            made = inputs(protocol, out, seed, reference, mesh)
            clock(f"seed {seed}: labels and reward model")
            for name, policies in methods(protocol, out, seed, reference, made):
                about = {"arm": name, "seed": seed}
                found.append({**about, "step": 0, **start})
                for n, policy in enumerate(policies, start=1):
                    values = measured(protocol, policy, reference, out, seed)
                    found.append({**about, "step": n, **values})
                last = found[-1]
                shown = f"reward {last['reward']:.2f}, KL {last['kl']:.2f}"
                clock(f"seed {seed}: {name}: {shown}")
        return found

    # Commands are processes, and mostly start and compile, on one core.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        of_seeds = list(pool.map(of_seed, protocol.seeds))
    records = [one for found in of_seeds for one in found]
    write_json(out / f"{name_of(options)}.json", records)
    best = world.best_possible_curve(rewards)
    write_report(out, name_of(options), records, best)


def name_of(options: Options) -> str:
    """The name of the files that are written."""
    return "why" if options.why else "own_samples"


def measured(
    protocol: Protocol, policy: Path, reference: Path, out: Path, seed: int
) -> dict[str, Any]:
    """Gold reward and KL of a policy, unless an earlier command has measured it."""
    path = out / f"seed-{seed}" / "measured.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    name = policy.relative_to(path.parent).as_posix()
    made = max(x.stat().st_mtime_ns for x in policy.rglob("*"))
    if name not in known or known[name]["made"] != made:
        values = sentiment.measure(protocol, policy, reference, seed=1000 + seed)
        known[name] = {"made": made, "values": values}
        write_json(path, known)
    return known[name]["values"]


def tables(
    records: Sequence[dict[str, Any]], baseline: str
) -> tuple[report.Table, report.Table]:
    """Reward at matched KL, and the difference from a baseline by seed."""
    names = list(dict.fromkeys(one["arm"] for one in records))
    seeds = sorted({one["seed"] for one in records})

    def at(name: str, kl: float) -> np.ndarray:
        found = []
        for seed in seeds:
            path = [x for x in records if (x["arm"], x["seed"]) == (name, seed)]
            path.sort(key=lambda one: one["kl"])
            kls, rewards = ([one[k] for one in path] for k in ("kl", "reward"))
            found.append(reward_at_kl(np.array(kls), np.array(rewards), np.array([kl])))
        return np.concatenate(found)

    rewards, gains = [], []
    for name in names:
        ends = [x for x in records if x["arm"] == name and x["step"]]
        last = [max((x for x in ends if x["seed"] == s), key=lambda x: x["step"])
                for s in seeds]  # fmt: skip
        # A mean over other seeds than a neighbor's could not be compared with it.
        of_kls = [
            report.mean_spread(values.tolist()) if np.isfinite(values).all() else "–"
            for values in (at(name, kl) for kl in KLS)
        ]
        rewards.append(
            [
                name,
                report.mean_spread([x["reward"] for x in last]),
                report.mean_spread([x["kl"] for x in last]),
                f"{100 * np.mean([x['malformed'] for x in last]):.1f}%",
                *of_kls,
            ]
        )
        if name != baseline:
            gains.append([name, *(_gain(at(name, k) - at(baseline, k)) for k in KLS)])
    at_kls = [f"at KL {kl:g}" for kl in KLS]
    return (
        report.Table(["method", "reward", "KL", "malformed", *at_kls], rewards),
        report.Table([f"difference from {baseline}", *at_kls], gains),
    )


def _gain(values: np.ndarray) -> str:
    """The mean over seeds and its 95% t interval; fewer than two have none."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return "–"
    low, high = t_interval(values)[1:]
    return f"{values.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def write_report(
    out: Path,
    name: str,
    records: list[dict[str, Any]],
    best: list[dict[str, float]],
) -> None:
    """Writes the figure and the page, and prints the table."""
    most = 1.1 * max(one["kl"] for one in records)
    curve = [{"arm": "best possible", "seed": 0, "step": n, **x}
             for n, x in enumerate(best) if x["kl"] <= most]  # fmt: skip
    figure = out / f"{name}.png"
    report.reward_against_kl(figure, [*records, *curve])
    baseline = records[0]["arm"]
    found = tables(records, baseline)
    for one in found:
        for row in [one.columns, *one.rows]:
            show("  ".join(f"{cell!s:<24}" for cell in row).rstrip())
    sections = [
        report.Section(
            "Reward against KL",
            [
                report.Figure(
                    figure,
                    "Gold reward against KL after each round; large dots are means of "
                    "the last round over seeds.",
                ),
                *found,
                "Differences are paired by seed; in parentheses, their 95% t interval.",
            ],
        ),
        report.Section("Protocol", [ABOUT]),
    ]
    page = out / f"{name}.html"
    report.write_html(page, "Training on one's own answers", sections)
    show(str(page))


if __name__ == "__main__":
    with entry_point():
        main(checked(tyro.cli(Options, description=__doc__)))
