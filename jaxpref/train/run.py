"""The training run, from the first file read to the exported model."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxpref.data.bad_rows import write_skipped
from jaxpref.data.feed import Feed, Stream
from jaxpref.data.layouts.choose import padding_advice
from jaxpref.data.probe import check_exported
from jaxpref.files import write_json
from jaxpref.runtime import heartbeat
from jaxpref.runtime.best import Best
from jaxpref.runtime.checkpoints import Checkpoints
from jaxpref.runtime.compilation import in_background, log_compilations
from jaxpref.runtime.environment import versions
from jaxpref.runtime.loggers import check_installed
from jaxpref.runtime.memory import (
    check_arrays,
    check_memory,
    choose_remat,
    required_bytes,
)
from jaxpref.runtime.mesh import initialize_distributed, row_shards, to_global
from jaxpref.runtime.metrics_file import MetricsWriter
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.runtime.processes import (
    assert_equal_across_processes,
    log,
    only_first_process,
)
from jaxpref.runtime.provenance import Provenance, flat
from jaxpref.runtime.timings import Timings, timings
from jaxpref.scoring.matched_prompts import match_prompts
from jaxpref.scoring.provenance import contents
from jaxpref.train.begin import Beginning, begin, restore
from jaxpref.train.config import (
    TrainConfig,
    open_run,
    options_that_matter,
    to_json,
)
from jaxpref.train.fit import fit
from jaxpref.train.guard import Guard
from jaxpref.train.outputs import Run
from jaxpref.train.prepare import prepare
from jaxpref.train.samples import first_prompts
from jaxpref.train.task import Task

MakeStream = Callable[[Task, Beginning, Path, Timings], Stream]
"""`make_stream(task, begun, out, phases)`: the batches from the current position."""


def run(
    config: TrainConfig,
    *,
    task: Task | None = None,
    make_stream: MakeStream | None = None,
) -> Path:
    """Trains `config.model` on `config.data` and exports it.

    The same config and `out` resume an interrupted run, with the same bits on the same
    software, devices, mesh and process count.  The run writes to `out`: `config.json`,
    `metrics.jsonl`, `tensorboard/`, `reference/`, `checkpoints/`, `export/` (a Hugging
    Face folder), `adapter/` if adapters are trained, `timings.json` (seconds per
    phase), `memory.json` if `remat` is "auto", and `best.json` with `keep_best`.

    Args:
      config: the config.
      task: from `prepare(config)`, if that has been called already; the timings then
        begin with this call instead of with the process.
      make_stream: makes the source of the batches (default: the training records).

    Returns:
      The exported folder.

    Raises:
      InputError: for anything that the caller can fix; nothing written is lost.
      Preempted: after SIGTERM during training, once the last step is saved.
      Stopped: after too many bad steps in a row; see `guard`.
    """
    check_installed(config.logger)
    initialize_distributed()
    dtype = config.compute_dtype or default_compute_dtype()
    config = dataclasses.replace(config, compute_dtype=dtype)
    described = to_json(config)
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open_run(config, described))
        closing = lambda thing: stack.enter_context(contextlib.closing(thing))
        if config.explain_compiles and jax.process_index() == 0:
            stack.enter_context(log_compilations())
        phases = stack.enter_context(timings(time.time() if task else None))
        stack.enter_context(heartbeat.reporting())
        assert_equal_across_processes("before the run", versions())
        assert_equal_across_processes("before the run", described)
        phases.mark("start")
        task = task or prepare(config)
        # Before the reference scores, which may take long.
        first_prompts(task, count=config.eval_samples, tokens=config.eval_sample_tokens)
        _log_layout(task, padded=config.row_length == "none")
        write_skipped(out, task.datasets.splits.skipped, config.options.on_bad_row)
        phases.mark("tokenize")
        stack.enter_context(jax.set_mesh(task.mesh))
        made_by = Provenance(
            options_that_matter(described),
            contents(
                task.start, task.reference, task.models, task.datasets, task.earlier
            ),
        )
        if task.objective.matches_prompts:
            matched = match_prompts(task, out, config.batch_size, compute_dtype=dtype)
            task = dataclasses.replace(task, datasets=matched)
        keep, saved = config.keep_checkpoints, out / "checkpoints"
        checkpoints = closing(Checkpoints(saved, keep=keep, made_by=made_by))
        task, begun = _begin(task, checkpoints, out, phases, config)
        make = make_stream or _feed(config.loader_processes)
        stream = closing(make(task, begun, out, phases))
        loggers: Any = {"loggers": config.logger, "config": flat(described)}
        loggers["resumed_at"] = int(begun.state.step)
        binding = write_json, out / "config.json", described
        bind = functools.partial(only_first_process, *binding)
        if begun.saved:
            bind()
        best = Best(config.keep_best, out, begun.saved.get("best"))
        training = Run(
            task,
            out,
            stream,
            begun,
            saving=config,
            logging=config,
            checkpoints=checkpoints,
            writer=closing(MetricsWriter(out, **loggers)),
            guard=Guard(
                config, task.datasets, out, first=begun.saved.get("first_losses", ())
            ),
            best=best,
            bind=bind,
        )
        closing(training)
        state = fit(task, begun.state, stream, training, until=task.steps)
        training.finish(state)
        phases.mark("steps")
        if config.export == "best" and best.step not in (None, int(state.step)):
            log(f"exporting step {best.step}: {config.keep_best}")
            del begun, state
            state, _ = checkpoints.restore(task.abstract_state(), only=best.step)
        task.scorer.export(state.params, out / "export", task.export)
        if task.objective.trains_reward_model and (out / "export").exists():
            only_first_process(check_exported, out / "export")
        phases.mark("export")
        only_first_process(phases.write, out / "timings.json")
    return out / "export"


def _log_layout(task: Task, *, padded: bool) -> None:
    """Logs the shape of a step and, if it is padded, what packing would save."""
    log(task.layout.describe())
    splits, shards = task.datasets.splits, row_shards(task.mesh)
    sets = splits.train, splits.heldout
    if padded and (
        advice := padding_advice(task.layout, task.order, *sets, shards=shards)
    ):
        log(advice)


def _begin(
    task: Task,
    checkpoints: Checkpoints,
    out: Path,
    phases: Timings,
    config: TrainConfig,
) -> tuple[Task, Beginning]:
    """The start of a run whose step is compiled and fits into memory.

    The step compiles while the reference scores, unless `remat` is "auto", which
    compares compiled steps once the state exists.
    """
    check_arrays(
        "the weights, the optimizer's state and a batch",
        (task.abstract_state(), task.abstract_frozen(), task.abstract_batch()),
    )
    restored = restore(task, checkpoints, out)
    unfinished = restored is None or int(restored[0].step) < task.steps
    compiling = None
    if unfinished and config.remat != "auto":
        need = functools.partial(required_bytes, task.compile_train_step)
        compiling = in_background(need)

    def check(wait: bool) -> None:
        if wait:
            phases.mark("reference")
        if compiling is None:
            return
        # Several processes score together, so they must end at the same point.
        alone = jax.process_count() == 1
        if wait or (alone and compiling.done()):
            check_memory(compiling.result())

    begun = begin(task, restored, out, batch_size=config.batch_size, check=check)
    if unfinished and config.remat == "auto":
        with_policy = functools.cache(task.with_remat)
        step_of = lambda policy: with_policy(policy).compile_train_step
        task = with_policy(choose_remat(out, step_of))
    phases.mark("compile")
    return task, begun


def _feed(processes: int) -> MakeStream:
    """Makes the batches of the training records."""

    def feed(task: Task, begun: Beginning, out: Path, phases: Timings) -> Feed:
        del out, phases
        batches = task.batches(reference=begun.reference["train"], processes=processes)
        if begun.saved:
            batches.set_state(begun.saved["iterator"])
        return Feed(batches, functools.partial(to_global, mesh=task.mesh))

    return feed
