"""What a judge says of every two answers to a prompt: computed, or read from a file."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxpref.data import open_source
from jaxpref.data.records import Example, prompt_key
from jaxpref.errors import InputError
from jaxpref.evaluate.compare.answers import Key, ModelAnswers
from jaxpref.rewards import Answered, Judge, Reward
from jaxpref.rewards.answered import assistant_turn

GAMES = {
    "A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1),
    "B>>A": (0.0, 3), "A<<B": (0.0, 3), "A<B": (0.0, 1), "B=A": (0.5, 1),
    "B<A": (1.0, 1), "B<<A": (1.0, 3),
}  # fmt: skip
"""Arena-Hard's verdicts: the share of A, and how often the verdict counts."""


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """A judge's preferences between the answers of M models to N prompts."""

    first: Float[np.ndarray, "prompts models models"]
    """[n, i, j]: how likely answer i is better than answer j, when i is read first.
    NaN where there is no verdict."""
    weights: Float[np.ndarray, "prompts models models"]
    """[n, i, j]: how often the verdict on answers i and j counts."""
    mean: Float[np.ndarray, "prompts models models"] | None = None
    """[n, i, j]: how likely answer i is better than answer j over both orders; None for
    the mean of the two."""
    rewards: Float[np.ndarray, "prompts models"] | None = None
    """Rewards of the answers, if the judge gives any."""
    probabilities: bool = True
    """Whether the preferences are probabilities, and not only 1, 1/2 and 0."""

    def preferences(self, i: int, j: int) -> Float[np.ndarray, " prompts"]:
        """How likely answer i is better than answer j, over both orders."""
        if self.mean is not None:
            return self.mean[:, i, j]
        return (self.first[:, i, j] + 1 - self.first[:, j, i]) / 2

    @property
    def depends_on_order(self) -> bool:
        """Whether the judge read the answers one after the other."""
        swapped = 1 - self.first.transpose(0, 2, 1)
        return not np.allclose(self.first, swapped, equal_nan=True)


def judged(
    reward: Reward,
    models: Sequence[ModelAnswers],
    keys: Sequence[Key],
    *,
    tie_margin: float = 0.0,
    name: str,
) -> Verdicts:
    """The verdicts of a reward model, of rules, or of a language model.

    Args:
      reward: a reward prefers the answer with the larger one; a `Judge` is asked about
        every two answers in both orders.
      models: the answers.
      keys: which of them.
      tie_margin: rewards that differ by at most this are a tie.
      name: names the judge, for errors.

    Raises:
      InputError: if the text of a prompt is not known.
    """
    asked = [_answered(key, models, name) for key in keys]
    weights = np.ones((len(keys), len(models), len(models)))
    if isinstance(reward, Judge):
        return Verdicts(np.stack(reward.first_is_better(asked)), weights)
    rewards = np.stack(reward(asked))
    gaps = rewards[:, :, None] - rewards[:, None, :]
    far = np.where(np.abs(gaps) <= tie_margin, 0, np.sign(gaps))
    first = np.where(np.isnan(gaps), np.nan, 0.5 + 0.5 * far)
    return Verdicts(first, weights, rewards=rewards, probabilities=False)


def without_empty(
    verdicts: Verdicts, models: Sequence[ModelAnswers], keys: Sequence[Key]
) -> Verdicts:
    """The same verdicts, but an empty answer loses to any other; two of them tie.

    A reward model gives an empty answer no score.  Without its verdicts, a model that
    often ends before it answers would be compared only where it does not.
    """
    texts = [[one.answers[key].text for one in models] for key in keys]
    answers = np.array([[bool(text.strip()) for text in own] for own in texts])
    gaps = answers[:, :, None].astype(float) - answers[:, None, :]
    both = answers[:, :, None] & answers[:, None, :]
    first = np.where(both, verdicts.first, 0.5 + 0.5 * gaps)
    return dataclasses.replace(verdicts, first=first)


def _answered(key: Key, models: Sequence[ModelAnswers], name: str) -> Answered:
    """The prompt with the answer of every model."""
    answers = [one.answers[key] for one in models]
    known = next((x for x in answers if x.prompt is not None), None)
    if known is None or known.prompt is None:
        raise InputError(
            f"{answers[0].place}: names its question without the text, which {name} "
            "needs; pass a file with the questions' texts, or --verdicts"
        )
    completions: tuple[Any, ...] = tuple(x.text for x in answers)
    if not isinstance(known.prompt, str):
        completions = tuple(map(assistant_turn, completions))
    example = Example(known.prompt, completions)
    return Answered(example, {}, known.place, as_user=known.as_user)


