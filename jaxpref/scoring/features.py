"""What the head of a reward model reads of each completion."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref.data.batch import PreferenceBatch
from jaxpref.models import RewardModel
from jaxpref.models.layout import SPECS, on_mesh, reshard
from jaxpref.scoring.scorer import Params
from jaxpref.scoring.scores import Scored, ends, flat_sequences, packing


@dataclasses.dataclass(frozen=True)
class FeatureScorer:
    """The last hidden state of each completion, as `features`."""

    model: RewardModel

    def __call__(self, params: Params, frozen: Any, batch: PreferenceBatch) -> Scored:
        """The score `features` [R, S, K, D], float32; 0 where there is no token."""
        del frozen
        rows, slots, sides = batch.completion_lengths.shape
        places, tokens = ends(batch), flat_sequences(batch, batch.tokens)
        hidden = self.model.hidden(params, tokens, **packing(batch))
        at = reshard(jnp.maximum(places, 0), SPECS.tokens)
        # Under vmap, a gather within a row needs no sharding annotation.
        states = jax.vmap(lambda of_row, i: of_row[i])(hidden, at)
        states = jnp.where(places[..., None] >= 0, states, 0).astype(jnp.float32)
        shape = (rows, slots, sides, states.shape[-1])
        spread = on_mesh(jax.P(*SPECS.hidden, None))
        features = jnp.reshape(states, shape, out_sharding=spread)
        return Scored({"features": features}, {})
