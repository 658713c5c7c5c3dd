"""What a model is: its sizes, its numerics, and where its arrays live on the mesh."""

import dataclasses
import functools
import math

import jax
from jax.sharding import PartitionSpec as P

from jaxpref.errors import InputError

ROWS = ("data", "fsdp")
"""The mesh axes over which the rows of a batch are spread."""


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
    used; norms, rotary angles, attention weights and log-probs are float32 or wider.
    `remat` says what the backward pass recomputes within a layer: "none", "dots" (all
    but the matrix products with weights) or "full" (everything).
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

    @classmethod
    def from_hf_json(cls, fields: dict, source) -> "ModelConfig":
        """The config that a Hugging Face config.json describes.

        Args:
            fields: the JSON object; rotary fields as transformers 5 writes them
                (`rope_parameters`) or as older ones do (`rope_theta`, `rope_scaling`).
            source: the file's path, for messages.

        Raises:
            InputError: a field is missing, malformed, or asks for what this transformer
                does not do.
        """
        fields = {name: value for name, value in fields.items() if value is not None}
        for name, needed in _NEEDED.items():
            if fields.get(name, needed) != needed or (
                name == "model_type" and name not in fields
            ):
                raise InputError(
                    f"{source}: field {name} is {fields.get(name)!r}; this model "
                    f"supports only {needed!r}"
                )
        if "quantization_config" in fields:
            raise InputError(
                f"{source}: field quantization_config: quantised weights cannot be "
                "trained; use a folder with float32, float16 or bfloat16 weights"
            )
        get = functools.partial(_field, fields, source)
        hidden_size, heads = get("hidden_size", int), get("num_attention_heads", int)
        context = get("max_position_embeddings", int, 2048)
        sizes = dict(
            vocab_size=get("vocab_size", int),
            hidden_size=hidden_size,
            intermediate_size=get("intermediate_size", int),
            num_layers=get("num_hidden_layers", int),
            num_heads=heads,
            num_kv_heads=get("num_key_value_heads", int, heads),
            head_dim=get("head_dim", int, hidden_size // max(heads, 1)),
            rms_norm_eps=get("rms_norm_eps", float, 1e-6),
            max_position_embeddings=context,
            tie_word_embeddings=get("tie_word_embeddings", bool, False),
            initializer_range=get("initializer_range", float, 0.02),
        )
        try:
            return cls(**sizes, **_rope(fields, context))
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def to_hf_json(self) -> dict:
        """The fields of a config.json that transformers 4 and 5 both read."""
        scaling = None
        if self.rope_scaling is not None:
            s = self.rope_scaling
            scaling = {"rope_type": s.kind, "type": s.kind, "factor": s.factor}
            if s.kind == "llama3":
                scaling |= {name: getattr(s, name) for name in _LLAMA3_FIELDS}
        return {
            "architectures": ["LlamaForCausalLM"],
            **_NEEDED,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
        }


_NEEDED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
"""Fields of config.json with the only value that this transformer honours."""

_LLAMA3_FIELDS = (
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def _field(fields: dict, source, name: str, kind: type, default=None):
    value = fields.get(name, default)
    if value is None:
        raise InputError(f"{source}: field {name} is missing; copy the file again")
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise InputError(f"{source}: field {name} is {value!r}, not {kind.__name__}")
    return kind(value)


def _rope(fields: dict, context: int) -> dict:
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"field rope_scaling is {rope!r}, not an object")
    rope = {"rope_theta": fields.get("rope_theta", 10000.0), **rope}
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1))
    if partial != 1:
        raise InputError(
            f"field partial_rotary_factor is {partial!r}; only 1 is supported"
        )
    get = functools.partial(_field, rope, "rotary positions")
    theta, kind = get("rope_theta", float), rope.get("rope_type", rope.get("type"))
    if kind in (None, "default"):
        return {"rope_theta": theta, "rope_scaling": None}
    llama3 = {}
    if kind == "llama3":
        llama3 = {
            "low_freq_factor": get("low_freq_factor", float),
            "high_freq_factor": get("high_freq_factor", float),
            "original_max_position_embeddings": get(
                "original_max_position_embeddings", int, context
            ),
        }
    factor = get("factor", float, 1.0)
    return {"rope_theta": theta, "rope_scaling": RopeScaling(kind, factor, **llama3)}


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
    # Weights, as they are used: gathered over fsdp once.
    embed_gathered: P = P(None, "tensor")
    head_gathered: P = P(None, "tensor")
    # Activations: rows over data and fsdp.
    rows: P = P(ROWS)
    tokens: P = P(ROWS, None)
    hidden: P = P(ROWS, None, None)
    features: P = P(ROWS, None, "tensor")
    heads: P = P(ROWS, None, "tensor", None)
    groups: P = P(ROWS, None, "tensor", None, None)
    mask: P = P(ROWS, None, None, None)
    cache: P = P(None, ROWS, None, "tensor", None)


SPECS = Specs()


def on_mesh(spec: P) -> P | None:
    """The spec where a mesh is set, None where none is, so one code serves both."""
    return None if jax.sharding.get_abstract_mesh().empty else spec


def place(x: jax.Array, spec: P) -> jax.Array:
    """`x` laid out as `spec` where a mesh is set, and `x` itself where none is."""
    return x if on_mesh(spec) is None else jax.reshard(x, spec)


def check_mesh(config: ModelConfig) -> None:
    """Raises InputError if the mesh that is set cannot hold the model evenly."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    if not sizes:
        return
    if set(sizes) != {"data", "fsdp", "tensor"}:
        raise InputError(f"mesh: axes are {list(sizes)}; use data, fsdp and tensor")
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
