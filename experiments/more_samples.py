"""What does more computation at decoding gain if the reward is wrong?

Each of --prompts prompts has a model with a random table of next-token probabilities
(6 tokens, at most 4 tokens an answer), true rewards, standard normal, and rewards by
which answers are chosen: the true reward plus an error with heavy tails (Student's t,
--freedom degrees of freedom).  The methods, by their number n of draws or of rollouts:

- best-of-n;
- best-of-majority (arXiv:2510.03199), among answers with a share of --min-frequency;
- majority vote, which reads no reward;
- best-of-n by the mean of four rewards whose errors are independent, and pessimistic
  best-of-n: by that mean minus their standard deviation (arXiv:2310.02743);
- QAlign (arXiv:2504.03790): the last state of a chain of n - 1 steps;
- Transfer Q* (arXiv:2405.20495): each token by the mean reward of n continuations of
  each candidate, for n up to --most-rollouts;
- guided decoding with an autoregressive reward model (GenARM, arXiv:2410.08193), the
  one that infinitely many labels with Bradley-Terry noise would give: a single draw.

Compute is in tokens for each prompt: those that are generated, plus those that rewards
or guides read.  Of models of the same size, each takes about one forward pass of a
token.  The training of the autoregressive reward model is not counted.

Claims: with n, the reward of what best-of-n chooses keeps growing, and its true value
falls again; best-of-majority keeps more of it, and pessimistic best-of-n does not fall.
QAlign gains no more than best-of-n, at either beta tried (1 and 3).

Command (12 CPU seconds; also with --beta 1)
    python -m experiments.more_samples --json more_samples.json

Figures: docs/sampling.md.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence

import numpy as np
import tyro

from jaxpref.files import check_output, write_json
from jaxpref.runtime.entry import entry_point
from jaxpref.sampling.choice import (
    best_of_majority,
    best_of_n,
    majority_vote,
    pessimistic_best_of_n,
)
from jaxpref.sampling.qalign import qalign
from jaxpref.sampling.transfer_q import tilted, transfer_q

VOCABULARY, LONGEST, REWARDS = 6, 4, 4
OF_DRAWS = {
    "best-of-n": 1,
    "best-of-majority": 1,
    "majority": 0,
    "best-of-n, 4 rewards": REWARDS,
    "pessimistic best-of-n": REWARDS,
}
"""The methods that choose one of n draws, and how many rewards read each draw."""
Tokens = tuple[int, ...]
PREFIXES = [
    prefix
    for n in range(LONGEST)
    for prefix in itertools.product(range(1, VOCABULARY), repeat=n)
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the experiment."""

    json: str
    """File for the results."""
    prompts: int = 400
    """Number of prompts."""
    draws: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Numbers n of draws."""
    freedom: float = 1.5
    """Degrees of freedom of the error of the reward."""
    min_frequency: float = 0.05
    """Of best-of-majority."""
    beta: float = 3.0
    """Of QAlign, Transfer Q*, and guided decoding."""
    penalty: float = 1.0
    """Of pessimistic best-of-n."""
    most_rollouts: int = 16
    """The most rollouts of a candidate of Transfer Q*."""
    seed: int = 0
    """Of everything."""


@dataclasses.dataclass(frozen=True)
class World:
    """One prompt."""

    next: dict[Tokens, np.ndarray]
    """The distribution of the next token; token 0 ends an answer."""
    true: dict[Tokens, float]
    rewards: dict[Tokens, np.ndarray]
    """Each answer's rewards, with independent errors; all but two methods read only the
    first one."""
    guide: dict[Tokens, np.ndarray]
    """The next token's log-probabilities by the autoregressive reward model."""

    def complete(self, text: Tokens, rng: np.random.Generator) -> Tokens:
        """The text with a continuation by the model."""
        while not is_whole(text):
            cumulative = np.cumsum(self.next[text])
            text = (*text, int(np.searchsorted(cumulative, rng.random())))
        return text


@dataclasses.dataclass(frozen=True)
class Found:
    """What a method answers."""

    texts: list[Tokens]
    """The answer to each prompt."""
    tokens: float
    """Generated and read tokens, of a prompt in the mean."""


def is_whole(text: Tokens) -> bool:
    """Whether the answer has ended."""
    return len(text) == LONGEST or 0 in text


def make_world(rng: np.random.Generator, freedom: float) -> World:
    """A random prompt."""
    following = {prefix: rng.dirichlet(np.full(VOCABULARY, 0.5)) for prefix in PREFIXES}
    texts = [(*prefix, token) for prefix in PREFIXES for token in range(VOCABULARY)]
    answers = [text for text in texts if is_whole(text)]
    true = rng.normal(size=len(answers))
    rewards = true[:, None] + rng.standard_t(freedom, size=(len(answers), REWARDS))
    first = dict(zip(answers, rewards[:, 0].tolist()))
    return World(
        following,
        dict(zip(answers, true.tolist())),
        dict(zip(answers, rewards)),
        autoregressive(first),
    )


def autoregressive(rewards: dict[Tokens, float]) -> dict[Tokens, np.ndarray]:
    """The tables of next-token log-probabilities whose sums are rewards minus log Z.

    Every distribution over answers is a product of such tables, and Bradley-Terry
    labels of all pairs determine the rewards up to a constant: this is the limit of an
    autoregressive reward model that is trained on more and more labels.
    """
    sums = dict(rewards)  # of a text, log sum exp(reward) of the answers it begins
    found = {}
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        own = np.array([sums[(*prefix, token)] for token in range(VOCABULARY)])
        sums[prefix] = float(np.logaddexp.reduce(own))
        found[prefix] = own - sums[prefix]
    return found


