"""The training run, from the first file read to the exported model, as one story."""

import dataclasses
import functools
import logging
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from jaxpref import data
from jaxpref.errors import InputError
from jaxpref.models import build
from jaxpref.models.hub import resolve_folder
from jaxpref.models.huggingface import load_config, load_params
from jaxpref.models.huggingface import save as save_folder
from jaxpref.train import reference
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.config import TrainConfig, open_out
from jaxpref.train.mesh import (
    initialize_distributed,
    make_mesh,
    on_devices,
    row_shards,
    to_global,
)
from jaxpref.train.metrics import MetricsWriter
from jaxpref.train.objective import make_pair_logps
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.score import evaluation_metrics, make_score_step, score_pairs
from jaxpref.train.state import TrainState, init_state
from jaxpref.train.step import make_train_step

_log = logging.getLogger("jaxpref")

MAX_SKIPPED_IN_A_ROW = 10
"""Steps that may be non-finite one after another before the run gives up."""


def run(config: TrainConfig) -> Path:
    """Trains `config.model` on `config.data` and exports it.

    The same config and `out` resume after a kill: on the same software, devices, mesh and
    process count to the same bits.  Written to `out`: `config.json`, `metrics.jsonl`,
    `tensorboard/`, `reference/`, `checkpoints/`, `export/` (a Hugging Face folder).

    Returns:
      The exported folder.

    Raises:
      InputError: for anything the caller can put right; nothing written is lost.
    """
    initialize_distributed()
    out = open_out(config)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return _run(config, out, mesh)


def _run(config: TrainConfig, out: Path, mesh: jax.sharding.Mesh) -> Path:
    objective = config.objective
    rows = config.batch_size // config.accumulation
    if rows % row_shards(mesh):
        raise InputError(
            f"batch_size / accumulation = {rows} rows cannot be split over "
            f"data x fsdp = {row_shards(mesh)} devices; make it a multiple"
        )

    # ---- data: text -> tokens -> a fixed plan -------------------------------------
    folder = resolve_folder(config.model)
    tokenizer = data.load_tokenizer(folder)
    plan = _plan(config, tokenizer)
    shape = data.batch_shape(plan.train, plan.heldout)
    split = {
        "shape": shape,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "batch_size": config.batch_size,
        "accumulation": config.accumulation,
    }

    # ---- model, optimiser, state: restored, or born from the model folder ---------
    model_config = load_config(folder)
    longest = max(plan.train.longest, plan.heldout.longest)
    if longest > model_config.max_position_embeddings:
        raise InputError(
            f"{config.model}: a sequence of {longest} tokens is longer than the model's "
            f"{model_config.max_position_embeddings} positions; set --max-length"
        )
    model = build(
        dataclasses.replace(
            model_config,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
            remat=config.remat,
        )
    )
    pair_logps = make_pair_logps(model, chunk_size=config.logit_chunk)
    score_step = make_score_step(pair_logps)
    schedule = make_schedule(config.optimizer, config.max_steps)
    tx = make_optimizer(config.optimizer, schedule)
    new_state = functools.partial(init_state, tx=tx, objective=objective)
    params = jax.eval_shape(model.init, jax.random.key(0))
    abstract = on_devices(jax.eval_shape(new_state, params), mesh)
    checkpoints = Checkpoints(out / "checkpoints", keep=config.keep_checkpoints)
    restored = checkpoints.restore(abstract)
    if restored is not None and restored[1]["plan"] != plan.digest:
        raise InputError(
            f"{config.data}: its pairs are not those that the run in {out} began with; "
            "restore the file, or use another --out"
        )

    # ---- reference log-probs, then the reference weights are dropped --------------
    score = functools.partial(score_pairs, score_step, mesh=mesh)
    ordered = functools.partial(data.eval_batches, **split)
    params = None
    tables = {"train": None, "heldout": None}
    if objective.needs_reference:
        reference_folder = (
            resolve_folder(config.reference) if config.reference else folder
        )
        digest = reference.weights_digest(reference_folder, config.compute_dtype)
        for name, pairs in (("train", plan.train), ("heldout", plan.heldout)):
            path = out / "reference" / f"{name}.npz"
            tables[name] = _from_first_process(
                functools.partial(reference.load_table, path, pairs, digest),
                (len(pairs), objective.sides),
            )
            if tables[name] is None:
                if params is None:
                    params = load_params(reference_folder, model)
                tables[name] = score(
                    params,
                    ordered(pairs),
                    (len(pairs), objective.sides),
                    title=f"reference log-probs ({name})",
                )
                if jax.process_index() == 0:
                    reference.save_table(path, tables[name], pairs, digest)
        if reference_folder != folder:
            params = None
    if restored is None:
        if params is None:
            params = load_params(folder, model)
        state, next_index = jax.jit(new_state, donate_argnums=0)(params), None
    else:
        state, next_index = restored[0], restored[1]["iterator"]
    del params

    # ---- the loop: evaluate, save, next batch, step, write the previous metrics ---
    batches = data.batches(
        plan.train, seed=config.seed, reference_logps=tables["train"], **split
    )
    if next_index is not None:
        batches.set_state(next_index)
    train_step = make_train_step(pair_logps, objective, tx, schedule)
    start = int(state.step)
    writer = MetricsWriter(out, resumed_at=start)
    late = _LateMetrics(config, writer, plan.train, start)

    def evaluate(state: TrainState) -> None:
        late.flush()
        if not len(plan.heldout):
            return
        table = score(
            state.params,
            ordered(plan.heldout),
            (len(plan.heldout), objective.sides),
            title=f"evaluation at step {int(state.step)}",
        )
        writer.write(
            int(state.step),
            evaluation_metrics(
                objective,
                table,
                tables["heldout"],
                plan.heldout,
                state.objective_state,
            ),
        )

    def save(state: TrainState) -> None:
        meta = {"iterator": batches.get_state(), "plan": plan.digest}
        checkpoints.save(int(state.step), state, meta)

    try:
        for step in range(start, config.max_steps):
            if step % config.eval_every == 0:
                evaluate(state)
            if step % config.save_every == 0:
                save(state)
            batch = next(batches)
            state, metrics = train_step(state, to_global(batch, mesh))
            late.push(step + 1, metrics)
        evaluate(state)
        save(state)
        checkpoints.wait()
    finally:
        late.close()
        writer.close()
        checkpoints.close()

    export = out / "export"
    save_folder(export, model, state.params, source_folder=folder)
    return export


