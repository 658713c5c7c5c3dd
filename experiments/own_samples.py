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
    python -m experiments.own_samples --smoke     (sanity check)
    python -m experiments.own_samples --full      (all recipes, five seeds)
    Repeating a command resumes its run in OUT: runs/own_samples,
    runs/own_samples_smoke, runs/own_samples_full, or the folder of --out.

Expected
    Gold reward / KL to the reference after each round (offline: after as many steps);
    the reference has a reward of -0.04.  Only seed 0 is complete so far:

                                          1             2             3
        offline DPO, the labels       0.15 /  0.5   0.45 /  0.9   0.69 /  1.2
        offline DPO, the reward model 0.36 /  2.3   0.34 /  3.7   0.19 /  4.4
        iterated DPO                  0.34 /  2.1   0.11 /  5.2  -3.68 / 24.4
        upo                           0.35 /  2.0   0.04 /  4.9  -4.00 / 37.3
        spa, 3.3% of the labels       0.13 /  7.1   0.25 / 14.0  -3.95 / 69.3
        spa, all labels               0.88 /  7.2   0.96 / 11.4   0.29 / 13.2

    and of seed 1:

        offline DPO, the labels       0.14 /  0.6   0.26 /  1.0   0.38 /  1.0
        offline DPO, the reward model 0.60 /  1.3   1.07 /  2.3   1.44 /  3.0
        iterated DPO                  0.52 /  1.2   1.28 /  2.5   1.52 /  4.2

    So the answer depends on the reward model.  That of seed 0 has learned errors of its
    2,048 labels, and every method that follows it gets worse as it moves on; in the
    third round, answers leave the language.  With that of seed 1, rounds and offline
    pairs are alike at the same KL.  In no round did samples of its own give a policy a
    clear advantage over DPO on the labels at a KL of about 1.
    Time: 16 minutes for the arms of one seed, on two cores that also ran other work.

Protocol
    World: `sentiment_world.py`, a grammar of reviews with an exact gold reward, and its
    reference, a Llama model with 0.23 M parameters (`noisy_sentiment.py`).
    Labels: for each seed, 2,048 pairs of samples of the reference with Bradley-Terry
    labels of the gold reward, of which 30% are flipped.  A reward model is trained on
    them in one pass (`--loss bradley_terry`); nothing else sees the gold reward.
    Rounds: 64 answers to each of the 24 prompts, of which the 16 best are paired with
    the 16 worst by the reward model (SPA: by log-ratios), and 12 steps of 32 pairs.
    SPA begins with 3.3% of the labels, 68 pairs, or with all of them; delta learning
    takes its rejected answers from a reference that was trained for a tenth of the
    steps.
    Offline: DPO on the 2,048 labeled pairs, or on pairs of one round of answers of the
    reference, in as many steps as all rounds together.  Evaluated after as many steps
    as each round.
    Optimizer: momentum with steps of constant length (see `noisy_sentiment.py`).
    Measured on 1,920 samples of each policy: gold reward, and KL to the reference.
    Reward at matched KL: along the rounds of a recipe, piecewise linear in the root of
    the KL, for each seed.  Steps have constant length, so all methods move away from
    the reference at about the same speed, whatever their betas, which are 0.1.
