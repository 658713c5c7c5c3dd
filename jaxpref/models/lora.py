"""Low-rank adapters (LoRA) of a model's weight matrices.

A matrix W [inputs, outputs] is frozen and replaced by

    W + s a b,    s = alpha / r, or alpha / sqrt(r) if rank-stabilized

with a [inputs, r] and b [r, outputs] trained.  Source: Hu et al. 2021,
arXiv:2106.09685, section 4.1 (their A is a^T, their B is b^T); the second scale is from
Kalajdzievski 2023, arXiv:2312.03732.  DoRA also trains the norm of each output's
weights, m [outputs]: Liu et al. 2024, arXiv:2402.09353; see `low_rank`.

A `LowRank` takes the place of a matrix among the parameters, so no family needs code of
its own.  Which matrices can be adapted follows from the family's tensor names: those of
the layers.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpref.errors import InputError
from jaxpref.models.families import Family, TensorName
from jaxpref.models.layout import reshard
from jaxpref.models.low_rank import Dropout, LowRank, output_norms
from jaxpref.models.partition import ROUTER
from jaxpref.models.paths import by_path, nested
from jaxpref.models.quantized import Quantization
from jaxpref.models.stored import PerLayer, gathered
from jaxpref.runtime.ranges import MOST

KINDS = "attention", "mlp", "all"
"""Names of groups of matrices."""
MOST_RANK = 2**16
ALSO_OF_ADAPTERS = "base", "dropout"
"""Options that also apply to existing adapters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters, trained instead of the weights."""

    rank: int | None = None
    """Rank of the adapters of a LoRA run (default: none, so the weights are trained).
    The weights are frozen and held in the compute dtype, adapters in the parameter
    dtype.  docs/adapters.md has more."""
    alpha: float | None = None
    """The adapters' product is scaled by alpha / rank (default: twice the rank)."""
    targets: str = "attention,mlp"
    """The adapted matrices of each layer: attention, mlp, all, or names such as
    q_proj,v_proj; separated by commas."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    dora: bool = False
    """Also train the norm of the weights of each output (DoRA)."""
    dropout: float = 0.0
    """Probability of dropping each input of the adapters in training, also with
    --adapter."""
    base: Quantization | None = None
    """Hold the frozen matrices of the layers in 8 (int8) or 4 bits (nf4, as in QLoRA),
    also with --adapter (default: the compute dtype)."""

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise InputError(
                f"--lora.dropout {self.dropout}: must be at least 0 and below 1"
            )
        if self.rank is None:
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if value != field.default and field.name not in ALSO_OF_ADAPTERS:
                    raise InputError(
                        f"--lora.{field.name.replace('_', '-')} {value}: has no effect "
                        "without adapters; give --lora.rank too"
                    )
            return
        if not 1 <= self.rank <= MOST_RANK:
            raise InputError(f"--lora.rank {self.rank}: must be from 1 to {MOST_RANK}")
        if self.alpha is not None and not 0 < self.alpha <= MOST:
            raise InputError(f"--lora.alpha {self.alpha}: must be above 0 and finite")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which weights have adapters, and which are trained in full beside them."""

    rank: int
    alpha: float
    rank_stabilized: bool
    adapted: tuple[str, ...]
    """Paths of matrices with an adapter: "layers.query"."""
    whole: tuple[str, ...] = ()
    """Paths of parameters that are trained themselves, such as a reward head."""
    dora: bool = False
    """Whether the norms of the outputs' weights are trained."""

    @property
    def scale(self) -> float:
        """The factor s of the product a b."""
        root = math.sqrt(self.rank) if self.rank_stabilized else self.rank
        return self.alpha / root

    def trains(self, path: str) -> bool:
        """Whether the parameter itself is trained."""
        return path in self.whole

    def freezes(self, path: str) -> bool:
        """Whether the parameter is frozen, with or without an adapter."""
        return path not in self.whole

    def trained(self, params: Any, model: Any, key: PRNGKeyArray) -> Any:
        """What is trained at the start: whole parameters, and new adapters."""
        whole = {path: x for path, x in by_path(params).items() if self.trains(path)}
        new = by_path(new_adapters(self, model, key))
        if self.dora:
            leaves, names = by_path(params), matrices(model.architecture.family)
            for path in self.adapted:
                if path in leaves:
                    norms = norms_of(leaves[path], names[path].inputs or 0)
                    like = new[f"{path}.m"]
                    layout = jax.typeof(like).sharding.spec
                    new[f"{path}.m"] = reshard(norms.astype(like.dtype), layout)
        return nested(whole | new)

    def frozen(self, params: Any) -> Any:
        """What is frozen, from the model's parameters."""
        leaves = by_path(params).items()
        return nested({path: x for path, x in leaves if self.freezes(path)})

    def join(
        self,
        trained: Any,
        frozen: Any,
        *,
        dropout: float = 0.0,
        key: PRNGKeyArray | None = None,
    ) -> Any:
        """The model's parameters, with a `LowRank` for each adapted weight.

        Args:
            trained: what is trained.
            frozen: what is frozen.
            dropout: the share of the adapters' inputs to drop, if there is a key.
            key: a random key for dropout.
        """
        ours, leaves = by_path(trained), by_path(frozen)
        for path in self.adapted:
            factors = ours.pop(f"{path}.a"), ours.pop(f"{path}.b")
            magnitude, drop = ours.pop(f"{path}.m", None), None
            if key is not None and dropout:
                own = jax.random.fold_in(key, zlib.crc32(path.encode()))
                layers = jax.random.split(own, len(factors[0]))
                drop = Dropout(jax.random.key_data(layers), dropout)
            leaves[path] = LowRank(leaves[path], *factors, self.scale, magnitude, drop)
        return nested(leaves | ours)

    def exported(self, trained: Any, stored: dict[str, Any]) -> Any:
        """The merged parameters for `folder.save`; sums in float32."""
        ours = by_path(trained)
        for path in self.adapted:
            arrays = (gathered(ours.pop(f"{path}.{x}")) for x in self.arrays)
            stored = stored | {path: self._merged(stored[path], *arrays)}
        return nested(stored | ours)

    @property
    def arrays(self) -> str:
        """The names of a matrix's trained arrays, after its path: a, b, and m."""
        return "abm" if self.dora else "ab"

    def _merged(
        self,
        weight: PerLayer,
        a: np.ndarray,
        b: np.ndarray,
        magnitude: np.ndarray | None = None,
    ) -> PerLayer:
        a, b = a.astype(np.float32), b.astype(np.float32)
        scale, inputs = np.float32(self.scale), tuple(range(a.ndim - 2))

        def layer(i: int) -> np.ndarray:
            merged = weight[i] + scale * np.tensordot(a[i], b[i], 1)
            if magnitude is None:
                return merged
            norms = np.sqrt(np.square(merged).sum(inputs))
            return merged * (magnitude[i] / np.where(norms > 0, norms, 1))

        return PerLayer(weight.shape, layer)