def _plan(config: TrainConfig, tokenizer) -> data.Plan:
    """The pairs of the run; `eval_data` takes the place of a held-out share."""
    make = functools.partial(
        data.make_plan, tokenizer=tokenizer, sides=config.objective.sides
    )
    if config.eval_data is None:
        plan = make(data.open_source(config.data), options=config.options)
    else:
        whole = dataclasses.replace(config.options, heldout_fraction=0.0)
        clean = dataclasses.replace(whole, flip_rate=0.0)
        plan = make(data.open_source(config.data), options=whole)
        held = make(data.open_source(config.eval_data), options=clean)
        digest = plan.digest + held.digest
        plan = dataclasses.replace(plan, heldout=held.train, digest=digest)
    if jax.process_index() == 0:
        print(f"{config.data}: {plan.describe()}", flush=True)
    return plan


class _LateMetrics:
    """Fetches a step's metrics only after the next step is on its way."""

    def __init__(self, config: TrainConfig, writer: MetricsWriter, pairs, start: int):
        self._config, self._writer, self._pairs = config, writer, pairs
        self._waiting = None
        self._skipped_in_a_row = 0
        self._tokens = self._pairs_done = 0
        self._since = time.perf_counter()
        self._bar = tqdm(
            total=config.max_steps,
            initial=start,
            desc=config.objective.name,
            unit="step",
            disable=jax.process_index() != 0,
        )

    def push(self, step: int, metrics: dict) -> None:
        waiting, self._waiting = self._waiting, (step, metrics)
        if waiting is not None:
            self._write(*waiting)

    def flush(self) -> None:
        if self._waiting is not None:
            self._write(*self._waiting)
            self._waiting = None

    def close(self) -> None:
        self._bar.close()

    def _write(self, step: int, metrics: dict) -> None:
        metrics = jax.device_get(metrics)
        finite, nonfinite = metrics.pop("finite"), metrics.pop("nonfinite_pairs")
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if not finite:
            self._report(step, nonfinite)
        self._tokens += int(metrics.pop("tokens"))
        self._pairs_done += int(metrics.pop("pairs"))
        self._bar.update()
        if step == 1:  # the first step is mostly compilation: not a rate
            self._restart_clock()
        if step % self._config.log_every == 0 or step in (1, self._config.max_steps):
            values = {name: float(value) for name, value in metrics.items()}
            seconds = time.perf_counter() - self._since
            if self._tokens:
                values["tokens_per_second"] = self._tokens / seconds
                values["pairs_per_second"] = self._pairs_done / seconds
            self._restart_clock()
            self._writer.write(step, values)
            shown = {"loss": f"{values['loss']:.4f}"}
            if "rewards/accuracies" in values:
                shown["accuracy"] = f"{values['rewards/accuracies']:.2f}"
            self._bar.set_postfix(shown)

    def _restart_clock(self) -> None:
        self._tokens = self._pairs_done = 0
        self._since = time.perf_counter()

    def _report(self, step: int, nonfinite: np.ndarray) -> None:
        ids = [self._pairs.ids[i] for i in nonfinite.ravel() if i >= 0]
        _log.warning(
            "step %d: the loss or its gradient is not finite; the step was skipped. %s",
            step,
            f"Pairs with a non-finite loss: {', '.join(ids)}"
            if ids
            else "Every pair's loss is finite: the gradient overflowed",
        )
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise InputError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row were not finite, the last at "
                f"step {step}; lower --learning-rate or use float32"
            )


def _from_first_process(load, shape: tuple[int, int]) -> np.ndarray | None:
    """What process 0 finds on its disk, on every process."""
    table = load() if jax.process_index() == 0 else None
    if jax.process_count() == 1:
        return table
    found = multihost_utils.broadcast_one_to_all(np.asarray(table is not None))
    if not found:
        return None
    blank = np.zeros(shape, np.float32) if table is None else table
    return np.asarray(multihost_utils.broadcast_one_to_all(blank))
