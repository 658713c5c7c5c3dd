"""Mixtures whose experts are sharded over the mesh axis `expert`.

The axis also splits the rows.  Each device gathers the tokens of all devices of the
axis, computes those that chose its own experts, and the results are summed over the
axis while each device receives those of its own tokens.

Why tokens are not sent to the owners of their experts (an all-to-all): no token is
dropped, so a device must be ready to receive all of them.  Arrays would be as large as
after a gather, with a copy of a token for each of its experts.  Over n devices, an
all-to-all moves k (n - 1) / n copies of a token, and a gather n - 1, which is less
unless n exceeds k (8 in Qwen3-MoE and OLMoE, 2 in Mixtral).  The tokens of preference
pairs are many, so a small n is best: see the table in docs/models.md.

The work does depend on the router.  A device computes its rows in pieces of a fixed
size and skips the pieces that would be empty, so the time is that of its own rows,
and only one piece is in memory.  The backward pass recomputes each piece.

Axes: M tokens of a device, n devices of `expert`, D hidden, F feed-forward features,
k experts of a token, e experts of a device, C rows of a piece.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.models.gathering import gather_shards, scatter_sums
from jaxpref.models.grouped import grouped_product

PIECES = 4
"""Pieces in which a device computes its rows if all experts are equally popular."""
EXPERT = ("expert",)
"""The mesh axes of the experts."""

Weights = tuple[Float[Array, "e D F"], Float[Array, "e D F"], Float[Array, "e F D"]]


def mixture_over_experts(
    h: Float[Array, "M D"],
    scores: Float[Array, "M k"],
    experts: Int[Array, "M k"],
    weights: Weights,
    *,
    activation: Callable[[jax.Array], jax.Array],
) -> Float[Array, "M D"]:
    """The mixture of a device's tokens, within `jax.shard_map`.

    Tokens are gathered in their own dtype; sums over experts, the gradients of tokens
    and those of the weights are in float32 or wider.

    Args:
        h: the tokens of this device.
        scores: the weights of each token's experts, float32 or wider.
        experts: the experts of each token, among all of them.
        weights: `gate`, `up` and `down` of this device's experts, in the parameter
            dtype.
        activation: of the gate.

    Returns:
        The sums over each token's experts, float32 or wider; partial ones if F is
        sharded.
    """
    dtype, wide = h.dtype, jnp.promote_types(h.dtype, jnp.float32)
    stored = tuple(weight.dtype for weight in weights)

    @jax.custom_vjp
    def apply(h, scores, experts, *weights):
        weights = (weight.astype(dtype) for weight in weights)
        rows = Rows(*_gathered(h, scores, experts), own=own)
        add = functools.partial(_add_outputs, activation, *weights)
        return _scattered(rows.over_pieces(add, jnp.zeros(rows.h.shape, wide)))

    def forward(*args):
        values = [arg.value for arg in args]
        trained = any(weight.perturbed for weight in args[3:])
        narrow = [weight.astype(dtype) for weight in values[3:]]
        return apply(*values), (*values[:3], *narrow, () if trained else None)

    def backward(saved, cotangent):
        h, scores, experts, *weights, trained = saved
        rows = Rows(*_gathered(h, scores, experts), own=own)
        # The caller rounds the result to the dtype of h, so this rounds nothing.
        (cotangent,) = _gathered(cotangent.astype(dtype))
        zeros: Any = [
            jnp.zeros(rows.h.shape, wide),
            jnp.zeros(rows.scores.size, scores.dtype),
        ]
        if trained is not None:
            zeros += [jnp.zeros(weight.shape, wide) for weight in weights]
        add = functools.partial(_add_gradients, activation, cotangent, *weights)
        dh, dscores, *dweights = rows.over_pieces(add, zeros)
        dscores = _scattered(dscores.reshape(rows.scores.shape))
        casts = zip(dweights or [None] * 3, stored, strict=True)
        dweights = [None if x is None else x.astype(kind) for x, kind in casts]
        return _scattered(dh).astype(dtype), dscores, None, *dweights

    own = len(weights[0])
    apply.defvjp(forward, backward, symbolic_zeros=True)
    return apply(h, scores, experts, *weights)


def _gathered(*arrays: jax.Array) -> tuple[Any, ...]:
    """Of the tokens of all devices of the axis."""
    return tuple(gather_shards(x, EXPERT, 0) for x in arrays)


def _scattered(x: Float[Array, "nM ..."]) -> Float[Array, "M ..."]:
    """Summed over the axis, of this device's tokens."""
    return scatter_sums(x, EXPERT, 0)