def read_verdicts(
    path: str, models: Sequence[ModelAnswers], keys: Sequence[Key]
) -> Verdicts:
    """The verdicts in a file on the answers of the models.

    Each record is an annotation of AlpacaEval (`instruction`, `generator_1`,
    `generator_2`, and `preference` from 1 to 2, for the second), or a judgment of
    Arena-Hard (`games` with the baseline first and then second, `model`, and `uid` or
    `question_id`); its baseline is the last of the models, unless `baseline` names it.

    Raises:
      InputError: if a record is neither, or no verdict is on these answers.
    """
    source, names = open_source(path), [one.name for one in models]
    place_of = {key: n for n, key in enumerate(keys)}
    shape = (len(keys), len(models), len(models))
    first, mean = (np.full(shape, np.nan) for _ in range(2))
    weights = np.ones(shape)
    seen: collections.Counter[tuple] = collections.Counter()
    for row in range(len(source)):
        record, place = source[row], source.location(row)
        if not isinstance(record, Mapping):
            raise InputError(f"{place}: a record must be a JSON object")
        one = _verdict(record, place, names)
        about = one.prompt, one.model, one.other
        n = place_of.get(Key(one.prompt, seen[about]))
        seen[about] += 1
        if n is None or not {one.model, one.other} <= set(names):
            continue
        i, j = names.index(one.model), names.index(one.other)
        first[n, i, j], first[n, j, i] = one.read_first, 1 - one.read_second
        mean[n, i, j], mean[n, j, i] = one.mean, 1 - one.mean
        weights[n, i, j] = weights[n, j, i] = one.weight
    for table in (first, mean):
        np.einsum("nii->ni", table)[:] = np.nan
    if np.isnan(mean).all():
        raise InputError(
            f"{path}: no verdict is on these prompts by {' and '.join(names)}; the "
            "models' names must be those of the verdicts"
        )
    return Verdicts(first, weights, mean)


class Verdict(NamedTuple):
    """A verdict in a file on the answers of two models."""

    prompt: str
    model: str
    other: str
    read_first: float
    """How likely the model's answer is better than the other's, if it is read first."""
    read_second: float
    mean: float
    """The same over both orders."""
    weight: float = 1.0


UNKNOWN = np.nan, np.nan, np.nan


def _verdict(record: Mapping[str, Any], place: str, names: Sequence[str]) -> Verdict:
    if isinstance(games := record.get("games"), list):
        return _arena_hard(record, games, place, names)
    two = [record.get("generator_1"), record.get("generator_2")]
    prompt, value = record.get("instruction"), record.get("preference")
    if not isinstance(prompt, str) or None in two:
        raise InputError(
            f"{place}: is not a verdict; give 'instruction', 'generator_1', "
            "'generator_2' and 'preference' (AlpacaEval), or 'games' (Arena-Hard)"
        )
    verdict = Verdict(prompt_key(prompt), str(two[0]), str(two[1]), *UNKNOWN)
    if value is None:
        return verdict
    value = 1.5 if value == 0 else value  # 0 is AlpacaEval's old mark of a tie
    mean = 2 - _within(value, "preference", 1, 2, place)
    orders = [
        _within(record.get(name, mean), name, 0, 1, place)
        for name in ("preference_first", "preference_second")
    ]
    return verdict._replace(read_first=orders[0], read_second=orders[1], mean=mean)


def _within(value: Any, name: str, low: int, high: int, place: str) -> float:
    """A number of a record.

    Raises:
      InputError: if it is none, or is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        value = f"{value!r:.50}"
    elif low <= value <= high:
        return float(value)
    raise InputError(
        f"{place}: field '{name}' must be a number from {low} to {high}, but it is "
        f"{value}"
    )


def _arena_hard(
    record: Mapping[str, Any], games: list, place: str, names: Sequence[str]
) -> Verdict:
    """The first game has the baseline as A, the second has it as B."""
    prompt = record.get("uid", record.get("question_id"))
    model, baseline = str(record.get("model")), str(record.get("baseline", names[-1]))
    scores = [x.get("score") if isinstance(x, Mapping) else None for x in games]
    if len(scores) != 2 or not isinstance(prompt, str):
        raise InputError(
            f"{place}: needs 'uid' or 'question_id', and two 'games', one in each order"
        )
    verdict = Verdict(prompt, model, baseline, *UNKNOWN)
    if None in scores:
        return verdict
    for score in scores:
        if score not in GAMES:
            raise InputError(
                f"{place}: a game's 'score' must be one of {', '.join(GAMES)}, but it "
                f"is {score!r:.50}"
            )
    (against, one), (share, two) = (GAMES[str(x)] for x in scores)
    # A strong verdict counts more than a weak one.
    mean = (one * (1 - against) + two * share) / (one + two)
    return verdict._replace(
        read_first=share, read_second=1 - against, mean=mean, weight=float(one + two)
    )
