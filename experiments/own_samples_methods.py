"""The methods that `own_samples.py` compares, as commands of jaxpref."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from experiments import noisy_sentiment as sentiment
from experiments import sentiment_world as world

OPTIMIZER = "--learning-rate 0.15 --adam-eps 1.0 --max-grad-norm 0.1 --decay constant"
"""Momentum with steps of constant length."""
ROWS = "--row-length none"
"""A row for each answer: the same shapes, compiled once, for all methods and rounds."""
LABELED, SAMPLED = "offline DPO, the labels", "offline DPO, the reward model"
ITERATED, BEST = "iterated DPO", "best answers, in rounds"
BEST_ONLY = """round:
sample --model {policy} --data {prompts} --n 4 --seed {seed} --out {round}/answers.jsonl
score --data {round}/answers.jsonl {reward} --out {round}/scored.jsonl
data pairs --data {round}/scored.jsonl --rule best-worst --keep-unfinished \\
    --out {round}/pairs.jsonl
train --model {policy} --data {pairs} --loss sft --epochs 1 --out {round}/policy
"""
"""Supervised training on the chosen answers of each round: no rejected ones."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All settings that determine the result; see "Protocol" above."""

    seeds: tuple[int, ...] = (0, 1)
    recipes: tuple[str, ...] = ("iterated_dpo", "upo", "spa")
    rounds: int = 3
    labels: int = 8192
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
    train_reward(protocol, reference, labels, folder / "reward")
    return Inputs(
        labels,
        folder / "few.jsonl",
        folder / "prompts.jsonl",
        folder / "reward" / "export",
        out / "weak" / "export",
    )


def train_weak(protocol: Protocol, out: Path) -> None:
    """The weak model of delta learning: a tenth of the steps of the reference."""
    steps = protocol.sft_steps // 10
    trained(
        f"--model {out}/world/untrained --data {out}/world/reviews.jsonl --loss sft "
        f"--max-steps {steps} --batch-size {protocol.sft_batch} --learning-rate 3e-3 "
        f"--heldout-fraction 0 --save-every {steps} --out {out}/weak"
    )


