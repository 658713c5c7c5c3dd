"""The start of a run: its state, restored or new, and the reference's scores."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref.runtime.environment import environment, environment_change_message
from jaxpref.runtime.processes import log
from jaxpref.scoring.reference import ScoredSet, reference_tables
from jaxpref.scoring.scorer import Frozen, Params
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.resume import check_resumable
from jaxpref.train.state import TrainState
from jaxpref.train.task import Task


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Everything that the loop needs before its first batch."""

    state: TrainState
    """The state to continue from."""
    frozen: Frozen
    """What the scorer reads in addition to the parameters, or None."""
    reference: Mapping[str, Mapping[str, np.ndarray]]
    """The reference's scores, by dataset and by name."""
    saved: Mapping[str, Any]
    """What the checkpoint holds in addition to the state; empty for a new run."""


def begin(
    task: Task, checkpoints: Checkpoints, out: Path, *, batch_size: int
) -> Beginning:
    """Restores the newest checkpoint, or starts from the model's folder.

    Args:
      task: what the run computes.
      checkpoints: the run's checkpoints.
      out: the run's folder.
      batch_size: pairs that are scored together by the reference.

    Raises:
      InputError: if the checkpoint belongs to another run, or a model cannot be read.
    """
    restored = checkpoints.restore(task.abstract_state())
    saved, params = {}, None
    if restored is None:
        params = task.scorer.load(task.model_folder, jax.random.key(task.seed))
    else:
        saved = restored[1]
        _check(task, saved, int(restored[0].step), out)
    reference = _score_reference(task, params, out, batch_size)
    frozen = None
    if task.reference is not None:
        frozen = task.scorer.load_frozen(task.reference.folder)
    if frozen is not None:
        log(
            f"{task.objective.name} keeps the reference's weights in memory: it needs "
            "full distributions, which cannot be stored in advance"
        )
    if restored is None:
        state = jax.jit(task.new_state, donate_argnums=0)(params)
    else:
        state = restored[0]
    return Beginning(state, frozen, reference, saved)


def _check(task: Task, saved: Mapping[str, Any], step: int, out: Path) -> None:
    check_resumable(saved, task, out)
    now = environment(task.mesh)
    message = environment_change_message(saved.get("environment", now), now, step)
    if message is not None:
        log(message)


def _score_reference(
    task: Task, params: Params | None, out: Path, batch_size: int
) -> dict[str, dict[str, np.ndarray]]:
    """The reference's stored scores for both datasets; empty if none is read.

    If the policy and the reference start from the same folder, the policy's initial
    parameters are used for both.
    """
    if task.reference is None or not task.reference.scores:
        return {"train": {}, "heldout": {}}
    splits, datasets = task.datasets.splits, task.datasets
    every = np.arange(len(splits.heldout))
    sets = [
        ScoredSet("train", splits.train, datasets.train_sources, task.records_seen()),
        ScoredSet("heldout", splits.heldout, datasets.heldout_sources, every),
    ]
    scorer, folder = task.reference_scorer, task.reference.folder

    def load() -> Params:
        if params is not None and folder == task.model_folder:
            return params["one"] if task.objective.num_models > 1 else params
        return scorer.load(folder, jax.random.key(task.seed))

    return reference_tables(
        task.reference,
        sets,
        out,
        load=load,
        score=task.score(task.reference_score_step),
        batch_size=batch_size,
        layout=f"{task.layout.rounding()}, mesh {dict(task.mesh.shape)}",
    )
