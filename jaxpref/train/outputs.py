"""What a run writes as it trains: metrics, evaluations, checkpoints."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from tqdm import tqdm

from jaxpref.data.agreement import check_batch_agreement
from jaxpref.data.feed import Stream
from jaxpref.data.mixing import short_names
from jaxpref.report.progress import evaluation_line
from jaxpref.runtime.best import Best
from jaxpref.runtime.checkpoints import Checkpoints
from jaxpref.runtime.environment import environment
from jaxpref.runtime.fingerprint import fingerprint
from jaxpref.runtime.late_metrics import LateMetrics
from jaxpref.runtime.metrics_file import MetricsWriter
from jaxpref.runtime.preemption import Preempted
from jaxpref.runtime.processes import only_first_process
from jaxpref.runtime.profile import profiled
from jaxpref.train.begin import Beginning
from jaxpref.train.evaluation import evaluation_metrics
from jaxpref.train.guard import Guard
from jaxpref.train.options import CheckpointOptions, LogOptions
from jaxpref.train.samples import Samples
from jaxpref.train.state import TrainState
from jaxpref.train.task import Task


class Run:
    """One run of a task: frozen parameters, the reference's scores, and the outputs.

    `fit` calls it before and after every step, on all processes.
    """

    def __init__(
        self,
        task: Task,
        out: Path,
        stream: Stream,
        begun: Beginning,
        *,
        saving: CheckpointOptions,
        logging: LogOptions,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        guard: Guard,
        best: Best,
        bind: Callable[[], None] = lambda: None,
    ):
        """Shows the progress bar.

        Args:
          task: what the run computes.
          out: the run's folder.
          stream: the source of its batches.
          begun: the start of the run.
          saving: when it is evaluated and saved.
          logging: when it logs.
          checkpoints: saves states.
          writer: writes metrics.
          guard: checks every step.
          best: the best evaluation so far.
          bind: called once the first step is done: from then on, OUT belongs to this
            run.
        """
        self.frozen, self._saving, self._profile = begun.frozen, saving, logging.profile
        self._task, self._out, self._stream = task, out, stream
        self._reference, self._checkpoints = begun.reference, checkpoints
        self._initial_weights = begun.initial_weights
        self._reference_scores = begun.reference_scores
        self._writer, self._guard, self._best = writer, guard, best
        self._bind = bind
        self._evaluated: int | None = None
        self._resumed_at = start = int(begun.state.step)
        self._late = LateMetrics(
            writer,
            name=task.objective.name,
            log_every=logging.log_every,
            max_steps=task.steps,
            check_step=self._check_step,
            start=start,
        )
        count, tokens = logging.eval_samples, logging.eval_sample_tokens
        self._samples = Samples(task, out, count=count, tokens=tokens, start=start)
        checkpoints.best = best.step

    def before_step(self, step: int, state: TrainState) -> bool:
        """Evaluates and saves if that is due after `step` steps.

        Returns:
          Whether to go on: False after `patience` evaluations without a better one.
        """
        due = step % self._saving.save_every == 0 and step > self._resumed_at
        if step % self._saving.eval_every == 0:
            with self._late.paused():
                better = self.evaluate(step, state)
            due |= better and step > self._resumed_at
        if due:
            with self._late.paused():
                self._save_healthy(step, state)
        if self._exhausted(step):
            only_first_process(tqdm.write, f"step {step}: stops, see --patience")
            return False
        return True

    def _exhausted(self, step: int) -> bool:
        """Whether too many evaluations in a row were not better than the best one.

        A function of steps alone, so that a resumed run ends at the same one.
        """
        patience, best = self._saving.patience, self._best.step or 0
        return (
            patience is not None and step - best >= patience * self._saving.eval_every
        )

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        with self._late.waiting():
            yield

    def traced(self, train_step: Callable) -> contextlib.AbstractContextManager:
        """The train step, which records a profile on the steps to be profiled."""
        return profiled(train_step, self._out, steps=self._profile)

    def after_step(self, step: int, metrics: dict, pairs: jax.Array) -> None:
        """Takes a step's metrics, which are fetched once the next step is running."""
        self._late.push(step, metrics, pairs)

    def leave(self, step: int, state: TrainState) -> None:
        """Saves the step and ends the run after a request to stop.

        Raises:
          Preempted: always.
        """
        with self._late.paused():
            healthy = self._save_healthy(step, state)
            self._checkpoints.wait()
        raise Preempted(step, saved=healthy)

    def finish(self, state: TrainState) -> None:
        """Saves and evaluates the last step.

        Raises:
          Stopped: if the loss has just risen too far, or nothing was learned.
        """
        step = int(state.step)
        with self._late.paused():
            self._guard.check_end(step)
            changed = fingerprint(state.params) != self._initial_weights
            self._guard.check_learned(step, int(state.skipped), changed)
            # Save first: interrupting the last evaluation then loses no step.
            self.save(step, state)
            if self._evaluated != step:  # by the early stop
                self.evaluate(step, state)
            self._checkpoints.wait()

    def evaluate(self, step: int, state: TrainState) -> bool:
        """Evaluates held-out records; returns whether it is the best step so far."""
        task, found = self._task, self._stream.evaluate(state)
        heldout = task.datasets.splits.heldout
        if len(heldout):
            reference = self._reference["heldout"]
            scores = None if step else task.scores_before_training(reference)
            if scores is None:
                score = task.score(task.score_step)
                title = f"evaluation at step {step}"
                scores = score(state.params, self.frozen, heldout, title=title)
            names = short_names(task.datasets.heldout_sources)
            learned = state.objective_state
            found |= evaluation_metrics(
                task.evaluation, scores, reference, heldout, learned, names
            )
            found |= self._samples.write(step, state.params, self.frozen)
        if found:
            self._writer.write(step, found)
            # Does not overwrite the progress bar.
            only_first_process(tqdm.write, evaluation_line(step, found))
        self._evaluated = step
        better = self._guard.healthy and self._best.improved(step, found)
        self._checkpoints.best = self._best.step
        return better

    def save(self, step: int, state: TrainState) -> None:
        """Saves the state of a step and the run's position."""
        task = self._task
        if jax.process_count() > 1:
            check_batch_agreement(
                step,
                task.datasets.splits,
                self._stream,
                self._guard.batch(),
                make_batches=functools.partial(task.batches, whole=True),
            )
        metadata = {
            "iterator": self._stream.get_state(),
            "steps": task.steps,
            "reference_scores": dict(self._reference_scores),
            "environment": environment(task.mesh),
            "rows": task.layout.rounding(),
            "first_losses": self._guard.get_state(),
            "best": self._best.get_state(),
            "initial_weights": self._initial_weights,
        }
        self._checkpoints.save(step, state, metadata)

    def close(self) -> None:
        """Ends the progress bar."""
        self._late.close()

    def _check_step(self, step: int, metrics: dict, pairs: jax.Array) -> None:
        if step == self._resumed_at + 1:
            self._bind()
        self._guard.check_step(step, metrics, pairs)

    def _save_healthy(self, step: int, state: TrainState) -> bool:
        if self._guard.healthy:
            self.save(step, state)
        return self._guard.healthy
