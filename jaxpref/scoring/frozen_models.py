"""Frozen models that a run reads besides its own: the reference, and teachers."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

from jaxpref.errors import InputError
from jaxpref.models import Architecture, Model
from jaxpref.models.adapter_files import read_lora
from jaxpref.models.folder import check_folder
from jaxpref.models.logprobs import REFERENCE
from jaxpref.models.soft_prompt_files import soft_prompt_length
from jaxpref.models.weights import Weights
from jaxpref.scoring.reference import Reference
from jaxpref.scoring.run_weights import reference_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teachers:
    """The models from which AlignDistil composes its teacher."""

    teacher: str | None = None
    """Model trained by DPO, for align_distil: a folder (also --out of a finished run),
    an adapter, or a Hub ID."""
    reverse: str | None = None
    """Model trained by DPO on swapped answers, for align_distil; or start, the model
    before training."""

    @property
    def given(self) -> dict[str, str]:
        """What was given, by name."""
        return {name: x for name, x in vars(self).items() if x is not None}

    def check(self, objective: str, read: Collection[str]) -> None:
        """Raises InputError unless they are those that an objective reads."""
        for name in vars(self):
            if name in read and name not in self.given:
                raise InputError(
                    f"{objective}: give a model folder or a finished run with --{name}"
                )
            if name in self.given and name not in read:
                raise InputError(
                    f"--{name} {self.given[name]}: {objective} does not read it; leave "
                    "it out"
                )


def frozen_weights(
    given: str | None, start: Weights, architecture: Architecture, *, flag: str
) -> Weights:
    """`reference_weights`, of a model with the architecture of the trained one.

    Raises:
      InputError: if there is no such model, or it has another architecture.
    """
    weights = reference_weights(given, start, flag=flag)
    if weights.adapter is not None and not soft_prompt_length(weights.adapter):
        read_lora(weights.adapter, Model(architecture))
    if check_folder(weights.folder, Model) != architecture:
        raise InputError(
            f"{flag} {given}: its config.json differs from that of the trained model; "
            "it must have the same architecture"
        )
    return weights


def frozen_models(
    teachers: Teachers,
    reference: Reference | None,
    start: Weights,
    architecture: Architecture,
) -> dict[str, Weights]:
    """Where the weights of the reference and of the teachers are, by name.

    Raises:
      InputError: as `frozen_weights`.
    """
    found = {} if reference is None else {REFERENCE: reference.weights}
    return found | {
        name: frozen_weights(given, start, architecture, flag=f"--{name}")
        for name, given in teachers.given.items()
    }


def folders_by_name(
    teachers: Teachers, reference: Reference | None, models: Mapping[str, Weights]
) -> dict[str, Path]:
    """The folders of models that score the tokens of the trained one.

    Args:
      teachers: the teachers.
      reference: the reference, or None.
      models: from `frozen_models`.

    Returns:
      Folders by the names that the user gave, for messages.
    """
    found = {given: models[name].folder for name, given in teachers.given.items()}
    return found | ({reference.name: reference.folder} if reference else {})
