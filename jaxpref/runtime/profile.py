"""A trace of some steps: what host and devices did, and for how long."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxpref.errors import first_line

_log = logging.getLogger("jaxpref")

WARM = 2
"""Steps of a process before the trace: the first compiles, and loads what is slow."""


@contextlib.contextmanager
def profiled(step: Callable, out: Path, *, steps: int) -> Iterator[Callable]:
    """The train step, of which `steps` calls are traced after the first `WARM`.

    Each process writes to `OUT/profile/process_N`; XProf and TensorBoard show the
    folder, Perfetto the `trace.json.gz` in it.  The devices are waited for where the
    trace begins and ends.  A trace that cannot be written is a warning.

    Args:
      step: called with the state first; it is yielded as it is where `steps` is 0.
      out: folder of the run.
      steps: how many.
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
            _log.warning("%s: no trace of the steps (%s)", folder, first_line(error))

    def traced(state, *rest):
        nonlocal calls
        calls += 1
        if calls == WARM + 1:
            jax.block_until_ready(state)
            switch(on=True)
        if not running:
            return step(state, *rest)
        with jax.profiler.StepTraceAnnotation("train_step", step_num=calls):
            found = step(state, *rest)
        if calls == WARM + steps:
            jax.block_until_ready(found)
            switch(on=False)
        return found

    try:
        yield traced
    finally:
        if running:
            switch(on=False)
