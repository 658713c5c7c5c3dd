"""Options of `jaxpref plan`."""

import dataclasses
from typing import Literal

from jaxpref.errors import InputError
from jaxpref.models.lora import LoraOptions
from jaxpref.models.reward_head import HeadOptions
from jaxpref.models.soft_prompt import SoftPromptOptions
from jaxpref.objectives import Objective
from jaxpref.runtime.ranges import at_least
from jaxpref.train import MeshConfig, OptimizerConfig
from jaxpref.train.options import LONGEST_ROW

MOST = {"batch": 2**20, "seq": LONGEST_ROW, "row_length": LONGEST_ROW}
"""The largest sizes; a plan makes a row of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The run to plan, and the machine it would get."""

    model: str
    """Preset, such as llama-3-8b, qwen3-8b or gemma-3-27b (docs/models.md lists them),
    Hugging Face model folder, or Hub ID."""
    topology: str
    """TPU slice, for example v5p:4x4x8, v5e:16x16, v6e:4x4, v4:4x4x4, or tpu7x:4x4x4,
    or gcloud's name of one, like v5litepod-16 or v5p-128; 2xv5e:16x16 for
    two slices; cpu:8 for eight virtual devices."""
    batch: int
    """Pairs per step, over all devices and micro-batches."""
    seq: int
    """Tokens of the longest prompt and answer together: the length of padded rows."""
    answer_length: int | None = None
    """Tokens of the longest answer (default: half of --seq)."""
    answers: int | None = None
    """Answers of each list, for losses of lists such as lipo_lambda; all lists are
    assumed to be as long as the longest.  For objectives of sampled answers, those to
    each prompt: --group-size of a run."""
    sample_batch_size: int = 64
    """Answers that are sampled at once, for objectives of sampled answers."""
    row_length: int | None = None
    """Tokens per packed row (default: one pair per row, padded).  All pairs are assumed
    to be as long as the longest."""
    accumulation: int = 1
    """Micro-batches per step."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass recomputes to save memory."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters and of the optimizer's moments."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of matrix products and activations."""
    logit_chunk: int | None = None
    """Completion tokens per sequence whose logits are in memory at once (default:
    chosen automatically)."""
    unroll: int = 1
    """Layers to unroll in the scan over layers."""
    router_balance: float = 0.0
    """Coefficient of the routers' load-balancing loss, as for `jaxpref train`."""
    mesh: MeshConfig = MeshConfig()
    """The mesh of devices."""
    lora: LoraOptions = LoraOptions()
    """The adapters, if not all weights are trained."""
    head: HeadOptions = HeadOptions()
    """The head of a reward model."""
    soft_prompt: SoftPromptOptions = SoftPromptOptions()
    """The soft prompt, if it is trained instead of the weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer; its state takes memory."""
    pairs: int | None = None
    """Pairs in the dataset, to estimate the hours of one pass over it."""
    step_only: bool = False
    """Compile only the training step, not the reference pass and the sampler: faster,
    and with less memory of this machine."""
    sweep: bool = False
    """Try other meshes and remat policies too, and recommend one."""
    json: str | None = None
    """File to write the plan to, as JSON."""

    def __post_init__(self):
        at_least(1, self, "batch", "seq", "accumulation", "unroll")
        at_least(0, self, "router_balance")
        at_least(1, self, "answer_length", "row_length", "logit_chunk", "pairs")
        at_least(1, self, "sample_batch_size")
        at_least(1, self, "answers")
        if (text := self.soft_prompt.text) is not None:
            raise InputError(
                f"--soft-prompt.text {text!r}: a plan reads no text; pass "
                "--soft-prompt.length"
            )
        for name, most in MOST.items():
            if (value := getattr(self, name)) is not None and value > most:
                raise InputError(f"{name} {value}: must be at most {most}")
        if not 1 <= self.answer < self.seq:
            raise InputError(
                f"answer_length {self.answer}: a prompt with an answer has seq "
                f"{self.seq} tokens, give from 1 to {self.seq - 1}"
            )

    def completions_of(self, objective: Objective) -> int:
        """Completions of a prompt in the batches of an objective.

        Raises:
          InputError: if it reads lists or samples answers and `answers` is missing, or
            the reverse.
        """
        if objective.token_numbers:
            return self._sampled_completions(objective)
        of_lists = objective.num_completions is None
        if of_lists and self.answers is None:
            raise InputError(
                f"--loss {objective.name}: its lists have as many answers as the data, "
                "which plan does not read; give --answers"
            )
        if not of_lists and self.answers is not None:
            raise InputError(
                f"--answers {self.answers}: {objective.name} does not read lists; leave"
                " it out"
            )
        if self.sample_batch_size != PlanConfig.sample_batch_size:
            raise InputError(
                f"--sample-batch-size {self.sample_batch_size}: {objective.name} "
                "samples no answers; leave it out"
            )
        if of_lists and self.answers == 1:
            raise InputError("--answers 1: a list has at least 2 answers")
        return objective.num_completions or self.answers or 0

    def _sampled_completions(self, objective: Objective) -> int:
        """The sampled answers to a prompt, after those of its pair if it has one."""
        if self.answers is None:
            raise InputError(
                f"--objective {objective.name}: give --answers, the answers that are "
                "sampled to each prompt (--group-size of jaxpref train)"
            )
        if self.answers == 1 and objective.compares_samples:
            raise InputError(
                f"--answers 1: {objective.name} compares the answers to a prompt; give "
                "at least 2"
            )
        return (objective.num_completions or 0) + self.answers

    @property
    def answer(self) -> int:
        """Tokens of the longest answer."""
        return self.seq // 2 if self.answer_length is None else self.answer_length
