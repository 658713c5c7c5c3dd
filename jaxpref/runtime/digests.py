"""Digests of arrays, which do not depend on how the arrays are sharded."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def digests(tree: Any) -> dict[str, int]:
    """One 32-bit digest per array, independent of its sharding.

    The array's bits are read as 32-bit words.  Each is multiplied by an odd number that
    depends on its position, and the products are summed modulo 2^32.  Integer sums do
    not depend on the order of summation.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    values = jax.device_get(_digest([leaf for _, leaf in leaves]))
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    return {name: int(value) for name, value in zip(names, values)}


def digest_of_meta(meta: dict) -> str:
    """SHA-256 of the metadata, except for this digest itself."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@jax.jit
def _digest(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(x):
        if x.dtype == jnp.bool:
            x = x.astype(jnp.uint8)
        # Wider than 32 bits: bitcasting adds an axis of 32-bit words.
        word = f"uint{8 * min(x.dtype.itemsize, 4)}"
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(word))
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            place = place * np.uint32(size) + index
        return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]
