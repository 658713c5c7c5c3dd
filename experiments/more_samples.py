"""Does more computation at decoding help if the reward is wrong?

Each of --prompts prompts has a model with a random table of next-token probabilities
(6 tokens, at most 4 tokens an answer), true rewards, standard normal, and a proxy: the
true reward plus an error with heavy tails (Student's t, --freedom degrees of freedom).
For each number n of draws, the proxy chooses an answer by

- best-of-n;
- best-of-majority (arXiv:2510.03199), among answers with a share of --min-frequency;
- majority vote, which reads no reward;
- QAlign (arXiv:2504.03790): the last state of a chain of n - 1 steps.

Claim: with n, the proxy's value of what best-of-n chooses keeps growing, and its true
value falls again; best-of-majority keeps more of it.  QAlign does not, if errors are so
large that the tilted distribution itself prefers them.

Command (15 CPU seconds)
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
from jaxpref.sampling.choice import best_of_majority, best_of_n, majority_vote
from jaxpref.sampling.qalign import qalign

VOCABULARY, LONGEST = 6, 4
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
    """Of QAlign."""
    seed: int = 0
    """Of everything."""


@dataclasses.dataclass(frozen=True)
class World:
    """One prompt."""

    next: dict[Tokens, np.ndarray]
    """The distribution of the next token; token 0 ends an answer."""
    true: dict[Tokens, float]
    proxy: dict[Tokens, float]

    def complete(self, text: Tokens, rng: np.random.Generator) -> Tokens:
        """The text with a continuation by the model."""
        while not is_whole(text):
            cumulative = np.cumsum(self.next[text])
            text = (*text, int(np.searchsorted(cumulative, rng.random())))
        return text


def is_whole(text: Tokens) -> bool:
    """Whether the answer has ended."""
    return len(text) == LONGEST or 0 in text


def make_world(rng: np.random.Generator, freedom: float) -> World:
    """A random prompt."""
    following = {prefix: rng.dirichlet(np.full(VOCABULARY, 0.5)) for prefix in PREFIXES}
    texts = [(*prefix, token) for prefix in PREFIXES for token in range(VOCABULARY)]
    answers = [text for text in texts if is_whole(text)]
    true = rng.normal(size=len(answers))
    proxy = true + rng.standard_t(freedom, size=len(answers))
    return World(following, dict(zip(answers, true)), dict(zip(answers, proxy)))


def chosen(
    worlds: Sequence[World], n: int, options: Options
) -> dict[str, list[Tokens]]:
    """The answer to each prompt, by method."""
    rng = np.random.default_rng([options.seed, n])
    found: dict[str, list[Tokens]] = {
        "best-of-n": [],
        "best-of-majority": [],
        "majority": [],
    }
    for world in worlds:
        drawn = [world.complete((), rng) for _ in range(n)]
        rewards = np.array([world.proxy[text] for text in drawn])
        least = options.min_frequency
        (place,) = best_of_majority(drawn, rewards, min_frequency=least)
        found["best-of-n"].append(drawn[best_of_n(rewards)])
        found["best-of-majority"].append(drawn[place])
        found["majority"].append(drawn[majority_vote(drawn)])

    def propose(step, texts, kept):
        each = zip(worlds, texts, kept, strict=True)
        return [world.complete(text[:count], rng) for world, text, count in each]

    states = qalign(
        [world.complete((), rng) for world in worlds],
        propose,
        lambda texts: np.array([w.proxy[x] for w, x in zip(worlds, texts)]),
        steps=n - 1,
        beta=options.beta,
        seed=options.seed,
    )
    return {**found, "QAlign": states[-1]}


def main(options: Options) -> None:
    """Prints and writes the mean rewards of each method for each n."""
    check_output("--json", options.json, {})
    rng = np.random.default_rng(options.seed)
    worlds = [make_world(rng, options.freedom) for _ in range(options.prompts)]
    rows = []
    print(f"{'n':>4}  {'method':18} {'true':>6} {'+-':>5}  proxy (median)")
    for n in options.draws:
        for method, texts in chosen(worlds, n, options).items():
            true = np.array([w.true[x] for w, x in zip(worlds, texts, strict=True)])
            proxy = np.array([w.proxy[x] for w, x in zip(worlds, texts, strict=True)])
            error = float(true.std() / np.sqrt(len(true)))
            row = {"n": n, "method": method, "true": float(true.mean())}
            row |= {"standard error": error, "proxy": float(np.median(proxy))}
            rows.append(row)
            shown = f"{row['true']:6.2f} {error:5.2f}  {row['proxy']:6.2f}"
            print(f"{n:4}  {method:18} {shown}")
    write_json(options.json, json.loads(json.dumps(rows)))


if __name__ == "__main__":
    with entry_point():
        main(tyro.cli(Options, description=__doc__))
