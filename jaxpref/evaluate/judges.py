"""The judges of an audit, Bradley-Terry models that differ in what they read.

- `length`: log of the length in characters, of the whole text;
- `surface`: interpretable features of the texts, and the length;
- `words`: TF-IDF of the texts, and the length;
- `states`: the language model's hidden states and log-probs, and the length;
- `reward`: the rewards of a reward model, if there is one, and the length.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxpref.evaluate.crossfit import prompt_folds, scaled
from jaxpref.evaluate.features import Features
from jaxpref.evaluate.preferences import differences
from jaxpref.evaluate.stack import stack
from jaxpref.evaluate.surface import describe_answers
from jaxpref.evaluate.words import principal, word_differences

STRONG = 3.0
"""Scale of the few length, log-prob and surface columns relative to the many others, so
that their coefficients are penalized nine times less."""

Columns = Float[np.ndarray, "pairs features"]


def length_column(answers: Sequence[tuple[str, str]]) -> Float[np.ndarray, "pairs 1"]:
    """The difference of log(1 + characters), with a mean square of 1.

    The whole texts count, whatever part of them the language model reads.
    """
    lengths = np.array([[len(x) for x in pair] for pair in answers]).reshape(-1, 2)
    return scaled(_side(np.log1p(lengths))[:, None])


def state_columns(found: Features, length: Float[np.ndarray, "pairs 1"]) -> Columns:
    """Chosen minus rejected: hidden states, log-probs, and length.

    Args:
      found: features of the language model; N pairs.
      length: from `length_column`.

    Returns:
      float64 [N, 2 D + 3] of hidden states, summed and average log-probs, and the
      length.  Columns have a mean square of 1, except that log-probs and the length are
      scaled by `STRONG`.
    """
    # An average over the tokens that the model has read.
    average = found.logps / found.lengths.astype(np.float64)
    logps = scaled(np.stack([_side(found.logps), _side(average)], axis=1))
    few = STRONG * np.concatenate([logps, length], axis=1)
    return np.concatenate([scaled(_side(found.states)), few], axis=1)


def judges(
    found: Features,
    surface: Float[np.ndarray, "pairs features"],
    answers: Sequence[tuple[str, str]],
    rewards: Float[np.ndarray, "pairs 2"] | None = None,
) -> dict[str, Columns]:
    """The columns of each judge, preferred answer minus the other, by its name.

    Args:
      found: features of the language model; N pairs.
      surface: differences of interpretable features, with a mean square of 1.
      answers: the texts of the preferred and the other answer of each pair.
      rewards: a reward model's reward of each answer; None without a reward model.

    Returns:
      float64 [N, features] by name, in the order above.
    """
    length = length_column(answers)
    words = word_differences(answers)
    # A mean square of 1 per word, over all words together.
    size = np.sqrt(np.mean(np.square(words))) if words.size else 0.0
    words = principal(words) / (size or 1.0)
    columns = {
        "length": length,
        "surface": STRONG * np.concatenate([surface, length], axis=1),
        "words": np.concatenate([words, STRONG * length], axis=1),
        "states": state_columns(found, length),
    }
    if rewards is not None:
        reward = scaled(_side(rewards)[:, None])
        columns["reward"] = STRONG * np.concatenate([reward, length], axis=1)
    return columns


def _side(values: np.ndarray) -> np.ndarray:
    return values[:, 0].astype(np.float64) - values[:, 1]


@dataclasses.dataclass(frozen=True)
class Part:
    """Pairs to judge, or to learn from."""

    found: Features
    """Features of the language model; N pairs."""
    prompts: Sequence[str]
    """The prompt of each pair, as text."""
    answers: Sequence[tuple[str, str]]
    """The texts of the preferred and the other answer of each pair."""
    keys: Sequence[str]
    """A key per pair; equal prompts have equal keys."""
    rewards: Float[np.ndarray, "pairs 2"] | None = None
    """A reward model's reward of each answer; None without a reward model."""


@dataclasses.dataclass(frozen=True)
class Judgment:
    """What the judges say about N pairs."""

    margins: Float[np.ndarray, " pairs"]
    """float64 [N]; of all judges together, positive where they agree with the label."""
    alone: Mapping[str, Float[np.ndarray, " pairs"]]
    """float64 [N] by judge."""
    weights: Mapping[str, float]
    """How much each judge moves the margins; see `Stack`."""
    surface: Float[np.ndarray, "pairs features"]
    """Differences of the interpretable features, with a mean square of 1."""
    folds: Int[np.ndarray, " pairs"]
    """The fold of each pair."""
    trusted: Float[np.ndarray, " trusted"] | None
    """The margins of the verified pairs, out of fold; None without any."""


def columns_of(part: Part) -> tuple[dict[str, Columns], Columns]:
    """The columns of each judge, and the differences of interpretable features.

    Exchanging the answers of a pair only changes the signs of its rows.
    """
    described = describe_answers(
        [(p, x) for p, pair in zip(part.prompts, part.answers) for x in pair]
    )
    surface = differences(described.reshape(len(part.keys), 2, -1))
    return judges(part.found, surface, part.answers, part.rewards), surface


def judge(part: Part, trusted: Part | None, *, folds: int, seed: int) -> Judgment:
    """Judges each pair by models that were not trained on it or its prompt.

    Args:
      part: the pairs to judge.
      trusted: pairs with verified labels, which are then the only ones to learn from;
        these may share prompts with the others.  None to learn from the other folds.
      folds: number of folds.
      seed: seeds the assignment of prompts to folds.
    """
    parts = [part] if trusted is None else [part, trusted]
    both = _together(parts)
    groups, surface = columns_of(both)
    outer, inner = (
        prompt_folds(both.keys, folds=folds, seed=number) for number in (seed, seed + 1)
    )
    count = len(part.keys)
    verified = np.arange(len(outer)) >= count
    own = outer[:count].copy()
    if trusted is not None:
        outer = np.where(verified, outer, folds)
    found = stack(
        groups,
        outer,
        inner,
        learned=None if trusted is None else verified,
    )
    return Judgment(
        margins=found.margins[:count],
        alone={name: margins[:count] for name, margins in found.alone.items()},
        weights=found.weights,
        surface=surface[:count],
        folds=own,
        trusted=None if trusted is None else found.margins[count:],
    )


def _together(parts: Sequence[Part]) -> Part:
    joined = lambda name: np.concatenate([getattr(p.found, name) for p in parts])
    chained = lambda name: [x for part in parts for x in getattr(part, name)]
    rewards = [part.rewards for part in parts if part.rewards is not None]
    return Part(
        Features(joined("states"), joined("logps"), joined("lengths")),
        chained("prompts"),
        chained("answers"),
        chained("keys"),
        np.concatenate(rewards) if rewards else None,
    )
