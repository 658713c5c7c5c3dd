"""Stochastic rounding of parameters and optimizer state in bfloat16.

Neighboring bfloat16 numbers differ by 0.4% to 0.8%.  A typical update is far smaller,
so rounding to the nearest number loses it: at a learning rate of 1e-6, almost no weight
ever moves.  Here a number x between its neighbors a < b becomes b with probability

    (x - a) / (b - a)

and a otherwise, so that its expectation is x (Gupta et al. 2015, arXiv:1502.02551).
The random bits depend on the seed, the number of the update, and the position in the
array, but not on the mesh or on interruptions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

_SALT = 0x5EED  # separates this from other uses of the run's seed


class RoundedState(NamedTuple):
    """The state of an optimizer whose updates are rounded stochastically."""

    count: jax.Array
    """int32 []; the number of updates done."""
    inner: Any
    """The optimizer's own state, in the dtypes that it has for these parameters."""


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16, up or down at random, with expectation x.

    Args:
      x: float32, of any shape and sharding.
      key: a random key; the same key and shape give the same choices on every mesh.

    Returns:
      bfloat16, with the shape and sharding of `x`.  Numbers that bfloat16 can
      represent and numbers that are not finite stay as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    explicit = not mesh.empty and mesh.are_all_axes_explicit
    layout = jax.typeof(x).sharding if explicit else None
    noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=layout)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of float32; a carry from the lower half rounds away
    # from zero.
    upper = (bits + noise.astype(jnp.uint32)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def rounded_stochastically(
    optimizer: optax.GradientTransformation, *, seed: int
) -> optax.GradientTransformation:
    """Computes updates in float32 and rounds what is stored in bfloat16 stochastically.

    These are the parameters and those arrays of the optimizer's state that have their
    dtype, such as the moments.  For parameters of other dtypes, this is `optimizer`
    itself.  `optax.apply_updates` gives the rounded parameters exactly: the update is
    the difference to them, in float32.

    Args:
      optimizer: any optimizer.
      seed: seed of the rounding.
    """

    def init(params):
        inner = optimizer.init(params)
        if not _is_low(params):
            return inner
        return RoundedState(jnp.zeros((), jnp.int32), inner)

    def update(updates, state, params=None):
        if not _is_low(params):
            return optimizer.update(updates, state, params)
        key = jax.random.fold_in(jax.random.key(seed), _SALT)
        for_params, for_state = jax.random.split(jax.random.fold_in(key, state.count))
        before = jax.tree.map(_wide, params)
        updates, inner = optimizer.update(
            jax.tree.map(_wide, updates), jax.tree.map(_wide, state.inner), before
        )
        rounded = _round_like(
            params, jax.tree.map(jnp.add, before, updates), for_params
        )
        updates = jax.tree.map(lambda new, old: _wide(new) - old, rounded, before)
        inner = _round_like(state.inner, inner, for_state)
        return updates, RoundedState(state.count + 1, inner)

    return optax.GradientTransformation(init, update)


def _is_low(params: Any) -> bool:
    return any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def _round_like(stored: Any, computed: Any, key: jax.Array) -> Any:
    """`computed` in the dtypes of `stored`; each array has its own key."""
    leaves, structure = jax.tree.flatten(computed)

    def one(number: int, old: jax.Array, new: jax.Array) -> jax.Array:
        if old.dtype == jnp.bfloat16 and new.dtype == jnp.float32:
            return stochastic_round(new, jax.random.fold_in(key, number))
        return new.astype(old.dtype)

    stored = jax.tree.leaves(stored)
    return structure.unflatten(map(one, range(len(leaves)), stored, leaves))
