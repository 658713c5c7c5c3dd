"""Options of `jaxpref audit`."""

import dataclasses
from pathlib import Path
from typing import Literal

from jaxpref.errors import InputError
from jaxpref.files import kind_of
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.runtime.ranges import at_least
from jaxpref.train.options import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Options of `jaxpref audit`."""

    data: str
    """Preference file or dataset.  Every pair in it is judged.  Records without a pair
    (a completion is empty, or both are identical) are counted."""
    model: str
    """Hugging Face model folder, or a Hub ID; its features are used to judge pairs."""
    out: str
    """Folder for `audit.jsonl`, `clean.jsonl`, `review.csv`, `summary.json` and
    `report.html`."""
    annotator_field: str | None = None
    """Field of the records that names the annotator (default: annotator)."""
    action: Literal["drop", "relabel", "soft"] = "drop"
    """What to do with suspicious pairs in `clean.jsonl`: drop them, relabel them by
    swapping `chosen` and `rejected` (and no other field, such as ratings), or keep all
    and add the probability `p_correct` to every record."""
    threshold: float | None = None
    """A pair is suspicious if the probability that its label is right is below this
    (default: 0.5)."""
    action_top: int | None = None
    """Apply --action to this many of the most suspicious pairs, whatever their
    probabilities, instead of using --threshold."""
    top: int = 20
    """Number of the most suspicious pairs to list in `review.csv` and `report.html`."""
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
    ignore_fields: tuple[str, ...] = ()
    """Fields of the records to ignore, even if they change what a record means."""
    compute_dtype: Dtype | None = None
    """Dtype of matrix products and activations (default: bfloat16 on TPU and GPU,
    float32 on CPU)."""
    mesh: MeshConfig = MeshConfig()
    """Layout of the devices."""

    def __post_init__(self):
        if self.features and (found := kind_of(Path(self.features))) is not None:
            raise InputError(
                f"--features {self.features}: holds {found}; choose another folder"
            )
        at_least(1, self, "batch_size")
        at_least(2, self, "max_length", "max_prompt_length")
        at_least(1, self, "top", "action_top")
        if self.folds < 2:
            raise InputError(f"--folds {self.folds}: must be at least 2")
        for name, most in {"threshold": 1.0, "assumed_flip_rate": 0.5}.items():
            value = getattr(self, name)
            if value is not None and not 0 < value < most:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {value}: must be above 0 and below {most}")
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
