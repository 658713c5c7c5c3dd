"""A head that predicts the return of what follows each prefix, for PPO."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpref.data.batch import PreferenceBatch
from jaxpref.models import Architecture
from jaxpref.models.layout import SPECS, on_mesh, reshard
from jaxpref.scoring.scores import flat_sequences, token_values


@dataclasses.dataclass(frozen=True)
class ValueHead:
    """A linear head on the final hidden states.

        V_t = <h_{t-1}, w> + b

    h_{t-1} is the state that predicts token t, so V_t depends on the prompt and on the
    tokens before t only.
    """

    def init(self, key: PRNGKeyArray, architecture: Architecture) -> dict[str, Array]:
        """A head of zeros, [D] and [].  The first advantages are thus plain returns."""
        del key
        zeros = lambda *shape: jnp.zeros(
            shape, jnp.float32, out_sharding=on_mesh(P(*(None,) * len(shape)))
        )
        return {"weight": zeros(architecture.hidden_size), "bias": zeros()}

    def scores(
        self,
        hidden: Float[Array, "rows T D"],
        heads: Mapping[str, Array],
        batch: PreferenceBatch,
    ) -> dict[str, Float[Array, "R Q P"]]:
        """The value before each target token, at least float32."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        values = jnp.einsum(
            "btd,d->bt",
            hidden,
            heads["weight"].astype(hidden.dtype),
            preferred_element_type=wide,
            out_sharding=on_mesh(SPECS.tokens),
        ) + heads["bias"].astype(wide)
        predictors = reshard(flat_sequences(batch, batch.predictors), SPECS.tokens)
        # Under vmap, a gather within a row needs no sharding annotation.
        found = jax.vmap(lambda v, i: v[i])(values, predictors)
        return {"policy_token_values": token_values(batch, found)}
