"""A reference that follows the policy.

Every `every` steps, the reference's weights become a weighted mean,

    reference <- share * policy + (1 - share) * reference

so a share below 1 is the soft update of TR-DPO, and 1 the hard one.

Source: Gorbatovski et al. 2024, arXiv:2404.09656, eq. 3 and 4; the defaults are TRL's.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxpref.data.batch import PreferenceBatch
from jaxpref.errors import InputError
from jaxpref.runtime.ranges import at_least
from jaxpref.scoring.micro_batches import skipping_empty
from jaxpref.scoring.scorer import Frozen, Params, Scorer
from jaxpref.scoring.scores import policy_name

NAME = "moving-average"
"""What `--reference` is for a moving reference."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingAverage:
    """How `--reference moving-average` follows the policy (TR-DPO)."""

    share: float = 0.6
    """Share of the policy's weights in each update of the reference; 1 copies them."""
    every: int = 512
    """Steps between updates of the reference."""

    def __post_init__(self):
        at_least(1, self, "every")
        if not 0 < self.share <= 1:
            raise InputError(
                f"moving_average.share {self.share}: must be above 0 and at most 1"
            )


def begins_at(reference: str | None) -> str | None:
    """Where the reference that `--reference` names begins; None for the start."""
    return None if reference == NAME else reference


@dataclasses.dataclass(frozen=True)
class MovingReference:
    """The scores of a moving reference, and how it moves."""

    scorer: Scorer
    """Scores with parameters like those that are trained; by the policy's names."""
    names: tuple[str, ...]
    """The reference's scores that the objective reads."""
    average: MovingAverage

    def scored(
        self, reference: Params, frozen: Frozen, batch: PreferenceBatch
    ) -> PreferenceBatch:
        """The batch [A, ...] with the reference's scores under its present weights."""

        @skipping_empty(batch)
        def score(_, micro):
            return None, self.scorer(reference, frozen, micro).scores

        _, scores = jax.lax.scan(score, None, batch)
        found = {name: scores[policy_name(name)] for name in self.names}
        return dataclasses.replace(batch, reference=jax.lax.stop_gradient(found))

    def moved(self, reference: Params, params: Params, step: Int[Array, ""]) -> Params:
        """The reference's weights after step number `step`, counted from 1."""
        share = jnp.where(step % self.average.every == 0, self.average.share, 0.0)

        def mean(old: Any, new: Any) -> Any:
            wide = jnp.promote_types(old.dtype, jnp.float32)
            moved = old.astype(wide) + share * (new.astype(wide) - old.astype(wide))
            # Exact where nothing moves, or everything does.
            moved = jnp.where(share == 1, new.astype(wide), moved)
            return jnp.where(share == 0, old, moved.astype(old.dtype))

        return jax.tree.map(mean, reference, params)
