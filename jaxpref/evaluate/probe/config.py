"""Options of `jaxpref probe`."""

import dataclasses
from pathlib import Path
from typing import Literal

from jaxpref.data import RecordOptions
from jaxpref.errors import InputError
from jaxpref.files import kind_of
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.runtime.ranges import at_least
from jaxpref.train.options import Dtype

ANNOTATOR, PROMPT = "annotator", "prompt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig(RecordOptions):
    """Options of `jaxpref probe`."""

    data: str
    """Preference file or dataset."""
    model: str
    """Hugging Face model folder, or a Hub ID; a language model or a reward model.  Its
    final hidden states are the features."""
    out: str
    """Folder for `probe.json`, `votes.jsonl`, `annotators.jsonl`, `heads.safetensors`;
    and for a reward model, in `model/`, if there is one head and no --columns."""
    heads: int = 1
    """Number of linear heads.  One is a Bradley-Terry model; several are compared with
    it."""
    mixed_by: Literal["annotator", "prompt"] = "annotator"
    """What the weights of several heads depend on: the annotator (PAL), or the prompt
    (MiCRo)."""
    new_votes: tuple[int, ...] = ()
    """Also report the accuracy on new annotators after this many of their votes:
    --new-votes 5 20."""
    columns: tuple[str, ...] = ()
    """Features of the domain: each NAME is read from the fields chosen_NAME and
    rejected_NAME of the records, which hold numbers; separated by commas or spaces."""
    by: tuple[str, ...] = ()
    """Fields whose values group the records, as in jaxpref evaluate."""
    folds: int = 5
    """Folds of the cross-validation.  A vote is predicted by a fit to the other folds,
    which share no prompt with it."""
    seed: int = 0
    """Seed of the folds, and of the starts of several heads."""
    features: str | None = None
    """Folder of cached features (default: OUT/features)."""
    batch_size: int = 32
    """Completions that the model reads at once, over all devices."""
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
        for name in ("by", "columns"):
            words = (x.strip() for word in getattr(self, name) for x in word.split(","))
            object.__setattr__(self, name, tuple(dict.fromkeys(filter(None, words))))
        at_least(1, self, "heads", "batch_size")
        at_least(0, self, "seed")
        at_least(2, self, "folds", "max_length", "max_prompt_length")
        if any(n < 1 for n in self.new_votes):
            raise InputError(f"--new-votes {min(self.new_votes)}: must be at least 1")
        if self.new_votes and (self.heads == 1 or self.mixed_by == PROMPT):
            raise InputError(
                "--new-votes: votes of a new annotator say which heads count, so it "
                "needs --heads 2 or more, mixed by annotator"
            )
        if self.mixed_by == PROMPT and self.heads == 1:
            raise InputError("--mixed-by prompt: needs --heads 2 or more")
        if self.features and (found := kind_of(Path(self.features))) is not None:
            raise InputError(
                f"--features {self.features}: holds {found}; choose another folder"
            )
