"""Architectures of known models, so that planning needs no model folder."""

from typing import Any

from jaxpref.errors import InputError
from jaxpref.models import Architecture
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.models.rotary import RopeScaling


def _llama3(factor: float, **sizes: Any) -> LlamaArchitecture:
    return LlamaArchitecture(
        vocab_size=128256,
        num_kv_heads=8,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", factor),
        max_position_embeddings=131072,
        **sizes,
    )


def _smollm2(**sizes: Any) -> LlamaArchitecture:
    return LlamaArchitecture(
        vocab_size=49152,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **sizes,
    )


PRESETS = {
    "llama-3-1b": _llama3(
        32.0,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "llama-3-8b": _llama3(
        8.0,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        head_dim=128,
    ),
    "llama-3-70b": _llama3(
        8.0,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_heads=64,
        head_dim=128,
    ),
    "smollm2-135m": _smollm2(
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        rope_theta=100000.0,
    ),
    "smollm2-360m": _smollm2(
        hidden_size=960,
        intermediate_size=2560,
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        rope_theta=100000.0,
    ),
    "smollm2-1.7b": _smollm2(
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        rope_theta=130000.0,
    ),
    # A small model with a large vocabulary, of no published weights.
    "llama-0.6b-152k": LlamaArchitecture(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1000000.0,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
}
"""Presets by name: Llama 3.1 (8B, 70B), Llama 3.2 (1B), SmolLM2, and a 0.6B."""


def find_model(name: str) -> Architecture:
    """A preset, or the architecture of a Hugging Face folder; no weights are read.

    Raises:
      InputError: if there is no such preset and no such folder.
    """
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    try:
        return read_architecture(resolve_folder(name))
    except InputError as error:
        raise InputError(f"{error}; presets: {', '.join(PRESETS)}") from error
