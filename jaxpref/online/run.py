"""A training run on answers that are sampled in training."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data.columns import SAMPLED
from jaxpref.online.batch import with_slots
from jaxpref.online.checks import check
from jaxpref.online.heldout import Heldout
from jaxpref.online.options import CERTAIN, SamplingOptions, UncertainReward
from jaxpref.online.source import pairs_source, rewarded_source
from jaxpref.online.stream import SampledStream
from jaxpref.rewards import RewardOptions
from jaxpref.runtime.mesh import initialize_distributed
from jaxpref.train.config import TrainConfig
from jaxpref.train.prepare import prepare
from jaxpref.train.run import run as train
from jaxpref.train.task import Task


def run(
    config: TrainConfig,
    sampling: SamplingOptions,
    rewards: RewardOptions,
    uncertain: UncertainReward = CERTAIN,
) -> Path:
    """Trains `config.model` on its own answers to the prompts of `config.data`.

    With an objective of pairs, such as `hypo`, also on the pairs, and without rewards.

    The same arguments and `out` resume an interrupted run, with the same bits on the
    same software, devices, mesh and process count.  In addition to what `train.run`
    writes, `samples.jsonl` and `eval_samples.jsonl` have answers with their rewards.

    Several processes sample on their devices together, and each holds all answers.

    Args:
      config: the config; its objective learns from sampled answers, and its batch size
        is the number of prompts of a step.
      sampling: how answers are sampled.
      rewards: what says how good they are; the default if the objective reads none.
      uncertain: the uncertainty of a single reward model, if it lowers the reward.

    Returns:
      The exported folder.

    Raises:
      InputError: for anything that the caller can fix; nothing written is lost.
      Preempted: after SIGTERM during training, once the last step is saved.
      Stopped: after too many bad steps in a row.
    """
    initialize_distributed()
    check(config, sampling, rewards)
    if SAMPLED in config.objective.reads:
        source = rewarded_source(config, sampling, rewards, uncertain)
    else:
        source = pairs_source(sampling)
    described = {"sampling": _decisive(sampling), **source.described}
    config = _with_options(config, described)
    task = prepare(_of_drawn_prompts(config, sampling), read=source.read)
    heldout = None
    if source.heldout:
        dataset = task.datasets.splits.heldout
        heldout = Heldout(source.heldout, dataset, sampling.eval_group_size)
    task = _without_heldout(task)
    make_stream = functools.partial(
        SampledStream,
        prompts=source.prompts(task),
        reward=source.reward,
        sampling=sampling,
        heldout=heldout,
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


def _of_drawn_prompts(config: TrainConfig, sampling: SamplingOptions) -> TrainConfig:
    """The config with as many epochs of steps as there are of prompts.

    Several steps learn from the answers to the same prompts.
    """
    if config.epochs is None:
        return config
    epochs = config.epochs * sampling.updates_per_sample
    return dataclasses.replace(config, epochs=epochs)


def _without_heldout(task: Task) -> Task:
    """The task with more slots in packed rows, and without held-out records.

    Its layout has room for the held-out prompts, but they have no answers that could be
    scored as those of other runs.
    """
    splits = task.datasets.splits
    splits = dataclasses.replace(splits, heldout=splits.heldout.take(np.arange(0)))
    datasets = dataclasses.replace(task.datasets, splits=splits)
    return dataclasses.replace(task, layout=with_slots(task.layout), datasets=datasets)