def lora_of(options: LoraOptions, family: Family, *, whole: Sequence[str] = ()) -> Lora:
    """The adapters that options describe.

    Raises:
        InputError: if the family has no such matrices.
    """
    assert options.rank is not None
    alpha = 2.0 * options.rank if options.alpha is None else options.alpha
    adapted = adapted_paths(options.targets, family)
    scale = options.rank, alpha, options.rank_stabilized
    return Lora(*scale, adapted, tuple(whole), options.dora)


def matrices(family: Family) -> dict[str, TensorName]:
    """The matrices of the layers, which can have adapters, by path.

    Those of experts cannot, nor can the router.
    """
    return {
        path: name
        for path, name in family.tensors.items()
        if name.inputs and name.stacked == 1 and path != ROUTER
    }


def module_name(name: TensorName) -> str:
    """The name of a matrix's module within its layer, such as q_proj."""
    return name.template.split(".")[-2]


def _kind(name: TensorName) -> str:
    return "attention" if "att" in name.template.split(".")[-3] else "mlp"


def adapted_paths(targets: str, family: Family) -> tuple[str, ...]:
    """The matrices that `LoraOptions.targets` names, in the family's order.

    Raises:
        InputError: if there is no such matrix.
    """
    names = [name.strip() for name in targets.split(",")]
    found = matrices(family)
    known = [*KINDS, *dict.fromkeys(map(module_name, found.values()))]
    for name in names:
        if name not in known:
            raise InputError(
                f"--lora.targets {name or targets!r}: a {family.model_type} model has "
                f"no such matrices; use some of {', '.join(known)}"
            )
    if {"mlp", "all"} & set(names) and ROUTER in family.tensors:
        raise InputError(
            f"--lora.targets {targets}: experts cannot have adapters; use attention"
        )
    return tuple(
        path
        for path, name in found.items()
        if {"all", _kind(name), module_name(name)} & set(names)
    )


