"""What a model is: its sizes, its numerics, and where its arrays live on the mesh."""

import dataclasses
import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxpref.errors import InputError
from jaxpref.sharding import ROWS

_FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pre-training context.

    `kind` is "linear" (every frequency divided by `factor`) or "llama3" (long
    wavelengths divided by `factor`, short ones kept, smooth in between; the last three
    fields are read only there).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise InputError(
                f"rotary positions: rope_type is {self.kind!r}; default, linear and "
                "llama3 are supported"
            )
        if self.factor <= 0 or self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"rotary positions: factor={self.factor}, low_freq_factor="
                f"{self.low_freq_factor}, high_freq_factor={self.high_freq_factor}; "
                "they must be positive and low < high"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and numerics of a decoder-only transformer.

    Parameters are stored in `param_dtype` and cast to `compute_dtype` where they are
    used.  Norms, rotary angles, the softmax over keys and log-probs are computed in
    float32 or wider; the angles' cosines and sines and the attention weights are then
    rounded to `compute_dtype`, as transformers does.
    `remat` says what the backward pass recomputes within a layer: "none", "dots" (all
    but the matrix products with weights) or "full" (everything).  `unroll` is how many
    layers of the scan over them are written out one after the other, at most all.
    `kernels`: whole sequences may take the attention kernels of accelerators, which
    have no second derivatives.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    kernels: bool = True

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise InputError(f"model config: {field.name} is {value}; give >= 1")
            if field.name.endswith("_dtype") and value not in _FLOATS:
                raise InputError(
                    f"model config: {field.name} is {value!r}; use one of {_FLOATS}"
                )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model config: num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}; query heads share key heads evenly"
            )
        if self.head_dim % 2:
            raise InputError(
                f"model config: head_dim={self.head_dim} is odd; rotary positions need "
                "an even head_dim"
            )
        if self.remat not in ("none", "dots", "full"):
            raise InputError(
                f"model config: remat is {self.remat!r}; use none, dots or full"
            )


@dataclasses.dataclass(frozen=True)
class Specs:
    """The one table of layouts on the mesh axes `data`, `fsdp` and `tensor`.

    Stored weights of the layers have a leading layer axis, which is never sharded.
    """

    # Weights, as they are stored: every matrix is spread over fsdp and tensor.
    # An embedding stored as ("tensor", "fsdp") would be rematerialised in the lookup.
    embed: P = P("fsdp", "tensor")
    head: P = P("fsdp", "tensor")
    attention_in: P = P(None, "fsdp", "tensor", None)
    attention_out: P = P(None, "tensor", None, "fsdp")
    mlp_in: P = P(None, "fsdp", "tensor")
    mlp_out: P = P(None, "tensor", "fsdp")
    norm: P = P(None)
    layer_norm: P = P(None, None)
    # Weights, as they are used: gathered over fsdp once, for training one copy for each
    # group of rows, so that slopes of different rows are not added up before the end.
    embed_gathered: P = P(None, "tensor")
    head_gathered: P = P(None, "tensor")
    copies: P = P(ROWS, None, "tensor")
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


def on_mesh(spec: P) -> P | None:
    """The spec where a mesh is set, None where none is, so one code serves both."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def place(x: jax.Array, spec: P) -> jax.Array:
    """`x` laid out as `spec` where a mesh is set, and `x` itself where none is."""
    return x if on_mesh(spec) is None else jax.reshard(x, spec)


def platform() -> str:
    """Of the devices the program is compiled for: "cpu", "gpu" or "tpu".

    They are those of the mesh that is set, which need not be on this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def check_mesh(config: ModelConfig) -> None:
    """Raises InputError if the mesh that is set cannot hold the model evenly."""
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
    both = ("fsdp", "tensor")
    for name, axes in {
        "num_kv_heads": ("tensor",),
        "num_heads": ("tensor",),
        "intermediate_size": ("tensor",),
        "vocab_size": both,
        "hidden_size": both,
    }.items():
        for axis in axes:
            if getattr(config, name) % sizes[axis]:
                raise InputError(
                    f"mesh: {axis}={sizes[axis]} does not divide the model's {name}="
                    f"{getattr(config, name)}; choose a {axis} size that does"
                )


def inverse_frequencies(config: ModelConfig) -> tuple[float, ...]:
    """Rotary frequencies in radians per position, one for each pair of features.

    f_i = theta^(-2i / head_dim), then scaled.  Sources: Su et al. 2021,
    arXiv:2104.09864, section 3.2.2; Chen et al. 2023, arXiv:2306.15595 (linear);
    Llama 3.1 (llama3: a wavelength beyond context / low_freq_factor is stretched, one
    below context / high_freq_factor is kept, frequencies between are interpolated).
    """
    K = config.head_dim
    frequencies = [config.rope_theta ** (-2 * i / K) for i in range(K // 2)]
    s = config.rope_scaling
    if s is None:
        return tuple(frequencies)
    if s.kind == "linear":
        return tuple(f / s.factor for f in frequencies)

    def llama3(f):
        turns = s.original_max_position_embeddings * f / (2 * math.pi)
        keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        keep = min(max(keep, 0.0), 1.0)
        return keep * f + (1 - keep) * f / s.factor

    return tuple(llama3(f) for f in frequencies)
