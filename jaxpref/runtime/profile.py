"""Profiler traces of a few training steps."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxpref.errors import first_line

_log = logging.getLogger("jaxpref")

WARM = 2
"""Steps before the trace starts; the first ones compile and load data."""


@contextlib.contextmanager
def profiled(step: Callable, out: Path, *, steps: int) -> Iterator[Callable]:
    """Wraps the train step so that `steps` calls are traced after the first `WARM`.

    Each process writes to `OUT/profile/process_N`.  XProf and TensorBoard open the
    folder, and Perfetto opens the `trace.json.gz` in it.  The trace begins and ends
    with all devices idle.  A trace that cannot be written causes only a warning.

    Args:
      step: the train step; its first argument is the state.
      out: folder of the run.
      steps: number of steps to trace; 0 yields `step` unchanged.
    """
    if not steps:
        yield step
        return
    folder = out / "profile" / f"process_{jax.process_index()}"
    calls, running = 0, False

    def switch(on: bool) -> None:
        nonlocal running
        running = on
        try:
            if on:
                jax.profiler.start_trace(str(folder))
            else:
                jax.profiler.stop_trace()
        except Exception as error:
            running = False
            _log.warning("%s: profiling failed (%s)", folder, first_line(error))

    def traced(state, *rest):
        nonlocal calls
        calls += 1
        if calls == WARM + 1:
            jax.block_until_ready(state)
            switch(on=True)
        if not running:
            return step(state, *rest)
        with jax.profiler.StepTraceAnnotation("train_step", step_num=calls):
            result = step(state, *rest)
        if calls == WARM + steps:
            jax.block_until_ready(result)
            switch(on=False)
        return result

    try:
        yield traced
    finally:
        if running:
            switch(on=False)
