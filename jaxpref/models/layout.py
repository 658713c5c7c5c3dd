"""How a model's arrays are sharded over the mesh."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from jaxpref.errors import InputError
from jaxpref.models.architecture import Architecture
from jaxpref.sharding import ROWS, on_axes

SHARDS = ("fsdp", "expert")
"""The mesh axes over which a matrix is sharded, besides `tensor`; they also split rows.
Experts' matrices are sharded over `fsdp`, and over `expert` by expert."""


@dataclasses.dataclass(frozen=True)
class Specs:
    """All shardings over the mesh axes `data`, `fsdp`, `expert` and `tensor`.

    A mesh may lack `expert`; `on_mesh` leaves it out then.

    Weights of the layers are stored with a leading layer axis, which is never sharded.
    """

    # Stored weights: every matrix is sharded over fsdp, expert and tensor.
    # An embedding stored as ("tensor", "fsdp") would be gathered whole in the lookup.
    embed: P = P(SHARDS, "tensor")
    head: P = P(SHARDS, "tensor")
    attention_in: P = P(None, SHARDS, "tensor", None)
    attention_out: P = P(None, "tensor", None, SHARDS)
    mlp_in: P = P(None, SHARDS, "tensor")
    mlp_out: P = P(None, "tensor", SHARDS)
    norm: P = P(None)
    layer_norm: P = P(None, None)
    head_bias: P = P(None, "tensor", None)
    mlp_bias: P = P(None, "tensor")
    # Weights in use: gathered over fsdp and expert once.  In training, each row group
    # has a copy, so that gradients of different groups are summed once, at the end.
    embed_gathered: P = P(None, "tensor")
    head_gathered: P = P(None, "tensor")
    row_group_copies: P = P(ROWS, None, "tensor")
    # Activations: rows over data, fsdp and expert.
    rows: P = P(ROWS)
    tokens: P = P(ROWS, None)
    hidden: P = P(ROWS, None, None)
    features: P = P(ROWS, None, "tensor")
    heads: P = P(ROWS, None, "tensor", None)
    groups: P = P(ROWS, None, "tensor", None, None)
    vocabulary: P = P("tensor")
    cache: P = P(None, ROWS, "tensor", None, None)


SPECS = Specs()


def on_mesh(spec: P | None) -> P | None:
    """The spec if a mesh is set, else None, so that the same code works for both.

    Axes that the mesh lacks are left out.  None also within `jax.shard_map`, where
    arrays are those of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if spec is None or mesh.empty or mesh.are_all_axes_manual:
        return None
    return on_axes(spec, mesh)


def reshard(x: Shaped[Array, "*shape"], spec: P) -> Shaped[Array, "*shape"]:
    """`x` in the layout `spec` if a mesh is set, else `x` itself."""
    here = on_mesh(spec)
    return x if here is None else jax.reshard(x, here)


def one_of(x: Any, index: tuple[int, ...]) -> Any:
    """`x[index]` for an array whose leading axes may be sharded, such as experts'."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not any(sharding.spec[: len(index)]):
        return x[index]
    spec = P(*sharding.spec[len(index) :])
    return x.at[index].get(out_sharding=NamedSharding(sharding.mesh, spec))


def platform() -> str:
    """The platform for which the program is compiled: "cpu", "gpu", or "tpu".

    It is that of the current mesh, whose devices may belong to another machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def num_parts(axes: tuple[str, ...]) -> int:
    """The number of devices on some axes of the current mesh; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def check_mesh(architecture: Architecture) -> None:
    """Raises InputError if the current mesh does not divide the model evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(mesh.shape)
    if not sizes:
        return
    if set(sizes) not in ({"data", "fsdp", "tensor"}, {*ROWS, "tensor"}):
        raise InputError(
            f"mesh: axes are {list(sizes)}; use data, fsdp and tensor, and expert for "
            "a mixture of experts"
        )
    if set(mesh.axis_types) != {AxisType.Explicit}:
        types = ", ".join(t.name for t in mesh.axis_types)
        raise InputError(
            f"mesh: the axes' types are {types}; make it with "
            f"axis_types=(jax.sharding.AxisType.Explicit,) * {len(sizes)}"
        )
    if sizes.get("expert", 1) > 1 and "num_experts" not in architecture.sharded_sizes:
        raise InputError(
            f"mesh: expert={sizes['expert']}, but a {architecture.family.model_type} "
            "model has no experts; use fsdp in its place"
        )
    for name, groups in architecture.sharded_sizes.items():
        for axes in groups:
            if getattr(architecture, name) % num_parts(axes):
                used = [axis for axis in axes if sizes.get(axis, 1) > 1]
                parts = " x ".join(f"{axis}={sizes[axis]}" for axis in used)
                raise InputError(
                    f"mesh: {parts} does not divide the model's {name}="
                    f"{getattr(architecture, name)}; choose a {' x '.join(used)} size "
                    "that does"
                )