def _add_outputs(activation: Callable, gate, up, down, out, piece) -> jax.Array:
    """The outputs of all tokens, with those of a piece added."""
    x, score, _, tokens, sizes = piece
    return out.at[tokens].add(_outputs(activation, sizes, x, score, gate, up, down))


def _add_gradients(
    activation: Callable, cotangent, gate, up, down, sums, piece
) -> list[jax.Array]:
    """The gradients of tokens, scores and maybe weights, with a piece's added."""
    x, score, places, tokens, sizes = piece
    of_tokens, of_scores, *of_weights = sums
    wide = of_tokens.dtype
    outputs = functools.partial(_outputs, activation, sizes)
    # Gradients of weights have their dtype.
    weights = [weight.astype(wide) for weight in (gate, up, down)]
    if of_weights:
        _, pullback = jax.vjp(outputs, x, score, *weights)
    else:
        _, pullback = jax.vjp(lambda x, score: outputs(x, score, *weights), x, score)
    dx, dscore, *dweights = pullback(cotangent[tokens].astype(wide))
    return [
        of_tokens.at[tokens].add(dx.astype(wide)),
        of_scores.at[places].add(dscore, mode="drop"),
        *map(jnp.add, of_weights, dweights),
    ]


def _outputs(
    activation: Callable[[jax.Array], jax.Array],
    sizes: Int[Array, " e"],
    x: Float[Array, "C D"],
    score: Float[Array, " C"],
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> Float[Array, "C D"]:
    """The experts' outputs of rows that are sorted by expert, times their scores."""
    hidden = activation(grouped_product(x, gate, sizes))
    hidden = hidden * grouped_product(x, up, sizes)
    return grouped_product(hidden, down, sizes, score.dtype) * score[:, None]


class Rows:
    """The tokens of all devices of the axis, and which of them are this device's work.

    A row is a token and one of its experts, [n M k] of them.
    """

    def __init__(self, h: jax.Array, scores: jax.Array, experts: jax.Array, own: int):
        """`h` [n M, D], `scores` and `experts` [n M, k], and e, the number of experts.

        Rows of this device's experts are placed first, by expert.
        """
        self.h, self.scores = h, scores
        devices, self.per_token = jax.lax.axis_size("expert"), scores.shape[1]
        expert = experts.reshape(-1) - jax.lax.axis_index("expert") * own
        expert = jnp.where((expert >= 0) & (expert < own), expert, own)
        self.order = jnp.argsort(expert)
        counts = jnp.sum(expert[:, None] == jnp.arange(own), 0, dtype=jnp.int32)
        self.ends = jnp.cumsum(counts)
        self.size = max(-(-len(expert) // (devices * PIECES)), 1)
        most = len(h) * min(self.per_token, own)
        self.pieces = -(-most // self.size)

    def over_pieces(self, add: Callable[[Any, Any], Any], zeros: Any) -> Any:
        """The result of adding the pieces that have rows, one after another.

        Args:
            add: `add(sums, (x [C, D], scores [C], places [C], tokens [C], sizes [e]))`
                with the tokens' states, the rows' scores, their places among all rows,
                their tokens, and the number of rows of each expert.
            zeros: the sums before the first piece.
        """

        def step(sums, index):
            used = lambda sums: add(sums, self._piece(index))
            empty = index * self.size >= self.ends[-1]
            return jax.lax.cond(empty, lambda sums: sums, used, sums), None

        return jax.lax.scan(step, zeros, jnp.arange(self.pieces))[0]

    def _piece(self, index: Int[Array, ""]) -> tuple[jax.Array, ...]:
        """Rows `index` C to (index + 1) C.  Those of others fill the last piece.

        They have score 0, count as rows of the last expert, and a place beyond all.
        """
        low = index * self.size
        within = low + jnp.arange(self.size)
        rows = self.order.at[within].get(mode="clip")
        own: Bool[Array, " C"] = within < self.ends[-1]
        tokens = rows // self.per_token
        scores = jnp.where(own, self.scores.reshape(-1)[rows], 0)
        ends = jnp.clip(self.ends - low, 0, self.size)
        sizes = jnp.diff(ends, prepend=0).at[-1].add(self.size - ends[-1])
        places = jnp.where(own, rows, self.order.size)
        return self.h[tokens], scores, places, tokens, sizes
