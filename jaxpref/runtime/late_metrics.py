"""Metrics of the running steps, and the progress bar."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
from tqdm import tqdm

from jaxpref.runtime import heartbeat
from jaxpref.runtime.metrics_file import MetricsWriter


class LateMetrics:
    """Fetches a step's metrics only after the next step has started.

    `tokens_per_second` and `pairs_per_second` measure training alone.  The clock is
    stopped within `paused`, and the first step of a process, which compiles, is left
    out.  `data_wait_fraction` is the share of that time spent within `waiting`.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        *,
        name: str,
        log_every: int,
        max_steps: int,
        check_step: Callable[[int, dict, jax.Array], None],
        start: int,
    ):
        """Shows the progress bar.

        Args:
          writer: writes the lines of metrics.
          name: the objective's name, shown in the bar.
          log_every: steps between two lines of metrics.
          max_steps: steps of the run.
          check_step: `check_step(step, metrics, pairs)` is called for every step, and
            may raise to end the run.
          start: steps done before this process began.
        """
        self._writer, self._check_step = writer, check_step
        self._log_every, self._max_steps = log_every, max_steps
        self._waiting = None
        self._compiled = False
        self._restart_clock()
        self._bar = tqdm(
            total=max_steps,
            initial=start,
            desc=name,
            unit="step",
            disable=jax.process_index() != 0,
        )

    def push(self, step: int, metrics: dict, pairs: jax.Array) -> None:
        """Takes the metrics of a step that has started, and writes the previous ones.

        Args:
          step: its number, from 1.
          metrics: the step's metrics.
          pairs: [A, R, S]; the pairs of its batch.

        Raises:
          Stopped: if `check_step` ends the run.
        """
        waiting, self._waiting = self._waiting, (step, metrics, pairs)
        if waiting is not None:
            self._write(*waiting)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for the running step, writes its metrics, and stops the clock."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._write(*waiting)
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def _write(self, step: int, metrics: dict, pairs: jax.Array) -> None:
        metrics = jax.device_get(metrics)
        heartbeat.beat(f"step {step}")
        self._check_step(step, metrics, pairs)
        del metrics["finite"], metrics["nonfinite_pairs"]
        self._tokens += int(metrics.pop("tokens"))
        self._pairs_done += int(metrics.pop("pairs"))
        self._bar.update()
        if not self._compiled:
            self._compiled = True
            self._restart_clock()
        if step % self._log_every == 0 or step in (1, self._max_steps):
            values = {name: float(value) for name, value in metrics.items()}
            if self._tokens:
                seconds = self._seconds + time.perf_counter() - self._since
                values["tokens_per_second"] = self._tokens / seconds
                values["pairs_per_second"] = self._pairs_done / seconds
                values["data_wait_fraction"] = self._waited / seconds
            self._restart_clock()
            self._writer.write(step, values)
            shown = {"loss": f"{values['loss']:.4f}"}
            if "rewards/accuracies" in values:
                shown["accuracy"] = f"{values['rewards/accuracies']:.2f}"
            if "rewards/mean" in values:
                shown["reward"] = f"{values['rewards/mean']:.3g}"
            if "data_wait_fraction" in values:
                shown["data wait"] = f"{values['data_wait_fraction']:.1%}"
            self._bar.set_postfix(shown)

    def _restart_clock(self) -> None:
        self._tokens = self._pairs_done = 0
        self._seconds, self._since = 0.0, time.perf_counter()
        self._waited = 0.0
