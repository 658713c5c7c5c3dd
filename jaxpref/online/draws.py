"""Which prompts a step answers: drawn in order, near a pass rate, or again."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxpref import data
from jaxpref.losses import informative_groups
from jaxpref.online.answers import Group
from jaxpref.online.options import SamplingOptions
from jaxpref.online.pass_rates import PassRates

Texts = list[list[str]]
AnswerPrompts = Callable[[Sequence[int], int], tuple[list[Group], Texts, np.ndarray]]
"""`answer(indices, first) -> (groups, texts, rewards)` of prompts, which are numbered
from `first` on."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The groups that a step learns from."""

    groups: list[Group]
    texts: Texts
    """Of their answers."""
    rewards: Float[np.ndarray, "B K"]
    """NaN for an answer without one."""
    rates: PassRates
    """With all answers, also those that were replaced."""
    metrics: dict[str, float]
    """`draws`, and `prompts/answered`, the prompts of all draws, with
    `resample_uniform`; and `prompts/expected`, the mean reward that was expected, with
    a target."""


def draw_groups(
    answer: AnswerPrompts,
    order: data.Order,
    rates: PassRates,
    *,
    number: int,
    size: int,
    seed: int,
    sampling: SamplingOptions,
) -> Drawn:
    """Answers the prompts of a step, and replaces groups of equal rewards.

    The prompts of a draw are a function of the seed, the number of the sample, that of
    the draw, the pass rates, and the rewards of the draws before.  A group of equal
    rewards has no advantage, if the baseline comes from the group and the KL penalty is
    not in the reward.  Up to `resample_uniform` times, those that are left are replaced
    by groups of prompts that the step has not answered: the dynamic sampling of DAPO,
    arXiv:2503.14476, Eq. 11.

    Args:
      answer: samples and rewards answers.
      order: the prompts of each step, unless there is a target.
      rates: the pass rates before the step.
      number: of the sample.
      size: B, prompts of a step.
      seed: the run's.
      sampling: how prompts are drawn.
    """
    choose = lambda rates, draw, count, taken: _prompts(
        order, rates, draw, count, taken, number=number, seed=seed, sampling=sampling
    )
    indices = choose(rates, 0, size, ())
    metrics = {}
    expected = float(np.mean(rates.expected()[indices]))
    if sampling.prompt_target is not None and math.isfinite(expected):
        metrics["prompts/expected"] = expected
    groups, texts, rewards = answer(indices.tolist(), 0)
    rates, taken = rates.updated(indices.tolist(), rewards), {*indices.tolist()}
    draws, answered = 1, size
    while draws <= sampling.resample_uniform:
        places = np.flatnonzero(~_informative(rewards))
        new = choose(rates, draws, len(places), taken).tolist()
        if not new:
            break
        taken |= {*new}
        new_groups, new_texts, new_rewards = answer(new, draws * size)
        rates = rates.updated(new, new_rewards)
        places = places[: len(new)]
        rewards[places] = new_rewards
        for n, place in enumerate(places.tolist()):
            groups[place], texts[place] = new_groups[n], new_texts[n]
        draws, answered = draws + 1, answered + len(new)
    if sampling.resample_uniform:
        metrics |= {"draws": float(draws), "prompts/answered": float(answered)}
    return Drawn(groups, texts, rewards, rates, metrics)


def _prompts(
    order: data.Order,
    rates: PassRates,
    draw: int,
    count: int,
    taken: Collection[int],
    *,
    number: int,
    seed: int,
    sampling: SamplingOptions,
) -> Int[np.ndarray, " B"]:
    """The prompts of a draw; fewer if all others are taken."""
    target = sampling.prompt_target
    if draw == 0 and target is None:
        return order(number, count)
    rest = np.setdiff1d(np.arange(len(rates.of_prompts)), [*taken])
    many = count if target is None else count * sampling.prompt_candidates
    # The generator takes no negative numbers.
    random = np.random.default_rng((seed % 2**32, number, draw))
    candidates = random.choice(rest, min(many, len(rest)), replace=False)
    return candidates if target is None else rates.nearest(candidates, target, count)


def _informative(rewards: Float[np.ndarray, "B K"]) -> np.ndarray:
    """Which groups have different rewards, bool [B]."""
    known = jnp.asarray(np.isfinite(rewards))
    return np.asarray(informative_groups(jnp.asarray(rewards), where=known))
