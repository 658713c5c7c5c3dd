"""Rounds of answers with a verifier, against DPO on as many answers of one model.

Question
    If a verifier says which answers are right, what do rounds of sampling, pairing, and
    training gain over DPO on the answers of the model before training, with as many
    verified answers?  The recipes are iterated DPO with a verifier (as in Orca-Math,
    arXiv:2402.14830), online DPO (2402.04792), and rejection sampling, which trains on
    right answers by maximum likelihood (2308.01825).

Commands
    python -m experiments.arithmetic_rounds
    python -m experiments.arithmetic_rounds --smoke     (sanity check)
    python -m experiments.arithmetic_rounds --seeds 100 --learning-rate 1e-4 \
        --out runs/arithmetic_rounds_long_steps
    Repeating a command resumes its runs in OUT: runs/arithmetic_rounds,
    runs/arithmetic_rounds_smoke, or --out.

Expected
    Pass@1 and KL after each round; in parentheses, how far the KL is above the least
    one at which a policy can have this pass@1.  Means of two seeds; the model before
    training has a pass@1 of 0.33.

                          round 1              round 2              round 3
      offline DPO         0.529, 0.10 (0.01)   0.854, 0.63 (0.04)   0.972, 1.06 (0.09)
      iterated DPO        0.528, 0.10 (0.01)   0.812, 0.52 (0.02)   0.952, 0.93 (0.05)
      rejection sampling  0.537, 0.10 (0.01)   0.826, 0.55 (0.03)   0.957, 0.93 (0.02)
      online DPO          0.520, 0.09 (0.01)   0.790, 0.47 (0.02)   0.950, 0.90 (0.02)

    Standard deviations are at most 0.008 (pass@1) and 0.02 (KL).
    Offline DPO has the highest pass@1 after as many labels and steps, but it also moves
    the furthest.  At the KL at which each recipe ends, interpolated along its thirds,
    it has 0.941 (iterated DPO: 0.952), 0.940 (rejection sampling: 0.957), and 0.932
    (online DPO: 0.950).  So at the same KL, rounds are ahead by 0.01 to 0.02, for each
    recipe and seed.
    Steps that are too long are worse for rounds.  With the third command, pass@1 of
    offline DPO is 0.97, 0.85, and 0.84 after the three thirds, at KLs of 1.0, 2.0, and
    2.2; that of iterated DPO is 0.95, 0.73, and 0.17, at 1.1, 2.0, and 4.6.
    Time: 7 minutes of CPU time, of which 2.4 are the supervised start; 19 minutes on
    two cores of an Intel Xeon that were shared with much other work (jax 0.10.2, CPU).

Protocol
    World: sums of two numbers, and a model that gives 33% right answers, trained from
    scratch on demonstrations of which 35% are right (`arithmetic.py`).
    Labels: the verifier (`rule:exact`) says of 18,432 sampled answers whether they are
    right: in each of three rounds, 8 to each of 768 prompts, for online DPO in each of
    six rounds, 2 to each of 1,536.  Offline DPO samples 8 to each of 2,304 prompts, all
    from the model before training.  A right answer is paired with a wrong one to the
    same prompt.
    Training: as many steps of 32 pairs in all for each method, with Adam at a constant
    learning rate, and a beta of 0.1.  The reference of iterated DPO is the model at the
    start of the round, that of the others the model before training; rejection
    sampling has none.  Each round starts Adam's moments from zeros, which offline DPO
    keeps.  Rejection sampling trains on the first right answer to each prompt that also
    has a wrong one, not on all right answers as in the paper.
    Measured after each third of the labels (offline: of the steps), on four answers to
    each of 500 held-out sums: pass@1, and KL to the model before training (exact for
    the next token, Monte Carlo over the prefix).
    The learning rate was chosen from 3e-5 and 1e-4 on seed 100, not one of the two.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments import arithmetic
from experiments.noisy_sentiment import begin, divergence
from experiments.own_samples_methods import BEST_ONLY, checkpoints, command, kept
from experiments.progress import say
from experiments.sentiment_world import write_jsonl
from jaxpref import report
from jaxpref.errors import show
from jaxpref.files import write_json
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.mesh import make_mesh

MESH = "--mesh.data -1 --mesh.fsdp 1"
"""`arithmetic.MESH`, as options."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """The sizes of the experiment."""

    out: str | None = None
    """Folder of the runs and the results (default: runs/arithmetic_rounds, with the
    suffix _smoke)."""
    smoke: bool = False
    """Whether to run only a few steps."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of prompts, answers, and training."""
    rounds: int = 3
    """Rounds; online DPO has twice as many."""
    prompts: int = 768
    """Prompts of a round."""
    answers: int = 8
    """Verified answers to each; online DPO has two to more prompts."""
    steps: int = 30
    """Steps of a round."""
    batch: int = 32
    """Pairs of a step."""
    learning_rate: float = 3e-5
    """Of Adam."""
    heldout: int = 500
    """Sums that are in no demonstration and no prompt."""


