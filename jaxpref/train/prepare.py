"""From a config to a task: the only place that reads the whole config."""

import functools
from collections.abc import Callable

import jax

from jaxpref import data
from jaxpref.data.layouts.choose import make_layout
from jaxpref.data.probe import check_rendering
from jaxpref.data.read import read_datasets
from jaxpref.models import Architecture, Model, Numerics, RewardModel
from jaxpref.models.folder import check_folder
from jaxpref.models.hub import resolve_folder
from jaxpref.models.reward import padding_of
from jaxpref.models.soft_prompt import start_tokens
from jaxpref.models.soft_prompt_files import soft_prompt_length
from jaxpref.models.weights import Weights, resolve_weights
from jaxpref.objectives.objective import Objective
from jaxpref.objectives.penalties import with_router_balance
from jaxpref.runtime.mesh import check_rows, make_mesh, row_shards, share_of_rows
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.runtime.saved_optimizer import saved_optimizer
from jaxpref.scoring.checks import check_fits, check_logit_chunk, check_totals
from jaxpref.scoring.frozen_models import (
    folders_by_name,
    frozen_models,
    frozen_weights,
)
from jaxpref.scoring.moving_reference import NAME as MOVING
from jaxpref.scoring.moving_reference import MovingReference, begins_at
from jaxpref.scoring.partition import Trained
from jaxpref.scoring.reference import Reference, model_digest
from jaxpref.scoring.reward_head import head_of
from jaxpref.scoring.scorer import ExportOptions, Scorer
from jaxpref.scoring.scores import reads_reference, stored_scores
from jaxpref.scoring.twin import make_scorer
from jaxpref.train.config import TrainConfig
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.options import ComputeOptions, steps_of
from jaxpref.train.task import Task


def prepare(
    config: TrainConfig, *, read: Callable[..., data.Datasets] = read_datasets
) -> Task:
    """Reads the model's config and the data, and builds the task of a run.

    Args:
      config: the config.
      read: reads the records, as `read_datasets`; runs may share what it returns.

    Raises:
      InputError: for anything that the caller can fix; nothing is written.
    """
    objective = with_router_balance(config.objective, config.router_balance)
    check_logit_chunk(config.logit_chunk, objective.scores)
    compute_dtype = config.compute_dtype or default_compute_dtype()
    mesh = make_mesh(config.mesh)
    if config.row_length == "none":
        check_rows(config.batch_size, config.accumulation, mesh)
    folder = resolve_folder(config.model)
    start = resolve_weights(config.model, config.adapter, config.lora.base)
    head = head_of(objective.reads, objective.options, config.head, start)
    rewards = head is not None
    kind = functools.partial(RewardModel, head=head) if rewards else Model
    # Before the data is read, since this check is quick.
    architecture = check_folder(folder, kind, new_head=rewards)
    check_totals(objective.totals, architecture)
    model = kind(architecture, _numerics(config, compute_dtype, objective))
    tokenizer = data.load_tokenizer(folder, config.options.template_options)
    soft = start_tokens(
        config.soft_prompt, tokenizer, architecture.vocab_size, seed=config.seed
    )
    reference = _reference(config, start, architecture, compute_dtype, soft)
    models = frozen_models(config.teachers, reference, start, architecture)
    scorer = _scorer(config, objective, model, soft, start, reference)
    stops, padding = data.stop_tokens(tokenizer), padding_of(tokenizer)
    if rewards:  # as at export, but before the time for training is spent
        check_rendering(tokenizer, config.model, padding=padding and padding.id)
    before = len(soft) or soft_prompt_length(start.adapter)
    options = data.for_model(config.options, architecture.context_length - before)
    datasets = read(
        tokenizer,
        options,
        kind=objective.kind,
        mix=config.mix,
        train=config.data,
        heldout=config.eval_data,
        whole_turns=rewards,
        scored_by=folders_by_name(config.teachers, reference, models),
    ).prefixed(before)
    splits = datasets.splits
    check_fits(datasets.train_sources, splits.train, config.model, architecture)
    check_fits(datasets.heldout_sources, splits.heldout, config.model, architecture)
    steps = steps_of(config, len(splits.train))
    order, layout = _order_and_layout(config, splits, mesh, steps)
    schedule_of = functools.partial(make_schedule, config.optimizer)
    return Task(
        scorer=scorer,
        objective=objective,
        optimizer=make_optimizer(
            config.optimizer, schedule_of(steps), seed=config.seed
        ),
        schedule=schedule_of(steps),
        schedule_of=schedule_of,
        mesh=mesh,
        layout=layout,
        order=order,
        seed=config.seed,
        steps=steps,
        num_annotators=len(splits.train.annotator_names),
        datasets=datasets,
        start=start,
        reference=reference,
        models=models,
        moving=_moving(config, scorer),
        earlier=saved_optimizer(config.optimizer_from),
        export=ExportOptions(folder, config.model, config.export_dtype, padding, stops),
    )


