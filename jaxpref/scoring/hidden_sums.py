"""Sums of final hidden states, and the CHES scores of pairs that come from them."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref import losses
from jaxpref.data.batch import PreferenceBatch
from jaxpref.models.layout import SPECS, on_mesh, reshard
from jaxpref.scoring.scores import flat_sequences
from jaxpref.sharding import ROWS

CHES = ("ches", "normalized_ches")
"""The scores of `Ches`; the second is of means over tokens."""


def predictor_sums(
    hidden: Float[Array, "rows T D"], batch: PreferenceBatch
) -> Float[Array, "R S K D"]:
    """The sum of the states that predict the tokens of each completion.

    Args:
      hidden: final hidden states of all sequences, [R Q, T, D].
      batch: a micro-batch, padded or packed.
    """
    rows, slots, sides = batch.completion_lengths.shape
    places = reshard(flat_sequences(batch, batch.predictors), SPECS.tokens)
    # Under vmap, a gather within a row needs no sharding annotation.
    states = jax.vmap(lambda of_row, i: of_row[i])(
        reshard(hidden, SPECS.hidden), places
    )
    shape = (*batch.predictors.shape, states.shape[-1])
    spread = on_mesh(jax.P(*SPECS.hidden, None))
    states = jnp.reshape(states, shape, out_sharding=spread).astype(jnp.float32)
    owners = jnp.asarray(batch.completions)[..., None] == jnp.arange(slots * sides)
    sums = jnp.einsum("rqpd,rqpc->rcd", states, owners.astype(jnp.float32))
    shape = (rows, slots, sides, states.shape[-1])
    return jnp.reshape(sums, shape, out_sharding=on_mesh(jax.P(ROWS, None, None, None)))


@dataclasses.dataclass(frozen=True)
class Ches:
    """Gives the CHES scores of pairs; a head of a policy without parameters."""

    def scores(
        self,
        hidden: Float[Array, "rows T D"],
        heads: Mapping[str, Array],
        batch: PreferenceBatch,
    ) -> dict[str, Float[Array, "R S K"]]:
        """The score of the pair, by `CHES`, if each of its answers is the chosen one.

        So that of side 0 is the score of the pair as it is labeled.  See `losses.ches`
        and `losses.length_normalized_ches`.
        """
        del heads
        sums = predictor_sums(hidden, batch)
        sizes = jnp.asarray(batch.completion_lengths)
        own, other = sums, sums[..., ::-1, :]
        scores = (
            losses.ches(own, other),
            losses.length_normalized_ches(own, other, sizes, sizes[..., ::-1]),
        )
        return dict(zip(CHES, scores, strict=True))
