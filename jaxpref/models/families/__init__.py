"""Model families: one file each, and one line in `FAMILIES`."""

from jaxpref.models.families import (
    gemma,
    gemma2,
    gemma3,
    gemma3_vision,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
)
from jaxpref.models.families.family import Family as Family
from jaxpref.models.families.family import TensorName as TensorName

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    gemma3_vision.FAMILY,
    smollm3.FAMILY,
    olmo2.FAMILY,
    phi3.FAMILY,
    granite.FAMILY,
    gpt_neox.FAMILY,
    gpt2.FAMILY,
    opt.FAMILY,
    stablelm.FAMILY,
    mixtral.FAMILY,
    qwen3_moe.FAMILY,
    olmoe.FAMILY,
)
"""All families whose folders are read and written."""
