"""Which options of a run on sampled answers go together."""

import dataclasses
from collections.abc import Sequence

from jaxpref.data.columns import FLAG, SAMPLED, WEIGHT
from jaxpref.errors import InputError
from jaxpref.online.options import (
    OF_EVALUATIONS,
    OF_REWARDS,
    UNREAD,
    SamplingOptions,
)
from jaxpref.online.rates import given_rates
from jaxpref.rewards import RewardOptions
from jaxpref.rewards.combine import LEAST_ANSWERS
from jaxpref.train.config import TrainConfig


def check(
    config: TrainConfig, sampling: SamplingOptions, rewards: RewardOptions
) -> None:
    """Refuses options that nothing reads, or that do not go together.

    Raises:
      InputError: naming the option.
    """
    name = config.objective.name
    given = {
        field.name: f"--{field.name.replace('_', '-')} {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    is_rewarded = SAMPLED in config.objective.reads
    unread = UNREAD if is_rewarded else (*UNREAD, "eval_data", *OF_EVALUATIONS)
    for option in [given[x] for x in unread if x in given]:
        raise InputError(
            f"{option}: {name} samples answers in training and does not read it; "
            "leave it out"
        )
    if config.options.heldout_fraction:
        raise InputError(
            f"heldout_fraction {config.options.heldout_fraction}: {name} evaluates no "
            "part of its data; leave it out"
        )
    if not is_rewarded:
        _check_without_rewards(name, sampling, rewards)
    if config.eval_data is None:
        evaluating = [given[x] for x in OF_EVALUATIONS if x in given]
        if sampling.eval_group_size > 1:
            evaluating.append(f"--eval-group-size {sampling.eval_group_size}")
        for option in evaluating:
            raise InputError(
                f"{option}: {name} evaluates only on the prompts of --eval-data; give "
                "them, or leave this option out"
            )
    others = ", or --objective ppo_clip or reinforce" * is_rewarded
    if sampling.group_size < 2 and config.objective.compares_samples:
        raise InputError(
            f"--group-size {sampling.group_size}: {name} compares the answers to a "
            f"prompt; give at least 2{others}"
        )
    is_default = sampling.prompt_candidates == SamplingOptions.prompt_candidates
    if sampling.prompt_target is None and not is_default:
        raise InputError(
            f"--prompt-candidates {sampling.prompt_candidates}: only --prompt-target "
            "reads it; give both, or leave it out"
        )
    if rewards.combine == "constrained":
        raise InputError(
            "--combine constrained: the answers of a step may not reach --at-least; "
            "use --combine sum with --weights, such as the multipliers that jaxpref "
            "score finds for answers of the model"
        )
    if sampling.overlong_buffer and (rates := given_rates(config)):
        raise InputError(
            f"--overlong-buffer {sampling.overlong_buffer}: {rates[0]} corrects "
            "rewards of 0 and 1, without a penalty; give only one of them"
        )
    if sampling.resample_uniform:
        _check_uniform_groups(config, sampling)
    if name == "reinforce" and sampling.updates_per_sample > 1:
        raise InputError(
            f"--updates-per-sample {sampling.updates_per_sample}: reinforce has a mean "
            "of the rewards of earlier steps as the baseline; use 1, or "
            "--objective rloo"
        )
    _check_rewards(config, sampling, rewards)


def _check_uniform_groups(config: TrainConfig, sampling: SamplingOptions) -> None:
    """Refuses to replace groups of equal rewards if these have advantages."""
    objective, name = config.objective, config.objective.name
    given = f"--resample-uniform {sampling.resample_uniform}: {name} also learns from"
    if not objective.compares_samples:
        raise InputError(
            f"{given} groups of equal rewards, since its baseline is not their mean; "
            "leave it out, or use --objective dapo or grpo"
        )
    if name == "rloo" and objective.options["beta"]:
        raise InputError(
            f"{given} groups of equal rewards, since the KL penalty is part of the "
            "reward; leave it out, give --objective.beta 0, or use --objective dapo or "
            "grpo"
        )


def _check_without_rewards(
    name: str, sampling: SamplingOptions, rewards: RewardOptions
) -> None:
    """Refuses options of rewards for an objective that reads none."""
    for given, default in ((rewards, RewardOptions()), (sampling, SamplingOptions())):
        for field in dataclasses.fields(given):
            value = getattr(given, field.name)
            of_rewards = given is rewards or field.name in OF_REWARDS
            if of_rewards and value != getattr(default, field.name):
                if isinstance(value, tuple):
                    value = " ".join(map(str, value))
                raise InputError(
                    f"--{field.name.replace('_', '-')} {value}: {name} reads no "
                    "rewards; leave it out"
                )


def _check_rewards(
    config: TrainConfig, sampling: SamplingOptions, rewards: RewardOptions
) -> None:
    """Refuses rewards with which an option has no effect or a metric no meaning."""
    target, candidates = sampling.prompt_target, sampling.prompt_candidates
    if target is not None and candidates < 2:
        raise InputError(
            f"--prompt-candidates {candidates}: --prompt-target chooses among more "
            "prompts than it answers; give at least 2"
        )
    heldout = [] if config.eval_data is None else [f"--eval-data {config.eval_data}"]
    relative = [f"--reward {x}" for x in rewards.reward if x.startswith("judge:")]
    check_compared(sampling, relative)
    relative += ["--combine log_sigmoid"] * (rewards.combine == "log_sigmoid")
    check_means(config, sampling, relative)
    if rewards.combine == "lower_bound":
        counts = {"--group-size": sampling.group_size}
        if heldout:
            counts["--eval-group-size"] = sampling.eval_group_size
        for flag, count in counts.items():
            if count < LEAST_ANSWERS:
                raise InputError(
                    f"{flag} {count}: --combine lower_bound needs at least "
                    f"{LEAST_ANSWERS} answers to a prompt; the penalties of fewer are "
                    f"equal; give {LEAST_ANSWERS} or more, or use --combine sum"
                )
    rates = given_rates(config)
    if rates and rewards.combine != "sum":
        raise InputError(
            f"--combine {rewards.combine}: {rates[0]} corrects rewards of 0 and 1; "
            "leave one of them out"
        )
    weights = config.options.named_columns.get(WEIGHT)
    if SAMPLED in config.objective.reads and weights is not None:
        raise InputError(
            f"{FLAG} {WEIGHT}={weights}: {config.objective.name} does not read it; "
            "leave it out"
        )


def check_means(
    config: TrainConfig, sampling: SamplingOptions, relative: Sequence[str]
) -> None:
    """Refuses options that read mean rewards, if rewards are relative to other answers.

    Args:
      config: the config.
      sampling: how prompts are drawn.
      relative: the options that make rewards relative.

    Raises:
      InputError: naming both options.
    """
    means = [] if config.eval_data is None else [f"--eval-data {config.eval_data}"]
    if sampling.prompt_target is not None:
        means.append(f"--prompt-target {sampling.prompt_target:g}")
    if means and relative:
        raise InputError(
            f"{means[0]}: {relative[0]} compares the answers of the current model with "
            "one another, so their mean reward does not say how good they are; leave "
            "one of them out"
        )


def check_compared(sampling: SamplingOptions, comparing: Sequence[str]) -> None:
    """Refuses single answers, if a reward compares the answers to a prompt.

    Args:
      sampling: how many answers are sampled.
      comparing: the options of rewards that compare them.

    Raises:
      InputError: naming both options.
    """
    if comparing and sampling.group_size < 2:
        raise InputError(
            f"--group-size {sampling.group_size}: {comparing[0]} compares the answers "
            "to a prompt; give at least 2"
        )


def check_prompts(config: TrainConfig, sampling: SamplingOptions, count: int) -> None:
    """Refuses to choose among prompts that each step answers anyway.

    Args:
      config: the config.
      sampling: how prompts are drawn.
      count: of different prompts.

    Raises:
      InputError: naming the option.
    """
    options = []
    if sampling.prompt_target is not None:
        options.append(f"--prompt-target {sampling.prompt_target:g}")
    if sampling.resample_uniform:
        options.append(f"--resample-uniform {sampling.resample_uniform}")
    if options and count <= config.batch_size:
        raise InputError(
            f"{options[0]}: a step answers --batch-size {config.batch_size} prompts, "
            f"and there are only {count}; give a smaller --batch-size, or leave the "
            "option out"
        )
