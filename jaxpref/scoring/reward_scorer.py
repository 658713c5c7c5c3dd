"""The scorer of a reward model: a reward, ratings or an embedding of each answer."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxpref.data.batch import PreferenceBatch
from jaxpref.models import Model, RewardModel
from jaxpref.models.folder import load_params
from jaxpref.models.layout import on_mesh
from jaxpref.models.weights import Weights
from jaxpref.scoring.goal_states import goal_places, goal_states
from jaxpref.scoring.scorer import (
    ExportOptions,
    Frozen,
    Params,
    Scorer,
    counted_tokens,
    save_model,
    totals_of,
    with_numerics,
)
from jaxpref.scoring.scores import (
    GoalStates,
    HeadInputs,
    OfStates,
    Scored,
    ends,
    flat_sequences,
    packing,
)
from jaxpref.sharding import ROWS

ANSWERS = P(ROWS, None, None, None)


@dataclasses.dataclass(frozen=True)
class RewardScorer:
    """A reward model, whose head is read at the last token of each completion."""

    model: RewardModel
    asked: OfStates = None
    """What an objective reads in training besides the head's numbers; see `Scored`."""
    seed: int = 0
    """Seed of the tokens that are drawn for `GoalStates`."""

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Scorer`."""
        return self.model.init(key)

    def load(self, folder: Path, key: PRNGKeyArray) -> Params:
        """The folder's backbone and head; a new head if it has none."""
        return load_params(folder, self.model, key)

    @property
    def models(self) -> frozenset[str]:
        """None: reward-model losses read no other model."""
        return frozenset()

    def load_frozen(self, folder: Path, models: Mapping[str, Weights]) -> Frozen:
        """Nothing: reward-model losses read no other model."""
        del folder, models
        return {}

    def reference_params(
        self, reference: Weights, frozen: Frozen, params: Params | None
    ) -> Params:
        """The trained parameters; reward-model losses need no reference."""
        del reference, frozen
        return params

    def init_frozen(self, key: PRNGKeyArray) -> Frozen:
        """Nothing: reward-model losses read no other model."""
        del key
        return {}

    def __call__(
        self,
        params: Params,
        frozen: Frozen,
        batch: PreferenceBatch,
        *,
        totals: Collection[str] = (),
    ) -> Scored:
        """See `Scorer`; with what is asked in a train step, see `in_training`."""
        last_places = places = ends(batch)
        asked = self.asked if self.asked and "step" in frozen else None
        if isinstance(asked, GoalStates):
            draws = dict(count=asked.count, seed=self.seed)
            drawn = goal_places(batch, last_places, frozen["step"], **draws)
            places = jnp.concatenate([last_places, drawn], axis=1)
        states, router = self.model.states_and_router(
            params,
            flat_sequences(batch, batch.tokens),
            places,
            **packing(batch),
            counted=counted_tokens(batch, totals),
        )
        count = last_places.shape[1]
        last, head = states[:, :count], self.model.head
        of_answers = lambda values: _of_answers(values, last_places, batch)
        numbers = of_answers(head(params, last))
        found = {head.score: numbers[..., 0] if head.score == "rewards" else numbers}
        if isinstance(asked, HeadInputs):
            found["head_inputs"] = of_answers(head.inputs(params, last))
        if isinstance(asked, GoalStates):
            found |= goal_states(batch, states[:, count:], count=asked.count)
        return Scored(found, totals_of(router))

    def policy(self, params: Params, frozen: Frozen) -> tuple[Model, Params]:
        """See `Scorer`."""
        del params, frozen
        raise ValueError("A reward model generates no text.")

    def of_reference(self, stored: frozenset[str]) -> Scorer:
        """The scorer itself: reward-model losses need no reference."""
        del stored
        return self

    def with_scores(self, stored: frozenset[str]) -> Scorer:
        """The scorer itself: reward-model losses need no reference."""
        del stored
        return self

    def with_remat(self, policy: str) -> Scorer:
        """See `Scorer`."""
        return dataclasses.replace(self, model=with_numerics(self.model, remat=policy))

    def export(self, params: Params, folder: Path, options: ExportOptions) -> None:
        """See `Scorer`."""
        save_model(self.model, params, folder, options)


def _of_answers(
    values: Float[Array, "rows C N"], ends: Int[Array, "rows C"], batch: PreferenceBatch
) -> Float[Array, "R S K N"]:
    """Values at the ends of answers, by answer; 0 where there is none."""
    values = jnp.where((ends >= 0)[..., None], values, 0)
    shape = (*batch.completion_lengths.shape, values.shape[-1])
    return jnp.reshape(values, shape, out_sharding=on_mesh(ANSWERS))