def _scorer(
    config: TrainConfig,
    objective: Objective,
    model: Model | RewardModel,
    soft_prompt: tuple[int, ...],
    start: Weights,
    reference: Reference | None,
) -> Scorer:
    return make_scorer(
        model,
        objective.scores,
        statistics=objective.statistics,
        heads=objective.heads,
        chunk_size=config.logit_chunk,
        num_models=objective.num_models,
        trained=Trained(
            train=config.train,
            lora=config.lora,
            soft_prompt=soft_prompt,
            start=start,
            reference=reference and reference.weights,
            seed=config.seed,
        ),
    )


def _order_and_layout(
    config: TrainConfig,
    splits: data.Splits,
    mesh: jax.sharding.Mesh,
    steps: int,
) -> tuple[data.Order, data.Layout]:
    """The order of the training pairs, and the layout of all batches."""
    empty_share = config.mix.empty_share if config.mix else None
    order_of = functools.partial(
        data.make_order, splits.train, empty_share=empty_share, weights=splits.weights
    )
    order = order_of(seed=config.seed)
    layout = make_layout(
        splits,
        order,
        # Equal for all seeds, so that these share the reference's scores.
        sizes_for=order_of(seed=0) if config.seed else None,
        shards=row_shards(mesh),
        share=share_of_rows(mesh),
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        row_length=None if config.row_length == "none" else config.row_length,
        num_steps=steps,
    )
    return order, layout


def _numerics(
    config: ComputeOptions, compute_dtype: str, objective: Objective
) -> Numerics:
    return Numerics(
        param_dtype=config.param_dtype,
        compute_dtype=compute_dtype,
        remat="none" if config.remat == "auto" else config.remat,
        unroll=config.unroll,
        # A gradient probe differentiates a gradient.
        twice_differentiable=objective.probe is not None,
    )


def _moving(config: TrainConfig, scorer: Scorer) -> MovingReference | None:
    if config.reference != MOVING:
        return None
    names = stored_scores(config.objective.scores)
    scores = scorer.with_scores(names)
    return MovingReference(scores, tuple(sorted(names)), config.moving_average)


def _reference(
    config: TrainConfig,
    start: Weights,
    architecture: Architecture,
    compute_dtype: str,
    soft_prompt: tuple[int, ...],
) -> Reference | None:
    """The reference of a run, or None if its objective reads none, or it has none.

    Raises:
      InputError: if the reference has another architecture.
    """
    if not reads_reference(config.objective.scores) or config.reference == "none":
        return None
    begins = begins_at(config.reference)
    weights = frozen_weights(begins, start, architecture, flag="--reference")
    dtypes = f"{config.param_dtype} {compute_dtype}"
    if soft_prompt:
        dtypes += f" after the tokens {soft_prompt}"
    return Reference(
        name=config.reference or config.model,
        weights=weights,
        scores=tuple(sorted(stored_scores(config.objective.scores))),
        numerics=f"{config.logit_chunk} logits at a time",
        digest=model_digest(weights, dtypes),
        compute_dtype=compute_dtype,
    )
