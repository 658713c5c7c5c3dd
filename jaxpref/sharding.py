"""How arrays are laid out: what every package needs to know of it."""

from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec

Tree = TypeVar("Tree")
ROWS = ("data", "fsdp", "expert")
"""The mesh axes over which the rows of a batch are sharded; see `on_axes`."""


def row_axes(mesh: Any) -> tuple[str, ...]:
    """Those of `ROWS` that the mesh has."""
    return tuple(axis for axis in ROWS if axis in mesh.shape)


def on_axes(spec: PartitionSpec, mesh: Any) -> PartitionSpec:
    """The spec without the axes that the mesh lacks.

    Only meshes for mixtures of experts have an axis `expert`.
    """

    def held(axes: Any) -> Any:
        if not isinstance(axes, tuple):
            return axes if axes is None or axes in mesh.shape else None
        found = tuple(axis for axis in axes if axis in mesh.shape)
        return found if len(found) > 1 else found[0] if found else None

    return PartitionSpec(*map(held, spec))


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


def fetched(tree: Tree) -> Tree:
    """The whole of all arrays on the host of every process.

    All processes must call it at the same point, with the mesh of the arrays set.
    """
    if jax.process_count() > 1:  # a host can only read what its devices hold
        tree = _everywhere(tree)
    return jax.device_get(tree)


@jax.jit
def _everywhere(tree: Tree) -> Tree:
    return jax.tree.map(replicated, tree)
