"""Stops a run after too many bad steps in a row, and names their pairs."""

import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref.data import Datasets
from jaxpref.errors import InputError, Stopped
from jaxpref.files import write_json
from jaxpref.sharding import replicated
from jaxpref.train.options import GuardOptions

_log = logging.getLogger("jaxpref")

FIRST = 10
"""Number of initial steps whose median loss is the baseline for later ones."""


class Guard:
    """Checks the loss of every step; too many bad steps in a row stop the run.

    A step is bad if its loss, gradient or update is not finite (the state is then left
    unchanged), or if its loss is above

        m + max_loss_rise * max(|m|, 1),    m the median loss of the run's first steps.

    This also works for losses that are negative, or zero at the start.  A loss that
    falls without bound is noticed only once it is no longer finite.

    No checkpoint should be saved right after a bad step (see `healthy`).  The existing
    ones stay, and a run that resumes from one checks the same steps again.
    All processes see the same losses, so they all reach the same decision.
    """

    def __init__(
        self,
        options: GuardOptions,
        datasets: Datasets,
        out: Path,
        *,
        first: Sequence[float] = (),
    ):
        """Starts with no bad steps.

        Args:
          options: when to stop.
          datasets: the records, to name those of bad steps.
          out: the run's folder.
          first: what `get_state` returned before the run was interrupted.
        """
        self._options, self._out = options, out
        self._pairs, self._sources = datasets.splits.train, datasets.train_sources
        self._first = list(first)
        self._bad: list[dict[str, Any]] = []
        self._risen = False
        self._batch: jax.Array | None = None

    @property
    def healthy(self) -> bool:
        """Whether the last step checked was good."""
        return not self._bad

    def get_state(self) -> list[float]:
        """The losses of the first steps."""
        return list(self._first)

    def batch(self) -> np.ndarray | None:
        """The pairs of the last step checked, over all processes; int [A, R, S].

        All processes must call this.  None before the first step.
        """
        if self._batch is None:
            return None
        return np.asarray(jax.device_get(_gathered(self._batch)))

    def check_step(
        self, step: int, metrics: dict[str, np.ndarray], pairs: jax.Array
    ) -> None:
        """Checks the metrics of a step.

        Args:
          step: its number, from 1.
          metrics: all its metrics, on the host.
          pairs: int [A, R, S]; the pairs of its batch, on the devices.

        Raises:
          Stopped: after `max_bad_steps` bad steps in a row, which are first written to
            `stopped/step_<step>.json`.
        """
        self._batch = pairs
        loss, start, most = float(metrics["loss"]), math.nan, math.inf
        if len(self._first) == FIRST:
            start = statistics.median(self._first)
            most = start + self._options.max_loss_rise * max(abs(start), 1.0)
        blamed = metrics["nonfinite_pairs"].ravel()
        blamed = np.unique(blamed[blamed >= 0])  # once, whatever the number of votes
        if not metrics["finite"]:
            why = "the loss or its gradient is not finite"
            more = f"; the step was skipped. {_describe(self._pairs.ids[blamed])}"
        elif loss > most:
            more, self._risen = "", True
            why = f"the loss is {loss:.4g}, far above the initial {start:.4g}"
        else:
            self._bad, self._risen = [], False
            if len(self._first) < FIRST:
                self._first.append(loss)
            return
        if jax.process_index() == 0:  # all processes would log the same
            _log.warning("step %d: %s%s", step, why, more)
        self._bad.append(self._record(step, why, metrics, set(blamed.tolist())))
        if len(self._bad) >= self._options.max_bad_steps:
            bad = f"{len(self._bad)} bad steps in a row (--max-bad-steps); last: "
            raise self._stopped(step, bad + why)

    def check_end(self, step: int) -> None:
        """Refuses to finish a run whose loss has just risen; skipped steps are fine.

        Raises:
          Stopped: as `check_step`.
        """
        if self._risen:
            why = "the loss at the last step rose by more than --max-loss-rise"
            raise self._stopped(step, why)

    def check_learned(self, step: int, skipped: int, changed: bool) -> None:
        """Refuses to finish a run that has changed no weight.

        Args:
          step: the number of steps done.
          skipped: how many of them were skipped.
          changed: whether any weight differs from before the first step.

        Raises:
          Stopped: if none does.
        """
        if changed:
            return
        why = "no weight has changed: the updates are below its precision"
        what = "higher"
        if skipped == step:
            why = "every step was skipped: its loss, gradient or update is not finite"
            what = "lower"
        raise Stopped(
            f"stopped at step {step}: {why}; nothing was learned, so nothing is "
            f"exported; use another --out with a {what} --learning-rate, or check the "
            "pairs and the options of the loss and the optimizer"
        )

    def _record(self, step: int, why: str, metrics: dict, blamed: set[int]) -> dict:
        def of_pair(index: int) -> dict[str, Any]:
            return {
                "id": str(self._pairs.ids[index]),
                "file": self._sources[self._pairs.columns["source"][index]],
                "row": int(self._pairs.columns["row"][index]) + 1,
                "finite": index not in blamed,
            }

        batch = self.batch()
        pairs = [] if batch is None else batch.ravel().tolist()
        numbers = {n: float(metrics[n]) for n in ("loss", "grad_norm", "learning_rate")}
        return {
            "step": step,
            "why": why,
            # JSON has no NaN and no infinity.
            **{n: x if math.isfinite(x) else str(x) for n, x in numbers.items()},
            "pairs": [of_pair(i) for i in pairs if i >= 0],
        }

    def _stopped(self, step: int, why: str) -> Stopped:
        path = self._out / "stopped" / f"step_{step}.json"
        where = f"their pairs are in {path}"
        if jax.process_index() == 0:
            try:
                path.parent.mkdir(exist_ok=True)
                write_json(path, {"step": step, "why": why, "bad_steps": self._bad})
            except (InputError, OSError) as error:
                where = f"their pairs could not be written ({error})"
        return Stopped(
            f"stopped at step {step}: {why}; {where}; no checkpoint was overwritten; "
            "check the pairs, or use another --out with a lower --learning-rate"
        )


# Not part of the train step, where it would cost a collective in every step.
_gathered = jax.jit(replicated)


def _describe(ids: np.ndarray) -> str:
    if not len(ids):
        return "The loss of every pair is finite: the gradient overflowed"
    return f"Pairs with a non-finite loss: {', '.join(ids)}"
