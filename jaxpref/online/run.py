"""A training run on answers that are sampled in training."""

import dataclasses
import functools
from pathlib import Path

import jax

from jaxpref.errors import InputError
from jaxpref.online import prompts as read
from jaxpref.online.batch import with_slots
from jaxpref.online.options import SamplingOptions
from jaxpref.online.rewards import ZeroOrOne, check_records, digests, in_memory
from jaxpref.online.stream import SampledStream
from jaxpref.rewards import ModelOptions, RewardOptions, combined_reward
from jaxpref.runtime.mesh import initialize_distributed
from jaxpref.train.config import TrainConfig
from jaxpref.train.prepare import prepare
from jaxpref.train.run import run as train

UNREAD = ("eval_data", "keep_best", "loader_processes", "eval_samples", "eval_every")
"""Options of other runs: there are no evaluations, and no records to prepare."""


def run(config: TrainConfig, sampling: SamplingOptions, rewards: RewardOptions) -> Path:
    """Trains `config.model` on its own answers to the prompts of `config.data`.

    The same arguments and `out` resume an interrupted run, with the same bits on the
    same software and devices.  In addition to what `train.run` writes, `samples.jsonl`
    has answers with their rewards.

    Args:
      config: the config; its objective learns from sampled answers, and its batch size
        is the number of prompts of a step.
      sampling: how answers are sampled.
      rewards: what says how good they are.

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
    _check(config, sampling, rewards)
    dtype = config.compute_dtype
    options = ModelOptions(
        batch_size=config.batch_size,
        compute_dtype=None if dtype == "float64" else dtype,
        mesh=config.mesh,
        template=config.options.template_options,
    )
    reward = combined_reward(rewards, options)
    prompts, skipped = read.read(config, sampling)
    check_records(reward, prompts)
    reward = in_memory(reward)
    objective = config.objective
    how = dataclasses.asdict(sampling)
    how.pop("log_samples")  # may differ when a run is resumed
    described = {
        "sampling": how,
        "rewards": dataclasses.asdict(rewards),
        "records": read.digest(prompts),
        "reward_models": digests(reward.parts),
    }
    described = {**objective.options, **described}
    objective = dataclasses.replace(objective, options=described)
    config = dataclasses.replace(config, objective=objective)
    name = config.data if isinstance(config.data, str) else config.data[0]
    datasets = read.with_room(prompts, name, objective.kind, sampling, skipped)
    drawn = _of_drawn_prompts(config, sampling)
    task = prepare(drawn, read=lambda *args, **others: datasets)
    task = dataclasses.replace(task, layout=with_slots(task.layout))
    make_stream = functools.partial(
        SampledStream,
        prompts=prompts,
        reward=ZeroOrOne(reward) if _rates(config) else reward,
        sampling=sampling,
        log_every=config.log_every,
    )
    return train(config, task=task, make_stream=make_stream)


def _of_drawn_prompts(config: TrainConfig, sampling: SamplingOptions) -> TrainConfig:
    """The config with as many epochs of steps as there are of prompts.

    Several steps learn from the answers to the same prompts.
    """
    if config.epochs is None:
        return config
    epochs = config.epochs * sampling.updates_per_sample
    return dataclasses.replace(config, epochs=epochs)


def _rates(config: TrainConfig) -> list[str]:
    """The rates of a verifier's errors that are given, as options."""
    options = config.objective.options
    names = ("false_positive_rate", "false_negative_rate")
    return [f"--objective.{x.replace('_', '-')}" for x in names if options.get(x)]


def _check(
    config: TrainConfig, sampling: SamplingOptions, rewards: RewardOptions
) -> None:
    """Refuses options that nothing reads, or that do not go together.

    Raises:
      InputError: naming the option.
    """
    name = config.objective.name
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in UNREAD and value != field.default:
            raise InputError(
                f"--{field.name.replace('_', '-')} {value}: {name} samples answers in "
                "training and does not read it; leave it out"
            )
    if rewards.combine == "constrained":
        raise InputError(
            "--combine constrained: the answers of a step may not reach --at-least; "
            "use --combine sum with --weights, such as the multipliers that jaxpref "
            "score finds for answers of the model"
        )
    if sampling.overlong_buffer and (rates := _rates(config)):
        raise InputError(
            f"--overlong-buffer {sampling.overlong_buffer}: {rates[0]} corrects "
            "rewards of 0 and 1, without a penalty; give one of them"
        )
    if name == "reinforce" and sampling.updates_per_sample > 1:
        raise InputError(
            f"--updates-per-sample {sampling.updates_per_sample}: reinforce has a mean "
            "of the rewards of earlier steps as the baseline; use 1, or "
            "--objective rloo"
        )
