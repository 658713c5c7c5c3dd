"""The reference model of a run."""

import dataclasses
from pathlib import Path

import jax

from jaxpref.models.hub import weights_digest
from jaxpref.models.weights import Weights
from jaxpref.scoring.score_tables import FixedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference(FixedModel):
    """The reference; without scores if its weights stay in memory."""

    weights: Weights
    """Where its parameters are, and how they are held."""

    @property
    def folder(self) -> Path:
        """Its Hugging Face folder."""
        return self.weights.folder


def model_digest(weights: Weights, dtypes: str) -> str:
    """SHA-256 of a model's config, weights, adapter or checkpoint, and dtypes.

    Empty on all processes except the first, the only one that reads and writes scores.
    """
    also = weights.quantization, weights.saved and weights.saved.digest
    dtypes = " ".join([dtypes, *filter(None, also)])
    of = weights.folder, dtypes, weights.adapter
    return weights_digest(*of) if jax.process_index() == 0 else ""