def factor_names(name: TensorName) -> tuple[TensorName, TensorName]:
    """The tensors of a and b in a folder of `peft`.

    If a tensor holds several matrices, they have one a, and the parts of one b.
    """
    module = f"base_model.model.{name.template.removesuffix('.weight')}"
    a = TensorName(f"{module}.lora_A.weight", name.inputs)
    b = f"{module}.lora_B.weight"
    return a, dataclasses.replace(name, template=b, inputs=1, input_major=False)


def factor_shapes(lora: Lora, model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and layouts of all a [L, inputs, r] and b [L, r, outputs].

    Those of a path are under "path.a" and "path.b"; with DoRA, m [L, outputs] is under
    "path.m".  The layouts are those of the weight's axes; r is never sharded.

    Args:
        lora: which weights have adapters.
        model: a language model or reward model; the adapters have its parameter dtype.
    """
    leaves = by_path(jax.eval_shape(model.init, jax.random.key(0)))
    names, found = matrices(model.architecture.family), {}
    for path in lora.adapted:
        leaf, split = leaves[path], 1 + (names[path].inputs or 0)
        for factor in lora.arrays:
            found[f"{path}.{factor}"] = jax.ShapeDtypeStruct(
                _axes(factor, leaf.shape, split, lora.rank),
                leaf.dtype,
                sharding=_layout(factor, leaf, split),
            )
    return found


def _axes(factor: str, of_weight: Sequence, split: int, of_rank: Any) -> tuple:
    """What belongs to the axes of a factor, given what belongs to those of W."""
    if factor == "a":
        return (*of_weight[:split], of_rank)
    if factor == "m":
        return (of_weight[0], *of_weight[split:])
    return (of_weight[0], of_rank, *of_weight[split:])


def _layout(factor: str, leaf: Any, split: int) -> NamedSharding | None:
    if leaf.sharding is None:
        return None
    axes = tuple(leaf.sharding.spec)
    axes += (None,) * (len(leaf.shape) - len(axes))
    return NamedSharding(leaf.sharding.mesh, P(*_axes(factor, axes, split, None)))


def new_adapters(lora: Lora, model: Any, key: PRNGKeyArray) -> Any:
    """New adapters: b is 0, so the function is that of the base.

    a is uniform within 1 / sqrt(inputs), as in `peft`.  Each depends only on the key
    and its own path.  With DoRA, m is 0 until it is set to `norms_of` the weights.  For
    the arguments, see `factor_shapes`.
    """
    found = {}
    for path, leaf in factor_shapes(lora, model).items():
        layout = None if leaf.sharding is None else leaf.sharding.spec
        options = dict(dtype=leaf.dtype, out_sharding=layout)
        if not path.endswith(".a"):
            found[path] = jnp.zeros(leaf.shape, **options)
            continue
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        bound = math.prod(leaf.shape[1:-1]) ** -0.5
        found[path] = jax.random.uniform(
            own, leaf.shape, minval=-bound, maxval=bound, **options
        )
    return nested(found)


@functools.partial(jax.jit, static_argnums=1)
def norms_of(weight: Any, inputs: int) -> Float[Array, "L outputs"]:
    """The norms of the outputs' weights in all layers, at which m starts."""
    return jax.lax.map(lambda one: output_norms(one, inputs), weight)