def train_reward(
    protocol: Protocol, reference: Path, labels: Path, out: Path, *, parts: int = 1
) -> None:
    """One pass over the labels, or over the first 1 / parts of them."""
    steps = protocol.labels // protocol.batch // parts
    trained(
        f"--model {reference} --data {labels} --loss bradley_terry --max-steps {steps} "
        f"--batch-size {protocol.batch} --learning-rate 1e-3 --heldout-fraction 0 "
        f"--out {out} --save-every {steps} {ROWS}"
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
    epoch = protocol.labels // protocol.batch
    yield (
        LABELED,
        offline(protocol, made.labels, folder / "labeled", reference, seed, last=epoch),
    )
    yield SAMPLED, sampled(protocol, folder, reference, made, seed)
    for recipe in protocol.recipes:
        starts = {"spa, 3.3% of the labels": made.few, "spa, all labels": made.labels}
        if recipe != "spa":
            starts = {recipe.replace("_", " ").replace("dpo", "DPO"): None}
        for name, data in starts.items():
            policies = in_rounds(
                protocol, recipe, name, folder, reference, made, seed, data=data
            )
            yield name, policies


def variations(protocol: Protocol, out: Path, seed: int, reference: Path, made: Inputs):
    """As `arms`, for one change at a time from iterated DPO."""
    folder = out / f"seed-{seed}"
    rounds = functools.partial(in_rounds, protocol, seed=seed, reference=reference)
    yield ITERATED, rounds("iterated_dpo", ITERATED, folder, made=made)
    yield SAMPLED, sampled(protocol, folder, reference, made, seed)
    recipe = folder / "best_only.recipe"
    recipe.write_text(BEST_ONLY)
    yield BEST, rounds(str(recipe), BEST, folder, made=made)
    best = folder / "best"
    yield (
        "best answers, offline",
        offline(protocol, pairs_of(folder), best, reference, seed, loss="sft"),
    )
    yield "RLOO", policy_gradient(protocol, folder / "rloo", reference, made, seed)
    train_reward(protocol, reference, made.labels, folder / "reward-eighth", parts=8)
    eighth = dataclasses.replace(made, reward=folder / "reward-eighth" / "export")
    yield (
        "reward model of 1/8 of the labels",
        rounds("iterated_dpo", "eighth", folder, made=eighth),
    )
    train_reward(protocol, reference, folder / "clean.jsonl", folder / "reward-clean")
    clean = dataclasses.replace(made, reward=folder / "reward-clean" / "export")
    yield (
        "reward model of labels without flips",
        rounds("iterated_dpo", "clean", folder, made=clean),
    )
    half = folder / "half.jsonl"
    prompts = world.all_prompts()[::2]
    world.write_jsonl(half, [{"prompt": x} for x in prompts])
    twice = dataclasses.replace(
        protocol, answers=2 * protocol.answers, per_prompt=2 * protocol.per_prompt
    )
    few = dataclasses.replace(made, prompts=half)
    yield (
        "half of the prompts",
        in_rounds(twice, "iterated_dpo", "half", folder, reference, few, seed),
    )


def in_rounds(
    protocol: Protocol,
    recipe: str,
    name: str,
    folder: Path,
    reference: Path,
    made: Inputs,
    seed: int,
    *,
    data: Path | None = None,
    parts: int = 1,
) -> list[Path]:
    """Runs a recipe; the policy after each round.

    Each training has `parts` times as many steps as the protocol says, and as many
    checkpoints.
    """
    at = folder / name.replace(" ", "-").replace("%", "").replace(",", "")
    first = 0 if recipe == "spa" else 1
    words = recipe_words(protocol, recipe, at, reference, made, data, seed, parts)
    command(f"rounds {' '.join(words)}")
    numbers = range(first, protocol.rounds + 1)
    return [at / f"round_{n}" / "policy" / "export" for n in numbers]


def recipe_words(
    protocol: Protocol,
    recipe: str,
    out: Path,
    reference: Path,
    made: Inputs,
    data: Path | None,
    seed: int,
    parts: int = 1,
) -> list[str]:
    """The options of `jaxpref rounds`."""
    answers = 2 * protocol.per_prompt if recipe == "online_dpo" else protocol.answers
    words = (
        f"--recipe {recipe} --model {reference} --prompts {made.prompts} --out {out} "
        f"--rounds {protocol.rounds} --same-prompts --eval-prompts 0 --seed {seed} "
        f"--sample.n {answers} --sample.max-new-tokens {world.MAX_COMPLETION_TOKENS} "
        f"--sample.batch-size 512 --train.batch-size {protocol.batch} "
        f"--train.seed {seed} --train.heldout-fraction 0"
    ).split()
    training = f"{kept(parts, protocol.steps)} {ROWS} {OPTIMIZER}"
    words += training.replace("--", "--train.").split()
    if data is not None:
        # Three epochs of few labels, or as many steps of all of them as the first point
        # of the policies that are trained on them only.
        labels = len(data.read_text().splitlines())
        most = protocol.labels // protocol.batch // protocol.rounds
        steps = str(max(1, min(3 * labels // protocol.batch, most)))
        words += ["--data", str(data), "--start.train.max-steps", steps]
        words += ["--start.train.save-every", steps]
    if recipe == "delta":
        return [*words, "--weak-model", str(made.weak)]
    words += ["--pairs.per-prompt", str(protocol.per_prompt)]
    if data is None:
        words += ["--reward", str(made.reward)]
        words += ["--score.batch-size", str(len(world.all_prompts()))]
    return words


def pairs_of(folder: Path) -> Path:
    """Pairs of answers of the reference."""
    return folder / "sampled" / "round_1" / "pairs.jsonl"


def sampled(
    protocol: Protocol, folder: Path, reference: Path, made: Inputs, seed: int
) -> list[Path]:
    """DPO on ranked answers of the reference, as many as all rounds together have.

    That is a single round of iterated DPO.
    """
    rounds = protocol.rounds
    whole = dataclasses.replace(
        protocol,
        rounds=1,
        answers=rounds * protocol.answers,
        per_prompt=rounds * protocol.per_prompt,
    )
    words = whole, "iterated_dpo", "sampled", folder, reference, made, seed
    in_rounds(*words, parts=rounds)
    return checkpoints(folder / "sampled/round_1/policy", rounds, protocol.steps)


def policy_gradient(
    protocol: Protocol, out: Path, reference: Path, made: Inputs, seed: int
) -> list[Path]:
    """RLOO with the same reward model; the policy after as many steps as each round.

    It samples about as many answers in all as the rounds do.
    """
    group = protocol.answers // protocol.steps
    trained(
        f"--model {reference} --data {made.prompts} --objective rloo --out {out} "
        f"--reward {made.reward} --group-size {group} --batch-size "
        f"{len(world.all_prompts())} --max-new-tokens {world.MAX_COMPLETION_TOKENS} "
        f"--seed {seed} --objective.beta 0 {kept(protocol.rounds, protocol.steps)} "
        f"{ROWS} {OPTIMIZER}"
    )
    return checkpoints(out, protocol.rounds, protocol.steps)


def offline(
    protocol: Protocol,
    data: Path,
    out: Path,
    reference: Path,
    seed: int,
    *,
    loss: str = "dpo --loss.beta 0.1",
    last: int | None = None,
) -> list[Path]:
    """Training on fixed pairs; the policy after as many steps as each round.

    Or after each third (of three rounds) of `last` steps.
    """
    each = last // protocol.rounds if last else protocol.steps
    trained(
        f"--model {reference} --data {data} --loss {loss} --out {out} --batch-size "
        f"{protocol.batch} --seed {seed} --heldout-fraction 0 "
        f"{kept(protocol.rounds, each)} {ROWS} {OPTIMIZER}"
    )
    return checkpoints(out, protocol.rounds, each)


def kept(rounds: int, each: int) -> str:
    """The options of a run that keeps a checkpoint after every `each` steps.

    With a constant learning rate, each is what a run of that length would export.
    """
    steps = rounds * each
    return f"--max-steps {steps} --save-every {each} --keep-checkpoints {rounds}"


def checkpoints(out: Path, rounds: int, each: int) -> list[Path]:
    """The checkpoints of a run with the options of `kept`."""
    return [out / "checkpoints" / str(n * each) for n in range(1, rounds + 1)]
