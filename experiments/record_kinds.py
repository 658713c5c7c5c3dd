"""Pairs, single answers, and lists with noisy labels, at matched KL.

Claim
    Pairs with 40% flips, twice as many single answers with 40% flips, and half as many
    lists of four with noisy ratings, made of the same answers and with the same
    information by the Cramer-Rao bound, give rewards at the same KL that twelve draws
    do not distinguish: no method differs from DPO on pairs by more than its 95%
    interval, which is up to 0.14 wide on either side, a tenth of the reward.  DPO on
    all pairs of a list is as good as the losses of lists.
    KTO is anchored preference optimization (APO-zero) here: most of the time, its
    reference point is 0, because the policy assigns answers to other prompts less
    probability than the reference does.

Commands
    python -m experiments.record_kinds             (default)
    python -m experiments.record_kinds --smoke     (sanity check)
    Writes results.json, table.md, a figure, and report.html to runs/record_kinds, with
    the suffix _smoke, or to the folder of --out.  Repeating the command trains only
    what is missing.

Expected
    Means over seeds 0 to 11.  Tuned beta, KL, and share of the best possible reward at
    this KL; reward at KL 1, its share, and its difference from DPO on pairs:

        records         method          beta  KL    share  at KL 1  share  difference
        pairs           DPO             1/8   0.81  0.77   1.35     0.76
        thumbs          BCO             1/8   0.91  0.78   1.39     0.78   +0.04 ± 0.11
                        KTO             1     0.90  0.77   1.36     0.76    0.00 ± 0.11
                        APO-zero        1     0.90  0.77   1.36     0.76    0.00 ± 0.11
        lists           Plackett-Luce   1/8   0.70  0.82   1.46     0.82   +0.11 ± 0.14
                        LiPO-lambda     1/8   0.75  0.80   1.42     0.79   +0.07 ± 0.13
                        IRPO            1/32  1.10  0.77   1.41     0.79   +0.06 ± 0.14
        pairs of lists  DPO             1/8   0.69  0.83   1.47     0.82   +0.11 ± 0.13

    ±: 95% interval.  The standard deviations over seeds of the rewards at KL 1 are from
    0.09 to 0.16: with 40% flips, the draw of the labels matters more than the method.
    Time: 2.2 minutes of CPU time (jax 0.10.2, Intel Xeon).

Protocol
    World and policies are those of `leaderboard.py`: 24 prompts with 256 reviews each
    that are equally likely under the reference, the gold reward of `sentiment_world.py`
    in [-4, 4], and log-linear policies in 77 features, whose rewards, KLs, and best
    possible rewards are exact.
    Answers: groups of four different answers to one prompt; every kind of record is
    made of the same groups.
    Pairs: two of each group.  Bradley-Terry labels, P = s(2 (r_a - r_b)), of which 40%
    are flipped.
    Thumbs: one for each answer, P(up) = s(2 (r - mean reward)), of which 40% are
    flipped.  For KTO, each also has the answer of a record with another prompt, whose
    log-ratio is theta . f(x, y') - log Z(x) + log 256, as of the prompt's own reviews.
    Lists: each group ranked by ratings v r + g, where g has a standard Gumbel
    distribution, so that the ranking follows the Plackett-Luce model, and its pairs
    that of Bradley and Terry.  Their only noise is that of the ratings.
    Information: the Cramer-Rao bound of the error of estimated rewards, averaged over
    answers, is the same for all kinds (`record_kinds_world.py`).  By this bound, a pair
    has the information of 2.01 thumbs, so there are two thumbs for each pair.  For
    lists, v = 0.139 is such that a list has the information of two pairs.  So all kinds
    also have the same number of answers.
    Training: one pass over 8,192 pairs, 16,384 thumbs, or 4,096 lists (24,576 pairs of
    lists) in 128 steps, with the gradients, AdamW, clipping, and cosine schedule of
    `jaxpref.train`, float32, and the library's own losses and objectives.
    Sweep: 12 betas from 2^-6 to 2^5 times the learning rates 0.1, 0.2, and 0.4.
    Reward at matched KL: each policy is rescaled, exp(c theta . f), to a KL of 0.64 or
    1, so that all methods have a reward at it, on every seed.
    Tuning, on seeds 100 to 103, the same for every method: the beta and the learning
    rate with the highest mean reward at a mean KL of at most 1, and for each matched
    KL, those with the highest mean reward after rescaling.  Reported on seeds 0 to 11,
    differences paired by seed, with 95% t intervals.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import record_kinds_world as kinds
from experiments.leaderboard import best_curve
from experiments.leaderboard_methods import blank_batch
from experiments.leaderboard_world import World, draw_texts, features_of, make_world
from experiments.log_linear import all_logits, measure, one_pass, reward_at_kl
from experiments.noisy_sentiment import begin
from experiments.progress import say
from experiments.record_kinds_report import MATCHED_KLS, write_results
from experiments.sentiment_world import ASPECTS, all_prompts
from jaxpref import losses, objectives
from jaxpref.data import PreferenceBatch
from jaxpref.files import write_json
from jaxpref.objectives import Objective, from_loss
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.ranges import checked
from jaxpref.scoring.scores import Scored


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All settings that determine the result; see "Protocol" above."""

    reviews: int = 256
    groups: int = 4096
    steps: int = 128
    betas: tuple[float, ...] = tuple(2.0 ** np.arange(-6, 6))
    learning_rates: tuple[float, ...] = (0.1, 0.2, 0.4)
    tuning_seeds: tuple[int, ...] = (100, 101, 102, 103)
    seeds: tuple[int, ...] = tuple(range(12))


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method, and the kind of its records."""

    name: str
    kind: str
    make: Callable[..., Objective]
    """`make(beta=...)`."""

    @property
    def file(self) -> str:
        """The name of its results under OUT/parts."""
        return f"{self.name} {self.kind}.json".replace(" ", "-")


dpo = functools.partial(from_loss, losses.dpo)
ARMS = (
    Arm("dpo", "pairs", dpo),
    Arm("bco", "thumbs", objectives.bco),
    Arm("kto", "thumbs", objectives.kto),
    Arm("apo_zero_unpaired", "thumbs", objectives.apo_zero_unpaired),
    Arm("plackett_luce", "lists", objectives.plackett_luce),
    Arm("lipo_lambda", "lists", objectives.lipo_lambda),
    Arm("irpo", "lists", objectives.irpo),
    Arm("dpo", "pairs of lists", dpo),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    out: str | None = None
    """Output folder; repeating the command resumes the run in it.  Default:
    runs/record_kinds, or runs/record_kinds_smoke."""
    smoke: bool = False
    """A sanity check that takes a minute; its numbers mean nothing."""


def choose(options: Options) -> tuple[Protocol, Path]:
    """The protocol and the output folder."""
    if not options.smoke:
        return Protocol(), Path(options.out or "runs/record_kinds")
    protocol = Protocol(
        reviews=16, groups=32, steps=4, betas=(0.01, 1.0), learning_rates=(0.4,),
        tuning_seeds=(100,), seeds=(0, 1),
    )  # fmt: skip
    return protocol, Path(options.out or "runs/record_kinds_smoke")


def records_of(
    kind: str, world: World, bounds: kinds.Bounds, protocol: Protocol, seed: int
) -> kinds.Records:
    """The records of a kind, [steps, records of a step, ...] by name."""
    groups = kinds.draw_groups(world, protocol.groups, seed=seed)
    lists = functools.partial(
        kinds.make_lists, world, groups, sharpness=bounds.sharpness, seed=seed
    )
    make = {
        "pairs": lambda: kinds.make_pairs(world, groups, seed=seed),
        "thumbs": lambda: kinds.make_thumbs(world, groups, seed=seed),
        "lists": lists,
        "pairs of lists": lambda: kinds.all_pairs(lists()),
    }
    split = lambda values: values.reshape(protocol.steps, -1, *values.shape[1:])
    return {name: split(values) for name, values in make[kind]().items()}


# ---- training ------------------------------------------------------------------------


def features_by_aspect(reviews: int) -> np.ndarray:
    """Features of every answer to a prompt about each aspect, [aspects, answers, ...].

    Prompts differ only in the place, which features do not depend on, and the aspect.
    """
    asked, texts = all_prompts()[: len(ASPECTS)], draw_texts(reviews)
    found = features_of([(prompt, text) for prompt in asked for _, text in texts])
    return found.reshape(len(asked), len(texts), -1)


def make_batch(records: dict[str, Any], step) -> PreferenceBatch:
    """The batch of one step; a completion is one "token", the index of its answer."""
    answers = records["answers"]
    count, completions = answers.shape
    return dataclasses.replace(
        blank_batch(count),
        tokens=answers[None, :, :, None],
        pair_index=(step * count + jnp.arange(count)).reshape(1, count, 1),
        completion_lengths=jnp.ones((1, count, 1, completions), jnp.int32),
        numbers={
            name: jnp.asarray(x, jnp.float32).reshape(1, count, 1, *x.shape[1:])
            for name, x in records.items()
            if name != "answers"
        },
    )


def score(world: World, features: np.ndarray, theta, batch: PreferenceBatch) -> Scored:
    """Log-probs of policy and reference, [R, 1, K], given the prompt of answer 1."""
    answers = batch.tokens[..., 0]
    reviews = world.rewards.shape[1]
    prompt = answers[:, :1] // reviews
    logits = jnp.asarray(features, theta.dtype)[prompt % len(features), answers] @ theta
    normalizer = jax.nn.logsumexp(all_logits(world, theta), axis=1)
    logps = (logits - normalizer[prompt])[:, None]
    uniform = jnp.full_like(logps, -np.log(reviews))
    return Scored({"policy_logps": logps, "reference_logps": uniform}, {})


def trainer(world: World, features: np.ndarray, arm: Arm) -> Callable:
    """`train(records, betas, learning rates)`: what is measured, [seeds, settings].

    By name: `reward`, `kl`, and `matched`, which has a further axis for the KLs.
    """

    def train_one(records, beta, learning_rate):
        theta = one_pass(
            arm.make(beta=beta),
            functools.partial(score, world, features),
            make_batch,
            records,
            start=jnp.zeros(features.shape[-1]),
            learning_rate=learning_rate,
        )
        at = jnp.stack([reward_at_kl(world, theta, kl) for kl in MATCHED_KLS])
        return measure(world, theta) | {"matched": at}

    return jax.jit(jax.vmap(jax.vmap(train_one, (None, 0, 0)), (0, None, None)))


def run_arm(
    arm: Arm,
    world: World,
    features: np.ndarray,
    bounds: kinds.Bounds,
    protocol: Protocol,
) -> dict:
    """All runs of one arm: the contents of its file."""
    seeds = [*protocol.tuning_seeds, *protocol.seeds]
    drawn = [records_of(arm.kind, world, bounds, protocol, seed) for seed in seeds]
    grid = [(b, rate) for rate in protocol.learning_rates for b in protocol.betas]
    betas, rates = np.array(grid).T
    found = trainer(world, features, arm)(
        jax.tree.map(lambda *x: np.stack(x), *drawn),
        jnp.array(betas),
        jnp.array(rates),
    )
    return {
        "method": arm.name,
        "records": arm.kind,
        "seeds": seeds,
        "betas": betas.tolist(),
        "learning_rates": rates.tolist(),
        **{name: np.asarray(values).tolist() for name, values in found.items()},
    }


def main(options: Options) -> None:
    """Runs what is missing, and writes the report."""
    protocol, out = choose(options)
    begin(protocol, out)
    (out / "parts").mkdir(exist_ok=True)
    clock = functools.partial(say, time.perf_counter())
    world = make_world(protocol.reviews)
    features = features_by_aspect(protocol.reviews)
    bounds = kinds.measure_bounds(world)
    clock(f"a pair has the information of {bounds.thumbs_per_pair:.2f} thumbs")
    parts = []
    for arm in ARMS:
        path = out / "parts" / arm.file
        if not path.exists():
            write_json(path, run_arm(arm, world, features, bounds, protocol))
            clock(f"{arm.name}, {arm.kind}")
        parts.append(json.loads(path.read_text()))
    write_results(
        out,
        parts,
        best_curve(world),
        bounds=dataclasses.asdict(bounds),
        tuning=len(protocol.tuning_seeds),
        about=__doc__ or "",
    )


if __name__ == "__main__":
    with entry_point():
        main(checked(tyro.cli(Options, description=__doc__)))
