"""How arrays are laid out: what every package needs to know of it."""

import jax
from jax.sharding import PartitionSpec

ROWS = ("data", "fsdp")
"""The mesh axes over which the rows of a batch are sharded."""


def replicated(x: jax.Array) -> jax.Array:
    """The whole of `x` on every device: a gather under Explicit axes, else `x`.

    Sorting, rolling, top-k and scattering along a sharded axis need it: under Explicit
    axes they refuse to guess a layout.  Without a mesh, and under Auto axes, where the
    compiler gathers by itself, it is the identity.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh.are_all_axes_explicit:
        return x
    return jax.reshard(x, PartitionSpec())
