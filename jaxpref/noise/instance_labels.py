"""Labels to learn flip rates from (`jaxpref.noise.instance_fit`).

While a model trains, its margins of the most recent labels are remembered, each from
before the model was trained on that label.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.noise import _common
from jaxpref.noise.instance import Features, Prior
from jaxpref.sharding import replicated

__all__ = ["Labels", "flat", "no_labels", "remember"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labels:
    """N labels, or places for them."""

    margins: Float[Array, " N"]
    """z, nats, positive where the model agrees with the label."""
    features: Features
    """Of the pairs as labeled; [N, E] and [N, O]."""
    annotators: Int[Array, " N"]
    """Index of the annotator; -1 if unknown."""
    where: Bool[Array, " N"]
    """Which of them are real."""


def no_labels(prior: Prior, size: int) -> Labels:
    """Places for `size` labels, all empty."""
    features = Features(
        jnp.zeros((size, len(prior.even)), jnp.float32),
        jnp.zeros((size, len(prior.odd)), jnp.float32),
    )
    return Labels(
        margins=jnp.zeros(size, jnp.float32),
        features=features,
        annotators=jnp.full(size, -1, jnp.int32),
        where=jnp.zeros(size, bool),
    )


def flat(
    margin_logits: Float[Array, "*batch"],
    features: Features,
    annotators: Int[Array, "*batch"],
    where: Bool[Array, "*batch"],
) -> Labels:
    """The labels of a global batch, on every device; zeros where `where` is false."""
    arrays = margin_logits, features, annotators, where
    z, features, annotators, where = jax.tree.map(replicated, arrays)
    z = jax.lax.stop_gradient(_common.floating(z))
    column = lambda x: jnp.where(where[..., None], x, 0).reshape(
        where.size, x.shape[-1]
    )
    return Labels(
        margins=_common.finite(jnp.where(where, z, 0)).ravel(),
        features=jax.tree.map(column, features),
        annotators=jnp.where(where, annotators, -1).ravel(),
        where=where.ravel(),
    )


def remember(labels: Labels, new: Labels) -> Labels:
    """The newest labels of both, as many as fit into `labels`.

    The result begins with the new labels, followed by the old ones in their order.
    Empty places are last.
    """
    size = len(labels.where)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), new, labels)
    # A stable sort, real labels first.
    order = jnp.argsort(~both.where)[:size]
    return jax.tree.map(lambda x, old: x[order].astype(old.dtype), both, labels)
