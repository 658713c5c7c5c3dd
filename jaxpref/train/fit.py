"""The training loop."""

from typing import cast

import jax

from jaxpref.data.feed import Stream
from jaxpref.runtime import heartbeat
from jaxpref.runtime.preemption import watched
from jaxpref.train.outputs import Run
from jaxpref.train.state import TrainState
from jaxpref.train.task import Task


def fit(
    task: Task, state: TrainState, stream: Stream, run: Run, *, until: int
) -> TrainState:
    """Trains until `until` steps are done: evaluate, save, next batch, step, log.

    A further call with a later `until` continues from the returned state.  The programs
    belong to the task and are compiled only once.

    Args:
      task: what the run computes.
      state: the current state; its arrays are donated.
      stream: returns a batch for a state, so batches may depend on the parameters.
      run: what happens before and after each step.
      until: the step to stop after.

    Returns:
      The state after step `until`, or after an earlier one at which the run's
      evaluations have not become better for too long.

    Raises:
      Preempted: after a SIGTERM, once the last step is saved.
      Stopped: after too many bad steps in a row.
    """
    start = int(state.step)
    with watched(start) as should_stop, run.traced(task.train_step) as train_step:
        for step in range(start, until):
            if not run.before_step(step, state):
                break
            stream.await_state(state)
            with run.waiting_for_data():
                batch = stream.draw(state)
            heartbeat.beat(f"the batch of step {step + 1}")
            state, metrics = train_step(state, run.frozen, batch)
            metrics |= stream.metrics()
            run.after_step(step + 1, metrics, cast(jax.Array, batch.pair_index))
            if should_stop(step + 1):
                run.leave(step + 1, state)
    return state