"""

import dataclasses
import functools
import json
import subprocess
import sys
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
from experiments.progress import say
from jaxpref import report
from jaxpref.errors import InputError, show
from jaxpref.evaluate.frontier import reward_at_kl, t_interval
from jaxpref.files import write_json
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.ranges import checked
from jaxpref.train import MeshConfig, make_mesh

OPTIMIZER = "--learning-rate 0.5 --adam-eps 1.0 --max-grad-norm 0.1 --decay constant"
"""Momentum with steps of constant length."""
KLS = (0.25, 0.5, 1.0)
"""At which rewards are compared."""
LABELED, SAMPLED = "offline DPO, the labels", "offline DPO, the reward model"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All settings that determine the result; see "Protocol" above."""

    seeds: tuple[int, ...] = (0, 1)
    recipes: tuple[str, ...] = ("iterated_dpo", "upo", "spa")
    rounds: int = 3
    labels: int = 2048
    flip_rate: float = 0.3
    share: float = 0.033
    answers: int = 64
    per_prompt: int = 16
    steps: int = 12
    batch: int = 32
    sft_reviews: int = 20_000
    sft_steps: int = 300
    sft_batch: int = 128
    evaluated_samples: int = 1920
    reference_samples: int = 49_152


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
    records: list[dict[str, Any]] = []
    for seed in protocol.seeds:
        made = inputs(protocol, out, seed, reference, mesh)
        clock(f"seed {seed}: labels and reward model")
        for name, policies in arms(protocol, out, seed, reference, made):
            records.append({"arm": name, "seed": seed, "step": 0, **start})
            for n, policy in enumerate(policies, start=1):
                with jax.set_mesh(mesh):
                    found = measured(protocol, policy, reference, seed)
                records.append({"arm": name, "seed": seed, "step": n, **found})
            last = records[-1]
            clock(
                f"seed {seed}: {name}: reward {last['reward']:.2f}, KL {last['kl']:.2f}"
            )
            write_json(out / "own_samples.json", records)
    write_report(out, protocol, records, world.best_possible_curve(rewards))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What all arms of a seed share."""

    labels: Path
    few: Path
    prompts: Path
    reward: Path
    weak: Path


def inputs(protocol: Protocol, out: Path, seed: int, reference: Path, mesh) -> Inputs:
    """Labels, with flips written into them, and the reward model trained on them."""
    folder = out / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    clean, labels = folder / "clean.jsonl", folder / "labels.jsonl"
    sentiment.write_pairs(clean, reference, protocol.labels, seed=seed, mesh=mesh)
    if not labels.exists():
        rows = [json.loads(line) for line in clean.read_text().splitlines()]
        flips = np.random.default_rng(seed).random(len(rows)) < protocol.flip_rate
        for row, is_flipped in zip(rows, flips):
            del row["rewards"]
            if is_flipped:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        few = max(1, round(protocol.share * len(rows)))
        world.write_jsonl(folder / "few.jsonl", rows[:few])
        world.write_jsonl(
            folder / "prompts.jsonl", [{"prompt": x} for x in world.all_prompts()]
        )
        world.write_jsonl(labels, rows)  # the last one: it says that all are there
    steps = protocol.labels // protocol.batch
    trained(
        f"--model {reference} --data {labels} --loss bradley_terry --max-steps {steps} "
        f"--batch-size {protocol.batch} --learning-rate 1e-3 --heldout-fraction 0 "
        f"--out {folder}/reward --save-every {steps}"
    )
    weak = out / "weak"
    if "delta" in protocol.recipes:
        steps = protocol.sft_steps // 10
        trained(
            f"--model {out}/world/untrained --data {out}/world/reviews.jsonl "
            f"--loss sft --max-steps {steps} --batch-size {protocol.sft_batch} "
            f"--learning-rate 3e-3 --heldout-fraction 0 --save-every {steps} "
            f"--out {weak}"
        )
    return Inputs(
        labels,
        folder / "few.jsonl",
        folder / "prompts.jsonl",
        folder / "reward" / "export",
        weak / "export",
    )


def trained(line: str) -> None:
    """Runs `jaxpref train`, unless it has ended."""
    words = line.split()
    if not (Path(words[words.index("--out") + 1]) / "export").exists():
        command(f"train {line}")


def command(line: str) -> None:
    """Runs a command of jaxpref in a process of its own."""
    subprocess.run([sys.executable, "-m", "jaxpref", *line.split()], check=True)


def arms(protocol: Protocol, out: Path, seed: int, reference: Path, made: Inputs):
    """Runs each method; yields its name and the policies along its way."""
    folder = out / f"seed-{seed}"
    yield LABELED, offline(protocol, made.labels, folder / "labeled", reference, seed)
    pairs = folder / "reference_pairs.jsonl"
    if not pairs.exists():
        ranked_pairs(protocol, folder, reference, made, pairs, seed)
    yield SAMPLED, offline(protocol, pairs, folder / "sampled", reference, seed)
    for recipe in protocol.recipes:
        starts = {"spa, 3.3% of the labels": made.few, "spa, all labels": made.labels}
        if recipe != "spa":
            starts = {recipe.replace("_", " ").replace("dpo", "DPO"): None}
        for name, data in starts.items():
            at = folder / name.replace(" ", "-").replace("%", "").replace(",", "")
            words = recipe_words(protocol, recipe, at, reference, made, data, seed)
            command(f"rounds {' '.join(words)}")
            path = lambda n, at=at: at / f"round_{n}" / "policy" / "export"
            first = 0 if recipe == "spa" else 1
            yield name, [path(n) for n in range(first, protocol.rounds + 1)]


def recipe_words(
    protocol: Protocol,
    recipe: str,
    out: Path,
    reference: Path,
    made: Inputs,
    data: Path | None,
    seed: int,
) -> list[str]:
    """The options of `jaxpref rounds`."""
    answers = 2 * protocol.per_prompt if recipe == "online_dpo" else protocol.answers
    words = (
        f"--recipe {recipe} --model {reference} --prompts {made.prompts} --out {out} "
        f"--rounds {protocol.rounds} --same-prompts --eval-prompts 0 --seed {seed} "
        f"--sample.n {answers} --sample.max-new-tokens {world.MAX_COMPLETION_TOKENS} "
        f"--sample.batch-size 512 --train.max-steps {protocol.steps} "
        f"--train.batch-size {protocol.batch} --train.seed {seed} "
        f"--train.heldout-fraction 0 --train.save-every {protocol.steps}"
    ).split()
    words += [x.replace("--", "--train.") for x in OPTIMIZER.split()]
    if data is not None:
        words += ["--data", str(data)]
    if recipe == "delta":
        return [*words, "--weak-model", str(made.weak)]
    words += ["--pairs.per-prompt", str(protocol.per_prompt)]
    if recipe != "spa":
        words += ["--reward", str(made.reward)]
        words += ["--score.batch-size", str(len(world.all_prompts()))]
    return words


def ranked_pairs(
    protocol: Protocol,
    folder: Path,
    reference: Path,
    made: Inputs,
    pairs: Path,
    seed: int,
) -> None:
    """As many pairs as all rounds together have, from answers of the reference."""
    answers, scored = folder / "answers.jsonl", folder / "scored.jsonl"
    command(
        f"sample --model {reference} --data {made.prompts} --seed {seed} "
        f"--n {protocol.rounds * protocol.answers} --batch-size 512 --out {answers} "
        f"--max-new-tokens {world.MAX_COMPLETION_TOKENS}"
    )
    reward = f"--reward {made.reward} --batch-size 24"
    command(f"score --data {answers} {reward} --out {scored}")
    command(
        f"data pairs --data {scored} --rule best-worst --keep-unfinished --out {pairs} "
        f"--per-prompt {protocol.rounds * protocol.per_prompt}"
    )


def offline(
    protocol: Protocol, data: Path, out: Path, reference: Path, seed: int
) -> list[Path]:
    """DPO on fixed pairs; the policy after as many steps as each round."""
    found = []
    for n in range(1, protocol.rounds + 1):
        steps = n * protocol.steps
        trained(
            f"--model {reference} --data {data} --loss dpo --loss.beta 0.1 --out "
            f"{out}-{n} --max-steps {steps} --batch-size {protocol.batch} --seed "
            f"{seed} --heldout-fraction 0 --save-every {steps} {OPTIMIZER}"
        )
        found.append(Path(f"{out}-{n}") / "export")
    return found


def measured(
    protocol: Protocol, policy: Path, reference: Path, seed: int
) -> dict[str, Any]:
    """Gold reward and KL of a policy, unless an earlier command has measured it."""
    path = policy.parent / "measured.json"
    if not path.exists():
        found = sentiment.measure(protocol, policy, reference, seed=1000 + seed)
        write_json(path, found)
    return json.loads(path.read_text())


def table(records: Sequence[dict[str, Any]], baseline: str) -> report.Table:
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

    rows = []
    for name in names:
        ends = [x for x in records if x["arm"] == name and x["step"]]
        last = [max((x for x in ends if x["seed"] == s), key=lambda x: x["step"])
                for s in seeds]  # fmt: skip
        cells = [
            report.mean_spread([x["reward"] for x in last]),
            report.mean_spread([x["kl"] for x in last]),
            f"{100 * np.mean([x['malformed'] for x in last]):.1f}%",
        ]
        for kl in KLS:
            values = at(name, kl)
            cell = report.mean_spread(values[np.isfinite(values)].tolist())
            gain = values - at(baseline, kl)
            if name != baseline and np.isfinite(gain).sum() > 1:
                low, high = t_interval(gain[np.isfinite(gain)])[1:]
                cell += f" ({np.nanmean(gain):+.2f}, {low:+.2f} to {high:+.2f})"
            cells.append(cell)
        rows.append([name, *cells])
    columns = ["method", "reward", "KL", "malformed", *(f"at KL {x:g}" for x in KLS)]
    return report.Table(columns, rows)


def write_report(
    out: Path,
    protocol: Protocol,
    records: list[dict[str, Any]],
    best: list[dict[str, float]],
) -> None:
    """Writes the figure and the page, and prints the table."""
    most = 1.1 * max(one["kl"] for one in records)
    curve = [{"arm": "best possible", "seed": 0, "step": n, **x}
             for n, x in enumerate(best) if x["kl"] <= most]  # fmt: skip
    report.reward_against_kl(out / "frontier.png", [*records, *curve])
    found = table(records, LABELED)
    for row in [found.columns, *found.rows]:
        show("  ".join(f"{cell!s:<28}" for cell in row).rstrip())
    sections = [
        report.Section(
            "Reward against KL",
            [
                report.Figure(
                    out / "frontier.png",
                    "Gold reward against KL after each round; large dots are means of "
                    "the last round over seeds.",
                ),
                found,
                f"In parentheses: the difference from {LABELED}, paired by seed, with "
                "its 95% t interval.",
            ],
        ),
        report.Section("Protocol", [__doc__ or ""]),
    ]
    report.write_html(out / "report.html", "Training on one's own answers", sections)
    show(f"{out}/report.html")


if __name__ == "__main__":
    with entry_point():
        main(checked(tyro.cli(Options, description=__doc__)))
