"""Steps that go wrong, one after another: the run stops and names their pairs."""

import logging
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref.errors import InputError, Stopped
from jaxpref.files import write_json
from jaxpref.sharding import replicated
from jaxpref.train.options import GuardOptions
from jaxpref.train.task import Datasets

_log = logging.getLogger("jaxpref")

FIRST = 10
"""Steps whose median loss the later ones are compared with."""


class Guard:
    """Judges every step by its loss; too many bad ones in a row stop the run.

    A step is bad whose loss, gradient or update is not finite (it changed nothing), or
    whose loss is above

        m + max_loss_rise * max(|m|, 1),    m the median loss of the run's first steps.

    Losses that are negative, or zero at the start, have a yardstick by it too.  A loss
    that falls without end is not seen until it is no longer finite.

    While the last step was bad, no checkpoint is to be saved (`healthy`): the ones
    there are stay, and a run that resumes from one of them judges the same steps
    again.
    All processes see the same losses, so all come to the same end.
    """

    def __init__(
        self,
        options: GuardOptions,
        datasets: Datasets,
        out: Path,
        *,
        first: Sequence[float] = (),
    ):
        """Has checked nothing yet.

        Args:
          options: when to stop.
          datasets: the records, to name those of bad steps.
          out: folder of the run.
          first: what `get_state` gave before the run was interrupted.
        """
        self._options, self._out = options, out
        self._pairs, self._sources = datasets.splits.train, datasets.train_sources
        self._first = list(first)
        self._bad: list[dict[str, Any]] = []
        self._risen = False
        self._batch: jax.Array | None = None

    @property
    def healthy(self) -> bool:
        """Whether the step judged last was not bad."""
        return not self._bad

    def get_state(self) -> list[float]:
        """Losses of the first steps."""
        return list(self._first)

    def batch(self) -> np.ndarray | None:
        """The pairs of the step judged last, over all processes; int [A, R, S].

        To be called by all of them; None before the first step.
        """
        if self._batch is None:
            return None
        return np.asarray(jax.device_get(_gathered(self._batch)))

    def check_step(
        self, step: int, metrics: dict[str, np.ndarray], pairs: jax.Array
    ) -> None:
        """Looks at what a step gave.

        Args:
          step: its number, from 1.
          metrics: all of them, on the host.
          pairs: int [A, R, S]; those of its batch, as it lies on the devices.

        Raises:
          Stopped: after `max_bad_steps` bad steps in a row, once they are written to
            `stopped/step_<step>.json`.
        """
        self._batch = pairs
        loss, start, most = float(metrics["loss"]), math.nan, math.inf
        if len(self._first) == FIRST:
            start = statistics.median(self._first)
            most = start + self._options.max_loss_rise * max(abs(start), 1.0)
        blamed = metrics["nonfinite_pairs"].ravel()
        blamed = blamed[blamed >= 0]
        if not metrics["finite"]:
            why = "the loss or its gradient is not finite"
            more = f"; the step was skipped. {_pairs_told(self._pairs.ids[blamed])}"
        elif loss > most:
            more, self._risen = "", True
            why = f"the loss is {loss:.4g}, far above the first ones' {start:.4g}"
        else:
            self._bad, self._risen = [], False
            if len(self._first) < FIRST:
                self._first.append(loss)
            return
        if jax.process_index() == 0:  # all of them say the same
            _log.warning("step %d: %s%s", step, why, more)
        self._bad.append(self._record(step, why, metrics, set(blamed.tolist())))
        if len(self._bad) >= self._options.max_bad_steps:
            bad = f"{len(self._bad)} bad steps in a row (--max-bad-steps), the last: "
            raise self._stopped(step, bad + why)

    def check_end(self, step: int) -> None:
        """Refuses to end a run whose loss has just risen; skipped steps do no harm.

        Raises:
          Stopped: as `check_step`.
        """
        if self._risen:
            why = "the run was over, and its loss risen by more than --max-loss-rise"
            raise self._stopped(step, why)

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
            "look at the pairs, or use another --out with a lower --learning-rate"
        )


# Not in the train step: that would be a collective for every step.
_gathered = jax.jit(replicated)


def _pairs_told(ids: np.ndarray) -> str:
    if not len(ids):
        return "Every pair's loss is finite: the gradient overflowed"
    return f"Pairs with a non-finite loss: {', '.join(ids)}"
