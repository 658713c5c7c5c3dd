"""The plain options of a run in groups; each group checks its own."""

import dataclasses
import math
from typing import Literal

from jaxpref.errors import InputError
from jaxpref.runtime.best import parse_criterion
from jaxpref.runtime.loggers import LoggerName
from jaxpref.runtime.ranges import MOST, at_least

Dtype = Literal["float32", "bfloat16", "float64"]
DEFAULT_STEPS = 1000
"""Optimizer steps of a run that gives neither `max_steps` nor `epochs`."""
LONGEST_ROW = 2**22
"""Maximum tokens of a row; a row of this length is made to find its shapes."""
MOST_PROCESSES = 256
"""Maximum number of processes that prepare batches for one process of the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a run reads, and where it writes."""

    model: str
    """Hugging Face model folder, or a Hub ID."""
    data: str | tuple[str, ...]
    """Preference data: a file, a folder of files, or a dataset on the Hub.  Several may
    be given, with or without weights: A.jsonl:0.7 B.jsonl:0.3.  See docs/data.md."""
    out: str
    """Folder to write the run to: report, metrics, checkpoints, exported model.  The
    same command resumes an interrupted run."""
    adapter: str | None = None
    """Folder of a LoRA adapter or soft prompt to start from, as peft writes it."""
    train: str = "all"
    """Which weights are trained: all (but the routers of experts; with-router for
    these too), head, last:N (layers, final norm and head) or no-embeddings.  See
    --lora.rank for adapters."""
    reference: str | None = None
    """Reference model or adapter: a folder (also --out of a run) or Hub ID; start, the
    model before training (default); base, the model without --adapter; moving-average,
    which follows the policy (TR-DPO); or none.  Scores of one that does not move are
    cached for later runs in $JAXPREF_CACHE or ~/.cache/jaxpref."""
    optimizer_from: str | None = None
    """RUN or RUN/checkpoints/STEP from which a new run takes its initial optimizer
    state, such as Adam's moments (default: zeros).  Its learning-rate schedule starts
    from step 0."""
    eval_data: str | None = None
    """Data to evaluate on, instead of held-out prompts of --data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How many steps there are, and which pairs each step sees."""

    max_steps: int | None = None
    """Optimizer steps (default: 1000, unless --epochs is given)."""
    epochs: float | None = None
    """Passes over the training pairs, instead of --max-steps; may be a fraction."""
    batch_size: int = 32
    """Pairs per optimizer step, over all devices and micro-batches."""
    accumulation: int = 1
    """Micro-batches per optimizer step.  More micro-batches use less memory."""
    row_length: int | Literal["auto", "none"] = "auto"
    """Tokens per packed row, auto to choose it from the data and the devices, or none
    for one padded pair per row.  A packed row holds several pairs, each prompt once,
    with little padding.  Steps see the same pairs either way.  A row must hold the
    longest prompt with both of its answers."""
    seed: int = 0
    """Seed of the order of the training pairs, of new weights, and of rounding."""
    loader_processes: int = 0
    """Processes that prepare batches; 0 uses threads of the main process."""

    def __post_init__(self):
        at_least(1, self, "batch_size", "accumulation", "max_steps")
        at_least(0, self, "loader_processes")
        if self.loader_processes > MOST_PROCESSES:
            raise InputError(
                f"loader_processes {self.loader_processes}: must be at most "
                f"{MOST_PROCESSES}"
            )
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise InputError(f"epochs {self.epochs}: must be above 0 and finite")
        if self.epochs is not None and self.max_steps is not None:
            raise InputError(
                f"--epochs {self.epochs} and --max-steps {self.max_steps}: both set "
                "the length of the run; give only one of them"
            )
        if isinstance(self.row_length, int):
            if not 1 <= self.row_length <= LONGEST_ROW:
                raise InputError(
                    f"row_length {self.row_length}: must be from 1 to {LONGEST_ROW}"
                )
        elif self.row_length not in ("auto", "none"):
            raise InputError(
                f"row_length {self.row_length}: expected auto, none or a number"
            )
        if self.batch_size % self.accumulation:
            raise InputError(
                f"batch_size {self.batch_size} is not a multiple of accumulation "
                f"{self.accumulation}"
            )


