"""What a run is asked to do, as one frozen dataclass, and how OUT remembers it."""

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils

from jaxpref.data import DataOptions, MixOptions
from jaxpref.errors import InputError
from jaxpref.files import open_out, write_json
from jaxpref.objectives.objective import Objective
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.train.best import check_asked
from jaxpref.train.optimizer import OptimizerConfig

Dtype = Literal["float32", "bfloat16", "float64"]

MAY_CHANGE = (
    "out",
    "mesh",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "keep_best",
    "export",
    "max_bad_steps",
    "max_loss_rise",
    "explain_compiles",
    "loader_processes",
    "profile",
)
"""Fields a resumed run may change: none of them changes what is computed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The plain settings of a run."""

    model: str
    """Hugging Face model folder, or a hub id to download."""
    data: str
    """Preference file or data set; see `jaxpref.data.open_source`."""
    out: str
    """Folder of the run: config, metrics, checkpoints, export."""
    reference: str | None = None
    """Reference model folder or hub id; the model itself where not given.  Its scores
    are kept for later runs in $JAXPREF_CACHE, else in ~/.cache/jaxpref."""
    eval_data: str | None = None
    """Data to evaluate on, in place of held-out prompts of `--data`."""
    max_steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Pairs an optimiser step, over all devices and micro-batches."""
    accumulation: int = 1
    """Micro-batches an optimiser step; more of them need less memory."""
    row_length: int | None = None
    """Tokens of a packed row: several pairs in each, prompts once, so that hardly
    anything is computed for padding; batch_size is then a mean.  At least the tokens of
    the longest prompt with both answers.  None: one pair a row, padded."""
    seed: int = 0
    """Seed of the order of examples."""
    param_dtype: Dtype = "float32"
    """Dtype the parameters and optimiser moments are kept in."""
    compute_dtype: Dtype | None = None
    """Dtype of matrix products and activations; where not given, bfloat16 on TPU and
    GPU and float32 on CPU."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the exported weights."""
    remat: Literal["none", "dots", "full", "auto"] = "none"
    """What the backward pass recomputes to save memory: none, dots, full, or the first
    of them (auto) whose compiled step fits the device."""
    unroll: int = 1
    """Layers of the scan over them that are written out; at most all."""
    logit_chunk: int | None = None
    """Completion tokens of a sequence whose logits exist at the same time; by default
    as many as fill a quarter of a GiB of each device, or what the head's slope takes,
    if that is more."""
    loader_processes: int = 0
    """Processes that make batches beside this one; 0: threads of this one do."""
    log_every: int = 10
    """Steps between metric lines."""
    eval_every: int = 100
    """Steps between evaluations on the held-out pairs; also at first and last step."""
    save_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    keep_best: str | None = None
    """Keep the best checkpoint beside the newest ones: "max:" or "min:" and a metric of
    the evaluations, as max:eval_rewards/accuracies.  An evaluation that is better than
    all before it saves a checkpoint of its step."""
    export: Literal["last", "best"] = "last"
    """Whether the last step's weights are exported or the best one's (keep_best)."""
    max_bad_steps: int = 10
    """Steps in a row that may go wrong before the run stops (code 65), writes their
    pairs to OUT/stopped and leaves its checkpoints as they are: the loss or gradient is
    not finite, or the loss has risen by more than max_loss_rise.  1: the first one."""
    max_loss_rise: float = 10.0
    """How far the loss may rise above the median of the first ten steps, in multiples
    of its size there (at least 1); inf: as far as it will."""
    profile: int = 0
    """Steps to trace into OUT/profile, after two that compile and warm up."""
    explain_compiles: bool = False
    """Print a line for every program compiled: name, seconds, shapes, and whether it
    came from the cache on disk."""

    def __post_init__(self):
        positive = (
            "batch_size accumulation log_every eval_every save_every "
            "keep_checkpoints max_bad_steps max_steps unroll"
        ).split()
        for name in positive:
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.logit_chunk is not None and self.logit_chunk < 1:
            raise InputError(f"logit_chunk {self.logit_chunk}: must be at least 1")
        for name in ("loader_processes", "profile"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} {getattr(self, name)}: must be at least 0")
        if not self.max_loss_rise > 0:
            raise InputError(f"max_loss_rise {self.max_loss_rise}: must be above 0")
        if self.keep_best is not None:
            check_asked(self.keep_best)
        elif self.export == "best":
            raise InputError("--export best: say by what, with --keep-best")
        if self.batch_size % self.accumulation:
            raise InputError(
                f"batch_size {self.batch_size} is not a multiple of accumulation "
                f"{self.accumulation}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """One training run.  The same config with the same `out` resumes."""

    objective: Objective
    """What is made small, e.g. `from_loss(losses.rdpo, flip_rate=0.2)`."""
    options: DataOptions = DataOptions()
    """How text becomes tokens, and which pairs are held out or flipped."""
    mix: MixOptions | None = None
    """Pairs with an empty trace beside those with traces, for `bvpo` and only there."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimiser and its schedule."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are used."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the training pairs come from, by the column `source`."""
        empty = self.mix and self.mix.empty_data
        return (self.data, empty) if empty else (self.data,)

    @property
    def heldout_sources(self) -> tuple[str, ...]:
        """Where the pairs that are evaluated on come from, likewise."""
        return (self.eval_data,) if self.eval_data else self.sources

    def __post_init__(self):
        super().__post_init__()
        if "float64" in (self.param_dtype, self.compute_dtype):
            if not jax.config.jax_enable_x64:
                raise InputError("float64 needs JAX_ENABLE_X64=1 in the environment")
        read, named = self.objective.labels, self.options.labels.named
        flag = lambda name: f"--labels.{name.replace('_', '-')}"
        if missing := sorted(read - named.keys()):
            raise InputError(
                f"loss {self.objective.name}: reads {', '.join(missing)} of the "
                "records; name the fields: "
                + " ".join(f"{flag(name)} FIELD" for name in missing)
            )
        for name in sorted(named.keys() - read):
            raise InputError(
                f"{flag(name)} {named[name]}: {self.objective.name} reads none"
            )
        if self.row_length is not None and self.objective.mixes:
            raise InputError(
                f"--row-length {self.row_length}: {self.objective.name} is trained "
                "with one pair a row; leave it out"
            )
        if self.objective.mixes != (self.mix is not None):
            raise InputError(
                f"{self.objective.name}: mixes pairs with traces and with empty ones; "
                "give mix=MixOptions()"
                if self.objective.mixes
                else f"mix {self.mix}: {self.objective.name} mixes nothing; wrap it "
                "with bvpo"
            )
        if self.reference is not None and not self.objective.needs_reference:
            raise InputError(
                f"--reference {self.reference}: {self.objective.name} reads none"
            )


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON values, the objective as its name and options."""
    plain = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name != "objective"
    }
    objective = {"name": config.objective.name, **config.objective.options}
    return json.loads(json.dumps(plain | {"loss": objective}, default=_plain))


def open_run(config: TrainConfig) -> Path:
    """Makes OUT, or finds the same run in it.

    Raises:
      InputError: if OUT cannot be written, or holds a run of another config; the
        message names the fields that differ.
    """
    if "://" in config.out:
        raise InputError(
            f"--out {config.out}: only folders are written to; mount the bucket, for "
            "example with gcsfuse"
        )
    out = Path(config.out)
    open_out(out, "config.json", to_json(config), what="a run", may_change=MAY_CHANGE)
    return out


def remember(config: TrainConfig, out: Path) -> None:
    """Writes `config.json`: from here on OUT belongs to this config.

    Called once everything else was found to be usable, so that a first attempt with a
    wrong option does not bind OUT to it.
    """
    # Not before every process has compared: they may share the folder.
    multihost_utils.sync_global_devices("config.json was read")
    if jax.process_index() == 0:
        write_json(out / "config.json", to_json(config))


def _plain(value):
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} cannot be written to config.json")
