"""Frozen weight matrices in 8 or 4 bits.

A matrix is cut into blocks of up to 64 consecutive inputs of one output.  A block is
stored as a scale, and a code for each of its weights:

    int8: w ~ scale * code, code from -127 to 127, scale = max|block| / 127
    nf4:  w ~ scale * level[code], scale = max|block|; the 16 levels are quantiles of
          the normal distribution, and two codes share a byte

Source: Dettmers et al. 2023, arXiv:2305.14314, eq. 1 to 4 and appendix E.  Their second
quantization, that of the scales, is not used: those are float32.

Axes: L layers, n blocks, m bytes of a block (64 in int8, 32 in nf4).
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer, PRNGKeyArray

from jaxpref.errors import InputError
from jaxpref.models.gathering import gather_frozen, without_fsdp
from jaxpref.models.layout import on_mesh, reshard

Quantization = Literal["int8", "nf4"]
QUANTIZATIONS = get_args(Quantization)
BLOCK = 64
"""The largest number of weights in a block."""
BITS = {"int8": 8 + 32 / BLOCK, "nf4": 4 + 32 / BLOCK}
"""Bits of a weight, with its share of the scale of a block of 64."""
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The levels of nf4: arXiv:2305.14314, appendix E."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A frozen matrix of one layer or, with an axis L, of all.

    It takes the place of the array; `linear.dense_einsum` multiplies with it.
    """

    codes: Integer[Array, "*L inputs n m outputs"]
    """int8, or uint8 with two codes: those of the block's first half are the low bits.
    The last axis of the inputs is cut into blocks; inputs and outputs may be several
    axes."""
    scales: Float[Array, "*L inputs n outputs"]
    """float32."""
    kind: Quantization = dataclasses.field(metadata={"static": True})
    outputs: int = dataclasses.field(metadata={"static": True})
    """The number of axes of the outputs."""
    layout: P | None = dataclasses.field(metadata={"static": True})
    """The layout of a layer's matrix in use, gathered over fsdp; None without a mesh.
    """

    def __getitem__(self, index: Any) -> "Quantized":
        """Itself: a block reads its weights with `self.query[...]`."""
        if index is not ...:
            raise TypeError(f"a Quantized weight has no part {index}")
        return self

    def dequantized(self, dtype: Any) -> Float[Array, "inputs outputs"]:
        """The matrix of one layer, whole on every device of `fsdp`."""
        # The codes are gathered: in nf4, 4.5 bits per weight instead of 16 or 32.
        codes, scales = gather_frozen(self.codes), gather_frozen(self.scales)
        axis = codes.ndim - 1 - self.outputs
        if self.kind == "nf4":
            codes = jnp.concatenate([codes & 15, codes >> 4], axis)
            values = _looked_up(codes, NF4)
        else:
            values = codes.astype(jnp.float32)
        values *= jnp.expand_dims(scales, axis)
        before, (n, m), after = (
            values.shape[: axis - 1],
            values.shape[axis - 1 : axis + 1],
            values.shape[axis + 1 :],
        )
        spec = on_mesh(jax.typeof(values).sharding.spec)
        if spec is not None:
            spec = P(*spec[:axis], *spec[axis + 1 :])
        shape = (*before, n * m, *after)
        whole = jnp.reshape(values.astype(dtype), shape, out_sharding=spec)
        return whole if self.layout is None else reshard(whole, self.layout)


def _looked_up(codes: jax.Array, table: tuple[float, ...]) -> jax.Array:
    """`table[codes]`, chosen bit by bit, since gathers are slow on TPUs."""
    if len(table) == 1:
        return jnp.float32(table[0])
    half = len(table) // 2
    low, high = _looked_up(codes, table[:half]), _looked_up(codes, table[half:])
    return jnp.where((codes & half) != 0, high, low)


def encoded(
    values: Float[np.ndarray, "*inputs outputs"], kind: Quantization, axis: int
) -> tuple[np.ndarray, np.ndarray]:
    """The codes and the scales of a matrix, or of some whole blocks of it.

    Args:
        values: float32.
        kind: the quantization.
        axis: the last axis of the inputs, which is cut into blocks.
    """
    size = values.shape[axis]
    m = block_size(size)
    shape = (*values.shape[:axis], size // m, m, *values.shape[axis + 1 :])
    blocks = values.reshape(shape)
    most = np.abs(blocks).max(axis + 1)
    divisor = np.where(most == 0, np.float32(1), most)
    shares = blocks / np.expand_dims(divisor, axis + 1)
    if kind == "int8":
        return np.rint(shares * 127).astype(np.int8), most / np.float32(127)
    levels = np.array(NF4, np.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = np.searchsorted(middles, shares).astype(np.uint8)
    low, high = np.split(codes, 2, axis + 1)
    return low | (high << 4), most


def block_size(size: int) -> int:
    """Weights per block: the largest divisor of `size` that divides `BLOCK`."""
    return math.gcd(size, BLOCK)


def shapes_of(leaf: Any, kind: Quantization, inputs: int, path: str) -> Quantized:
    """Shapes, dtypes and layouts of a quantized matrix [L, inputs, outputs].

    Args:
        leaf: shape, dtype and layout of the matrix.
        kind: the quantization.
        inputs: the number of axes of its inputs.
        path: its path, for messages.

    Raises:
        InputError: if it cannot be cut into blocks.
    """
    size = block_size(leaf.shape[inputs])
    n, m = leaf.shape[inputs] // size, size
    dtype = jnp.int8
    if kind == "nf4":
        if size % 2:
            raise InputError(
                f"--lora.base nf4: {path} has {leaf.shape[inputs]} inputs, an "
                "odd number, but two weights share a byte; use --lora.base int8"
            )
        m, dtype = size // 2, jnp.uint8
    before, after = leaf.shape[:inputs], leaf.shape[inputs + 1 :]
    outputs = len(after)
    codes, scales = (*before, n, m, *after), (*before, n, *after)
    if leaf.sharding is None:
        make: Any = jax.ShapeDtypeStruct
        arrays = make(codes, dtype), make(scales, jnp.float32)
        return Quantized(*arrays, kind, outputs, None)
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    spec = (*spec, *(None,) * (len(leaf.shape) - len(spec)))
    axes = spec[inputs]
    names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    sizes = math.prod(mesh.shape[name] for name in names)
    # Few blocks may not divide the devices of an axis.  Along fsdp, codes can be cut
    # within blocks, since they are gathered before they are read.
    whole = axes if n % sizes == 0 else None
    in_block = whole is None and "fsdp" in names and m % sizes == 0
    within = axes if in_block else None
    start, end = spec[:inputs], spec[inputs + 1 :]
    make: Any = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, P(*spec))
    )
    in_use = without_fsdp(P(*spec[1:]))
    return Quantized(
        make(codes, dtype, *start, whole, within, *end),
        make(scales, jnp.float32, *start, whole, *end),
        kind,
        outputs,
        in_use,
    )


def drawn(shapes: Quantized, key: PRNGKeyArray, scale: float) -> Quantized:
    """A random matrix of such shapes, in the same layout, with one scale."""
    layout = lambda leaf: None if leaf.sharding is None else leaf.sharding.spec
    codes, scales = shapes.codes, shapes.scales
    bits = jax.random.bits(key, codes.shape, jnp.uint8, out_sharding=layout(codes))
    full = jnp.full(scales.shape, scale, scales.dtype, out_sharding=layout(scales))
    return dataclasses.replace(shapes, codes=bits.astype(codes.dtype), scales=full)
