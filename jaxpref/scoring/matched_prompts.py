"""Underlying distribution matching: weights that match prompts between two classes.

Undesirable answers are weighted by p(x | desirable) / p(x | undesirable) of their
prompt x, so that both classes have the same distribution of prompts.  The weights of a
run are computed once, from the model before training, and kept in OUT/reference.

Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", 2024,
arXiv:2404.04656.
"""

import dataclasses
import functools
import hashlib
import io
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxpref.data import Datasets, PreferenceDataset
from jaxpref.data.columns import WEIGHT
from jaxpref.errors import InputError
from jaxpref.files import write_whole
from jaxpref.losses import udm_weights
from jaxpref.models import Model, Numerics
from jaxpref.models.folder import read_architecture
from jaxpref.models.hub import weights_digest
from jaxpref.models.weights import Weights, load_weights
from jaxpref.runtime.processes import (
    broadcast_from_process_zero,
    log,
    only_first_process,
)
from jaxpref.scoring.density_ratio import FOLDS, fit_density_ratio
from jaxpref.scoring.prompt_features import make_prompt_step, prompt_features

FITTED = 8192
"""Most prompts that the classifier is fitted to, at random."""
FILE = "prompt_weights.npz"
"""Name of the file in OUT/reference."""


class Trained(Protocol):
    """What a run trains, and where."""

    @property
    def datasets(self) -> Datasets:
        """The records."""
        ...

    @property
    def start(self) -> Weights:
        """The model before training."""
        ...

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices."""
        ...


def match_prompts(
    task: Trained, out: Path, batch_size: int, *, compute_dtype: str
) -> Datasets:
    """The records of a run, with weights of undesirable answers in training.

    They multiply any weights that the records have.

    Args:
      task: its records are single answers with the column `desirable`.
      out: the run's folder.
      batch_size: prompts whose features are computed together.
      compute_dtype: dtype of the model's matrix products.

    Raises:
      InputError: if a class has too few prompts, or the file cannot be written.
    """
    train, start = task.datasets.splits.train, task.start
    path, about = out / "reference" / FILE, ""
    if first := jax.process_index() == 0:
        of_model = weights_digest(start.folder, compute_dtype, start.adapter)
        about = hashlib.sha256(f"{of_model} {train.digest()}".encode()).hexdigest()
    blank = np.full(len(train), np.nan, np.float32)
    found = broadcast_from_process_zero(_stored(path, about, blank) if first else blank)
    if np.isnan(found).any():
        numerics = Numerics(compute_dtype=compute_dtype)
        model = Model(read_architecture(start.folder), numerics)
        sizes: dict[str, Any] = {"mesh": task.mesh, "batch_size": batch_size}
        found = prompt_weights(train, model, start, **sizes)
        found = broadcast_from_process_zero(found)
        only_first_process(_store, path, about, found)
    columns = train.columns | {WEIGHT: train.weights * found}
    splits = dataclasses.replace(
        task.datasets.splits, train=dataclasses.replace(train, columns=columns)
    )
    return dataclasses.replace(task.datasets, splits=splits)


def prompt_weights(
    dataset: PreferenceDataset,
    model: Model,
    start: Weights,
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int,
) -> Float[np.ndarray, " N"]:
    """The weight of each answer: `udm_weights` if it is undesirable, otherwise 1."""
    desirable = dataset.columns["desirable"] > 0.5
    # Prompts are numbered by their hashes: in random order.
    _, first, which = np.unique(
        dataset.columns["prompt"], return_index=True, return_inverse=True
    )
    counts = np.stack(
        [np.bincount(which, own, len(first)) for own in (~desirable, desirable)], 1
    )
    several = (counts[:FITTED] > 0).sum(0)
    for name, number in zip(("undesirable", "desirable"), several.tolist()):
        if number < FOLDS:
            raise InputError(
                f"--loss.udm: {number} prompts have {name} answers, too few to "
                f"estimate their distribution; at least {FOLDS} are needed, or leave "
                "--loss.udm out"
            )
    step, params = make_prompt_step(model), load_weights(start, model)
    features = functools.partial(
        prompt_features,
        dataset,
        step=step,
        params=params,
        mesh=mesh,
        batch_size=batch_size,
    )
    fitted, others = np.split(np.arange(len(first)), [FITTED])
    table = np.zeros((len(fitted), 0), np.float32)
    for places, values in features(first[fitted]):
        if not table.shape[1]:
            table = np.zeros((len(fitted), values.shape[1]), np.float32)
        table[places] = values
    ratio = fit_density_ratio(table, counts[fitted])
    log_ratios = np.zeros(len(first))
    log_ratios[fitted] = ratio.log_ratios
    for places, values in features(first[others]):
        log_ratios[others[places]] = ratio.predict(values)
    chances = 1 / (1 + np.exp(-log_ratios[which]))
    weights = np.where(
        desirable, 1, np.asarray(udm_weights(jnp.asarray(chances, jnp.float32)))
    )
    own = weights[~desirable]
    log(
        f"prompts of desirable and undesirable answers: a classifier has a held-out "
        f"loss of {ratio.heldout_nll:.3f} (0.693 if they are alike); weights of "
        f"undesirable answers from {own.min():.2f} to {own.max():.2f}, mean "
        f"{own.mean():.2f}"
    )
    return weights.astype(np.float32)


def _store(path: Path, about: str, weights: np.ndarray) -> None:
    file = io.BytesIO()
    np.savez(file, weights=weights, made_by=about)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, file.getvalue())


def _stored(path: Path, about: str, blank: np.ndarray) -> np.ndarray:
    """The stored weights, or `blank` if there are none of this model and data."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            weights, made_by = stored["weights"], str(stored["made_by"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return blank
    fits = made_by == about and weights.shape == blank.shape
    return weights.astype(np.float32) if fits else blank
