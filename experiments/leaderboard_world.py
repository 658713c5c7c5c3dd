"""The world of `leaderboard.py`: reviews, their tokens, pairs, and five kinds of noise.

The reference is uniform over a finite set of reviews, and a policy is a vector theta:

    pi(y|x) = exp(theta . f(x, y)) / Z(x)

So log-probabilities, also those of every token, rewards, and KLs are exact sums.
"""

import dataclasses

import numpy as np

from experiments import sentiment_world as sentiment
from experiments.exact_frontier import phrases
from jaxpref.data.noise import flip_by_class, flip_symmetric

ANNOTATORS = 10
"""Annotators of "two pools", half of them in each pool."""
POOL_RATES = (0.05, 0.4)
"""Flip rates of the two pools."""


@dataclasses.dataclass(frozen=True)
class World:
    """All prompts and reviews; "answers" are the reviews of all prompts, in order."""

    features: np.ndarray
    """Of each answer, [answers, features]: weighted shares of what its clauses say (see
    `exact_frontier.py`), and its length, standardized."""
    rewards: np.ndarray
    """Gold rewards, [prompts, reviews]."""
    lengths: np.ndarray
    """Words of each answer plus one, the end of the text, [answers]."""
    paths: np.ndarray
    """The node of the tree of prefixes after each token, [answers, tokens]; after the
    end, an additional last node."""
    parents: np.ndarray
    """The parent of each node, [nodes]; roots, one per prompt, are their own."""


def make_world(reviews: int) -> World:
    """Draws different reviews of each prompt from the grammar, equally likely."""
    texts = draw_texts(reviews)
    features = features_of(texts)
    lengths = np.array([len(text.split()) + 1 for _, text in texts])
    rewards = [sentiment.gold_reward(*text) for text in texts]
    shape = len(sentiment.all_prompts()), reviews
    return World(features, np.reshape(rewards, shape), lengths, *make_tree(texts))


def draw_texts(reviews: int) -> list[tuple[str, str]]:
    """The prompt and the text of every answer."""
    rng, texts = np.random.default_rng(0), []
    for prompt in sentiment.all_prompts():
        found: dict[str, None] = {}
        while len(found) < reviews:
            found.setdefault(sentiment.write_review(rng, prompt))
        texts += [(prompt, text) for text in found]
    return texts


def features_of(texts: list[tuple[str, str]]) -> np.ndarray:
    """Features of (prompt, review) pairs, one row each; see `World`."""
    said = [phrases(*text) for text in texts]
    names = sorted({name for pairs in said for name, _ in pairs})
    column = {name: n for n, name in enumerate(names)}
    features = np.zeros((len(texts), len(names) + 1))
    for row, pairs in zip(features, said):
        for name, weight in pairs:
            row[column[name]] += weight
    lengths = np.array([len(text.split()) + 1 for _, text in texts])
    features[:, -1] = (lengths - lengths.mean()) / lengths.std()
    return features


def make_tree(texts: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """(paths, parents) of the tree of all prefixes; see `World`."""
    nodes: dict[tuple, int] = {(prompt,): 0 for prompt, _ in texts}
    nodes = {root: n for n, root in enumerate(nodes)}
    parents, paths = list(range(len(nodes))), []
    for prompt, text in texts:
        prefix, path = (prompt,), []
        for word in (*text.split(), "</s>"):
            parent, prefix = nodes[prefix], (*prefix, word)
            if prefix not in nodes:
                nodes[prefix] = len(parents)
                parents.append(parent)
            path.append(nodes[prefix])
        paths.append(path)
    longest, last = max(map(len, paths)), len(parents)
    padded = [path + [last] * (longest - len(path)) for path in paths]
    return np.array(padded), np.array([*parents, last])


@dataclasses.dataclass(frozen=True)
class Noise:
    """A kind of label noise."""

    name: str
    flip_rate: float
    """Mean flip rate, for methods that know it."""
    annotators: int = 0
    """Number of known annotators."""


NOISES = {
    noise.name: noise
    for noise in (
        Noise("none", 0.0),
        Noise("symmetric 20%", 0.2),
        Noise("symmetric 40%", 0.4),
        Noise("two pools", sum(POOL_RATES) / 2, ANNOTATORS),
        Noise("half by length", 0.25),
    )
}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of answers with noisy labels, and what methods may know about them."""

    answers: np.ndarray
    """Index of the chosen and of the rejected answer, [pairs, 2]."""
    is_flipped: np.ndarray
    """Whether the label differs from the one without noise, [pairs]."""
    annotator: np.ndarray
    """[pairs]; -1 if unknown."""
    labels: dict[str, np.ndarray]
    """By the names of `jaxpref.data.columns`, [pairs].  They come from the gold
    rewards and true flip rates: a method that reads one knows more than others."""


def draw_pairs(world: World, noise: Noise, count: int, *, seed: int) -> Pairs:
    """Two different samples of the reference each, with Bradley-Terry labels.

    Pairs and labels without noise are the same for every kind of noise.
    """
    rng = np.random.default_rng(seed)
    prompts, reviews = world.rewards.shape
    prompt = rng.integers(prompts, size=count)
    first = rng.integers(reviews, size=count)
    second = (first + rng.integers(1, reviews, size=count)) % reviews
    first, second = first + reviews * prompt, second + reviews * prompt
    gold = world.rewards.ravel()
    right = sentiment.prefer(gold[first], gold[second], seed=seed)
    flips, annotator, rate = flip(world, noise, first, second, right, seed=seed)
    label = right ^ flips
    chosen, rejected = np.where(label, first, second), np.where(label, second, first)
    gap = np.abs(gold[first] - gold[second])
    labels = {
        "chosen_rating": gold[chosen],
        "rejected_rating": gold[rejected],
        "margin": sentiment.SHARPNESS * gap,
        "strength": gap,
        "tie": np.zeros(count),
        "flip_rate": rate,
        "chosen_first": label.astype(float),
        "flip_predictor": rate,
    }
    return Pairs(np.stack([chosen, rejected], axis=1), flips, annotator, labels)


def flip(world: World, noise: Noise, first, second, right, *, seed: int):
    """(flips, annotators, true flip rates) of pairs; the first is better if `right`."""
    count = len(first)
    ids, unknown = [f"pair {n}" for n in range(count)], np.full(count, -1)
    if noise.annotators:
        who = np.random.default_rng((seed, 1)).integers(noise.annotators, size=count)
        pools = np.arange(noise.annotators) * len(POOL_RATES) // noise.annotators
        rates = dict(enumerate(np.array(POOL_RATES)[pools]))
        flips = flip_by_class(ids, who.tolist(), rates, seed=seed)
        return flips, who, np.array(list(rates.values()))[who]
    if noise.name == "half by length":
        by_length = flip_symmetric(ids, rate=0.5, seed=seed)
        # Of two answers with equal lengths, the label is a coin toss.
        coin = np.random.default_rng((seed, 1)).random(count) - 0.5
        longer = world.lengths[first] - world.lengths[second] + coin
        flips = by_length & ((longer > 0) != right)
        # A label by length alone says nothing of the reward.
        return flips, unknown, np.where(by_length, 0.5, 0.0)
    flips = flip_symmetric(ids, rate=noise.flip_rate, seed=seed)
    return flips, unknown, np.full(count, noise.flip_rate)
