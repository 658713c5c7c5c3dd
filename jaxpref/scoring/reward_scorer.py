"""The scorer of a reward model: a reward, ratings or an embedding of each answer."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import PRNGKeyArray

from jaxpref.data.batch import PreferenceBatch
from jaxpref.models import Model, RewardModel
from jaxpref.models.folder import load_params
from jaxpref.models.layout import on_mesh
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
    flat_sequences,
    last_places,
    packing,
)
from jaxpref.sharding import ROWS

ANSWERS = P(ROWS, None, None, None)


@dataclasses.dataclass(frozen=True)
class RewardScorer:
    """A reward model, whose head is read at the last token of each completion."""

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
            # A sequence ends with its completion, one position after the state that
            # predicts its last token.
            last = jnp.where(flat(batch.completions) >= 0, flat(batch.predictors), -2)
            places = jnp.max(last, axis=-1, keepdims=True) + 1
        else:
            places = last_places(segments, slots=slots, sides=sides)
        numbers, router = self.model.numbers_and_router(
            params,
            flat(batch.tokens),
            places,
            **packed,
            counted=counted_tokens(batch, totals),
        )
        numbers = jnp.where((places >= 0)[..., None], numbers, 0)
        shape = (rows, slots, sides, numbers.shape[-1])
        numbers = jnp.reshape(numbers, shape, out_sharding=on_mesh(ANSWERS))
        name = self.model.head.score
        found = {name: numbers[..., 0] if name == "rewards" else numbers}
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
