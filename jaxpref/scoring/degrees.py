"""A head that classifies answers by how much of their content was removed (SPO)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpref import losses
from jaxpref.data.batch import PreferenceBatch
from jaxpref.models import Architecture
from jaxpref.models.layout import SPECS, on_mesh, reshard
from jaxpref.scoring.scores import (
    completion_sums,
    flat_sequences,
    last_places,
    last_tokens,
    packing,
)


@dataclasses.dataclass(frozen=True)
class DegreeHead:
    """A linear head on the final hidden state of an answer's last token."""

    count: int
    """Number of degrees."""

    def init(self, key: PRNGKeyArray, architecture: Architecture) -> dict[str, Array]:
        """A new head: normal with variance 1 / (D + 1), as that of a reward model."""
        size = architecture.hidden_size
        shape, spec = (size, self.count), on_mesh(P(None, None))
        draw = jax.random.normal(key, shape, jnp.float32, out_sharding=spec)
        return {"degree": draw * (size + 1) ** -0.5}

    def scores(
        self,
        hidden: Float[Array, "rows T D"],
        heads: Mapping[str, Array],
        batch: PreferenceBatch,
    ) -> dict[str, Float[Array, "R S K"]]:
        """Log-probabilities of the answers' degrees; 0 where an answer has none.

        The chosen answer is whole: its degree is 0.  That of the rejected one is the
        column `degree`; -1 for none.  Labels that were flipped by `--inject` do not
        change what is known of the answers.
        """
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = jnp.einsum(
            "btd,dc->btc",
            hidden,
            heads["degree"].astype(hidden.dtype),
            preferred_element_type=wide,
            out_sharding=on_mesh(SPECS.hidden),
        )
        of_classes = [_at_ends(logits[..., c], batch) for c in range(self.count)]
        degraded = jnp.asarray(batch.numbers["degree"]).astype(jnp.int32)
        flipped = jnp.asarray(batch.is_flipped)
        degrees = jnp.stack(
            [jnp.where(flipped, degraded, 0), jnp.where(flipped, 0, degraded)], axis=-1
        )
        known = (degraded >= 0)[..., None]
        found = losses.degree_classification(
            jnp.stack(of_classes, axis=-1), jnp.where(known, degrees, 0)
        )
        return {"degree_logps": jnp.where(known, -found, 0)}


def _at_ends(
    values: Float[Array, "rows T"], batch: PreferenceBatch
) -> Float[Array, "R S K"]:
    """The values at the last token of each completion."""
    rows, slots, sides = batch.completion_lengths.shape
    # Under vmap, a gather within a row needs no sharding annotation.
    take = lambda places: jax.vmap(lambda v, i: v[i])(
        values, reshard(places, SPECS.tokens)
    )
    packed: Any = packing(batch)["segments"]
    if packed is not None:
        places = last_places(packed, slots=slots, sides=sides)
        found = jnp.where(places >= 0, take(places), 0)
        spread = on_mesh(SPECS.hidden)
        return jnp.reshape(found, (rows, slots, sides), out_sharding=spread)
    ends = dataclasses.replace(
        batch, completions=last_tokens(jnp.asarray(batch.completions))
    )
    # A token's own state is one position after the state that predicts it.
    return completion_sums(ends, take(flat_sequences(batch, batch.predictors) + 1))
