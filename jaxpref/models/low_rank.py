"""A weight matrix with a low-rank change, in place of the matrix."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """W + scale a b, in place of the weight W of one layer or, with an axis L, of all.

    `linear.dense_einsum` multiplies with it.  Inputs and outputs may be several axes.
    """

    weight: Float[Array, "*L inputs outputs"]
    """W."""
    a: Float[Array, "*L inputs r"]
    b: Float[Array, "*L r outputs"]
    scale: float = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index: Any) -> "LowRank":
        """Itself: a block reads its weights with `self.query[...]`."""
        if index is not ...:
            raise TypeError(f"a LowRank weight has no part {index}")
        return self
