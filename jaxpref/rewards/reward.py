"""What a reward is."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float

from jaxpref.rewards.answered import Answered


class Reward(Protocol):
    """Says how good answers are."""

    def __call__(self, answered: Sequence[Answered]) -> list[Float[np.ndarray, " K"]]:
        """The reward of each answer of each prompt; NaN if it has none."""
        ...
