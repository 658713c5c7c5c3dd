"""The start of a run: its state, restored or new, and the reference's scores."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref.errors import InputError
from jaxpref.runtime.checkpoints import Checkpoints
from jaxpref.runtime.environment import environment, environment_change_message
from jaxpref.runtime.fingerprint import fingerprint
from jaxpref.runtime.processes import log
from jaxpref.scoring.score_tables import ScoredSet, score_tables
from jaxpref.scoring.scorer import Frozen, Params
from jaxpref.scoring.scores import stored_scores
from jaxpref.train.optimizer import with_new_schedule
from jaxpref.train.state import TrainState
from jaxpref.train.task import Task


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Everything that the loop needs before its first batch."""

    state: TrainState
    """The state to continue from."""
    frozen: Frozen
    """What the scorer reads in addition to the parameters."""
    reference: Mapping[str, Mapping[str, np.ndarray]]
    """The reference's scores, by dataset and by name."""
    reference_scores: Mapping[str, Any]
    """Digests of these scores, for the checkpoints."""
    saved: Mapping[str, Any]
    """What the checkpoint holds in addition to the state; empty for a new run."""
    initial_weights: list[int]
    """The fingerprint of the weights before the first step."""


def restore(
    task: Task, checkpoints: Checkpoints, out: Path
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint, a state and its metadata; None for a new run.

    Raises:
      InputError: if the checkpoint was made by another run, or the length of the run
        has changed and the steps already made would have been different.
    """
    restored = checkpoints.restore(task.abstract_state())
    if restored is None:
        return None
    state, saved = restored
    done, before = int(state.step), saved["steps"]
    if task.steps < done:
        raise InputError(
            f"--max-steps {task.steps}: the run in {out} has already made {done} "
            "steps; ask for more steps, or use another --out"
        )
    if before != task.steps:
        past = np.arange(done)
        rates = task.schedule(past), task.schedule_of(before)(past)
        if not np.array_equal(*rates):
            raise InputError(
                f"--max-steps {before} -> {task.steps}: the {done} steps that the run "
                f"in {out} has made would have had different learning rates; only runs "
                "with --decay constant can be made longer or shorter; use another --out"
            )
    now, was = environment(task.mesh), saved["environment"]
    if before != task.steps:  # packed rows depend on the number of steps
        now, was = (
            now | {"rows": task.layout.rounding()},
            was | {"rows": saved["rows"]},
        )
    message = environment_change_message(was, now, done)
    if message is not None:
        log(message)
    return state, saved


def begin(
    task: Task,
    restored: tuple[TrainState, dict[str, Any]] | None,
    out: Path,
    *,
    batch_size: int,
    check: Callable[[bool], None] = lambda wait: None,
) -> Beginning:
    """Loads the initial weights of a new run, and scores the reference.

    Args:
      task: what the run computes.
      restored: from `restore`.
      out: the run's folder.
      batch_size: pairs that are scored together by the reference.
      check: called with False before each part of the scoring, and with True before
        the state is created; may raise to end the run.

    Raises:
      InputError: if a model cannot be read.
    """
    params = None
    if restored is None:
        if task.earlier is not None:  # before the time for scoring is spent
            task.earlier.check(task.abstract_state().opt_state)
        params = task.scorer.load(task.start.folder, jax.random.key(task.seed))
    saved: Mapping[str, Any] = {} if restored is None else restored[1]
    frozen = task.scorer.load_frozen(task.start.folder, task.models)
    reference, digests = _score_reference(
        task, params, frozen, out, batch_size, check, saved.get("reference_scores", {})
    )
    if task.objective.models:
        names = " and ".join(sorted(task.objective.models))
        log(
            f"{task.objective.name} keeps the weights of {names} in memory: it needs "
            "full distributions, which cannot be stored in advance"
        )
    check(True)
    if restored is None:
        state = jax.jit(task.new_state, donate_argnums=0)(params)
        initial = fingerprint(state.params)
        if task.earlier is not None:
            state = dataclasses.replace(state, opt_state=None)  # frees its memory
            earlier = task.earlier.read(task.abstract_state().opt_state)
            state = dataclasses.replace(state, opt_state=with_new_schedule(earlier))
    else:
        state, initial = restored[0], saved.get("initial_weights", [])
    return Beginning(state, frozen, reference, digests, saved, initial)


def _score_reference(
    task: Task,
    params: Params | None,
    frozen: Frozen,
    out: Path,
    batch_size: int,
    check: Callable[[bool], None],
    expected: Mapping[str, Any],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """The reference's stored scores for both datasets, and their digests.

    Empty if none is read; zeros if the run has no reference.

    If the policy starts as the reference, its initial parameters are used for both.
    """
    reference = task.reference
    splits, datasets = task.datasets.splits, task.datasets
    if reference is None or not reference.scores:
        # The objective reads none, or the run has none: then they are 0.
        names = stored_scores(task.objective.scores)
        table = lambda x: np.zeros((len(x), x.num_completions), np.float32)
        sets = {"train": splits.train, "heldout": splits.heldout}
        return {name: dict.fromkeys(names, table(x)) for name, x in sets.items()}, {}
    # A reference that moves scores the pairs of a step within the step.
    seen = task.records_seen()[: 0 if task.moving else None]
    every = np.arange(len(splits.heldout))
    sets = [
        ScoredSet("train", splits.train, datasets.train_sources, seen),
        ScoredSet("heldout", splits.heldout, datasets.heldout_sources, every),
    ]
    score = task.score(task.reference_score_step)

    def checked_score(*args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        check(False)
        return score(*args, **kwargs)

    def load() -> Params:
        start = params if task.starts_as_reference else None
        return task.scorer.reference_params(reference.weights, frozen, start)

    return score_tables(
        reference,
        sets,
        out=out,
        load=load,
        score=checked_score,
        batch_size=batch_size,
        layout=f"{task.layout.rounding()}, mesh {dict(task.mesh.shape)}",
        expected=expected,
    )