def best_of_draws(
    worlds: Sequence[World], n: int, options: Options, rng: np.random.Generator
) -> dict[str, Found]:
    """The methods that choose one of n draws."""
    drawn = [[world.complete((), rng) for _ in range(n)] for world in worlds]
    length = float(np.mean([sum(map(len, texts)) for texts in drawn]))
    places: dict[str, list[int]] = {name: [] for name in OF_DRAWS}
    for world, texts in zip(worlds, drawn):
        rewards = np.array([world.rewards[text] for text in texts])
        first, mean, std = rewards[:, 0], rewards.mean(axis=1), rewards.std(axis=1)
        least, penalty = options.min_frequency, options.penalty
        own = {
            "best-of-n": best_of_n(first),
            "best-of-majority": best_of_majority(texts, first, min_frequency=least)[0],
            "majority": majority_vote(texts),
            "best-of-n, 4 rewards": best_of_n(mean),
            "pessimistic best-of-n": pessimistic_best_of_n(mean, std, penalty=penalty),
        }
        for name, place in own.items():
            places[name].append(place)
    return {
        name: Found([x[k] for x, k in zip(drawn, own)], length * (1 + OF_DRAWS[name]))
        for name, own in places.items()
    }


def by_qalign(
    worlds: Sequence[World], n: int, options: Options, rng: np.random.Generator
) -> Found:
    """The last states of chains of n - 1 steps."""
    starts, tokens = [world.complete((), rng) for world in worlds], 0

    def propose(step, texts, kept):
        nonlocal tokens
        each = zip(worlds, texts, kept, strict=True)
        found = [world.complete(text[:count], rng) for world, text, count in each]
        tokens += sum(map(len, found)) - int(np.sum(kept))
        return found

    def rewards(texts):
        nonlocal tokens
        tokens += sum(map(len, texts))
        return np.array([world.rewards[x][0] for world, x in zip(worlds, texts)])

    beta, seed = options.beta, options.seed
    states = qalign(starts, propose, rewards, steps=n - 1, beta=beta, seed=seed)
    return Found(states[-1], (tokens + sum(map(len, starts))) / len(worlds))


def by_transfer_q(
    worlds: Sequence[World], n: int, options: Options, rng: np.random.Generator
) -> Found:
    """Token by token, with n rollouts of every next token."""
    tokens = 0

    def candidates(numbers, texts):
        nonlocal tokens
        tokens += len(numbers)  # one forward pass gives all candidates
        p = np.array([worlds[k].next[x] for k, x in zip(numbers, texts)])
        with np.errstate(divide="ignore"):
            return np.tile(np.arange(VOCABULARY), (len(p), 1)), np.log(p)

    def values(step, numbers, texts):
        nonlocal tokens
        found = []
        for k, text in zip(numbers, texts):
            # What is whole has no rollouts, and is read once.
            count = 1 if is_whole(text) else n
            whole = [worlds[k].complete(text, rng) for _ in range(count)]
            tokens += sum(2 * len(x) - len(text) for x in whole)
            found.append(np.mean([worlds[k].rewards[x][0] for x in whole]))
        return np.array(found)

    texts = transfer_q(
        len(worlds),
        candidates,
        values,
        is_whole,
        max_new_tokens=LONGEST,
        alpha=options.beta,
        seed=options.seed,
    )
    return Found(texts, tokens / len(worlds))


def guided(
    worlds: Sequence[World], options: Options, rng: np.random.Generator
) -> Found:
    """One draw from the model times the guide to the power 1 / beta."""
    weighted = [
        dataclasses.replace(
            world,
            next={
                prefix: tilted(np.log(p), world.guide[prefix], alpha=options.beta)
                for prefix, p in world.next.items()
            },
        )
        for world in worlds
    ]
    texts = [world.complete((), rng) for world in weighted]
    return Found(texts, 2 * float(np.mean([len(text) for text in texts])))


def methods(worlds: Sequence[World], n: int, options: Options) -> dict[str, Found]:
    """The answers of each method that a number n of draws or rollouts applies to."""
    rng = np.random.default_rng([options.seed, n])
    found = best_of_draws(worlds, n, options, rng)
    found["QAlign"] = by_qalign(worlds, n, options, rng)
    if n <= options.most_rollouts:
        found["Transfer Q*"] = by_transfer_q(worlds, n, options, rng)
    if n == 1:
        found["guided"] = guided(worlds, options, rng)
    return found


def main(options: Options) -> None:
    """Prints and writes rewards and tokens of each method for each n."""
    check_output("--json", options.json, {})
    rng = np.random.default_rng(options.seed)
    worlds = [make_world(rng, options.freedom) for _ in range(options.prompts)]
    rows = []
    print(f"{'n':>4}  {'method':21} {'tokens':>7}   {'true':>6} {'+-':>5}  reward")
    for n in options.draws:
        for method, found in methods(worlds, n, options).items():
            texts = found.texts
            true = np.array([w.true[x] for w, x in zip(worlds, texts, strict=True)])
            rewards = [w.rewards[x][0] for w, x in zip(worlds, texts, strict=True)]
            row = {"n": n, "method": method, "tokens": found.tokens}
            row |= {"true": float(true.mean()), "reward": float(np.median(rewards))}
            row["standard error"] = error = float(true.std() / np.sqrt(len(true)))
            rows.append(row)
            print(
                f"{n:4}  {method:21} {found.tokens:7.1f}   {row['true']:6.2f} "
                f"{error:5.2f}  {row['reward']:6.2f}"
            )
    write_json(options.json, json.loads(json.dumps(rows)))


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