def steps_of(options: StepOptions, num_pairs: int) -> int:
    """Optimizer steps of a run with `num_pairs` training pairs, rounded up."""
    if options.epochs is None:
        return DEFAULT_STEPS if options.max_steps is None else options.max_steps
    steps = options.epochs * num_pairs / options.batch_size
    if steps > MOST:
        raise InputError(f"epochs {options.epochs}: {steps:.1e} steps; limit {MOST}")
    # 0.3 epochs of 100 pairs are 3 steps of 10 pairs, however 0.3 is rounded.
    return max(1, math.ceil(steps * (1 - 1e-9)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """How a step is computed, and in which precision."""

    param_dtype: Dtype = "float32"
    """Dtype of the parameters and the optimizer's moments.  Updates are computed in
    float32; what is stored in bfloat16 is rounded stochastically."""
    compute_dtype: Dtype | None = None
    """Dtype of matrix products and activations (default: bfloat16 on TPU and GPU,
    float32 on CPU)."""
    remat: Literal["none", "dots", "full", "auto"] = "none"
    """What the backward pass recomputes to save memory.  auto takes the first of none,
    dots and full whose compiled step fits the device."""
    unroll: int = 1
    """Layers to unroll in the scan over layers; at most all of them."""
    logit_chunk: int | None = None
    """Completion tokens per sequence whose logits are in memory at once (default: as
    many as fill a quarter of a GiB per device, or the memory of the output layer's
    gradient if that is more)."""

    router_balance: float = 0.0
    """Coefficient of the routers' load-balancing loss, added to the loss; for mixtures
    of experts only.  Above 0, accumulation takes another forward pass."""

    def __post_init__(self):
        at_least(1, self, "unroll", "logit_chunk")
        at_least(0, self, "router_balance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Evaluation, checkpoints, and export."""

    eval_every: int = 100
    """Steps between evaluations on held-out pairs.  The first and the last step are
    always evaluated."""
    save_every: int = 100
    """Steps between checkpoints.  The last step is always saved."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep."""
    keep_best: str | None = None
    """Also keep the best checkpoint by an evaluation metric, for example
    max:eval_rewards/accuracies or min:eval_loss.  A checkpoint is saved whenever an
    evaluation is better than all earlier ones."""
    patience: int | None = None
    """Stop after this many evaluations in a row that are not better than the best one
    (see --keep-best)."""
    export: Literal["last", "best"] = "last"
    """Export the weights of the last step, or of the best one (see --keep-best)."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the exported weights."""

    def __post_init__(self):
        at_least(1, self, "eval_every", "save_every", "keep_checkpoints", "patience")
        if self.keep_best is not None:
            parse_criterion(self.keep_best)
        elif self.export == "best":
            raise InputError("--export best: choose a metric with --keep-best")
        elif self.patience is not None:
            raise InputError("--patience: choose a metric with --keep-best")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardOptions:
    """When a diverging run is stopped."""

    max_bad_steps: int = 10
    """Bad steps in a row after which the run stops.  A step is bad if its loss or
    gradient is not finite, or its loss rose by more than --max-loss-rise.  The run
    writes the pairs of those steps to OUT/stopped, leaves its checkpoints as they are,
    and exits with code 65."""
    max_loss_rise: float = dataclasses.field(default=10.0, metadata={"infinite": True})
    """How far the loss may rise above the median of the first ten steps, as a multiple
    of that median (or of 1 if the median is smaller).  inf allows any rise."""

    def __post_init__(self):
        at_least(1, self, "max_bad_steps")
        if not self.max_loss_rise > 0:
            raise InputError(f"max_loss_rise {self.max_loss_rise}: must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What is written and printed during training."""

    log_every: int = 10
    """Steps between lines of metrics."""
    logger: tuple[LoggerName, ...] = ("tensorboard",)
    """Where metrics go besides OUT/metrics.jsonl; may be given several times."""
    eval_samples: int = 0
    """Held-out prompts that are answered greedily at each evaluation; the answers are
    written to OUT/samples.jsonl and shown in the report."""
    eval_sample_tokens: int = 64
    """Maximum tokens of such an answer."""
    profile: int = 0
    """Steps to profile, after two warm-up steps; written to OUT/profile."""
    explain_compiles: bool = False
    """Print a line for every compiled program: name, seconds, shapes, and whether it
    came from the cache on disk."""

    def __post_init__(self):
        at_least(1, self, "log_every", "eval_sample_tokens")
        at_least(0, self, "profile", "eval_samples")


PARTS = (
    SourceOptions,
    StepOptions,
    ComputeOptions,
    CheckpointOptions,
    GuardOptions,
    LogOptions,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(*reversed(PARTS)):
    """The plain options of a run.

    It inherits from all groups, so it can be passed to a function that needs one.
    """

    def __post_init__(self):
        for part in PARTS[1:]:
            part.__post_init__(self)