def arms(
    protocol: Protocol, out: Path, start: Path, seed: int
) -> Iterator[tuple[str, list[Path]]]:
    """Runs each method; yields its name and its policies after each third."""
    folder = out / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    lines = (out / "world" / "prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    order = np.random.default_rng(seed).permutation(len(rows))
    prompts = folder / "prompts.jsonl"
    few = order[: protocol.rounds * protocol.prompts]
    write_jsonl(prompts, [rows[n] for n in few])

    def run(name: str, recipe: str, sizes: Protocol, prompts=prompts, parts=1):
        at = folder / name.replace(" ", "_")
        return name, in_rounds(sizes, recipe, at, start, prompts, seed, parts=parts)

    # Offline DPO is iterated DPO with a single round.
    once = dataclasses.replace(protocol, rounds=1, prompts=len(few))
    yield run("offline DPO", "iterated_dpo", once, parts=protocol.rounds)
    yield run("iterated DPO", "iterated_dpo", protocol)
    recipe = folder / "rejection_sampling.recipe"
    recipe.write_text(BEST_ONLY)
    yield run("rejection sampling", str(recipe), protocol)
    online = dataclasses.replace(
        protocol,
        rounds=2 * protocol.rounds,
        prompts=protocol.prompts * protocol.answers // 4,
        answers=2,
        steps=protocol.steps // 2,
    )
    name, policies = run(
        "online DPO", "online_dpo", online, prompts=out / "world" / "prompts.jsonl"
    )
    yield name, policies[1::2]


def in_rounds(
    protocol: Protocol,
    recipe: str,
    out: Path,
    start: Path,
    prompts: Path,
    seed: int,
    *,
    parts: int = 1,
) -> list[Path]:
    """Runs a recipe; the policy after each round.

    Each training has `parts` times as many steps as the protocol says, and as many
    checkpoints, whose policies are returned.
    """
    sampling = (
        f"--n {protocol.answers} --max-new-tokens {arithmetic.TOKENS} "
        f"--batch-size 512 {MESH}"
    )
    training = (
        f"{kept(parts, protocol.steps)} --batch-size {protocol.batch} --learning-rate "
        f"{protocol.learning_rate} --decay constant --heldout-fraction 0 --row-length "
        f"none --seed {seed} {MESH}"
    )
    command(
        f"rounds --recipe {recipe} --model {start} --prompts {prompts} --out {out} "
        f"--reward rule:exact --rounds {protocol.rounds} --prompts-per-round "
        f"{protocol.prompts} --eval-prompts 0 --seed {seed} "
        f"{sampling.replace('--', '--sample.')} {training.replace('--', '--train.')}"
    )
    numbers = range(1, protocol.rounds + 1)
    runs = [out / f"round_{n}" / "policy" for n in numbers]
    return [x for run in runs for x in checkpoints(run, parts, protocol.steps)]


def measured(
    policy: Path, start: Path, held: np.ndarray, *, seed: int
) -> dict[str, float]:
    """Pass@1 on sums, and KL to the model before training, from one answer to each."""
    prompts = [arithmetic.prompt_of(pair) for pair in held]
    texts, tokens, lengths = arithmetic.answered(policy, prompts, seed=seed)
    right = [text == arithmetic.answer_of(x) for text, x in zip(texts, held)]
    first = tokens.shape[1] - arithmetic.TOKENS
    inside = np.arange(arithmetic.TOKENS) < lengths[:, None]
    with jax.set_mesh(make_mesh(arithmetic.MESH)):
        (model, params), (_, base) = map(arithmetic.load, (policy, start))
        kl = divergence(model, params, base, tokens, inside, start=first)
    return {"reward": float(np.mean(right)), "kl": float(np.mean(kl))}


def main(protocol: Protocol) -> list[dict[str, Any]]:
    """Runs everything, prints the table, and writes `results.json` and a figure."""
    out = Path(protocol.out or "runs/arithmetic_rounds" + "_smoke" * protocol.smoke)
    world = arithmetic.Protocol(heldout=protocol.heldout)
    if protocol.smoke:
        world = dataclasses.replace(
            world, demonstrations=5_000, sft_steps=200, heldout=100
        )
        protocol = dataclasses.replace(
            protocol, seeds=(0,), prompts=128, steps=2, batch=2, heldout=100
        )
    started = time.perf_counter()
    begin(dataclasses.replace(protocol, out=str(out)), out)
    held = np.repeat(arithmetic.write_world(world, out), 4, axis=0)
    start = arithmetic.supervised(world, out)
    first = measured(start, start, held, seed=1000)
    say(started, f"supervised start: pass@1 {first['reward']:.3f}")
    records: list[dict[str, Any]] = []
    for seed in protocol.seeds:
        for name, policies in arms(protocol, out, start, seed):
            for step, policy in enumerate([start, *policies]):
                found = measured(policy, start, held, seed=1000 + seed)
                records.append({"arm": name, "seed": seed, "step": step, **found})
            last = records[-1]
            shown = f"pass@1 {last['reward']:.3f}, KL {last['kl']:.2f}"
            say(started, f"seed {seed}: {name}: {shown}")
            write_json(out / "results.json", records)
    report.reward_against_kl(out / "arithmetic_rounds.png", records)
    for row in table(protocol, records):
        show("  ".join(f"{cell:<34}" for cell in row).rstrip())
    return records


def least_kl(rate: float, start: float) -> float:
    """The least KL, in nats, at which a policy can have a rate of right answers.

        rate log(rate / start) + (1 - rate) log((1 - rate) / (1 - start))

    That is the divergence of "right or wrong" at the mean rates.  The divergence of the
    answers is no smaller (data processing inequality), nor is a mean over prompts with
    different rates (joint convexity).

    Args:
      rate: that of the policy, in [0, 1].
      start: that of the reference, in (0, 1).
    """
    sides = (rate, start), (1 - rate, 1 - start)
    return sum(p * math.log(p / q) for p, q in sides if p > 0)


def table(protocol: Protocol, records: list[dict[str, Any]]) -> list[list[str]]:
    """Pass@1, KL, and how far it is above the least one, after each round.

    Means over seeds, the first two with standard deviations.
    """
    numbers = range(1, protocol.rounds + 1)
    rows = [["method", *(f"round {n}: pass@1, KL (excess)" for n in numbers)]]
    starts = {x["seed"]: x["reward"] for x in records if x["step"] == 0}
    for name in dict.fromkeys(one["arm"] for one in records):
        cells = []
        for n in numbers:
            own = [x for x in records if (x["arm"], x["step"]) == (name, n)]
            rewards = report.mean_spread([x["reward"] for x in own], digits=3)
            kls = report.mean_spread([x["kl"] for x in own])
            excess = [x["kl"] - least_kl(x["reward"], starts[x["seed"]]) for x in own]
            cells.append(f"{rewards}, {kls} ({np.mean(excess):.2f})")
        rows.append([name, *cells])
    return rows


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Protocol, description=__doc__))
