"""How a model's arrays are sharded over the mesh."""

import dataclasses

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from jaxpref.errors import InputError
from jaxpref.models.architecture import Architecture
from jaxpref.sharding import ROWS


@dataclasses.dataclass(frozen=True)
class Specs:
    """All shardings over the mesh axes `data`, `fsdp` and `tensor`.

    Weights of the layers are stored with a leading layer axis, which is never sharded.
    """

    # Stored weights: every matrix is sharded over fsdp and tensor.
    # An embedding stored as ("tensor", "fsdp") would be gathered whole in the lookup.
    embed: P = P("fsdp", "tensor")
    head: P = P("fsdp", "tensor")
    attention_in: P = P(None, "fsdp", "tensor", None)
    attention_out: P = P(None, "tensor", None, "fsdp")
    mlp_in: P = P(None, "fsdp", "tensor")
    mlp_out: P = P(None, "tensor", "fsdp")
    norm: P = P(None)
    layer_norm: P = P(None, None)
    head_bias: P = P(None, "tensor", None)
    mlp_bias: P = P(None, "tensor")
    # Weights in use: gathered over fsdp once.  In training, each row group has
    # a copy, so that gradients of different groups are summed once, at the end.
    embed_gathered: P = P(None, "tensor")
    head_gathered: P = P(None, "tensor")
    row_group_copies: P = P(ROWS, None, "tensor")
    # Activations: rows over data and fsdp.
    rows: P = P(ROWS)
    tokens: P = P(ROWS, None)
    hidden: P = P(ROWS, None, None)
    features: P = P(ROWS, None, "tensor")
    heads: P = P(ROWS, None, "tensor", None)
    groups: P = P(ROWS, None, "tensor", None, None)
    mask: P = P(ROWS, None, None, None)
    vocabulary: P = P("tensor")
    cache: P = P(None, ROWS, None, "tensor", None)


SPECS = Specs()


def on_mesh(spec: P | None) -> P | None:
    """The spec if a mesh is set, else None, so that the same code works for both.

    None also within `jax.shard_map`, where arrays are those of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.are_all_axes_manual else spec


def reshard(x: Shaped[Array, "*shape"], spec: P) -> Shaped[Array, "*shape"]:
    """`x` in the layout `spec` if a mesh is set, else `x` itself."""
    return x if on_mesh(spec) is None else jax.reshard(x, spec)


def platform() -> str:
    """The platform for which the program is compiled: "cpu", "gpu", or "tpu".

    It is that of the current mesh, whose devices may belong to another machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def check_mesh(architecture: Architecture) -> None:
    """Raises InputError if the current mesh does not divide the model evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(mesh.shape)
    if not sizes:
        return
    if set(sizes) != {"data", "fsdp", "tensor"}:
        raise InputError(f"mesh: axes are {list(sizes)}; use data, fsdp and tensor")
    if set(mesh.axis_types) != {AxisType.Explicit}:
        types = ", ".join(t.name for t in mesh.axis_types)
        raise InputError(
            f"mesh: the axes' types are {types}; make it with "
            "axis_types=(jax.sharding.AxisType.Explicit,) * 3"
        )
    for name, axes in architecture.sharded_sizes.items():
        for axis in axes:
            if getattr(architecture, name) % sizes[axis]:
                raise InputError(
                    f"mesh: {axis}={sizes[axis]} does not divide the model's {name}="
                    f"{getattr(architecture, name)}; choose a {axis} size that does"
                )
