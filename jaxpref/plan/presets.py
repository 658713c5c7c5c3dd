"""Architectures of well-known models, so that planning needs no model folder."""

import functools
from typing import Any

from jaxpref.errors import InputError
from jaxpref.models import Architecture
from jaxpref.models.families.gemma3 import Gemma3Architecture
from jaxpref.models.families.llama import LlamaArchitecture
from jaxpref.models.families.mistral import MistralArchitecture
from jaxpref.models.families.mixtral import MixtralArchitecture
from jaxpref.models.families.qwen2 import Qwen2Architecture
from jaxpref.models.families.qwen3 import Qwen3Architecture
from jaxpref.models.families.qwen3_moe import Qwen3MoeArchitecture
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.models.rotary import LinearScaling, Llama3Scaling

Sizes = tuple[int, ...]
"""Hidden size, MLP size, layers, heads, key-value heads."""


def _sizes(sizes: Sizes) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
    return dict(zip((*names, "num_kv_heads"), sizes, strict=True))


def _llama3(
    factor: float, *sizes: int, head_dim: int = 128, tied: bool = False
) -> LlamaArchitecture:
    return LlamaArchitecture(
        vocab_size=128256,
        head_dim=head_dim,
        rope_theta=500000.0,
        rope_scaling=Llama3Scaling(
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
        **_sizes(sizes),
    )


def _smollm2(theta: float, *sizes: int) -> LlamaArchitecture:
    return LlamaArchitecture(
        vocab_size=49152,
        head_dim=64,
        rope_theta=theta,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **_sizes(sizes),
    )


def _qwen(
    make: Any,
    *sizes: int,
    head_dim: int = 128,
    vocabulary: int = 151936,
    tied: bool = False,
) -> Architecture:
    return make(
        vocab_size=vocabulary,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
        **_sizes(sizes),
    )


def _qwen2(*sizes: int, **options: Any) -> Architecture:
    return _qwen(Qwen2Architecture, *sizes, **options)


def _qwen3(*sizes: int, **options: Any) -> Architecture:
    return _qwen(Qwen3Architecture, *sizes, **options)


def _qwen3_moe(*sizes: int) -> Architecture:
    make = functools.partial(
        Qwen3MoeArchitecture,
        num_experts=128,
        experts_per_token=8,
        dense_intermediate_size=6144,
    )
    return _qwen(make, *sizes)


def _gemma3(
    *sizes: int,
    head_dim: int = 256,
    scalar: int = 256,
    window: int = 1024,
    vocabulary: int = 262208,
    context: int = 131072,
    factor: float = 8.0,
) -> Gemma3Architecture:
    layers = range(sizes[2])
    return Gemma3Architecture(
        vocab_size=vocabulary,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        sliding_window=window,
        sliding_layers=tuple((n + 1) % 6 > 0 for n in layers),
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        rope_scaling=None if factor == 1 else LinearScaling(factor=factor),
        max_position_embeddings=context,
        tie_word_embeddings=True,
        **_sizes(sizes),
    )


PRESETS: dict[str, Architecture] = {
    "llama-3-1b": _llama3(32.0, 2048, 8192, 16, 32, 8, head_dim=64, tied=True),
    "llama-3-3b": _llama3(32.0, 3072, 8192, 28, 24, 8, tied=True),
    "llama-3-8b": _llama3(8.0, 4096, 14336, 32, 32, 8),
    "llama-3-70b": _llama3(8.0, 8192, 28672, 80, 64, 8),
    "llama-3-405b": _llama3(8.0, 16384, 53248, 126, 128, 8),
    "smollm2-135m": _smollm2(100000.0, 576, 1536, 30, 9, 3),
    "smollm2-360m": _smollm2(100000.0, 960, 2560, 32, 15, 5),
    "smollm2-1.7b": _smollm2(130000.0, 2048, 8192, 24, 32, 32),
    "mistral-7b": MistralArchitecture(
        vocab_size=32768,
        head_dim=128,
        rope_theta=1000000.0,
        max_position_embeddings=32768,
        **_sizes((4096, 14336, 32, 32, 8)),
    ),
    "mixtral-8x7b": MixtralArchitecture(
        vocab_size=32000,
        head_dim=128,
        rope_theta=1000000.0,
        max_position_embeddings=32768,
        num_experts=8,
        experts_per_token=2,
        **_sizes((4096, 14336, 32, 32, 8)),
    ),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, head_dim=64, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, vocabulary=152064),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
    "qwen3-30b-a3b": _qwen3_moe(2048, 768, 48, 32, 4),
    "gemma-3-1b": _gemma3(
        1152, 6912, 26, 4, 1, window=512, vocabulary=262144, context=32768, factor=1
    ),
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4),
    "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, head_dim=128, scalar=168),
    # Llama layers with the sizes of a small model that has a large vocabulary.
    "llama-0.6b-152k": LlamaArchitecture(
        vocab_size=151936,
        head_dim=128,
        rope_theta=1000000.0,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        **_sizes((1024, 3072, 28, 16, 8)),
    ),
}
"""Presets by name; "llama-3" stands for Llama 3.1 (8B and more) and 3.2."""


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
