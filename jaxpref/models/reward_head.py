"""The head of a reward model: from an answer's last hidden state to its numbers."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpref.errors import InputError
from jaxpref.models.layout import on_mesh
from jaxpref.sharding import ROWS

Layers = Literal["linear", "mlp"]
LAST, HIDDEN = "score", "score_hidden"
"""The parameters of a head by path: its last layer, and the one before."""
WEIGHTS = P(None, None)
"""A head has a few numbers per feature, too few to shard."""
NUMBERS = P(ROWS, None, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """The head of a reward model."""

    kind: Layers | None = None
    """Layers of a reward model's head: linear, or mlp for two with a SiLU between them
    (default: as in --model, or linear if it is a language model)."""
    size: int | None = None
    """Numbers in the embedding of an answer, for general_preference; even (default:
    6)."""

    def __post_init__(self):
        if self.size is not None and not (0 < self.size <= 2**16 and not self.size % 2):
            raise InputError(
                f"--head.size {self.size}: must be an even number from 2 to 65536"
            )


@dataclasses.dataclass(frozen=True)
class Head:
    """What a reward model says of an answer, from its last hidden state h.

        linear:  numbers = h W                W [D, N]
        mlp:     numbers = silu(h V) W        V [D, D], W [D, N]

    The numbers are a reward, or one rating for each attribute, or an embedding, which
    is scaled to unit length.  Hashable; holds no arrays.

    Sources: two layers with a SiLU, BaseReward, arXiv:2509.16127; attributes,
    HelpSteer2, arXiv:2406.08673; embeddings, GPM, arXiv:2410.02197.
    """

    layers: Layers = "linear"
    attributes: tuple[str, ...] = ()
    """Names of the ratings, if that is what the numbers are."""
    embedding: int = 0
    """Length of the embedding, if that is what the numbers are; even."""
    temperature: float = 1.0
    """tau of `losses.general_preference`: scores of pairs are divided by it."""

    @property
    def size(self) -> int:
        """N, numbers of an answer."""
        return self.embedding or len(self.attributes) or 1

    @property
    def score(self) -> str:
        """What the numbers are: "rewards", "attributes" or "embeddings"."""
        if self.embedding:
            return "embeddings"
        return "attributes" if self.attributes else "rewards"

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of its parameters."""
        return (LAST,) if self.layers == "linear" else (HIDDEN, LAST)

    def init(
        self, key: PRNGKeyArray, features: int, dtype: Any
    ) -> dict[str, Float[Array, "inputs outputs"]]:
        """Random parameters, normal with variance 1 / (D + 1).

        The numbers of an untrained head are then about as large as the features.  They
        are not zero, so that models with one backbone and different keys differ.

        Source: Stiennon et al. 2020, arXiv:2009.01325.
        """

        def draw(key: PRNGKeyArray, outputs: int) -> Array:
            spread = on_mesh(WEIGHTS)
            values = jax.random.normal(
                key, (features, outputs), dtype, out_sharding=spread
            )
            return values * jnp.asarray((features + 1) ** -0.5, dtype)

        found = {LAST: draw(key, self.size)}
        if HIDDEN in self.paths:
            found[HIDDEN] = draw(jax.random.fold_in(key, 1), features)
        return found

    def inputs(
        self, params: Any, states: Float[Array, "B P D"]
    ) -> Float[Array, "B P D"]:
        """What W multiplies: the states themselves, or silu(h V)."""
        if HIDDEN not in self.paths:
            return states
        inner = jax.nn.silu(_product(states, params[HIDDEN]))
        return inner.astype(states.dtype)

    def __call__(
        self, params: Any, states: Float[Array, "B P D"]
    ) -> Float[Array, "B P N"]:
        """The numbers of final hidden states, in float32 or wider.

        The factors of the products are in the dtype of `states`.
        """
        numbers = _product(self.inputs(params, states), params[LAST])
        if not self.embedding:
            return numbers
        # A state of zeros, as of padding, has no direction: it stays zero.
        square = jnp.sum(numbers * numbers, axis=-1, keepdims=True)
        return numbers * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


def without_head(params: Any) -> dict[str, Any]:
    """The parameters of the backbone alone."""
    return {name: x for name, x in params.items() if name not in (LAST, HIDDEN)}


def _product(states: Array, matrix: Array) -> Array:
    return jnp.einsum(
        "bpd,dn->bpn",
        states,
        matrix.astype(states.dtype),
        preferred_element_type=jnp.promote_types(states.dtype, jnp.float32),
        out_sharding=on_mesh(NUMBERS),
    )
