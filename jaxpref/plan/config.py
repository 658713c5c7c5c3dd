"""What is asked of a plan."""

import dataclasses
from typing import Literal

from jaxpref.errors import InputError
from jaxpref.train import MeshConfig, OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A run that is thought of, and the machine that it may get."""

    model: str
    """Preset (llama-3-1b, llama-3-8b, llama-3-70b, smollm2-135m, smollm2-360m,
    smollm2-1.7b, llama-0.6b-152k), Hugging Face model folder, or a hub id."""
    topology: str
    """Slice of TPU chips, as v5p:4x4x8, v5e:16x16, v6e:4x4, v4:4x4x4 or tpu7x:4x4x4; or
    cpu:8 for eight virtual devices."""
    batch: int
    """Pairs of a step, over all devices and micro-batches."""
    seq: int
    """Tokens of the longest prompt with an answer: what the padded rows are long."""
    answer_length: int | None = None
    """Tokens of the longest answer; half of seq where not given."""
    row_length: int | None = None
    """Tokens of a packed row; pairs are all taken to be as long as the longest."""
    accumulation: int = 1
    """Micro-batches of a step."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass recomputes to save memory."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters and of the optimiser's moments."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of products and activations."""
    logit_chunk: int | None = None
    """Completion tokens of a sequence whose logits exist at the same time."""
    unroll: int = 1
    """Layers of the scan over them that are written out."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are used."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """What is remembered of gradients for each weight."""
    pairs: int | None = None
    """Pairs of the data set, for the hours that one pass over it takes."""
    sweep: bool = False
    """Try other meshes and remat policies too, and recommend one."""
    json: str | None = None
    """Write what was found to this file."""

    def __post_init__(self):
        for name in ("batch", "seq", "accumulation", "unroll"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: must be at least 1")
        for name in ("answer_length", "row_length", "logit_chunk", "pairs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value}: must be at least 1")
        if not 1 <= self.answer < self.seq:
            raise InputError(
                f"answer_length {self.answer}: a prompt with an answer has seq "
                f"{self.seq} tokens, give from 1 to {self.seq - 1}"
            )

    @property
    def answer(self) -> int:
        """Tokens of the longest answer."""
        return self.seq // 2 if self.answer_length is None else self.answer_length
