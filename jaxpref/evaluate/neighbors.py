"""Answers for preferences near the target (robust preference selection, RPS).

Each answer of a prompt is requested with a different direction in the space of rewards,
within an angle of the target, and `--pick best` keeps the one with the largest reward
under the target direction, which is `--weights`.  arXiv:2510.20498, with 5
directions and 30 degrees.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.errors import InputError
from jaxpref.evaluate.sample_options import (
    AlignmentOptions,
    DirectionOptions,
    SampleConfig,
)
from jaxpref.evaluate.sampled import Sampled
from jaxpref.rewards import RewardOptions
from jaxpref.sampling.directions import neighboring_directions

FLAG = "--direction-prompt"
PLACE = re.compile(r"\{(prompt|\d+)\}")
"""The user's message, or a number of the direction."""
Directions = Float[np.ndarray, "prompts n m"]


def check(
    options: DirectionOptions,
    config: SampleConfig,
    alignment: AlignmentOptions,
    rewards: RewardOptions,
) -> None:
    """Checks that options fit together.

    Raises:
      InputError: if they do not.
    """
    if options.direction_prompt is None:
        return
    if alignment.pick != "best" or alignment.decode != "sample" or config.diverse:
        raise InputError(f"{FLAG}: requires --pick best without --decode or --diverse")
    count = len(rewards.reward)
    if count < 2 or rewards.combine != "sum" or rewards.weights_field is not None:
        raise InputError(
            f"{FLAG}: a direction has a number for each of several rewards; pass "
            "--reward at least twice, and the target direction as --weights"
        )
    if not any(rewards.weights or (1,)):
        raise InputError(f"{FLAG}: --weights are all 0, which is no direction")
    found = {*PLACE.findall(options.direction_prompt)}
    wanted = {"prompt", *map(str, range(1, count + 1))}
    wrong = [f"{{{x}}} is missing" for x in sorted(wanted - found)]
    wrong += [f"{{{x}}} is not one of these" for x in sorted(found - wanted)]
    if wrong:
        places = ", ".join(f"{{{n}}}" for n in range(1, count + 1))
        raise InputError(
            f"{FLAG}: must contain {{prompt}} and, for {count} rewards, {places}; "
            f"{', '.join(wrong)}"
        )


def neighbors(
    options: DirectionOptions,
    rewards: RewardOptions,
    prompts: int,
    config: SampleConfig,
) -> Directions | None:
    """A unit vector for each answer; None if none are asked for.

    Those of a prompt depend on the seed and on its number alone.

    Args:
      options: the largest angle.
      rewards: the target direction.
      prompts: how many.
      config: the number of answers to each, and the seed.
    """
    if options.direction_prompt is None:
        return None
    target = np.array(rewards.weights or (1.0,) * len(rewards.reward))
    of_prompt = lambda number: neighboring_directions(
        target,
        config.n,
        max_angle=math.radians(options.max_angle),
        rng=np.random.default_rng([config.seed, number]),
    )
    return np.stack([of_prompt(number) for number in range(prompts)])


def asked(
    prompts: Sequence[data.Prompt],
    directions: Directions,
    options: DirectionOptions,
    tokenizer: Any,
    max_length: int,
) -> list[data.Prompt]:
    """Each prompt once for each of its directions.

    Raises:
      InputError: if a prompt does not end with a user's text, or is too long.
    """
    text, found = options.direction_prompt or "{prompt}", []
    reword = lambda direction: lambda message: _filled(text, message, direction)
    for prompt, own in zip(prompts, directions, strict=True):
        for direction in own:
            asks = reword(direction)
            found.append(data.reworded(prompt, asks, tokenizer, max_length, FLAG))
    return found


def by_prompt(
    replies: Sequence[Sequence[Sampled]], directions: Directions
) -> list[list[Sampled]]:
    """The answers to each prompt, with their directions, from those to `asked`."""
    answers = iter(own[0] for own in replies)
    return [
        [
            dataclasses.replace(next(answers), direction=tuple(direction))
            for direction in own.tolist()
        ]
        for own in directions
    ]


def _filled(text: str, message: str, direction: Float[np.ndarray, " m"]) -> str:
    """The text with the message and the direction, times 100."""
    hundredths = [f"{round(100 * x)}" for x in direction.tolist()]
    value = lambda place: message if place == "prompt" else hundredths[int(place) - 1]
    return PLACE.sub(lambda match: value(match[1]), text)
