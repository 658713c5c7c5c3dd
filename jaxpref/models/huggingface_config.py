"""config.json of Hugging Face model folders: what it says as a `ModelConfig`."""

import functools
import json
from pathlib import Path

from jaxpref.errors import InputError
from jaxpref.models.config import ModelConfig, RopeScaling

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


def read_json(path: Path) -> dict:
    """The JSON object of a file of a model folder.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; give the folder of a Hugging Face model"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); copy it again") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds {type(fields).__name__}, not a JSON object")
    return fields


def config_from_hf(fields: dict, source) -> ModelConfig:
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
        return ModelConfig(**sizes, **_rope(fields, context))
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def config_to_hf(config: ModelConfig) -> dict:
    """The fields of a config.json that transformers 4 and 5 both read."""
    scaling = None
    if config.rope_scaling is not None:
        s = config.rope_scaling
        scaling = {"rope_type": s.kind, "type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            scaling |= {name: getattr(s, name) for name in _LLAMA3_FIELDS}
    return {
        "architectures": ["LlamaForCausalLM"],
        **_NEEDED,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
    }


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
