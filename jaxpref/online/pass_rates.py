"""How often each prompt is solved, as far as the answers so far show."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

DECAY = 0.5
"""Of the running means.  The policy changes, so a group counts twice as much as the one
before it."""
AT_RANDOM = 8
"""One of so many prompts is drawn at random.  A running mean changes only with new
answers, so a prompt whose first ones all failed could otherwise never come back."""


@dataclasses.dataclass(frozen=True)
class PassRates:
    """Running means of the rewards of each prompt's answers.

        p_i <- DECAY p_i + (1 - DECAY) mean of the group's rewards

    A prompt that has not been answered yet is expected to do as well as those first
    answered recently.  Rewards of 0 and 1 make these pass rates.

    Prompts near a target are those of prompt curriculum learning, Gao et al. 2025,
    arXiv:2510.01135, whose estimates are those of a value model.
    """

    of_prompts: Float[np.ndarray, " N"]
    """float32; NaN for a prompt without answers."""
    of_new: float = math.nan
    """The running mean over groups that were the first of their prompt; NaN if there
    are none."""

    def expected(self) -> Float[np.ndarray, " N"]:
        """The mean reward that each prompt is expected to have; NaN if unknown."""
        seen = ~np.isnan(self.of_prompts)
        return np.where(seen, self.of_prompts, np.float32(self.of_new))

    def updated(
        self, indices: Sequence[int], rewards: Float[np.ndarray, "B K"]
    ) -> "PassRates":
        """The means after further groups of answers.

        Args:
          indices: the prompts of the groups.
          rewards: of their answers; NaN for none.
        """
        found, first = self.of_prompts.copy(), []
        for index, own in zip(indices, rewards, strict=True):
            own = own[np.isfinite(own)]
            if not len(own):
                continue
            mean = float(own.mean())
            if math.isnan(found[index]):
                first.append(mean)
            found[index] = _mixed(float(found[index]), mean)
        of_new = _mixed(self.of_new, float(np.mean(first))) if first else self.of_new
        return PassRates(found, of_new)

    def nearest(
        self, candidates: Int[np.ndarray, " C"], target: float, size: int
    ) -> Int[np.ndarray, " B"]:
        """The candidates whose expected rewards are nearest to a target.

        Of equal ones, the first; if nothing is known yet, all are equal.  One of
        `AT_RANDOM`, but never all, is taken whatever its expected reward.

        Args:
          candidates: prompts in random order.
          target: the expected reward.
          size: B, prompts to choose.
        """
        random = min(math.ceil(size / AT_RANDOM), max(size - 1, 0))
        others = candidates[random:]
        distances = np.abs(self.expected()[others] - np.float32(target))
        order = np.argsort(np.nan_to_num(distances), kind="stable")
        return np.concatenate([candidates[:random], others[order[: size - random]]])


def _mixed(before: float, new: float) -> float:
    """The running mean; the new value if there is none."""
    return new if math.isnan(before) else DECAY * before + (1 - DECAY) * new
