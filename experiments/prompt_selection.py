"""Which prompts a policy gradient learns from: all in turn, or informative ones.

Claims examined
    Replacing groups of equal rewards (the dynamic sampling of DAPO, Yu et al. 2025,
    arXiv:2503.14476), and answering prompts whose pass rate is near 1/2 (prompt
    curriculum learning, Gao et al. 2025, arXiv:2510.01135, here with a running mean for
    each prompt instead of a value model), learn in fewer steps.

Commands
    python -m experiments.prompt_selection
    python -m experiments.prompt_selection --prompts 512 --wrong-answers 0.75
    python -m experiments.prompt_selection --smoke     (sanity check)
    Repeating a command resumes its runs in OUT: runs/prompt_selection,
    runs/prompt_selection_smoke, or --out.

Expected
    First step with a pass@1 of 0.9, prompts answered by then, and the share of
    groups of equal rewards that these steps learn from; for both seeds:

        all 9,500 prompts       step     prompts       equal
        in turn                 26, 26     832,   832  27%, 25%
        --resample-uniform 3    26, 26   1,185, 1,143   3%,  2%
        --prompt-target 0.5     26, 28     832,   896  26%, 29%
        both                    26, 26   1,180, 1,175   3%,  3%

        512 prompts, 75% wrong  step     prompts       equal
        in turn                 30, 32     960, 1,024  83%, 82%
        --resample-uniform 3    26, 28   2,543, 2,740  45%, 46%
        --prompt-target 0.5     28, 28     896,   896  61%, 61%
        both                    26, 26   1,708, 1,695  17%, 16%

    The sums are of similar difficulty and none occurs twice, so with all prompts there
    is nothing to choose, and resampling answers 40% more prompts for nothing.  If most
    prompts have a wrong answer and recur, the pass rates find them: fewer steps and
    fewer answers.  Resampling also saves steps, but answers 2.7 times as many prompts.
    All runs end with a pass@1 of 0.98 to 1.00.
    Only speed is compared; the divergence from the supervised start is not measured.

    Time: 15 and 10 minutes on two cores that also ran other work, without the
    supervised start (jax 0.10.2, CPU).

Protocol
    The world of `experiments.arithmetic`, and the same supervised start for all runs.
    GRPO without a KL penalty, 32 prompts with 4 answers each in a step, learning rate
    1e-4, 60 steps.  Two seeds of the prompts and of the answers.  Every second step,
    pass@1 on the 500 held-out sums (`--eval-data`), one answer each, with the same
    random numbers in all evaluations of a run.  Wrong answers are a word that the model
    cannot write.
    Changed after seeing results: the first learning rate, 5e-4, reached 0.9 at step 8
    in all runs that finished, too early to tell them apart; the second command was
    added when the first one showed no difference.
"""

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments import arithmetic
from experiments.progress import say
from experiments.sentiment_world import write_jsonl
from jaxpref import objectives
from jaxpref.data import DataOptions
from jaxpref.errors import show
from jaxpref.files import write_json
from jaxpref.online.options import SamplingOptions
from jaxpref.online.run import run as run_online
from jaxpref.rewards import RewardOptions
from jaxpref.train import Decay, OptimizerConfig, TrainConfig, read_metrics

GOAL = 0.9
"""The pass@1 whose first step is reported."""
ANSWERS = 4
"""Of each prompt.  So few that many groups have equal rewards."""
ARMS: dict[str, dict[str, Any]] = {
    "in turn": {},
    "resample-uniform 3": {"resample_uniform": 3},
    "prompt-target 0.5": {"prompt_target": 0.5},
    "both": {"resample_uniform": 3, "prompt_target": 0.5},
}
"""The options of each arm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """The sizes of the experiment."""

    out: str | None = None
    """Folder of the runs and the results (default: runs/prompt_selection, with the
    suffix _smoke)."""
    smoke: bool = False
    """Whether to run only a few steps."""
    prompts: int = 9_500
    """Prompts to train on.  With fewer, they recur within a run."""
    wrong_answers: float = 0.0
    """Share of these prompts whose answer in the file is wrong and never given."""
    steps: int = 60
    """Steps of each run."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the prompts and of the answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What all runs read."""

    model: Path
    """The supervised start."""
    prompts: Path
    heldout: Path
    steps: int


