"""What the head of a reward model says of answers, as rewards and scores by name."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxpref import losses
from jaxpref.data import Kind
from jaxpref.data.columns import RATING
from jaxpref.data.records.mapping import read_fields
from jaxpref.errors import InputError
from jaxpref.models.reward_head import Head

FLAG = "--attribute-weights"
RATED = "rated"
"""The `--kind` of single answers with ratings."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """How the numbers of a head become rewards."""

    head: Head
    weights: tuple[float, ...] = ()
    """What each attribute counts in the reward."""

    def __call__(
        self, numbers: Float[np.ndarray, "N K ..."]
    ) -> tuple[Float[np.ndarray, "N K"], dict[str, np.ndarray]]:
        """The rewards, and the scores that they come from, by name.

        Rewards are scores themselves, or the weighted sum of predicted ratings.  Of
        embeddings, a pair has one score, s(y_1 > y_2 | x) / tau; the reward of each
        answer is half of its score against the other, so their difference is the score.
        """
        if self.head.embedding:
            first, second = (jnp.asarray(numbers[:, side]) for side in (0, 1))
            scores = losses.skew_symmetric_score(first, second)
            half = np.asarray(scores) / (2 * self.head.temperature)
            return np.stack([half, -half], axis=1), {}
        if self.head.attributes:
            names = self.head.attributes
            rewards = numbers @ np.asarray(self.weights, numbers.dtype)
            return rewards, {name: numbers[..., n] for n, name in enumerate(names)}
        return numbers, {"rewards": numbers}


def answers_of(head: Head, words: Sequence[str], kind: Kind) -> Answers:
    """How a head's numbers are read for records of a kind.

    Args:
      head: the head.
      words: the weights of its attributes, from `--attribute-weights`.
      kind: what is read of each record.

    Raises:
      InputError: if the head cannot judge such records, or the weights are wrong.
    """
    if words and not head.attributes:
        raise InputError(
            f"{FLAG} {' '.join(words)}: the model predicts no ratings of attributes; "
            "leave it out"
        )
    if head.embedding and kind.sides != 2:
        raise InputError(
            "the model scores pairs of answers, and no single answer; evaluate it on "
            "pairs: records with chosen and rejected"
        )
    if not head.attributes:
        return Answers(head)
    names, example = head.attributes, f"{head.attributes[0]}=1"
    found = dict.fromkeys(names, 0.0)
    for name, text in read_fields(words, FLAG, example).items() if words else ():
        if name not in found:
            raise InputError(
                f"{FLAG} {name}={text}: the model predicts {', '.join(names)}"
            )
        try:
            found[name] = float(text)
        except ValueError:
            raise InputError(f"{FLAG} {name}={text}: expected a number") from None
    if not any(found.values()) and not _is_rated(kind):
        raise InputError(
            f"the model predicts ratings of {', '.join(names)}; say what each counts, "
            f"as in {FLAG} {example}, or compare them with ratings: --kind {RATED}"
        )
    return Answers(head, tuple(found.values()))


def rated_kind(head: Head) -> Kind:
    """Single answers with ratings of a head's attributes.

    Raises:
      InputError: if it predicts none.
    """
    if not head.attributes:
        raise InputError(
            f"--kind {RATED}: the model predicts no ratings of attributes; evaluate a "
            "model trained with --loss attribute_regression, or leave it out"
        )
    return Kind(1, frozenset(RATING + name for name in head.attributes))


def _is_rated(kind: Kind) -> bool:
    return any(name.startswith(RATING) for name in kind.numbers)
