"""The best checkpoint of a run by one of its evaluations' metrics."""

import math
import re
from pathlib import Path
from typing import Any

import jax

from jaxpref.errors import InputError
from jaxpref.files import write_json


class Best:
    """Remembers the step whose evaluation was best; `best.json` tells it to others."""

    def __init__(self, asked: str | None, out: Path, state: dict | None = None):
        """Goes on where `get_state` was asked.

        Args:
          asked: "max:NAME" or "min:NAME", a metric as `metrics.jsonl` has it; None to
            remember nothing.
          out: folder of the run.
          state: of the run before it was interrupted; of another metric it is dropped.
        """
        self._out = out
        self._mode, self._name = check_asked(asked) if asked else (None, None)
        asked_for = {"best": self._mode, "metric": self._name}
        same = state is not None and state.items() >= asked_for.items()
        self._state = state if same else None
        self._write()

    @property
    def step(self) -> int | None:
        """The step, None where nothing was evaluated yet or nothing was asked."""
        return None if self._state is None else self._state["step"]

    def get_state(self) -> dict[str, Any] | None:
        """Step, name and value, as JSON can write them."""
        return self._state

    def improved(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether this evaluation is better than all before it; it is then remembered.

        A model that was not trained yet (step 0) is none to keep, and neither is one
        whose metric is not finite.

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


def check_asked(asked: str) -> tuple[str, str]:
    """What `--keep-best` says: "max" or "min", and the metric's name."""
    found = re.fullmatch(r"(max|min):(eval_\S+)", asked)
    if not found:
        raise InputError(
            f"--keep-best {asked}: expected max: or min: and a metric of the "
            "evaluations, as max:eval_rewards/accuracies or min:eval_loss"
        )
    return found[1], found[2]
