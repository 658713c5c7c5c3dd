"""Rewards as the user writes them."""

import dataclasses
import re
from pathlib import Path

from jaxpref.errors import InputError
from jaxpref.rewards.follow_up import follow_up
from jaxpref.rewards.functions import function_reward
from jaxpref.rewards.judge import judge_of
from jaxpref.rewards.models import ModelOptions, log_ratio, model_reward
from jaxpref.rewards.reward import Reward
from jaxpref.rewards.rules import rule_of

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""`module:function`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """What rewards of some kinds read."""

    answer_field: str = "answer"
    """Field of the records with the right answer, for rules that compare with it."""
    follow_up_model: str | None = None
    """Language model of `follow-up:TEXT`."""
    principle: str = ""
    """What makes an answer better, in words, for `judge:DIR`."""


def reward_of(
    word: str, models: ModelOptions, options: RewardOptions = RewardOptions()
) -> Reward:
    """The reward that a word names.

    Args:
      word: a reward model's folder or Hub ID, `rule:NAME`, `log-ratio:STRONG:WEAK`,
        `follow-up:TEXT`, `judge:DIR`, or `module:function`.
      models: how models compute rewards.
      options: what rewards of some kinds read.

    Raises:
      InputError: if it names none.
    """
    kind, _, rest = word.partition(":")
    if kind == "rule":
        name, _, argument = rest.partition(":")
        return rule_of(name, argument, field=options.answer_field)
    if kind == "log-ratio":
        strong, colon, weak = rest.partition(":")
        if not (strong and colon and weak):
            raise InputError(
                f"--reward {word}: name two language models: log-ratio:STRONG:WEAK"
            )
        return log_ratio(strong, weak, models)
    if kind == "follow-up":
        return follow_up(rest, options.follow_up_model, models)
    if kind == "judge":
        return judge_of(rest, models, principle=options.principle)
    if FUNCTION.fullmatch(word) and not Path(word).exists():
        return function_reward(word)
    return model_reward(word, models)
