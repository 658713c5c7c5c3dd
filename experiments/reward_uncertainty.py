"""Do uncertain reward models find wrong labels better than their margins?

Claim
    UPO (Wang et al. 2024, arXiv:2409.11212) filters preference pairs by the uncertainty
    of a reward model under dropout.  Ensembles and the posterior of the last layer are
    other estimates.  For pairs like those of the training set, none of them finds
    wrong labels, or errors of the model, better than the plain margin.

Commands
    python -m experiments.reward_uncertainty             (default)
    python -m experiments.reward_uncertainty --smoke     (sanity check)
    Writes results.json and table.md to runs/reward_uncertainty, with the suffix _smoke,
    or to the folder of --out.  Repeating the command computes only what is missing.

Expected
    AUROC for flips of held-out pairs and for the model's errors, means over five seeds;
    `p` is the mean probability, and `std` the standard deviation of the margin:

                              20% flips                  40% flips
                              flips p   std   errors p   flips p   std   errors p
        margin                0.900           0.857      0.781           0.698
        dropout               0.900   0.492   0.856      0.781   0.495   0.698
        Laplace               0.900   0.506   0.857      0.781   0.505   0.698
        heads                 0.892   0.507   0.822      0.765   0.504   0.657
        models                0.901   0.505   0.861      0.781   0.492   0.700
        models, resampled     0.896   0.503   0.840      0.765   0.506   0.666

    Differences of `p` from the margin are at most 0.005 above it, and no interval of
    one that is above by 0.001 or more excludes 0.  BALD is between 0.46 and 0.62
    everywhere.  On training pairs, the numbers for flips are alike.  The models rank
    0.891 and 0.748 of the held-out pairs as the gold reward does.  Log losses after a
    temperature: 0.601 to 0.604 at 20% (margin 0.601), 0.685 to 0.687 at 40% (0.685).
    Time: 40 seconds of CPU time.

Protocol
    World and models are those of `review_rewards.py`: 24 prompts with 256 reviews each,
    and a reward model with one hidden layer of 64 units, the features of its head.
    Pairs: 2,048 for training and as many held-out ones for each seed, with Bradley-
    Terry labels, P = s(2 (r_a - r_b)), of which 20% or 40% are flipped.
    Training: 10 epochs of 32 steps of 64 pairs, with the gradients, AdamW, clipping,
    and cosine schedule of `jaxpref.train`, and a learning rate of 3e-3.
    Estimates: the functions of `jaxpref score --uncertainty`.  Dropout: 100 masks at a
    rate of 0.1.  Heads: 10 heads of the one model, fitted to resampled pairs.  Models:
    5 models with other initial weights, trained on the same pairs, or on resampled
    ones.  Laplace: the posterior of the head, with the prior precision of highest
    evidence.
    Measured: the AUROC for planted flips of the probability that the label is wrong, of
    the standard deviation of the margin, and of the mutual information of label and
    weights (BALD), against that of the plain margin; the same for held-out pairs that
    the model ranks unlike the gold reward, of the probability of the less likely label;
    and the log loss of noisy held-out labels, after a temperature is fitted to the
    first half of them, on the second.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import review_rewards as models
from experiments.leaderboard_world import World, make_world
from experiments.noisy_sentiment import begin
from experiments.progress import say
from experiments.ranks import area
from jaxpref import losses
from jaxpref.evaluate.frontier import t_interval
from jaxpref.files import write_json, write_whole
from jaxpref.noise.calibration import fit_temperature
from jaxpref.noise.dropout import dropout_rewards, record_keys
from jaxpref.noise.linear_head import (
    HeadPosterior,
    expected_probability,
    laplace,
    resampled_heads,
)
from jaxpref.noise.uncertainty import bald
from jaxpref.objectives import from_loss
from jaxpref.runtime.entry import entry_point
from jaxpref.runtime.ranges import checked


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All settings that determine the result; see "Protocol" above."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    flip_rates: tuple[float, ...] = (0.2, 0.4)
    reviews: int = 256
    pairs: int = 2048
    batch: int = 64
    epochs: int = 10
    learning_rate: float = 3e-3
    members: int = 5
    masks: int = 100
    heads: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    out: str | None = None
    """Output folder; repeating the command resumes the run in it.  Default:
    runs/reward_uncertainty or runs/reward_uncertainty_smoke."""
    smoke: bool = False
    """A sanity check of seconds; its numbers mean nothing."""


def choose(options: Options) -> tuple[Protocol, Path]:
    """The protocol and the output folder."""
    if not options.smoke:
        return Protocol(), Path(options.out or "runs/reward_uncertainty")
    protocol = Protocol(
        seeds=(0, 1), flip_rates=(0.4,), reviews=8, pairs=128, batch=32, epochs=1,
        members=2, masks=4, heads=3,
    )  # fmt: skip
    return protocol, Path(options.out or "runs/reward_uncertainty_smoke")


def trainer(world: World, protocol: Protocol):
    """`train(records, seeds)`: a model for each of several sequences of batches."""

    def train_one(records, seed):
        return models.train(
            from_loss(losses.bradley_terry),
            world.features,
            records,
            jax.random.key(seed),
            learning_rate=protocol.learning_rate,
        )

    return jax.jit(jax.vmap(train_one))


def train_models(
    world: World, pairs, train, protocol: Protocol, *, seed: int
) -> list[dict[str, np.ndarray]]:
    """A model, the members of an ensemble of all pairs, and of resampled ones."""
    rng = np.random.default_rng((seed, 2))
    count = 1 + 2 * protocol.members
    records = []
    for member in range(count):
        draw = np.arange(protocol.pairs)
        if member > protocol.members:
            draw = rng.integers(protocol.pairs, size=protocol.pairs)
        own = dataclasses.replace(
            pairs, answers=pairs.answers[draw], is_flipped=pairs.is_flipped[draw]
        )
        sizes = {"epochs": protocol.epochs, "batch": protocol.batch}
        records.append(models.shuffled(own, **sizes, seed=seed))
    stacked = jax.tree.map(lambda *x: np.stack(x), *records)
    seeds = 1000 * seed + np.arange(count)
    found = jax.device_get(train(stacked, seeds))
    return [jax.tree.map(lambda x, n=n: x[n], found) for n in range(count)]


def random_heads(
    world: World, model: dict, answers: np.ndarray, protocol: Protocol
) -> tuple[jax.Array, HeadPosterior]:
    """Heads of one model, fitted to resampled training pairs, and their posterior."""
    features = models.hidden(model, jnp.asarray(world.features, jnp.float32)[answers])
    differences = features[:, 0] - features[:, 1]
    posterior = laplace(differences, jnp.asarray(model["head"]))
    heads = resampled_heads(
        differences,
        jax.random.key(0),
        members=protocol.heads,
        prior_precision=posterior.prior_precision,
    )
    return heads, posterior


def estimates(
    world: World,
    trained: list[dict],
    heads: jax.Array,
    posterior: HeadPosterior,
    answers: np.ndarray,
    protocol: Protocol,
) -> dict[str, dict[str, np.ndarray]]:
    """P(label right), standard deviation of the margin, and BALD, by estimate.

    Args:
      world: the answers.
      trained: from `train_models`.
      heads: from `random_heads`.
      posterior: from `random_heads`.
      answers: the pairs that are judged.
      protocol: all settings.
    """
    table = jnp.asarray(world.features, jnp.float32)
    model, *members = trained
    head = jnp.asarray(model["head"])
    features = models.hidden(model, table[answers])
    difference = features[:, 0] - features[:, 1]
    margins = difference @ head
    keys = record_keys(0, np.arange(len(answers), dtype=np.uint32))
    masked = dropout_rewards(features, head, keys, passes=protocol.masks)
    each = jnp.stack([models.reward(m, table[answers]) for m in members])
    gaps = each[..., 0] - each[..., 1]
    variance = posterior.variance(difference)
    sampled = {
        "dropout": masked[..., 0] - masked[..., 1],
        "heads": heads @ difference.T,
        "models": gaps[: protocol.members],
        "models, resampled": gaps[protocol.members :],
    }
    found = {"margin": {"p": jax.nn.sigmoid(margins)}}
    for name, some in sampled.items():
        p = jax.nn.sigmoid(some)
        found[name] = {"p": p.mean(0), "std": some.std(0), "bald": bald(p)}
    p = expected_probability(margins, variance)
    found["laplace"] = {"p": p, "std": jnp.sqrt(variance)}
    return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def measure(
    found: dict[str, np.ndarray], wrong: np.ndarray, unlikely: np.ndarray
) -> dict[str, float]:
    """AUROC for what is wrong: of a probability, of the standard deviation, of BALD."""
    scores = found | {"p": unlikely}
    return {name: area(x, wrong) for name, x in scores.items()}


def log_loss(p: np.ndarray) -> float:
    """Of labels that have the probability p, each the likely or the unlikely one.

    A temperature is fitted to the first half, and the loss is that of the second.
    """
    p = np.clip(p, 1e-6, 1 - 1e-6)
    logits = np.log(p) - np.log1p(-p)
    half = len(p) // 2
    fitted = fit_temperature(jnp.asarray(logits[:half], jnp.float32), jnp.ones(half))
    return float(np.logaddexp(0, -logits[half:] / float(fitted.temperature)).mean())


def run_one(world: World, train, rate: float, seed: int, protocol: Protocol) -> dict:
    """All numbers of one seed and flip rate."""
    pairs = models.draw_pairs(world, rate, protocol.pairs, seed=seed)
    heldout = models.draw_pairs(world, rate, protocol.pairs, seed=1000 + seed)
    trained = train_models(world, pairs, train, protocol, seed=seed)
    heads, posterior = random_heads(world, trained[0], pairs.answers, protocol)
    accuracy = models.accuracy(world, trained[0], jnp.asarray(heldout.answers))
    result = {"flip_rate": rate, "seed": seed, "accuracy": float(accuracy)}
    for name, judged in (("training", pairs), ("held out", heldout)):
        found = estimates(world, trained, heads, posterior, judged.answers, protocol)
        result[name] = {
            how: measure(x, judged.is_flipped, 1 - x["p"]) for how, x in found.items()
        }
    gold = world.rewards.ravel()[heldout.answers]
    wrong = (found["margin"]["p"] > 0.5) != (gold[:, 0] > gold[:, 1])
    result["errors"] = {
        how: measure(x, wrong, np.minimum(x["p"], 1 - x["p"]))
        for how, x in found.items()
    }
    result["log_loss"] = {how: log_loss(x["p"]) for how, x in found.items()}
    return result


def main(options: Options) -> None:
    """Computes what is missing, and writes the table."""
    protocol, out = choose(options)
    begin(protocol, out)
    (out / "parts").mkdir(exist_ok=True)
    clock = functools.partial(say, time.perf_counter())
    world = make_world(protocol.reviews)
    train, results = trainer(world, protocol), []
    for rate in protocol.flip_rates:
        for seed in protocol.seeds:
            path = out / "parts" / f"{round(100 * rate)}-{seed}.json"
            if not path.exists():
                write_json(path, run_one(world, train, rate, seed, protocol))
            results.append(json.loads(path.read_text()))
            clock(f"{rate:.0%} flips, seed {seed}")
    write_json(out / "results.json", results)
    write_whole(str(out / "table.md"), table(results, protocol.flip_rates))


def table(results: list[dict], rates: tuple[float, ...]) -> str:
    """Means of all numbers; differences from the margin with 95% t intervals."""
    lines = [
        "| flips | estimate | by | flips, training | flips, held out | model's errors |"
        " log loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for rate in rates:
        own = [x for x in results if x["flip_rate"] == rate]
        for how, numbers in own[0]["training"].items():
            for by in numbers:
                cells = [
                    mean_and_gain(
                        np.array([x[part][how][by] for x in own]),
                        np.array([x[part]["margin"]["p"] for x in own]),
                    )
                    for part in ("training", "held out", "errors")
                ]
                loss = np.mean([x["log_loss"][how] for x in own])
                cells.append(f"{loss:.4f}" if by == "p" else "")
                lines.append(f"| {rate:.0%} | {how} | {by} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_and_gain(values: np.ndarray, baseline: np.ndarray) -> str:
    """The mean, and the paired difference from the baseline with its interval."""
    gains = values - baseline
    if not gains.any() or len(gains) < 2:
        return f"{values.mean():.3f}"
    mean, low, high = t_interval(gains)
    return f"{values.mean():.3f} ({mean:+.3f}, {low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    with entry_point():
        main(checked(tyro.cli(Options, description=__doc__)))
