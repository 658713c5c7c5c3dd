"""The scorer of a reward model."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxpref.data.batch import PreferenceBatch
from jaxpref.models import Model, RewardModel
from jaxpref.models.folder import load_params
from jaxpref.models.layout import SPECS, on_mesh
from jaxpref.models.weights import Weights
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
    Scored,
    completion_sums,
    flat_sequences,
    last_places,
    last_tokens,
    packing,
)


@dataclasses.dataclass(frozen=True)
class RewardScorer:
    """A reward model: one score per completion, read at its last token."""

    model: RewardModel

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
        """See `Scorer`."""
        del frozen
        rows, slots, sides = batch.completion_lengths.shape
        flat = lambda array: flat_sequences(batch, array)
        packed = packing(batch)
        if (segments := packed["segments"]) is None:
            # A token's own state is one position after the state that predicts it.
            places = flat(batch.predictors) + 1
        else:
            places = last_places(segments, slots=slots, sides=sides)
        rewards, router = self.model.rewards_and_router(
            params,
            flat(batch.tokens),
            places,
            **packed,
            counted=counted_tokens(batch, totals),
        )
        if segments is None:
            ends = dataclasses.replace(
                batch, completions=last_tokens(cast(jax.Array, batch.completions))
            )
            rewards = completion_sums(ends, rewards)
        else:
            rewards = jnp.where(places >= 0, rewards, 0)
            spread = on_mesh(SPECS.hidden)
            rewards = jnp.reshape(rewards, (rows, slots, sides), out_sharding=spread)
        return Scored({"rewards": rewards}, totals_of(router))

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
