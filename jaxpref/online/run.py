"""A training run on answers that are sampled in training."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref import data
from jaxpref.data.bad_rows import BadRow
from jaxpref.data.columns import SAMPLED
from jaxpref.errors import InputError
from jaxpref.online import pairs
from jaxpref.online import prompts as read
from jaxpref.online.batch import with_slots
from jaxpref.online.checks import check, check_prompts
from jaxpref.online.heldout import Heldout
from jaxpref.online.options import SamplingOptions
from jaxpref.online.rates import given_rates, rates_of
from jaxpref.online.rewards import ZeroOrOne, check_records, digests
from jaxpref.online.stream import SampledStream
from jaxpref.rewards import Combined, ModelOptions, RewardOptions, combined_reward
from jaxpref.runtime.mesh import initialize_distributed
from jaxpref.train.config import TrainConfig
from jaxpref.train.prepare import prepare
from jaxpref.train.run import run as train
from jaxpref.train.task import Task


def run(config: TrainConfig, sampling: SamplingOptions, rewards: RewardOptions) -> Path:
    """Trains `config.model` on its own answers to the prompts of `config.data`.

    With an objective of pairs, such as `hypo`, also on the pairs, and without rewards.

    The same arguments and `out` resume an interrupted run, with the same bits on the
    same software and devices.  In addition to what `train.run` writes, `samples.jsonl`
    has answers with their rewards.

    Args:
      config: the config; its objective learns from sampled answers, and its batch size
        is the number of prompts of a step.
      sampling: how answers are sampled.
      rewards: what says how good they are; the default if the objective reads none.

    Returns:
      The exported folder.

    Raises:
      InputError: for anything that the caller can fix; nothing written is lost.
      Preempted: after SIGTERM during training, once the last step is saved.
      Stopped: after too many bad steps in a row.
    """
    initialize_distributed()
    if jax.process_count() > 1:
        raise InputError(
            f"--objective {config.objective.name}: samples answers on one process; "
            f"this run has {jax.process_count()}; start it on one host"
        )
    check(config, sampling, rewards)
    if SAMPLED not in config.objective.reads:
        return _run_on_pairs(config, sampling)
    dtype = config.compute_dtype
    options = ModelOptions(
        batch_size=config.batch_size,
        compute_dtype=None if dtype == "float64" else dtype,
        mesh=config.mesh,
        template=config.options.template_options,
    )
    reward = combined_reward(rewards, options)
    prompts = _read(config, sampling, reward)
    check_prompts(config, sampling, len(prompts.train))
    reward = reward.in_memory()
    described = _described(config, sampling, rewards, prompts)
    described["reward_models"] = digests(reward.parts)
    config = _with_options(config, described)
    task, heldout = _prepared(config, sampling, prompts)
    rates = given_rates(config)
    make_stream = functools.partial(
        SampledStream,
        prompts=prompts.train,
        reward=ZeroOrOne(reward, rates) if rates else reward,
        sampling=sampling,
        heldout=heldout,
        log_every=config.log_every,
    )
    return train(config, task=task, make_stream=make_stream)


@dataclasses.dataclass(frozen=True)
class _Prompts:
    """The prompts of a run, and the rows of their files that are skipped."""

    train: list[data.Prompt]
    heldout: list[data.Prompt]
    skipped: list[BadRow]


def _read(config: TrainConfig, sampling: SamplingOptions, reward: Combined) -> _Prompts:
    """Reads the prompts, and what the reward needs of their records.

    Raises:
      InputError: naming the record that lacks something.
    """
    prompts, skipped = read.read(read.file_of(config), config, sampling)
    check_records(reward, prompts)
    if config.eval_data is None:
        return _Prompts(prompts, [], skipped)
    heldout, more = read.read(config.eval_data, config, sampling)
    check_records(reward, heldout)
    read.warn_of_shared(heldout, prompts, config.eval_data)
    return _Prompts(prompts, heldout, [*skipped, *more])


def _run_on_pairs(config: TrainConfig, sampling: SamplingOptions) -> Path:
    """The same with pairs, whose prompts are answered; no reward is read."""
    config = _with_options(config, {"sampling": _decisive(sampling)})
    options = dataclasses.replace(config.options, heldout_fraction=0.0)
    config = dataclasses.replace(config, options=options)
    read_pairs = functools.partial(pairs.read, sampling=sampling)
    task = prepare(_of_drawn_prompts(config, sampling), read=read_pairs)
    task = dataclasses.replace(task, layout=with_slots(task.layout))
    make_stream = functools.partial(
        SampledStream,
        prompts=pairs.PairPrompts(task),
        reward=pairs.no_reward,
        sampling=sampling,
        heldout=None,
        log_every=config.log_every,
    )
    return train(config, task=task, make_stream=make_stream)


def _decisive(sampling: SamplingOptions) -> dict[str, Any]:
    """The options of sampling that may not differ when a run is resumed."""
    found = dataclasses.asdict(sampling)
    found.pop("log_samples")
    return found


def _with_options(config: TrainConfig, more: Mapping[str, Any]) -> TrainConfig:
    """The config with further options of its objective, for `config.json`."""
    options = {**config.objective.options, **more}
    objective = dataclasses.replace(config.objective, options=options)
    return dataclasses.replace(config, objective=objective)


def _described(
    config: TrainConfig,
    sampling: SamplingOptions,
    rewards: RewardOptions,
    prompts: _Prompts,
) -> dict[str, Any]:
    """What decides what the run computes, for `config.json`."""
    described = {
        "sampling": _decisive(sampling),
        "rewards": dataclasses.asdict(rewards),
        "records": read.digest(prompts.train),
    }
    if prompts.heldout:
        described["eval_data_records"] = read.digest(prompts.heldout)
    return {**config.objective.options, **described}


def _prepared(
    config: TrainConfig, sampling: SamplingOptions, prompts: _Prompts
) -> tuple[Task, Heldout | None]:
    """The task, and the prompts of its evaluations.

    The layout has room for both, and the task has no held-out records: they have no
    answers that could be scored as those of other runs.
    """
    rates = rates_of(prompts.train, config)
    kind, file = config.objective.kind, read.file_of(config)
    train_data = read.with_room(prompts.train, sampling, rates)
    heldout = train_data.take(np.arange(0))
    if prompts.heldout:  # their rates are not read
        unread = [dict.fromkeys(rates[0], 0.0)] * len(prompts.heldout)
        heldout = read.with_room(prompts.heldout, sampling, unread)
    splits = data.Splits(
        train=train_data,
        heldout=heldout,
        report={"prompts": len(prompts.train)},
        digest=read.digest(prompts.train),
        kind=kind,
        skipped=tuple(prompts.skipped),
    )
    datasets = data.Datasets(splits, (file,), (config.eval_data or file,))
    drawn = _of_drawn_prompts(config, sampling)
    task = prepare(drawn, read=lambda *args, **others: datasets)
    splits = task.datasets.splits
    trained = dataclasses.replace(splits, heldout=splits.heldout.take(np.arange(0)))
    task = dataclasses.replace(
        task,
        layout=with_slots(task.layout),
        datasets=dataclasses.replace(task.datasets, splits=trained),
    )
    if not prompts.heldout:
        return task, None
    return task, Heldout(prompts.heldout, splits.heldout, sampling.eval_group_size)


def _of_drawn_prompts(config: TrainConfig, sampling: SamplingOptions) -> TrainConfig:
    """The config with as many epochs of steps as there are of prompts.

    Several steps learn from the answers to the same prompts.
    """
    if config.epochs is None:
        return config
    epochs = config.epochs * sampling.updates_per_sample
    return dataclasses.replace(config, epochs=epochs)
