"""The config of a run: a frozen dataclass, written to OUT/config.json."""

import contextlib
import dataclasses
import enum
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxpref.data import DataOptions, MixOptions
from jaxpref.data.columns import FLAG, SAMPLED, WEIGHT, missing_columns
from jaxpref.data.mixing import read_mixture
from jaxpref.errors import InputError, closest
from jaxpref.files import RUN, RUN_FILES
from jaxpref.models.lora import LoraOptions
from jaxpref.models.reward_head import HeadOptions
from jaxpref.models.soft_prompt import SoftPromptOptions
from jaxpref.objectives.objective import Objective
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.runtime.provenance import flat
from jaxpref.runtime.run_folder import check_config, open_out
from jaxpref.scoring.frozen_models import Teachers
from jaxpref.scoring.moving_reference import NAME as MOVING
from jaxpref.scoring.moving_reference import MovingAverage
from jaxpref.scoring.scores import reads_reference, stored_scores
from jaxpref.train.optimizer import OptimizerConfig
from jaxpref.train.options import RunOptions

MAY_CHANGE = (
    "out",
    "mesh",
    "log_every",
    "logger",
    "eval_samples",
    "eval_sample_tokens",
    "save_every",
    "keep_checkpoints",
    "keep_best",
    "patience",
    "export",
    "max_bad_steps",
    "max_loss_rise",
    "explain_compiles",
    "loader_processes",
    "profile",
)
"""Fields that may differ when a run is resumed; none affects what is computed."""
CHECKED_BY_CONTENT = (
    "model",
    "data",
    "adapter",
    "reference",
    "optimizer_from",
    "teachers",
    "eval_data",
    "mix.empty_data",
    "options.inject.rates",
    "options.inject.annotators",
)
"""Fields that name files: checkpoints carry digests of their contents."""
LENGTH = "max_steps", "epochs"
"""Fields that may differ if the steps already made would be the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunOptions):
    """One training run.  The same config with the same `out` resumes."""

    objective: Objective
    """What is minimized, for example `from_loss(losses.rdpo, flip_rate=0.2)`."""
    options: DataOptions = DataOptions()
    """How records become tokens, and which pairs are held out."""
    head: HeadOptions = HeadOptions()
    """The head of a reward model."""
    lora: LoraOptions = LoraOptions()
    """The adapters to train instead of the weights."""
    soft_prompt: SoftPromptOptions = SoftPromptOptions()
    """The soft prompt to train instead of the weights."""
    moving_average: MovingAverage = MovingAverage()
    """How a reference moves; for `--reference moving-average` only."""
    teachers: Teachers = Teachers()
    """The models that `align_distil` reads."""
    mix: MixOptions | None = None
    """How pairs with an empty trace are mixed in; for `bvpo` only."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer and its schedule."""
    mesh: MeshConfig = MeshConfig()
    """The device mesh."""

    def __post_init__(self):
        super().__post_init__()
        self._check_dtypes()
        new_adapters = self.lora.rank is not None or self.soft_prompt.given
        if self.optimizer_from and new_adapters and self.adapter is None:
            raise InputError(
                f"--optimizer-from {self.optimizer_from}: new adapters have no earlier "
                "optimizer state; leave it out, or continue an --adapter"
            )
        self._check_columns()
        self._check_objective()

    def _check_dtypes(self):
        if "float64" in (self.param_dtype, self.compute_dtype):
            # jax declares its options at run time.
            wide = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
            if not wide:
                raise InputError("float64 needs JAX_ENABLE_X64=1 in the environment")

    def _check_columns(self):
        read, named = self.objective.numbers, self.options.named_columns
        if missing := missing_columns(named, read):
            raise InputError(
                f"loss {self.objective.name}: reads {', '.join(missing)} from the "
                f"records; name the fields: {FLAG} "
                + " ".join(f"{name}=FIELD" for name in missing)
            )
        for name in sorted(named.keys() - read - {WEIGHT}):
            raise InputError(
                f"{FLAG} {name}={named[name]}: {self.objective.name} does not read it"
                f" from the records{closest(name, {*read, WEIGHT})}"
            )

    def _check_objective(self):
        if self.eval_samples and self.objective.trains_reward_model:
            raise InputError(
                f"--eval-samples {self.eval_samples}: {self.objective.name} trains a "
                "reward model, which writes no text; leave it out"
            )
        self.teachers.check(self.objective.name, self.objective.models)
        if self.objective.mixes_empty_traces != (self.mix is not None):
            raise InputError(
                f"{self.objective.name}: mixes pairs with traces and pairs with empty "
                "ones; set mix=MixOptions()"
                if self.objective.mixes_empty_traces
                else f"mix {self.mix}: {self.objective.name} does not mix pairs; wrap "
                "it with bvpo"
            )
        name, scores = self.objective.name, self.objective.scores
        moving = self.reference == MOVING
        if self.moving_average != MovingAverage() and not moving:
            raise InputError(
                f"{self.moving_average}: has no effect without --reference {MOVING}; "
                "give both, or neither"
            )
        if self.reference is not None and not reads_reference(scores):
            raise InputError(
                f"--reference {self.reference}: {name} does not use a reference"
            )
        reasons = {
            "trains two models": self.objective.num_models > 1,
            "scores its samples under a fixed reference": self.objective.token_numbers,
            "reads more of a reference than its log-probs": not stored_scores(scores),
        }
        why = next((text for text, applies in reasons.items() if applies), None)
        if why and (moving or self.reference == "none"):
            or_beta = (
                ", or give --objective.beta 0"
                if SAMPLED in self.objective.reads
                else ""
            )
            raise InputError(
                f"--reference {self.reference}: {name} {why}; leave it out{or_beta}"
            )


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON values, with the objective as its name and options."""
    own = [f.name for f in dataclasses.fields(config)]
    plain = {n: getattr(config, n) for n in own if n not in ("objective", "teachers")}
    # Only where they are read, so that runs begun without such options can resume.
    plain |= {"teachers": given} if (given := config.teachers.given) else {}
    objective = {"name": config.objective.name, **config.objective.options}
    return json.loads(json.dumps(plain | {"loss": objective}, default=_plain))


@contextlib.contextmanager
def open_run(config: TrainConfig, described: dict[str, Any]) -> Iterator[Path]:
    """Creates OUT, or checks that it holds the same run, and locks it.

    Args:
      config: the config.
      described: the same, from `to_json`.

    Raises:
      InputError: as `open_out` and `check_config`.
    """
    reads = {
        "--model": config.model,
        "--data": read_mixture(config.data).names,
        "--adapter": config.adapter,
        "--reference": config.reference,
        "--optimizer-from": config.optimizer_from,
        **{f"--{name}": model for name, model in config.teachers.given.items()},
        "--eval-data": config.eval_data,
        "--inject.rates": config.options.inject.rates,
        "--inject.annotators": config.options.inject.annotators,
        "--empty-data": config.mix and config.mix.empty_data,
    }
    name, may_change = "config.json", (*MAY_CHANGE, *CHECKED_BY_CONTENT, *LENGTH)
    opened = open_out(config.out, name, what=RUN, writes=RUN_FILES, reads=reads)
    with opened as out:
        check_config(out, name, described, what=RUN, may_change=may_change)
        yield out


def options_that_matter(described: dict[str, Any]) -> dict[str, Any]:
    """The options that decide what a run computes, by dotted name.

    Leaves out the run's length, and paths, whose contents are compared instead.

    Args:
      described: the config, from `to_json`.
    """
    return flat(described, but=(*MAY_CHANGE, *CHECKED_BY_CONTENT, *LENGTH))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if (tolist := getattr(value, "tolist", None)) is not None:
        return tolist()
    raise TypeError(f"{value!r} cannot be written to config.json")
