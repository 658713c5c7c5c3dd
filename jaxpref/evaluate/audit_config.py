"""Options of `jaxpref audit`."""

import dataclasses
from pathlib import Path
from typing import Literal

from jaxpref.data import RecordOptions
from jaxpref.errors import InputError
from jaxpref.evaluate.preferences import STRATA
from jaxpref.evaluate.surface import NAMES
from jaxpref.files import kind_of
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.runtime.ranges import at_least
from jaxpref.train.options import Dtype

THRESHOLD = 0.5
"""The default of `threshold`."""
CONFIDENT = 0.6
"""Its default with the action "recycle"."""
RANGES = {"threshold": 1.0, "assumed_flip_rate": 0.5, "power": 0.5}
"""Upper bounds, exclusive, of options that must also be above 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig(RecordOptions):
    """Options of `jaxpref audit`."""

    data: str
    """Preference file or dataset.  Every pair in it is judged.  Records without a pair
    (a completion is empty, or both are identical) are counted."""
    model: str
    """Hugging Face model folder, or a Hub ID; its features are used to judge pairs."""
    out: str
    """Folder for `audit.jsonl`, `clean.jsonl`, `review.csv`, `annotators.csv`,
    `preferences.csv`, `summary.json`, `report.html` and `annotators.html`."""
    reward_model: str | None = None
    """Reward model folder (such as OUT/export of a run with --loss bradley_terry), or a
    Hub ID; its rewards are one more judge of the pairs."""
    trusted: str | None = None
    """Preference file or dataset with verified labels.  The audit then learns from
    these labels alone."""
    annotator_field: str | None = None
    """Field of the records that names the annotator (default: annotator)."""
    source_field: str = "source"
    """Field of the records with the source of a pair, for `preferences.csv`."""
    action: Literal["drop", "relabel", "soft", "recycle"] | None = None
    """What to do with suspicious pairs in `clean.jsonl`: drop them, relabel them by
    swapping `chosen` and `rejected` (and no other field, such as ratings), keep all and
    add the probability `p_correct` to every record (soft), or keep, swap or drop each
    by --threshold (recycle).  Default: drop, and recycle with --trusted."""
    threshold: float | None = None
    """A pair is suspicious if the probability that its label is right is below this
    (default: 0.5).  With --action recycle, a label is kept if it is right with at least
    this probability, swapped if it is wrong with at least this probability, and
    dropped otherwise (default: 0.6)."""
    action_top: int | None = None
    """Apply --action to this many of the most suspicious pairs, whatever their
    probabilities, instead of using --threshold."""
    top: int = 20
    """Number of the most suspicious pairs to list in `review.csv` and `report.html`."""
    budget: int | None = None
    """List in `review.csv` this many pairs that are most worth reviewing, instead of
    the most suspicious ones, and report the expected gain."""
    apply: str | None = None
    """A `review.csv` whose column `verdict` a person has filled in with right, wrong or
    drop.  Those labels are kept, swapped or dropped in `clean.jsonl`."""
    power: float | None = None
    """Report how many pairs or votes would give a 95% interval of the flip rate of this
    width."""
    confounders: str | None = None
    """What to hold fixed in the weights of `preferences.csv`, separated by commas:
    names of features, annotator, or source."""
    assumed_flip_rate: float = 0.1
    """Flip rate to assume if the pairs do not determine it."""
    features: str | None = None
    """Folder of cached features (default: OUT/features).  Audits with one model may
    share it."""
    folds: int = 5
    """Folds of the cross-validation.  A pair is judged by a fit to the other folds."""
    seed: int = 0
    """Seed of the assignment of prompts to folds."""
    batch_size: int = 32
    """Completions the model reads at once, over all devices."""
    max_length: int | None = None
    """Maximum tokens of prompt and completion together (default: 1024, or the model's
    context if that is shorter)."""
    max_prompt_length: int | None = None
    """Maximum tokens of a prompt (default: what the completions leave of --max-length,
    at least half).  Longer prompts lose their earliest turns, or their first tokens."""
    compute_dtype: Dtype | None = None
    """Dtype of matrix products and activations (default: bfloat16 on TPU and GPU,
    float32 on CPU)."""
    mesh: MeshConfig = MeshConfig()
    """Layout of the devices."""

    def __post_init__(self):
        super().__post_init__()
        if self.features and (found := kind_of(Path(self.features))) is not None:
            raise InputError(
                f"--features {self.features}: holds {found}; choose another folder"
            )
        at_least(1, self, "batch_size")
        at_least(2, self, "max_length", "max_prompt_length")
        at_least(1, self, "top", "action_top", "budget")
        if self.folds < 2:
            raise InputError(f"--folds {self.folds}: must be at least 2")
        for name, most in RANGES.items():
            value = getattr(self, name)
            if value is not None and not 0 < value < most:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {value}: must be above 0 and below {most}")
        self._check_action()
        for name in self.held_fixed:
            if name not in (*NAMES, *STRATA):
                raise InputError(
                    f"--confounders {self.confounders}: {name!r} is none of "
                    f"{', '.join((*STRATA, *NAMES))}"
                )

    def _check_action(self) -> None:
        """Checks the options that say what happens to which pair."""
        for name in ("threshold", "action_top"):
            value = getattr(self, name)
            if self.action == "soft" and value is not None:
                raise InputError(
                    f"--{name.replace('_', '-')} {value}: --action soft keeps all "
                    "pairs, so it has no effect; leave it out"
                )
        if self.threshold is not None and self.action_top is not None:
            raise InputError(
                f"--threshold {self.threshold} and --action-top {self.action_top}: "
                "both say which pairs are suspicious; give only one of them"
            )
        if self.acts == "recycle" and self.action_top is not None:
            raise InputError(
                f"--action-top {self.action_top}: --action recycle treats every pair "
                "by its probability; use --threshold, or --action drop or relabel"
            )
        if self.acts == "recycle" and self.limit <= 0.5:
            raise InputError(
                f"--threshold {self.threshold}: must be above 0.5 with --action recycle"
            )

    @property
    def acts(self) -> str:
        """The action, or its default."""
        return self.action or ("recycle" if self.trusted else "drop")

    @property
    def limit(self) -> float:
        """The threshold, or its default."""
        default = CONFIDENT if self.acts == "recycle" else THRESHOLD
        return self.threshold or default

    @property
    def held_fixed(self) -> tuple[str, ...]:
        """The names of the confounders."""
        names = (self.confounders or "").split(",")
        return tuple(name.strip() for name in names if name.strip())
