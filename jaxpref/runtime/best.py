"""The best checkpoint of a run by a metric of its evaluations."""

import math
import re
from pathlib import Path
from typing import Any

import jax

from jaxpref.errors import InputError
from jaxpref.files import write_json


class Best:
    """Remembers the step with the best evaluation, and writes it to `best.json`."""

    def __init__(self, criterion: str | None, out: Path, state: dict | None = None):
        """Continues from a state that `get_state` returned.

        Args:
          criterion: "max:NAME" or "min:NAME", where NAME is a metric in
            `metrics.jsonl`; None to remember nothing.
          out: the run's folder.
          state: the state before the run was interrupted.  It is dropped if it is for
            another metric.
        """
        self._out = out
        self._mode, self._name = (
            parse_criterion(criterion) if criterion else (None, None)
        )
        wanted = {"best": self._mode, "metric": self._name}
        same = state is not None and state.items() >= wanted.items()
        self._state = state if same else None
        self._write()

    @property
    def step(self) -> int | None:
        """The best step; None before the first evaluation or without a criterion."""
        return None if self._state is None else self._state["step"]

    def get_state(self) -> dict[str, Any] | None:
        """Step, metric and value, as values that JSON can represent."""
        return self._state

    def improved(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether this evaluation is better than all earlier ones.  Remembers it if so.

        Step 0, before any training, never counts; nor does a non-finite metric.

        Raises:
          InputError: if the metric was not measured.
        """
        if self._name is None:
            return False
        if self._name not in metrics:
            raise InputError(
                f"--keep-best {self._mode}:{self._name}: not measured; the evaluation "
                f"has {', '.join(sorted(metrics)) or 'no pairs: hold some out'}"
            )
        value = metrics[self._name]
        if step == 0 or not math.isfinite(value):
            return False
        if self._state is not None:
            gain = value - self._state["value"]
            if (gain if self._mode == "max" else -gain) <= 0:
                return False
        self._state = {
            "step": step,
            "best": self._mode,
            "metric": self._name,
            "value": value,
        }
        self._write()
        return True

    def _write(self) -> None:
        if self._state is not None and jax.process_index() == 0:
            write_json(self._out / "best.json", self._state)


def parse_criterion(criterion: str) -> tuple[str, str]:
    """Splits the value of `--keep-best` into "max" or "min" and a metric name."""
    found = re.fullmatch(r"(max|min):(eval_\S+)", criterion)
    if not found:
        raise InputError(
            f"--keep-best {criterion}: expected max: or min: and an evaluation metric, "
            "such as max:eval_rewards/accuracies or min:eval_loss"
        )
    return found[1], found[2]
