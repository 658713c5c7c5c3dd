"""The training run, from the first file read to the exported model, as one story."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax

from jaxpref import data
from jaxpref.models import RewardModel, build
from jaxpref.models.hub import resolve_folder
from jaxpref.models.huggingface import load_config, load_params
from jaxpref.models.huggingface import save as save_folder
from jaxpref.models.reward import padding_of
from jaxpref.objectives import co_training
from jaxpref.runtime import heartbeat
from jaxpref.runtime.compilation import log_compilations
from jaxpref.runtime.mesh import (
    check_rows,
    initialize_distributed,
    make_mesh,
    on_devices,
    row_shards,
    to_global,
)
from jaxpref.runtime.precision import with_compute_dtype
from jaxpref.runtime.preemption import Preempted, watched
from jaxpref.runtime.processes import assert_equal_across_processes
from jaxpref.runtime.profile import profiled
from jaxpref.scoring import reference
from jaxpref.scoring.score_dataset import (
    evaluation_metrics,
    make_score_step,
    score_pairs,
)
from jaxpref.scoring.scores import make_scores
from jaxpref.train.agreement import agree_on_batch, versions
from jaxpref.train.batching import make_layout, make_order
from jaxpref.train.best import Best
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.config import TrainConfig, open_run, remember, to_json
from jaxpref.train.elsewhere import surroundings, told_of_change
from jaxpref.train.feed import Feed
from jaxpref.train.guard import Guard
from jaxpref.train.inputs import check_fits, read_plan
from jaxpref.train.memory import choose_remat
from jaxpref.train.metrics import LateMetrics, MetricsWriter
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.programs import describe, padding_advice
from jaxpref.train.resume import check_same
from jaxpref.train.state import TrainState, init_state
from jaxpref.train.step import make_train_step


def run(config: TrainConfig) -> Path:
    """Trains `config.model` on `config.data` and exports it.

    The same config and `out` resume after a kill: on the same software, devices, mesh
    and process count to the same bits.  Written to `out`: `config.json`,
    `metrics.jsonl`, `tensorboard/`, `reference/`, `checkpoints/`, `export/` (a Hugging
    Face folder), `memory.json` where `remat` is "auto", and `best.json` with
    `keep_best`.

    Returns:
      The exported folder.

    Raises:
      InputError: for anything the caller can put right; nothing written is lost.
      Preempted: after SIGTERM while it trains, once the last step is saved.
      Stopped: after too many bad steps in a row; see `guard`.
    """
    initialize_distributed()
    config = with_compute_dtype(config)
    out = open_run(config)
    mesh = make_mesh(config.mesh)
    explain = config.explain_compiles and jax.process_index() == 0
    explaining = log_compilations() if explain else contextlib.nullcontext()
    with jax.set_mesh(mesh), explaining, heartbeat.reporting():
        assert_equal_across_processes("before the run", versions())
        assert_equal_across_processes("before the run", to_json(config))
        return _run(config, out, mesh)


def _run(config: TrainConfig, out: Path, mesh: jax.sharding.Mesh) -> Path:
    objective = config.objective
    if config.row_length is None:
        check_rows(config.batch_size, config.accumulation, mesh)

    # ---- data: text -> tokens -> a fixed plan -------------------------------------
    folder = resolve_folder(config.model)
    tokenizer = data.load_tokenizer(folder)
    plan = read_plan(config, tokenizer)
    order = make_order(
        plan.train,
        seed=config.seed,
        empty_share=None if config.mix is None else config.mix.empty_share,
    )
    batching = make_layout(
        plan,
        order,
        mesh,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        row_length=config.row_length,
        num_steps=config.max_steps,
    )

    # ---- model, optimiser, state: restored, or born from the model folder ---------
    model_config = load_config(folder)
    check_fits(config.sources, plan.train, config.model, model_config)
    check_fits(config.heldout_sources, plan.heldout, config.model, model_config)
    make_model = RewardModel if objective.needs_rewards else build
    model = make_model(
        dataclasses.replace(
            model_config,
            param_dtype=config.param_dtype,
            compute_dtype=config.compute_dtype,
            remat="none" if config.remat == "auto" else config.remat,
            unroll=config.unroll,
            kernels=not objective.mixes,  # bvpo differentiates a gradient
        )
    )
    new_params, load = model.init, functools.partial(load_params, folder, model)
    scores = make_scores(model, objective.needs, chunk_size=config.logit_chunk)
    scoring = functools.partial(
        score_pairs, eval_batches=batching.eval_batches, mesh=mesh
    )
    score = score_reference = functools.partial(scoring, make_score_step(scores))
    if "log_weights" in objective.needs:
        # The reference's scores are kept for all losses: from the program of most.
        plain = make_scores(
            model, objective.needs - {"log_weights"}, chunk_size=config.logit_chunk
        )
        score_reference = functools.partial(scoring, make_score_step(plain))
    if objective.trains_two:
        new_params, load = co_training.both(new_params), co_training.both(load)
        score = functools.partial(
            scoring, make_score_step(co_training.scores_of_both(scores))
        )
    if jax.process_index() == 0:
        scorers = {score} if len(plan.heldout) else set()
        scorers |= {score_reference} if objective.stored else set()
        programs = ["train_step"] + ["score_step"] * len(scorers)
        print(describe(batching, programs), flush=True)
        if config.row_length is None and not objective.mixes:
            told = padding_advice(
                batching, order, plan.train, plan.heldout, shards=row_shards(mesh)
            )
            if told is not None:
                print(told, flush=True)
    schedule = make_schedule(config.optimizer, config.max_steps)
    tx = make_optimizer(config.optimizer, schedule)
    new_state = functools.partial(
        init_state,
        tx=tx,
        objective=objective,
        num_annotators=len(plan.train.annotator_names),
    )
    params = jax.eval_shape(new_params, jax.random.key(0))
    abstract = on_devices(jax.eval_shape(new_state, params), mesh)
    checkpoints = Checkpoints(out / "checkpoints", keep=config.keep_checkpoints)
    restored = checkpoints.restore(abstract)
    where = surroundings(mesh)
    digest = reference.reference_digest(config)
    saved = {}
    if restored is not None:
        saved = restored[1]
        check_same(saved, config, out, plan, digest)
        told = told_of_change(
            saved.get("surroundings", where), where, int(restored[0].step)
        )
        if told is not None and jax.process_index() == 0:
            print(told, flush=True)

    # ---- the reference: scored once and dropped, or kept where that is not enough --
    params = None
    if restored is None:
        params = load(jax.random.key(config.seed))
    one = params["one"] if params and objective.trains_two else params
    layout = (
        f"{batching}, mesh {dict(mesh.shape)}, {config.logit_chunk} logits at a time"
    )
    tables = reference.make_tables(
        config, plan, out, model, one, score_reference, digest, layout
    )
    del one
    kept = None
    if objective.needs_live_reference:
        kept = reference.load_reference(config, model)
        if jax.process_index() == 0:
            print(f"{objective.name} keeps the reference's weights in memory: it reads")
            print("whole distributions, which cannot be stored beforehand", flush=True)
    if restored is None:
        state = jax.jit(new_state, donate_argnums=0)(params)
    else:
        state = restored[0]
    del params

    # ---- the loop: evaluate, save, next batch, step, write the previous metrics ---
    batches = batching.batches(
        plan.train,
        order,
        reference=tables["train"],
        processes=config.loader_processes,
    )
    if restored is not None:
        batches.set_state(saved["iterator"])
    feed = Feed(batches, functools.partial(to_global, mesh=mesh))

    def step_of(remat: str) -> Callable:
        own = make_model(dataclasses.replace(model.config, remat=remat))
        scores = make_scores(own, objective.needs, chunk_size=config.logit_chunk)
        if objective.trains_two:
            scores = co_training.scores_of_both(scores)
        return make_train_step(scores, objective, tx, schedule)

    remat = model.config.remat
    if config.remat == "auto":
        made = batching.eval_batches(plan.train, reference=tables["train"])
        one = to_global(next(iter(made)), mesh)
        remat = choose_remat(
            out, lambda remat: step_of(remat).lower(abstract, one, kept).compile()
        )
        del one
    train_step = step_of(remat)
    start = int(state.step)
    remember(config, out)
    writer = MetricsWriter(out, resumed_at=start)
    guard = Guard(config, plan.train, out, saved.get("first_losses", ()))
    late = LateMetrics(writer, config=config, judge=guard.judge, start=start)
    best = Best(config.keep_best, out, saved.get("best"))
    checkpoints.best = best.step
    whole = batching.of_all_processes()
    make_whole = functools.partial(whole.batches, plan.train, order)

    def evaluate(step: int, state: TrainState) -> bool:
        """Whether this is the best step so far."""
        found = {}
        if len(plan.heldout):
            title = f"evaluation at step {step}"
            scored = score(state.params, plan.heldout, kept, title=title)
            of_set = tables["heldout"], plan.heldout, state.objective_state
            found = evaluation_metrics(objective, scored, *of_set)
            writer.write(step, found)
        better = guard.well and best.improved(step, found)
        checkpoints.best = best.step
        return better

    def save(step: int, state: TrainState) -> None:
        agree_on_batch(step, make_whole, plan, feed, guard.batch())
        meta = {
            "iterator": feed.get_state(),
            "plan": plan.digest,
            "reference": digest,
            "surroundings": where,
            "first_losses": guard.get_state(),
            "best": best.get_state(),
        }
        checkpoints.save(step, state, meta)

    closing = contextlib.closing
    with closing(checkpoints), closing(writer), closing(late), closing(feed):
        traced = profiled(train_step, out, steps=config.profile)
        with watched(start) as noticed, traced as do_step:
            for step in range(start, config.max_steps):
                better = False
                if step % config.eval_every == 0:
                    with late.paused():
                        better = evaluate(step, state)
                if (better or step % config.save_every == 0) and step > start:
                    with late.paused():
                        if guard.well:
                            save(step, state)
                with late.waiting():
                    batch = next(feed)
                heartbeat.beat(f"the batch of step {step + 1}")
                state, metrics = do_step(state, batch, kept)
                late.push(step + 1, metrics, batch.pairs)
                if noticed(step + 1):
                    with late.paused():
                        if guard.well:
                            save(step + 1, state)
                        checkpoints.wait()
                    raise Preempted(step + 1, saved=guard.well)
        with late.paused():
            guard.check_end(max(start, config.max_steps))
            # Saved first: an interrupt of the last evaluation costs no step.
            save(max(start, config.max_steps), state)
            evaluate(max(start, config.max_steps), state)
            checkpoints.wait()
        if config.export == "best" and best.step not in (None, int(state.step)):
            if jax.process_index() == 0:
                print(f"exporting step {best.step}: {config.keep_best}", flush=True)
            del state
            state, _ = checkpoints.restore(abstract, only=best.step)

    exported = {"export": state.params}
    if objective.trains_two:
        exported = {"export": state.params["one"], "export_two": state.params["two"]}
    for name, trained in exported.items():
        save_folder(
            out / name,
            model,
            trained,
            folder,
            config.export_dtype,
            padding=padding_of(tokenizer),
        )
    return out / "export"