def trained(
    options: dict[str, Any], seed: int, inputs: Inputs, out: Path
) -> list[dict[str, Any]]:
    """Trains an arm with one seed; returns its metrics."""
    run_online(
        TrainConfig(
            model=str(inputs.model),
            data=str(inputs.prompts),
            eval_data=str(inputs.heldout),
            out=str(out),
            objective=objectives.grpo(beta=0.0),
            max_steps=inputs.steps,
            batch_size=32,
            row_length="none",
            seed=seed,
            mesh=arithmetic.MESH,
            eval_every=2,
            save_every=20,
            log_every=1,
            logger=(),
            options=DataOptions(heldout_fraction=0.0),
            optimizer=OptimizerConfig(
                learning_rate=1e-4,
                warmup_steps=inputs.steps // 12,
                decay=Decay.CONSTANT,
            ),
        ),
        SamplingOptions(
            group_size=ANSWERS,
            max_new_tokens=arithmetic.TOKENS,
            sample_batch_size=512,
            **options,
        ),
        RewardOptions(reward=("rule:exact",)),
    )
    return read_metrics(out / "metrics.jsonl")


def write_prompts(protocol: Protocol, world: Path) -> Path:
    """Writes the prompts that are trained on; returns their file."""
    text = (world / "prompts.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()[: protocol.prompts]]
    wrong = np.random.default_rng(2).random(len(rows)) < protocol.wrong_answers
    for row in itertools.compress(rows, wrong):
        row["answer"] = "unknown"
    path = world / f"prompts_{protocol.prompts}_{protocol.wrong_answers:g}.jsonl"
    write_jsonl(path, rows)
    return path


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The step at which the goal is reached, and what was sampled until then."""
    curve = [
        (x["step"], x["eval_rewards/mean"]) for x in lines if "eval_rewards/mean" in x
    ]
    steps = [x for x in lines if "loss" in x]
    reached = next((step for step, value in curve if value >= GOAL), None)
    before = steps[:reached]
    return {
        "reached": reached,
        "prompts": sum(x.get("prompts/answered", 32.0) for x in before),
        "uniform": float(np.mean([x["rewards/uniform"] for x in before])),
        "last": curve[-1][1],
        "curve": curve,
    }


def main(protocol: Protocol) -> dict[str, Any]:
    """Runs everything and writes `results.json`."""
    world = arithmetic.Protocol()
    out = Path(protocol.out or "runs/prompt_selection" + "_smoke" * protocol.smoke)
    if protocol.smoke:
        sizes = {"demonstrations": 2_000, "sft_steps": 100, "heldout": 100}
        world = dataclasses.replace(world, **sizes)
        protocol = dataclasses.replace(protocol, steps=3, seeds=(0,))
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    held = arithmetic.write_world(world, out)
    start = arithmetic.supervised(world, out)
    say(started, "supervised start")
    sums = [
        {"prompt": arithmetic.prompt_of(x), "answer": arithmetic.answer_of(x)}
        for x in held
    ]
    write_jsonl(out / "world" / "heldout.jsonl", sums)
    prompts = write_prompts(protocol, out / "world")
    inputs = Inputs(
        model=start,
        prompts=prompts,
        heldout=out / "world" / "heldout.jsonl",
        steps=protocol.steps,
    )
    results: dict[str, Any] = {}
    for name, options in ARMS.items():
        for seed in protocol.seeds:
            folder = out / f"{name.replace(' ', '-')}-{prompts.stem}-{seed}"
            lines = trained(options, seed, inputs, folder)
            found = results.setdefault(name, {})[str(seed)] = summary(lines)
            say(
                started,
                f"{name}, seed {seed}: {GOAL} at step {found['reached']} after "
                f"{found['prompts']:.0f} prompts, {found['uniform']:.0%} uniform; last "
                f"{found['last']:.3f}",
            )
    write_json(out / f"results_{prompts.stem}.json", results)
    show(f"{out}/results_{prompts.stem}.json")
    return results


if __name__ == "__main__":
    main(tyro.cli(Protocol))
