"""Metrics of a run: `metrics.jsonl`, TensorBoard, and the progress bar."""

import json
import math
import os
from pathlib import Path

import jax
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Writes metric lines on process 0; silent everywhere else.

    One JSON object a line, with `step`: the number of optimiser steps done when it was
    measured.  Evaluation lines carry `eval_` names.
    """

    def __init__(self, out: Path, *, resumed_at: int):
        """Opens the files and drops what lies beyond the step the run resumes at.

        Args:
          out: folder of the run.
          resumed_at: the restored step, 0 for a new run.
        """
        self._file = self._board = None
        if jax.process_index() == 0:
            path = out / "metrics.jsonl"
            _keep_before(path, resumed_at)
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(
                str(out / "tensorboard"), purge_step=resumed_at, flush_secs=30
            )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line and flushes it; non-finite numbers are written as null."""
        if self._file is None:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; a torn last line (a killed run) is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _keep_before(path: Path, step: int) -> None:
    """Keeps training lines up to `step` and evaluation lines before it.

    The resumed run evaluates again at `step`, so that line would stand twice.
    """
    if not path.exists():
        return
    kept = [
        line
        for line in read_metrics(path)
        if line["step"] < step or (line["step"] == step and "loss" in line)
    ]
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(replacement, path)
