"""What a run on sampled answers reads: prompts with rewards, or pairs."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpref import data
from jaxpref.data.bad_rows import BadRow
from jaxpref.online import pairs
from jaxpref.online import prompts as prompt_files
from jaxpref.online.checks import check_compared, check_means, check_prompts
from jaxpref.online.options import SamplingOptions, UncertainReward
from jaxpref.online.rates import given_rates, rates_of
from jaxpref.online.rewards import ZeroOrOne, check_records, digests
from jaxpref.online.uncertain import (
    alone,
    estimation,
    lower_bound_of,
    read_fit_data,
)
from jaxpref.rewards import (
    ModelOptions,
    PreferenceReward,
    RewardOptions,
    combined_reward,
)
from jaxpref.rewards.reward import Reward
from jaxpref.train.config import TrainConfig
from jaxpref.train.task import Task


@dataclasses.dataclass(frozen=True)
class Source:
    """The prompts that are answered, and the reward of the answers."""

    read: Callable[..., data.Datasets]
    """Reads the records with room for answers, as `data.read_datasets`."""
    prompts: Callable[[Task], Sequence[data.Prompt]]
    """The prompts of a task's training records."""
    heldout: Sequence[data.Prompt]
    """Those that are answered at each evaluation."""
    reward: Reward
    described: Mapping[str, Any]
    """What decides the rewards and is in no other option, for `config.json`."""


def pairs_source(sampling: SamplingOptions) -> Source:
    """Pairs whose prompts are answered; no reward is read."""
    read = functools.partial(pairs.read, sampling=sampling)
    return Source(read, pairs.PairPrompts, (), pairs.no_reward, {})


def rewarded_source(
    config: TrainConfig,
    sampling: SamplingOptions,
    rewards: RewardOptions,
    uncertain: UncertainReward,
) -> Source:
    """Prompts, with the records that the rewards read.

    Raises:
      InputError: naming an option, or a record that lacks something.
    """
    dtype = config.compute_dtype
    options = ModelOptions(
        batch_size=config.batch_size,
        compute_dtype=None if dtype == "float64" else dtype,
        mesh=config.mesh,
        template=config.options.template_options,
    )
    estimated = estimation(rewards, uncertain, seed=config.seed)
    reward = combined_reward(rewards if estimated is None else alone(rewards), options)
    of_pairs = [k for k, x in reward.parts.items() if isinstance(x, PreferenceReward)]
    comparing = [f"--reward {word}" for word in of_pairs]
    check_means(config, sampling, comparing)
    check_compared(sampling, comparing)
    file = prompt_files.file_of(config)
    prompts, skipped = prompt_files.read(file, config, sampling)
    check_records(reward, prompts)
    heldout: list[data.Prompt] = []
    if config.eval_data is not None:
        heldout, more = prompt_files.read(config.eval_data, config, sampling)
        skipped = [*skipped, *more]
        check_records(reward, heldout)
        prompt_files.warn_of_shared(heldout, prompts, config.eval_data)
    check_prompts(config, sampling, len(prompts))
    reward = reward.in_memory()
    described = {
        "rewards": dataclasses.asdict(rewards),
        "records": _digest(prompts),
        "reward_models": digests(reward.parts),
    }
    if estimated is not None:
        fit_data = read_fit_data(estimated, config.options)
        reward = lower_bound_of(reward, estimated, rewards.std_weight, fit_data)
        described["uncertainty"] = dataclasses.asdict(estimated)
        described["fit_data_records"] = prompt_files.digest(
            [x.record for x in fit_data]
        )
    if heldout:
        described["eval_data_records"] = _digest(heldout)
    rates = given_rates(config)
    datasets = _with_room(config, sampling, prompts, heldout, skipped)
    return Source(
        read=lambda *args, **others: datasets,
        prompts=lambda task: prompts,
        heldout=heldout,
        reward=ZeroOrOne(reward, rates) if rates else reward,
        described=described,
    )


def _with_room(
    config: TrainConfig,
    sampling: SamplingOptions,
    prompts: Sequence[data.Prompt],
    heldout: Sequence[data.Prompt],
    skipped: Sequence[BadRow],
) -> data.Datasets:
    """The prompts as data, with room for answers."""
    rates = rates_of(prompts, config)
    # The rates of held-out prompts are not read.
    unread = [dict.fromkeys(rates[0], 0.0)] * len(heldout)
    splits = data.Splits(
        train=prompt_files.with_room(prompts, sampling, rates),
        heldout=prompt_files.with_room(heldout, sampling, unread),
        report={"prompts": len(prompts)},
        digest=_digest(prompts),
        kind=config.objective.kind,
        skipped=tuple(skipped),
    )
    file = prompt_files.file_of(config)
    return data.Datasets(splits, (file,), (config.eval_data or file,))


def _digest(prompts: Sequence[data.Prompt]) -> str:
    return prompt_files.digest([x.source_record for x in prompts])
